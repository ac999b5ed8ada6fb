"""Model families of Hugging Face transformers: one table, from their config to ours.

A family is added here: a function from the fields of `config.json` to a list of layers,
and a row of `FAMILIES`. `tests/interop/make_fixtures.py` gets its row too.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from moex.config.base import MOST, ConfigError, ConfigWarning, check, short
from moex.interop.defaults import DEFAULTS
from moex.interop.fields import Fields
from moex.interop.layers import (
    Layer,
    attention,
    by_layer_types,
    fold,
    groups,
    normalize,
    num_layers,
    sparse,
    window,
)
from moex.interop.names import Names
from moex.interop.positions import rope
from moex.moe.experts.glu import Glu
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense


def mixtral(of: Fields) -> list[Layer]:
    """The layers of Mixtral 8x7B and 8x22B."""
    of.only("attention_bias", False)  # transformers ignores the field
    own = attention(of, window=of("sliding_window", int, least=1, null=None))
    return [(own, sparse(of, "intermediate_size"))] * num_layers(of)


def olmoe(of: Fields) -> list[Layer]:
    """The layers of OLMoE."""
    of.only("head_dim", of.count("hidden_size") // of.count("num_attention_heads"))
    own = attention(of, qk_norm="whole", clip=of("clip_qkv", float, null=None))
    moe = sparse(of, "intermediate_size", normalize=normalize(of))
    return [(own, moe)] * num_layers(of)


def qwen3_moe(of: Fields) -> list[Layer]:
    """The layers of Qwen3-30B-A3B, Qwen3-235B-A22B and models like them."""
    own = attention(of, qk_norm=True, window=window(of))
    moe = sparse(of, "moe_intermediate_size", normalize=normalize(of))
    dense = Dense(hidden=of.count("intermediate_size"))
    only = of("mlp_only_layers", list[int], null=[])
    step = of.count("decoder_sparse_step")
    return [
        (own, dense if i in only or (i + 1) % step else moe)
        for i in range(num_layers(of))
    ]


def _deepseek(of: Fields, interleaved: bool, **router) -> list[Layer]:
    of.only("attention_bias", False)
    of.only("mlp_bias", False)
    of.only("moe_layer_freq", 1)
    heads = of.count("num_attention_heads")
    of.only("num_key_value_heads", heads)
    of.read |= {"head_dim", "qk_head_dim"}  # these are sums and copies of other fields
    where, scores = rope(of)
    own = LatentAttention(
        heads=heads,
        kv_latent=of.count("kv_lora_rank"),
        q_latent=of("q_lora_rank", int, least=1, null=None),
        nope_dim=of.count("qk_nope_head_dim"),
        rope_dim=of("qk_rope_head_dim", int, least=2),
        v_dim=of.count("v_head_dim"),
        rope_interleaved=interleaved,
        score_scale=scores,
        **where,
    )
    scale = of("routed_scaling_factor", float)
    moe = sparse(of, "moe_intermediate_size", scale=scale, **router)
    shared = of.count("n_shared_experts", least=0)
    if shared:
        moe.shared = Dense(hidden=of.count("moe_intermediate_size") * shared)
    first = of.count("first_k_dense_replace", least=0)
    count = num_layers(of)
    if first > count:
        raise of.refuse("first_k_dense_replace", first, f"from 0 to {count} layers")
    dense = Dense(hidden=of.count("intermediate_size"))
    return [(own, dense)] * first + [(own, moe)] * (count - first)


def deepseek_v2(of: Fields) -> list[Layer]:
    """The layers of DeepSeek-V2 and V2-Lite."""
    of.only("norm_topk_prob", False)
    of.only("scoring_func", "softmax")
    of.only("rope_interleave", True)
    method = of("topk_method", str)
    of.only("topk_method", "greedy", "group_limited_greedy")
    limited = groups(of, "max") if method != "greedy" else None
    of.read |= {"n_group", "topk_group"}
    return _deepseek(of, True, normalize="none", groups=limited)


def deepseek_v3(of: Fields) -> list[Layer]:
    """The layers of DeepSeek-V3, R1 and other models of the same type."""
    of.only("scoring_func", "sigmoid")
    of.only("topk_method", "noaux_tc")
    return _deepseek(
        of,
        of("rope_interleave", bool, null=False),
        score="sigmoid",
        normalize=normalize(of, null=False),
        groups=groups(of, "top2"),
        bias_rate=1e-3,
    )


def gpt_oss(of: Fields) -> list[Layer]:
    """The layers of gpt-oss-20b and 120b."""
    of.only("swiglu_limit", 7.0)
    of.only("swiglu_alpha", 1.702)
    full = attention(of, sinks=True)
    moe = sparse(of, "intermediate_size", logit_bias=True)
    assert isinstance(moe.experts, Glu)
    moe.experts.activation, moe.experts.bias = "clamped", True
    keys = of("sliding_window", int, least=1, null=None)
    count = num_layers(of)
    turns = ["sliding_attention", "full_attention"] * count
    return [(own, moe) for own in by_layer_types(of, full, keys, turns[:count])]


def llama(of: Fields) -> list[Layer]:
    """The layers of Llama 2 and 3, dense."""
    of.only("mlp_bias", False)
    ffn = Dense(hidden=of.count("intermediate_size"))
    return [(attention(of), ffn)] * num_layers(of)


def qwen3(of: Fields) -> list[Layer]:
    """The layers of Qwen3, dense."""
    full, keys = attention(of, qk_norm=True), window(of)
    ffn = Dense(hidden=of.count("intermediate_size"))
    first = of.count("max_window_layers", least=0)
    kinds = [
        "full_attention" if keys is None or i < first else "sliding_attention"
        for i in range(num_layers(of))
    ]
    return [(own, ffn) for own in by_layer_types(of, full, keys, kinds)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table."""

    architecture: str  # its class in transformers
    # From the fields of `config.json` to (attention, feed-forward) per layer.
    layers: Callable[[Fields], list[Layer]]
    # The field with the number of experts; empty: all layers are dense.
    experts: str = ""
    names: Names = Names()  # the names of its tensors
    # Patterns of tensors that a checkpoint may carry and moex has no use for.
    unused: tuple[str, ...] = ()


