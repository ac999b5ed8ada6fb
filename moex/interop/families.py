"""Model families of Hugging Face transformers: one table, from their config to ours.

A family is added here: a function from the fields of `config.json` to a list of layers,
and a row of `FAMILIES`. `tests/interop/make_fixtures.py` gets its row too.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from moex.config import ConfigError, nearest
from moex.interop.names import Names
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import Groups, TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.rope import Linear, Llama3, Yarn
from moex.nn.stack import Segment

# (attention, feed-forward) of one layer.
Layer = tuple[Any, Any]


class Fields:
    """The fields of a `config.json`, with one-line errors that name file and field."""

    def __init__(self, where: str, values: Mapping[str, Any]):
        self.where, self.values = where, values

    def __call__(self, name: str, *default: Any) -> Any:
        """The value of a field; the default where it is missing or null."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default:
            return default[0]
        raise ConfigError(f"{self.where}: has no {name!r}, which its family needs.")

    def refuse(self, name: str, value: Any, allowed: str) -> ConfigError:
        """The error for a value that moex has no counterpart of."""
        return ConfigError(f"{self.where}: {name} = {value!r}: must be {allowed}.")

    def count(self, name: str) -> int:
        """A field that must be a whole number of at least 1."""
        value = self(name)
        if type(value) is not int or value < 1:
            raise self.refuse(name, value, "a whole number of at least 1")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that is there and none of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise self.refuse(
                name, value, f"{' or '.join(map(repr, allowed))}; moex has no other"
            )


# What transformers takes where a config names none; 10,000 for the other families.
THETA = {"mixtral": 1e6, "gpt_oss": 150_000.0}


