"""The one walk over the layers of a model: it gives each its place and number.

Layers are counted from 0 over the whole model, those without experts too. A segment
holds `repeat` copies of its pattern, so one place of a pattern is several layers.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moex.moe.chain import Chain
from moex.moe.layer import MoE
from moex.nn.contract import FeedForwardConfig


@dataclasses.dataclass(frozen=True)
class Sparse:
    """The MoE of a feed-forward, which may stand inside `Chain` and `Narrow`."""

    path: str  # its module in the parameters, such as "segments/0/blocks/1/ffn/inner"
    where: str  # the path of its config, for messages
    moe: MoE  # its config; part of the model config, not a copy
    width: int  # the width of the tokens that it sees
    # Config of the router of each round; one, where there is no chain.
    routers: tuple[Any, ...]
    chained: bool  # whether rounds have figures of their own


@dataclasses.dataclass(frozen=True)
class Site:
    """One place of a segment's pattern: `repeat` layers with equal configs.

    Configs are parts of the model config, not copies.
    """

    segment: int  # number of the segment in the model
    place: int  # number of the block in the pattern of the segment
    number: int  # number in the model of the first of these layers
    stride: int  # layers from one of them to the next
    repeat: int  # how many there are
    attention: Any  # their attention config
    ffn: Any  # their feed-forward config
    sparse: Sparse | None  # the MoE in it; None for a dense one

    @property
    def path(self) -> str:
        """The path of the block in the model; its parameters are [repeat, ...]."""
        return f"segments/{self.segment}/blocks/{self.place}"

    @property
    def where(self) -> str:
        """The path of the feed-forward in the run config, for messages."""
        return f"config.model.layers[{self.segment}].pattern[{self.place}]"

    @property
    def numbers(self) -> range:
        """The numbers of its layers in the model."""
        end = self.number + self.repeat * self.stride
        return range(self.number, end, self.stride)


class Routed(NamedTuple):
    """A router of a model."""

    layer: int  # number of the layer from 0; dense layers count too
    round: int  # round of a chain, from 1; 0 where there is no chain
    router: Any  # its config
    moe: MoE  # config of the layer whose experts it chooses

    @property
    def label(self) -> str:
        """Its name in logs and traces."""
        return label(self.layer, self.round)


def sites(model) -> list[Site]:
    """Every place of every pattern of a model config, in order."""
    found, start = [], 0
    for s, segment in enumerate(model.layers):
        stride, attentions = len(segment.pattern), segment.attentions(model.attention)
        for i, ffn in enumerate(segment.pattern):
            site = Site(
                segment=s,
                place=i,
                number=start + i,
                stride=stride,
                repeat=segment.repeat,
                attention=attentions[i],
                ffn=ffn,
                sparse=None,
            )
            sparse = _sparse(ffn, f"{site.path}/ffn", site.where, model.dim)
            found.append(dataclasses.replace(site, sparse=sparse))
        start += segment.repeat * stride
    return found


def _sparse(ffn: FeedForwardConfig, path: str, where: str, width: int) -> Sparse | None:
    if isinstance(ffn, Chain):
        routers = tuple(ffn.rounds())
        return Sparse(path, f"{where}.moe", ffn.moe, width, routers, True)
    if isinstance(ffn, MoE):
        return Sparse(path, where, ffn, width, (ffn.router,), False)
    if (inside := ffn.wraps(width)) is None:
        return None
    name, inner, width = inside
    return _sparse(inner, f"{path}/{name}", f"{where}.{name}", width)


def layers(model) -> list[tuple[Site, int]]:
    """Every layer of a model config in order: its site, and the number of its copy."""
    copies = ((n, site, r) for site in sites(model) for r, n in enumerate(site.numbers))
    return [(site, r) for _, site, r in sorted(copies, key=lambda copy: copy[0])]


def site_at(found: Sequence[Site], path: str) -> Site:
    """The site whose block holds `path`, a path of a module or parameter.

    Raises:
      KeyError: if there is none.
    """
    for site in found:
        if path.startswith(f"{site.path}/"):
            return site
    raise KeyError(path)


def routers(model) -> Iterator[Routed]:
    """Every router of a model config, in the order of its layers and rounds."""
    for site, r in layers(model):
        if site.sparse is not None:
            for t, router in enumerate(site.sparse.routers):
                chain_round = t + 1 if site.sparse.chained else 0
                yield Routed(site.numbers[r], chain_round, router, site.sparse.moe)


def label(number: int, chain_round: int = 0) -> str:
    """The name of a layer in logs and traces: "003", or "003.1" in a chain's round 1.

    Args:
      number: number of the layer, from 0.
      chain_round: from 1; 0 where there is no chain.
    """
    return f"{number:03d}" + (f".{chain_round}" if chain_round else "")


def shown(label: str) -> str:
    """The label for people: "3", or "3.1" for the first round of a chain."""
    number, dot, chain_round = label.partition(".")
    return f"{number.lstrip('0') or number[-1:]}{dot}{chain_round}"
