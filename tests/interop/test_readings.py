"""Fields of config.json that are missing, null, misplaced or of another type.

`fixtures/readings.json` has what transformers makes of each case
(`make_readings.py`); here it is what moex makes of them.
"""

import dataclasses
import functools
import itertools
import json
import math
import re

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.interop.defaults import DEFAULTS
from moex.interop.families import find_family, read_model
from moex.interop.fields import UNUSED
from moex.interop.names import pieces
from moex.interop.positions import KNOWN
from moex.moe.layer import MoE
from moex.nn.mla import LatentAttention
from moex.nn.rope import frequencies
from tests.interop import make_readings, parity
from tests.marks import thorough_but_for


@functools.cache
def table() -> dict:
    return json.loads(make_readings.FILE.read_text(encoding="utf-8"))


def described(model, names) -> dict:
    """What `make_readings.described` has, of a model config of moex."""
    own = model.attention
    mla = isinstance(own, LatentAttention)
    width = own.rope_dim if mla else own.width(model.dim)
    frequency, magnitude = frequencies(width, own.rope_theta, own.rope_scaling)
    layers = []
    for segment in model.layers:
        attentions = segment.attentions(own)
        for _, ffn_attention in itertools.product(
            range(segment.repeat), zip(segment.pattern, attentions, strict=True)
        ):
            ffn, attention = ffn_attention
            scale = attention.score_scale if mla else 1.0
            window = None if mla else attention.window
            found = {"window": window, "scale": make_readings.number(scale)}
            if isinstance(ffn, MoE):
                found |= {"k": ffn.router.k, "gates": gates(ffn.router)}
            layers.append(found)
    number = make_readings.number
    return {
        "numbers": sum(math.prod(p.shape) for p in pieces(model, names)),
        "tied": model.tied_embeddings,
        "eps": number(model.norm_eps),
        "frequencies": [number(f) for f in frequency],
        "magnitude": number(magnitude),
        "interleaved": mla and own.rope_interleaved,
        "clip": None if mla else own.clip,
        "layers": [[len([*same]), layer] for layer, same in itertools.groupby(layers)],
    }


def gates(router) -> list:
    groups = router.groups
    kept = [None, None] if groups is None else [groups.num, groups.keep]
    return [router.normalize == "after", router.scale, *kept]


def read(config: dict):
    """What moex makes of a config.json, or the line of its error."""
    try:
        names = find_family("config.json", config).names
        return described(read_model("config.json", config), names)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json")
        return str(error)