def rope(of: Fields) -> tuple[dict, float]:
    """(`rope_theta` and `rope_scaling` of an attention, factor on scores of MLA)."""
    new, old = of("rope_parameters", {}), of("rope_scaling", {})
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, Mapping):
            raise of.refuse(name, value, "an object or null")
    own = Fields(f"{of.where}: rope", {**old, **new})
    theta = own("rope_theta", of("rope_theta", THETA.get(of("model_type"), 10_000.0)))
    kind = own("rope_type", own("type", "default"))
    share = own("partial_rotary_factor", of("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise own.refuse("partial_rotary_factor", share, "1.0")
    scaling: Any = None
    scores = 1.0
    if kind == "linear":
        scaling = Linear(factor=own("factor"))
    elif kind == "llama3":
        scaling = Llama3(
            factor=own("factor"),
            original=own("original_max_position_embeddings"),
            low=own("low_freq_factor"),
            high=own("high_freq_factor"),
        )
    elif kind == "yarn":
        factor = own("factor")
        one, all_dims = own("mscale", 0.0), own("mscale_all_dim", 0.0)
        magnitude = own("attention_factor", None)
        if magnitude is None and one and all_dims:
            magnitude = _sharper(factor, one) / _sharper(factor, all_dims)
        if all_dims:
            scores = _sharper(factor, all_dims) ** 2
        original = own(
            "original_max_position_embeddings", of("max_position_embeddings")
        )
        scaling = Yarn(
            factor=factor,
            original=original,
            fast=own("beta_fast", 32.0),
            slow=own("beta_slow", 1.0),
            magnitude=magnitude,
            truncate=own("truncate", True),
        )
    elif kind != "default":
        raise own.refuse("rope_type", kind, "'default', 'linear', 'llama3' or 'yarn'")
    return {"rope_theta": float(theta), "rope_scaling": scaling}, scores


def _sharper(factor, magnitude) -> float:
    return 1.0 if factor <= 1 else 0.1 * magnitude * math.log(factor) + 1.0


def attention(of: Fields, **more) -> Attention:
    """Grouped-query attention as most families have it."""
    heads, dim = of("num_attention_heads"), of("hidden_size")
    return Attention(
        heads=heads,
        kv_heads=of("num_key_value_heads", heads),
        head_dim=of("head_dim", dim // heads),
        bias=of("attention_bias", False),
        norm_eps=of("rms_norm_eps"),
        **rope(of)[0],
        **more,
    )


def mixtral(of: Fields) -> list[Layer]:
    """Mixtral 8x7B, 8x22B."""
    of.only("attention_bias", False)  # transformers has none, whatever is written
    own = attention(of, window=of("sliding_window", None))
    moe = MoE(
        num_experts=of("num_local_experts"),
        router=TopK(k=of("num_experts_per_tok")),
        experts=Glu(hidden=of("intermediate_size")),
    )
    return [(own, moe)] * of("num_hidden_layers")


def olmoe(of: Fields) -> list[Layer]:
    """OLMoE."""
    of.only("head_dim", of("hidden_size") // of("num_attention_heads"))
    own = attention(of, qk_norm="whole", clip=of("clip_qkv", None))
    moe = MoE(
        num_experts=of("num_experts"),
        router=TopK(k=of("num_experts_per_tok"), normalize=_normalize(of)),
        experts=Glu(hidden=of("intermediate_size")),
    )
    return [(own, moe)] * of("num_hidden_layers")


def _normalize(of: Fields) -> str:
    return "after" if of("norm_topk_prob", False) else "none"


def qwen3_moe(of: Fields) -> list[Layer]:
    """Qwen3-30B-A3B, Qwen3-235B-A22B and their kin."""
    of.only("use_sliding_window", False)
    own = attention(of, qk_norm=True)
    moe = MoE(
        num_experts=of("num_experts", None) or of("num_local_experts"),
        router=TopK(k=of("num_experts_per_tok"), normalize=_normalize(of)),
        experts=Glu(hidden=of("moe_intermediate_size")),
    )
    dense, step = of("mlp_only_layers", ()), of("decoder_sparse_step", 1)
    return [
        (
            own,
            Dense(hidden=of("intermediate_size"))
            if i in dense or (i + 1) % step
            else moe,
        )
        for i in range(of("num_hidden_layers"))
    ]


def _deepseek(of: Fields, router: TopK) -> list[Layer]:
    of.only("attention_bias", False)
    of.only("moe_layer_freq", 1)
    where, scores = rope(of)
    own = LatentAttention(
        heads=of("num_attention_heads"),
        kv_latent=of("kv_lora_rank"),
        q_latent=of("q_lora_rank", None),
        nope_dim=of("qk_nope_head_dim"),
        rope_dim=of("qk_rope_head_dim"),
        v_dim=of("v_head_dim"),
        rope_interleaved=of("rope_interleave", True),
        score_scale=scores,
        **where,
    )
    hidden, shared = of("moe_intermediate_size"), of("n_shared_experts", 0)
    moe = MoE(
        num_experts=of("n_routed_experts"),
        router=router,
        experts=Glu(hidden=hidden),
        shared=Dense(hidden=hidden * shared) if shared else None,
    )
    first = of("first_k_dense_replace", 0)
    layers = of("num_hidden_layers")
    if not 0 <= first <= layers:
        raise of.refuse("first_k_dense_replace", first, f"from 0 to {layers} layers")
    dense = Dense(hidden=of("intermediate_size"))
    return [(own, dense)] * first + [(own, moe)] * (layers - first)


def deepseek_v2(of: Fields) -> list[Layer]:
    """DeepSeek-V2, V2-Lite."""
    of.only("norm_topk_prob", False)
    of.only("scoring_func", "softmax")
    of.only("topk_method", "greedy", "group_limited_greedy")
    groups = None
    if of("topk_method", "greedy") == "group_limited_greedy":
        groups = Groups(num=of("n_group"), keep=of("topk_group"))
    router = TopK(
        k=of("num_experts_per_tok"),
        normalize="none",
        scale=float(of("routed_scaling_factor", 1.0)),
        groups=groups,
    )
    return _deepseek(of, router)


def deepseek_v3(of: Fields) -> list[Layer]:
    """DeepSeek-V3, R1 and other models of the same type."""
    of.only("scoring_func", "sigmoid")
    of.only("topk_method", "noaux_tc")
    router = TopK(
        k=of("num_experts_per_tok"),
        score="sigmoid",
        normalize="after" if of("norm_topk_prob", True) else "none",
        scale=float(of("routed_scaling_factor", 2.5)),
        groups=Groups(num=of("n_group"), keep=of("topk_group"), score="top2"),
        bias_rate=1e-3,
    )
    return _deepseek(of, router)


def gpt_oss(of: Fields) -> list[Layer]:
    """gpt-oss-20b and 120b."""
    of.only("swiglu_limit", 7.0)
    of.only("swiglu_alpha", 1.702)
    full = attention(of, sinks=True)
    full.bias = of("attention_bias", True)
    own = {
        "full_attention": full,
        "sliding_attention": dataclasses.replace(full, window=of("sliding_window")),
    }
    moe = MoE(
        num_experts=of("num_local_experts"),
        router=TopK(k=of("num_experts_per_tok"), logit_bias=True),
        experts=Glu(hidden=of("intermediate_size"), activation="clamped", bias=True),
    )
    layers = of("num_hidden_layers")
    turns = ["sliding_attention", "full_attention"] * layers
    kinds = of("layer_types", turns[:layers])
    for kind in kinds:
        if kind not in own:
            raise of.refuse("layer_types", kind, " or ".join(map(repr, own)))
    return [(own[kind], moe) for kind in kinds]


def llama(of: Fields) -> list[Layer]:
    """Llama 2 and 3, dense."""
    of.only("mlp_bias", False)
    ffn = Dense(hidden=of("intermediate_size"))
    return [(attention(of), ffn)] * of("num_hidden_layers")


def qwen3(of: Fields) -> list[Layer]:
    """Qwen3, dense."""
    of.only("use_sliding_window", False)
    ffn = Dense(hidden=of("intermediate_size"))
    return [(attention(of, qk_norm=True), ffn)] * of("num_hidden_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
      architecture: its class in transformers.
      layers: from the fields of `config.json` to (attention, feed-forward) per layer.
      names: of its tensors.
      unused: patterns of tensors that a checkpoint may carry and moex has no use for.
    """

    architecture: str
    layers: Callable[[Fields], list[Layer]]
    names: Names = Names()
    unused: tuple[str, ...] = ()


# Frequencies that old versions of transformers stored.
OLD = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
FAMILIES = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        layers=mixtral,
        names=Names(sparse="block_sparse_moe", experts=("w1", "w3", "w2")),
        unused=OLD,
    ),
    "olmoe": Family(architecture="OlmoeForCausalLM", layers=olmoe),
    "qwen3_moe": Family(architecture="Qwen3MoeForCausalLM", layers=qwen3_moe),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM", layers=deepseek_v2, unused=OLD
    ),
    # Its multi-token-prediction layers come after the last layer.
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        layers=deepseek_v3,
        unused=(*OLD, r"model\.layers\.{after_last}\..*"),
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        layers=gpt_oss,
        names=Names(router="router", experts=None),
    ),
    "llama": Family(architecture="LlamaForCausalLM", layers=llama, unused=OLD),
    "qwen3": Family(architecture="Qwen3ForCausalLM", layers=qwen3),
}


# Every family divides by these, or has as many of something.
COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def find_family(where: str, config: Mapping[str, Any]) -> Family:
    """The row of a `config.json`.

    Raises:
      ConfigError: if moex has no such family.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type = {kind!r}: must be one of {', '.join(FAMILIES)}."
            f"{nearest(str(kind), FAMILIES, cutoff=0.9)}"
        )
    return FAMILIES[kind]


def read_model(where: str, config: Mapping[str, Any]) -> LM:
    """The model config that a `config.json` describes.

    Raises:
      ConfigError: for a missing field, or a value that moex has no counterpart of.
    """
    family = find_family(where, config)
    of = Fields(where, config)
    of.only("hidden_act", "silu")
    for name in COUNTS:
        of.count(name)
    layers = family.layers(of)
    return LM(
        dim=of("hidden_size"),
        attention=layers[0][0],
        layers=fold(layers),
        vocab=of("vocab_size"),
        tied_embeddings=of("tie_word_embeddings", False),
        scale_embeddings=False,
        norm_eps=of("rms_norm_eps"),
    )


def is_unused(family: Family, name: str, num_layers: int, extra: int) -> bool:
    """Whether a tensor is on the family's list of those that moex has no use for.

    Args:
      name: of a tensor.
      num_layers: of the model.
      extra: layers after the last, for predictions of further tokens.
    """
    after = "|".join(str(num_layers + i) for i in range(extra)) or "none"
    patterns = (p.replace("{after_last}", f"({after})") for p in family.unused)
    return any(re.fullmatch(p, name) for p in patterns)


def fold(layers: list[Layer], longest: int = 4) -> tuple[Segment, ...]:
    """Layers in order as few segments: what repeats is folded, first come first.

    Args:
      layers: (attention, feed-forward) of each.
      longest: pattern that is looked for.
    """
    same = all(own == layers[0][0] for own, _ in layers)
    segments, at = [], 0
    while at < len(layers):
        size, repeat = 1, 1
        for n in range(1, longest + 1):
            pattern, times = layers[at : at + n], 1
            while layers[at + n * times : at + n * (times + 1)] == pattern:
                times += 1
            if (times > 1 or n == 1) and n * times > size * repeat:
                size, repeat = n, times
        own = layers[at : at + size]
        segments.append(
            Segment(
                pattern=tuple(ffn for _, ffn in own),
                repeat=repeat,
                attention=None if same else tuple(a for a, _ in own),
            )
        )
        at += size * repeat
    return tuple(segments)
