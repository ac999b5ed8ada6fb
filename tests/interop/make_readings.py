"""Writes `fixtures/readings.json`: how transformers reads config.json, field by field.

  python -m tests.interop.make_readings        (extra `hf`; transformers >= 5.23)

Every field of the config class of every family is left out, made null and given another
value; the fields about rotary positions also stand in all places where transformers
looks for them. A case is kept with what the modules of the model then have (not the
fields of the config: some are read late, from another place), or with its error.
"""

import dataclasses
import itertools
import json
import pathlib
import warnings

from tests.interop import parity

FILE = pathlib.Path(__file__).parent / "fixtures" / "readings.json"
ROPE = (
    *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
    "original_max_position_embeddings",
)
# The others have the code of these.
OWN_ROPE = ("llama", "gpt_oss", "deepseek_v2", "deepseek_v3")
# Without these a config is broken; moex says so, transformers takes a large model's.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_experts_per_tok", "moe_intermediate_size"),
    *("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"),
    *("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
# Fields that files have beside those of a class: old ones, and those of other families.
BESIDE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_mtp_layers": 2,
    "head_dim": 4,
    "rope_interleave": False,
    "use_sliding_window": True,
    "torch_dtype": "bfloat16",
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LAYERS = {"full_attention": YARN, "sliding_attention": LINEAR}


def without(values: dict, *names: str) -> dict:
    return {k: v for k, v in values.items() if k not in names}


def rope_cases(short: bool) -> list[dict]:
    """Fields about positions, in place of all that a config has.

    Args:
      short: whether to leave out the cases that differ inside of one object.
    """
    original = "original_max_position_embeddings"
    late = without(YARN, original)
    old = without(LINEAR, "rope_type") | {"type": "linear"}
    objects = [
        *(LINEAR, LLAMA3, YARN, {}, {"rope_theta": 500.0}, {"rope_type": None}, old),
        *(LINEAR | {"type": "yarn"}, {"factor": 4.0}, {"rope_type": "linear"}),
        *(LINEAR | {"rope_theta": 500.0}, LINEAR | {"mscale_all_dim": 0.7}),
        *(LINEAR | {"attention_factor": 2.0}, LINEAR | {"factor": None}),
        *(LINEAR | {"factor": "4"}, LINEAR | {"mscale_all_dim": None}),
        *({"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "default"} | LAYERS),
        *(LAYERS, {"full_attention": YARN}, {"mscale_all_dim": 0.7}),
        *(LLAMA3 | {"mscale_all_dim": 0.7}, LLAMA3 | {original: None}),
        *(without(LLAMA3, n) for n in LLAMA3 if n != "rope_type"),
        *(late, YARN | {original: None}, YARN | {"factor": None}),
        *(without(YARN, "factor"), YARN | {"attention_factor": 0.7}),
        *(YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, YARN | {"beta_fast": 0.0}),
        *(YARN | {"beta_slow": 0.0}, YARN | {"beta_fast": None, "beta_slow": None}),
        *(YARN | {"truncate": value} for value in (True, False, None)),
        *(YARN | {"mscale": 0.7}, YARN | {"mscale_all_dim": 0.7}),
        *(YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},),
        *(YARN | {"mscale": None, "mscale_all_dim": 1.2},),
        *(YARN | {"mscale": 1, "mscale_all_dim": 0},),
        *(YARN | {"partial_rotary_factor": share} for share in (1.0, 0.5, None)),
    ]
    places = [
        {name: o} for o in objects for name in ("rope_parameters", "rope_scaling")
    ]
    late3 = without(LLAMA3, original)
    both = [
        {},
        *({"rope_theta": 500.0}, {"rope_theta": None}, {"rope_parameters": None}),
        *({"rope_scaling": None}, {"partial_rotary_factor": 0.5}, {original: 32}),
        {"rope_theta": 500.0, "rope_parameters": None},
        {"rope_theta": 500.0, "rope_parameters": {}},
        {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 700.0}},
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_theta": 500.0, "rope_parameters": YARN},
        {"rope_parameters": LINEAR, "rope_scaling": LINEAR},
        {"rope_parameters": LINEAR, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": LINEAR},
        {"rope_parameters": YARN, "rope_scaling": {}},
        {"rope_scaling": LINEAR, original: 32},
        *(
            {name: values, original: 32}
            for name in ("rope_parameters", "rope_scaling")
            for values in (late, YARN, late3, LLAMA3)
        ),
        {"rope_scaling": YARN, original: None},
        {"rope_scaling": YARN, "partial_rotary_factor": 1.0},
        {"rope_scaling": YARN, "partial_rotary_factor": None},
    ]
    cases = both if short else [*both, *places]
    return [{"drop": list(ROPE), "set": case} for case in cases]


def cases_of(fields, config: dict) -> list[dict]:
    """Changes of a config: {"drop": fields, "set": {field: value}}."""
    cases = [{"drop": [], "set": {}}]
    for name in fields:
        if name not in (*ROPE, *SIZES):
            cases.append({"drop": [name], "set": {}})
        if name in ROPE:
            continue
        cases.append({"drop": [], "set": {name: None}})
        value = config.get(name)
        if isinstance(value, bool):
            cases.append({"drop": [], "set": {name: not value}})
        elif isinstance(value, (int, float)):
            cases.append({"drop": [], "set": {name: value * 2 or 1}})
    cases += [{"drop": [], "set": {name: v}} for name, v in BESIDE.items()]
    cases += [
        {"drop": ["head_dim", "num_key_value_heads"], "set": {}},
        {"drop": [], "set": {"use_sliding_window": True, "sliding_window": 6}},
        {"drop": ["sliding_window"], "set": {"use_sliding_window": True}},
        {
            "drop": ["layer_types"],
            "set": {"use_sliding_window": True, "sliding_window": 6}
            | {"max_window_layers": 1},
        },
        {"drop": [], "set": {"layer_types": ["full_attention"]}},
        *(
            {"drop": [], "set": {"layer_types": [kind] * config["num_hidden_layers"]}}
            for kind in ("full_attention", "sliding_attention", "attention", "conv")
        ),
        *({"drop": [], "set": {"decoder_sparse_step": n}} for n in (0, 2)),
        *({"drop": [], "set": {"mlp_only_layers": v}} for v in ([], [0, 9], [-1])),
        *({"drop": [], "set": {"first_k_dense_replace": n}} for n in (0, 2, 99)),
        *({"drop": [], "set": {"topk_method": v}} for v in ("greedy", "noaux_tc")),
        *({"drop": [], "set": {"hidden_act": v}} for v in ("swish", "gelu")),
    ]
    return cases + rope_cases(config["model_type"] not in OWN_ROPE)


def base_of(family: str) -> dict:
    """The config.json that is changed."""
    config = parity.config_of(family)
    # Where it is null, transformers cannot extend the context of this family.
    return config | ({"head_dim": 8} if family == "mixtral" else {})


def changed(config: dict, case: dict) -> dict:
    return without(config, *case["drop"]) | case["set"]


def described(model) -> dict:
    """What the modules of a transformers model compute with."""
    config, body = model.config, model.model
    family = config.model_type
    every = {id(p): p.numel() for p in model.parameters()}
    biases = (b for n, b in model.named_buffers() if "e_score_correction" in n)
    mla = family.startswith("deepseek")
    layers = []
    for layer in body.layers:
        own = layer.self_attn
        width = own.qk_head_dim if mla else own.head_dim
        window = getattr(own, "sliding_window", None)
        if family in ("mixtral", "qwen3_moe"):
            window = config.sliding_window
        found = {"window": window, "scale": number(own.scaling * width**0.5)}
        gate = getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None)
        if gate is not None:
            found |= {"k": gate.top_k, "gates": gates(config, gate)}
        layers.append(found)
    runs = [[len([*same]), layer] for layer, same in itertools.groupby(layers)]
    rotary = body.rotary_emb
    return {
        "numbers": sum(every.values()) + sum(b.numel() for b in biases),
        "tied": model.lm_head.weight is body.embed_tokens.weight,
        "eps": number(body.norm.variance_epsilon),
        "frequencies": [number(f) for f in rotary.inv_freq.tolist()],
        "magnitude": number(rotary.attention_scaling),
        "interleaved": mla and bool(getattr(config, "rope_interleave", True)),
        "clip": getattr(config, "clip_qkv", None) if family == "olmoe" else None,
        "layers": runs,
    }


def gates(config, gate) -> list:
    """[whether gates are normalised, their factor, groups, groups that are kept]."""
    family = config.model_type
    if family == "deepseek_v2":
        limited = config.topk_method == "group_limited_greedy"
        kept = [config.n_group, config.topk_group] if limited else [None, None]
        return [False, float(config.routed_scaling_factor), *kept]
    if family == "deepseek_v3":
        factor = float(config.routed_scaling_factor)
        return [bool(gate.norm_topk_prob), factor, config.n_group, config.topk_group]
    return [bool(getattr(gate, "norm_topk_prob", True)), 1.0, None, None]


def number(value: float) -> float:
    """Six significant digits."""
    return float(f"{float(value):.6g}")


def reading(config: dict):
    """What transformers makes of a config.json, or the name of its error."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            values = json.loads(json.dumps(config))
            made = CONFIG_MAPPING[values["model_type"]].from_dict(values)
            model = AutoModelForCausalLM.from_config(
                made, attn_implementation="eager", dtype=torch.float32
            ).eval()
            model(torch.tensor([[1, 2, 3]]))
            return described(model)
    except Exception as error:
        return type(error).__name__


def fields_of(family: str) -> list[str]:
    """The fields that a config class has of its own."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    own = {f.name for f in dataclasses.fields(CONFIG_MAPPING[family])}
    return sorted(own - base)


def readings(family: str) -> list[dict]:
    """All cases of a family; a reading has what differs from that of the first."""
    config = base_of(family)
    found, whole = [], None
    for case in cases_of(fields_of(family), config):
        read = reading(changed(config, case))
        whole = whole or read
        if isinstance(read, dict):
            read = {k: v for k, v in read.items() if found == [] or v != whole[k]}
        found.append(case | {"read": read})
    return found


def main() -> None:
    import transformers

    transformers.logging.set_verbosity(50)
    text = ['{"transformers": ' + json.dumps(transformers.__version__)]
    for family in parity.NAMES:
        lines = ",\n ".join(json.dumps(case) for case in readings(family))
        text.append(f'"{family}": [\n {lines}]')
    FILE.write_text(",\n".join(text) + "}\n", encoding="utf-8")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
