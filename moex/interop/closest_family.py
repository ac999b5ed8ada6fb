"""Which family of transformers a moex model is, if any.

The family is not guessed: a `config.json` is written for each that it could be, read
back, and taken if the model that comes out is the one that went in.
"""

import dataclasses
import math
from typing import Any

from moex.config.base import Config, ConfigError, children, join
from moex.interop.defaults import DEFAULTS
from moex.interop.families import FAMILIES, read_model
from moex.interop.fields import ELSEWHERE
from moex.interop.layers import fold
from moex.model.layers import layers
from moex.moe.layer import MoE
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.rope import Llama3, Yarn

# Families that a model of moex's own can match; the others differ in more than routing.
CANDIDATES = ("mixtral", "qwen3_moe", "olmoe", "llama", "qwen3")
PARTS = "parts, not"


class NoFamily(ConfigError):
    """No family of transformers has a model."""


def closest(model: LM) -> dict:
    """The `config.json` of a model.

    Raises:
      NoFamily: if no family has it, with what differs from the closest one.
    """
    if model.tied_embeddings and model.scale_embeddings:
        raise NoFamily(
            "export-hf: config.model has tied embeddings that are scaled on their way "
            "in (scale_embeddings); no family has those."
        )
    if not isinstance(model.attention, Attention):
        raise NoFamily(
            f"export-hf: {type(model.attention).__name__} leaves only in runs that "
            "were imported with it."
        )
    plain, fewest = inference(model), None
    for kind in CANDIDATES:
        config = {"model_type": kind} | _fields(model, kind)
        try:
            read = inference(read_model("config.json", config))
        except ConfigError as error:
            found, distance = [str(error)], (True, math.inf)
        else:
            found = _differences(plain, read)
            distance = _distance(found)
        if not found:
            architecture = FAMILIES[kind].architecture
            return config | {"architectures": [architecture]}
        if fewest is None or distance < fewest[0]:
            fewest = distance, kind, found
    assert fewest is not None
    _, kind, found = fewest
    raise NoFamily(
        f"export-hf: no family of transformers has this model; {kind} is the closest, "
        f"and differs in {'; '.join(found[:6])}."
    )


def inference(model: LM) -> LM:
    """A copy of a model, equal for models that compute the same at inference."""
    blocks = [
        (_attention(site.attention, model), _feed_forward(site.ffn))
        for site, _ in layers(model)
    ]
    residuals = {segment.residual for segment in model.layers}
    folded = fold(blocks)
    if residuals != {"prenorm"}:
        folded = tuple(
            dataclasses.replace(s, residual=",".join(sorted(residuals))) for s in folded
        )
    return dataclasses.replace(
        model, attention=blocks[0][0], layers=folded, scale_embeddings=False
    )


def _attention(attention: Any, model: LM):
    if not isinstance(attention, Attention):
        return attention
    return dataclasses.replace(
        attention,
        kv_heads=attention.kv_heads or attention.heads,
        head_dim=attention.width(model.dim),
        norm_eps=attention.norm_eps if attention.qk_norm else model.norm_eps,
    )


def _feed_forward(ffn: Any):
    if not isinstance(ffn, MoE):
        return ffn
    own = dict(children(ffn.router))
    training = {"bias_rule": "sign", "jitter": 0.0, "noise": 0.0, "init_std": 0.02}
    training["bias_rate"] = 1e-3 if own.get("bias_rate") else 0.0
    router = dataclasses.replace(
        ffn.router, **{k: v for k, v in training.items() if k in own}
    )
    # Capacity does not matter: transformers and decoding here drop no slots.
    return dataclasses.replace(
        ffn, router=router, buffer_slots=None, capacity_factor=None
    )


def _fields(model: LM, kind: str) -> dict:
    """Every field that one of the candidates reads, and none that `kind` refuses."""
    attention = model.attention
    assert isinstance(attention, Attention)
    ffns = [site.ffn for site, _ in layers(model)]
    sparse = next((f for f in ffns if isinstance(f, MoE)), None)
    dense = next((f for f in ffns if isinstance(f, Dense)), None)
    rope = _rope(attention)
    fields: dict[str, Any] = {
        "hidden_size": model.dim,
        "vocab_size": model.vocab,
        "num_hidden_layers": len(ffns),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.width(model.dim),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": attention.bias,
        "clip_qkv": attention.clip,
        "sliding_window": attention.window,
        "rope_parameters": rope,
        "rope_theta": attention.rope_theta,  # for transformers 4, like the next field
        "rope_scaling": None if attention.rope_scaling is None else rope,
        "intermediate_size": dense.hidden if dense else 1,
    }
    if sparse is not None:
        router, experts = dict(children(sparse.router)), dict(children(sparse.experts))
        hidden = experts.get("hidden", 1)
        fields |= {
            "num_local_experts": sparse.num_experts,
            "num_experts": sparse.num_experts,
            "num_experts_per_tok": router.get("k", 1),
            "norm_topk_prob": router.get("normalize") == "after",
            "moe_intermediate_size": hidden,
            "mlp_only_layers": [
                i for i, ffn in enumerate(ffns) if isinstance(ffn, Dense)
            ],
        }
        if dense is None:
            fields["intermediate_size"] = hidden
    known = DEFAULTS[kind]
    return {k: v for k, v in fields.items() if k in known or k not in ELSEWHERE}


def _rope(attention: Attention) -> dict:
    scaling: Any = attention.rope_scaling
    fields = {"rope_theta": attention.rope_theta, "rope_type": "default"}
    if scaling is None:
        return fields
    fields |= {"factor": scaling.factor, "rope_type": "linear"}
    if isinstance(scaling, Llama3):
        fields |= {
            "rope_type": "llama3",
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
        }
    if isinstance(scaling, Yarn):
        fields |= {
            "rope_type": "yarn",
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "truncate": scaling.truncate,
            "attention_factor": scaling.magnitude,
        }
    if isinstance(scaling, (Llama3, Yarn)):
        fields["original_max_position_embeddings"] = scaling.original
    return fields


def _differences(ours: Any, theirs: Any, path: str = "config.model") -> list[str]:
    """The fields in which two configs differ, one line each."""
    if ours == theirs:
        return []
    if type(ours) is not type(theirs) or not isinstance(ours, (Config, tuple)):
        return [f"{path} = {_short(ours)}, not {_short(theirs)}"]
    mine, other = children(ours), children(theirs)
    if len(mine) != len(other):
        return [f"{path}: {len(mine)} {PARTS} {len(other)}"]
    found = []
    for (name, a), (_, b) in zip(mine, other, strict=True):
        found += _differences(a, b, join(path, name))
    return found


def _distance(differences: list[str]) -> tuple[bool, float]:
    """A sort key: different layers count more than any number of different fields."""
    return any(PARTS in text for text in differences), len(differences)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Config) else repr(value)