# Rotary frequencies, which old versions of transformers stored.
OLD = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
FAMILIES = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        layers=mixtral,
        experts="num_local_experts",
        names=Names(sparse="block_sparse_moe", experts=("w1", "w3", "w2")),
        unused=OLD,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM", layers=olmoe, experts="num_experts"
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM", layers=qwen3_moe, experts="num_experts"
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        layers=deepseek_v2,
        experts="n_routed_experts",
        unused=OLD,
    ),
    # Its multi-token-prediction layers come after the last layer.
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        layers=deepseek_v3,
        experts="n_routed_experts",
        unused=(*OLD, r"model\.layers\.{after_last}\..*"),
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        layers=gpt_oss,
        experts="num_local_experts",
        names=Names(router="router", experts=None),
    ),
    "llama": Family(architecture="LlamaForCausalLM", layers=llama, unused=OLD),
    "qwen3": Family(architecture="Qwen3ForCausalLM", layers=qwen3),
}


def find_family(where: str, config: Mapping[str, Any]) -> Family:
    """The row of a `config.json`.

    Raises:
      ConfigError: if moex has no such family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        # Suggest another spelling only: a family of a similar name is another model.
        near = [k for k in FAMILIES if str(kind).lower().replace("-", "_") == k]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where}: model_type = {short(kind)}: must be one of "
            f"{', '.join(FAMILIES)}; moex has no other.{hint}"
        )
    return FAMILIES[kind]


def read_model(
    where: str, config: Mapping[str, Any], say: Callable[[str], Any] = lambda line: None
) -> LM:
    """The model config that a `config.json` describes.

    Args:
      where: begins error messages.
      config: the fields of the file.
      say: called with a line for each field that is not known.

    Raises:
      ConfigError: for a missing field, or a value that moex has no counterpart of.
    """
    family = find_family(where, config)
    names = {"num_experts", "num_local_experts"} - {family.experts}
    aliases = dict.fromkeys(sorted(names), family.experts) if family.experts else {}
    of = Fields(where, config, DEFAULTS[config["model_type"]], aliases)
    of.experts = family.experts
    activation = of("hidden_act", str)
    if activation not in ("silu", "swish"):
        raise of.refuse("hidden_act", activation, "'silu'; moex has no other")
    layers = family.layers(of)
    model = LM(
        dim=of.count("hidden_size"),
        attention=layers[0][0],
        layers=fold(layers),
        vocab=of.count("vocab_size", least=2),
        tied_embeddings=of("tie_word_embeddings", bool),
        scale_embeddings=False,
        norm_eps=of("rms_norm_eps", float),
    )
    for name in of.check_rest():
        say(f"not used: {name} = {short(config[name])} of {where}, which is unknown")
    with warnings.catch_warnings():  # they come again with the whole run config
        warnings.simplefilter("ignore", ConfigWarning)
        check(model, where)
    return model


def unused_tensors(
    family: Family, where: str, config: Mapping[str, Any], num_layers: int
) -> re.Pattern:
    """The pattern of the tensors that a folder may have and moex has no use for.

    Args:
      family: the row of the model.
      where: begins error messages.
      config: the fields of `config.json`. They say how many layers after the last
        predict further tokens (DeepSeek-V3).
      num_layers: layers of the model.
    """
    name, most = "num_nextn_predict_layers", MOST["repeat"]
    of = Fields(where, config, {name: 1}, {"num_mtp_layers": name})
    extra = of(name, int, least=0, null=0)
    if extra > most:
        raise of.refuse(name, extra, f"at most {most:,}")
    after = "|".join(str(num_layers + i) for i in range(extra)) or "none"
    return re.compile("|".join(family.unused).replace("{after_last}", f"({after})"))