def close(ours, theirs) -> bool:
    """Whether two readings are equal up to rounding."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(
            close(ours[k], v) for k, v in theirs.items()
        )
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    if isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-5)
    return ours == theirs


# moex reads these where transformers stops: null as if they were left out.
LENIENT = UNUSED | {
    *("head_dim", "num_key_value_heads", "attention_bias", "mlp_bias"),
    *("partial_rotary_factor", "swiglu_alpha", "swiglu_limit"),
    "qk_rope_head_dim",  # DeepSeek-V3 of transformers takes a head_dim beside it
}
# moex has no counterpart of some values of these, or they contradict each other.
REFUSED = {
    *("attention_bias", "mlp_bias", "hidden_act", "norm_topk_prob", "rope_interleave"),
    *("swiglu_alpha", "swiglu_limit", "topk_method", "first_k_dense_replace"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "n_group"),
    *("use_sliding_window", "sliding_window", "layer_types", "clip_qkv"),
    *("partial_rotary_factor", "rope_parameters", "rope_scaling"),
}


def fields_of(case: dict) -> set[str]:
    """The fields that a case changes; of one about positions, those of the object."""
    names = set(case["set"]) | set(case["drop"]) - set(make_readings.ROPE)
    for place in ("rope_parameters", "rope_scaling"):
        names |= set(case["set"].get(place) or ())
    return names


@pytest.mark.parametrize("family", parity.NAMES)
def test_fields_are_read_as_transformers_reads_them(family):
    cases = table()[family]
    config, base = make_readings.base_of(family), cases[0]["read"]
    same = 0
    for case in cases:
        ours, theirs = read(make_readings.changed(config, case)), case["read"]
        names = fields_of(case)
        if isinstance(theirs, str):
            assert isinstance(ours, str) or names & LENIENT, (case, ours)
        elif isinstance(ours, str):
            assert names & REFUSED and any(n in ours for n in names), (case, ours)
        else:
            assert close(ours, base | theirs), (case, ours)
            same += 1
    assert same > len(cases) / 2


# A value of each kind that JSON has, and numbers at the ends of what it has.
HOSTILE = [
    *(None, True, False, "", "x", "4", "0.5", [], {}, [1], ["x"], [None], {"a": 1}),
    *([[1]], {"rope_type": []}, {"factor": {}}, {"rope_type": "yarn", "factor": []}),
    *(0, -1, 1.5, -0.0, 2**31, 2**63, 10**400, 1e308, 5e-324, -1e308),
    *(["full_attention"] * 2, [["full_attention"]], {"factor": 10**400}),
]


@pytest.mark.parametrize(
    "family",
    thorough_but_for(
        parity.NAMES, "mixtral", later=("deepseek_v2", "olmoe", "qwen3_moe")
    ),
)
def test_a_field_of_any_value_is_read_or_refused_in_one_line(family):
    config = make_readings.base_of(family)
    names = {*DEFAULTS[family], *KNOWN, *make_readings.BESIDE} - {"own_rope"}
    names |= set(make_readings.SIZES) & config.keys()
    refused = 0
    for name, value in itertools.product(sorted(names), HOSTILE):
        changes = [{name: value}]
        if name in KNOWN:
            changes.append({"rope_parameters": config["rope_parameters"] | changes[0]})
        refused += sum(is_refused(config | change) for change in changes)
    assert refused > 400


def is_refused(config: dict) -> bool:
    try:
        own = read_model("config.json", config).attention
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("config.json")
        return True
    frequency, magnitude = frequencies(8, own.rope_theta, own.rope_scaling)
    assert np.isfinite(frequency).all() and math.isfinite(magnitude)
    return False


def test_a_family_that_is_unknown_gets_no_other_name():
    for value in (*HOSTILE, "mistral", "qwen2_moe", "deepseek_v32", "gpt2"):
        message = read({"model_type": value})
        assert "model_type = " in message and "Did you mean" not in message
    assert "Did you mean 'gpt_oss'?" in read({"model_type": "GPT-OSS"})


def test_what_is_missing_of_a_size_is_said():
    for family in parity.NAMES:
        config = make_readings.base_of(family)
        needed = set(make_readings.SIZES) & config.keys()
        assert {"hidden_size", "vocab_size"} <= needed
        for name in needed:
            message = read(make_readings.without(config, name))
            said = "num_experts" if name == "num_local_experts" else name
            assert f"has no {name!r}" in message or f"has no {said!r}" in message
    config = make_readings.base_of("llama")
    config["hiden_size"] = config.pop("hidden_size")
    assert "Did you mean 'hiden_size'?" in read(config)


def test_fields_that_nobody_knows_are_said_or_refused():
    config, said = make_readings.base_of("mixtral"), []
    more = {
        "is_moe_config": True,
        "_note": 1,
        "rope_interleaved": False,
        "use_cache": 1,
    }
    read_model("config.json", config | more, said.append)
    assert said == ["not used: is_moe_config = True of config.json, which is unknown"]
    for name, value, message in (
        ("per_layer_config", {"0": {"head_dim": 4}}, "has no such field"),
        ("logits_scaling", 8.0, "has no such field"),
        ("rope_scalling", {"factor": 2.0}, "Did you mean 'rope_scaling'"),
    ):
        assert message in read(config | {name: value})
    wrong = {"rope_type": "yarn", "factor": 2.0, "beta_fst": 1.0}
    message = read(config | {"rope_parameters": wrong})
    assert "rope_parameters.beta_fst = 1.0" in message and "'beta_fast'" in message


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", parity.NAMES)
def test_the_table_is_what_transformers_reads(family):
    """And every field of the config class is known: one that is new is seen here."""
    pytest.importorskip("torch", reason="needs the hf extra")
    pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
    found = make_readings.readings(family)
    kept = table()[family]
    assert len(found) == len(kept)
    for new, old in zip(found, kept, strict=True):
        failed = isinstance(new["read"], str), isinstance(old["read"], str)
        assert failed[0] == failed[1] and (failed[0] or close(new["read"], old["read"]))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    others = UNUSED - {"max_position_embeddings"} | {"swiglu_alpha", "swiglu_limit"}
    others |= {*make_readings.SIZES, *make_readings.ROPE}
    if family.startswith("deepseek"):  # as many as heads, or moex refuses the file
        others |= {"num_key_value_heads"}
    for field in dataclasses.fields(CONFIG_MAPPING[family]):
        own = field.name in make_readings.fields_of(family)
        if own and field.name not in others and field.default is not None:
            assert DEFAULTS[family].get(field.name, False) == field.default, field


# Fields of published files, those of every family that is here; (parameters, fields).
PUBLISHED = {
    "mixtral": (
        46_702_792_704,
        """attention_dropout 0.0 hidden_act "silu" hidden_size 4096
        intermediate_size 14336 max_position_embeddings 32768 num_attention_heads 32
        num_experts_per_tok 2 num_hidden_layers 32 num_key_value_heads 8
        num_local_experts 8 output_router_logits false rms_norm_eps 1e-5
        rope_theta 1e6 router_aux_loss_coef 0.02 sliding_window null
        tie_word_embeddings false torch_dtype "bfloat16" use_cache true
        vocab_size 32000 bos_token_id 1 eos_token_id 2""",
    ),
    "qwen3_moe": (
        30_532_122_624,
        """attention_bias false decoder_sparse_step 1 eos_token_id 151645 head_dim 128
        hidden_act "silu" hidden_size 2048 intermediate_size 6144
        max_position_embeddings 40960 max_window_layers 48 mlp_only_layers []
        moe_intermediate_size 768 norm_topk_prob true num_attention_heads 32
        num_experts 128 num_experts_per_tok 8 num_hidden_layers 48
        num_key_value_heads 4 output_router_logits false rms_norm_eps 1e-6
        rope_scaling null rope_theta 1e6 router_aux_loss_coef 0.001
        sliding_window null tie_word_embeddings false use_sliding_window false
        vocab_size 151936""",
    ),
    "deepseek_v3": (
        671_026_419_200,
        """auto_map {} aux_loss_alpha 0.001 ep_size 1 first_k_dense_replace 3
        hidden_act "silu" hidden_size 7168 intermediate_size 18432 kv_lora_rank 512
        max_position_embeddings 163840 moe_intermediate_size 2048 moe_layer_freq 1
        n_group 8 n_routed_experts 256 n_shared_experts 1 norm_topk_prob true
        num_attention_heads 128 num_experts_per_tok 8 num_hidden_layers 61
        num_key_value_heads 128 num_nextn_predict_layers 1 pretraining_tp 1
        q_lora_rank 1536 qk_nope_head_dim 128 qk_rope_head_dim 64 rms_norm_eps 1e-6
        rope_theta 10000 routed_scaling_factor 2.5 scoring_func "sigmoid"
        seq_aux true tie_word_embeddings false topk_group 4 topk_method "noaux_tc"
        v_head_dim 128 vocab_size 129280 rope_scaling {"beta_fast":32,"beta_slow":1,
        "factor":40,"mscale":1.0,"mscale_all_dim":1.0,
        "original_max_position_embeddings":4096,"type":"yarn"}""",
    ),
    "gpt_oss": (
        20_914_757_184,
        """attention_bias true attention_dropout 0.0 eos_token_id 200002
        experts_per_token 4 head_dim 64 hidden_act "silu" hidden_size 2880
        initial_context_length 4096 intermediate_size 2880 num_attention_heads 64
        max_position_embeddings 131072 num_experts_per_tok 4 num_hidden_layers 24
        num_key_value_heads 8 num_local_experts 32 output_router_logits false
        pad_token_id 199999 rms_norm_eps 1e-5 rope_theta 150000 sliding_window 128
        swiglu_limit 7.0 tie_word_embeddings false use_cache true vocab_size 201088
        rope_scaling {"beta_fast":32.0,"beta_slow":1.0,"factor":32.0,
        "original_max_position_embeddings":4096,"rope_type":"yarn","truncate":false}""",
    ),
    "llama": (
        8_030_261_248,
        """attention_bias false bos_token_id 128000 eos_token_id [128001,128008,128009]
        hidden_act "silu" hidden_size 4096 intermediate_size 14336 mlp_bias false
        max_position_embeddings 131072 num_attention_heads 32 num_hidden_layers 32
        num_key_value_heads 8 pretraining_tp 1 rms_norm_eps 1e-5 rope_theta 500000.0
        tie_word_embeddings false vocab_size 128256 rope_scaling {"factor":8.0,
        "low_freq_factor":1.0,"high_freq_factor":4.0,
        "original_max_position_embeddings":8192,"rope_type":"llama3"}""",
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_files_are_read_without_a_remark(family):
    numbers, text = PUBLISHED[family]
    words = re.sub(r",\s+", ",", text).split()
    config = dict(zip(words[::2], map(json.loads, words[1::2]), strict=True))
    said: list[str] = []
    model = read_model("config.json", {"model_type": family} | config, said.append)
    names = find_family("config.json", {"model_type": family}).names
    assert not said
    assert sum(math.prod(p.shape) for p in pieces(model, names)) == numbers
