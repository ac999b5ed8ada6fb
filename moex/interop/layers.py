"""Parts of a layer that several families share, read from a `config.json`."""

import dataclasses
from typing import Any

from moex.config.base import MOST
from moex.interop.fields import Fields
from moex.interop.positions import rope
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import Groups, TopK
from moex.nn.attention import Attention
from moex.nn.stack import Segment

# (attention, feed-forward) of one layer.
Layer = tuple[Any, Any]


def attention(of: Fields, **more) -> Attention:
    """Grouped-query attention as most families have it."""
    heads, dim = of.count("num_attention_heads"), of.count("hidden_size")
    groups = of("num_key_value_heads", int, least=1, null=heads)
    if heads % groups:
        raise of.refuse("num_key_value_heads", groups, f"a divisor of {heads} heads")
    width = of("head_dim", int, least=2, null=dim // heads)
    if width % 2:
        raise of.refuse("head_dim", width, "an even number")
    return Attention(
        heads=heads,
        kv_heads=groups,
        head_dim=width,
        bias=of("attention_bias", bool),
        norm_eps=of("rms_norm_eps", float),
        **rope(of)[0],
        **more,
    )


def sparse(of: Fields, hidden: str, **router) -> MoE:
    """A layer of experts; `hidden` is the field with their width."""
    experts = of.count(of.experts)
    k = of.count("num_experts_per_tok")
    if k > experts:
        raise of.refuse("num_experts_per_tok", k, f"at most {of.experts} = {experts}")
    return MoE(
        num_experts=experts,
        router=TopK(k=k, **router),
        experts=Glu(hidden=of.count(hidden)),
    )


def normalize(of: Fields, **options) -> str:
    """The value of `normalize`: when the gates are made to sum to one."""
    return "after" if of("norm_topk_prob", bool, **options) else "none"


def groups(of: Fields, score: str) -> Groups:
    """The groups of experts that a token may choose from."""
    experts, num = of.count(of.experts), of.count("n_group")
    if experts % num:
        raise of.refuse("n_group", num, f"a divisor of {of.experts} = {experts}")
    keep = of.count("topk_group")
    if keep > num:
        raise of.refuse("topk_group", keep, f"at most n_group = {num}")
    size, k = experts // num, of.count("num_experts_per_tok")
    if k > keep * size:
        allowed = f"at most {keep * size}: topk_group = {keep} of n_group = {num}"
        raise of.refuse("num_experts_per_tok", k, allowed)
    if score == "top2" and size < 2:
        raise of.refuse("n_group", num, "smaller: a group has two experts at least")
    return Groups(num=num, keep=keep, score=score)


def num_layers(of: Fields) -> int:
    """The number of layers."""
    count, most = of.count("num_hidden_layers"), MOST["repeat"]
    if count > most:
        raise of.refuse("num_hidden_layers", count, f"at most {most:,}")
    return count


def window(of: Fields) -> int | None:
    """The attention window of Qwen3, which a field of its own turns on."""
    window = of("sliding_window", int, least=1, null=None)
    return window if of("use_sliding_window", bool) else None


def by_layer_types(
    of: Fields, full: Attention, keys: int | None, missing: list[str]
) -> list[Attention]:
    """The attention of every layer, with a window where `layer_types` says so.

    Args:
      of: the fields.
      full: the attention without a window.
      keys: how many keys a query sees through a window; None: no layer has one.
      missing: the value to take where `layer_types` is missing.
    """
    kinds = of("layer_types", list[str], null=missing)
    if len(kinds) != len(missing):
        allowed = f"as long as num_hidden_layers = {len(missing)}"
        raise of.refuse("layer_types", kinds, allowed)
    own = {"full_attention": full}
    if keys is not None:
        own["sliding_attention"] = dataclasses.replace(full, window=keys)
    for kind in kinds:
        if kind not in own:
            raise of.refuse("layer_types", kind, " or ".join(map(repr, own)))
    return [own[kind] for kind in kinds]


def fold(layers: list[Layer], longest: int = 4) -> tuple[Segment, ...]:
    """Make few segments of layers in order: patterns that repeat are folded.

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
