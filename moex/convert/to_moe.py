"""MoE layers in place of dense ones: the segments of a model, and its parameters.

The mathematics of one layer is in `upcycle.py`; reading and writing runs in
`apply.py`.

R copies of a block in a segment
"""

import copy
import dataclasses
import itertools

import jax
import numpy as np

from moex.config.base import ConfigError, walk
from moex.convert.kinds.moe import Upcycle
from moex.convert.upcycle import chosen_layers, layer_of_dense, moe_of_dense
from moex.model.layers import layers as layers_of
from moex.model.layers import sites
from moex.moe.contract import RouterConfig
from moex.nn.mlp import Dense
from moex.progress import phase


@dataclasses.dataclass(frozen=True)
class Piece:
    """Copies of an old segment that are a segment of the new model."""

    segment: int  # number of the old segment
    first: int  # copy that it begins with
    period: int  # copies that are one pattern of the new segment
    repeat: int  # copies of the new segment
    upcycled: tuple[bool, ...]  # for each of its blocks whether it becomes an MoE layer
    number: int  # number of its first layer in the model

    def copies(self, block: int) -> slice:
        """Where the copies of new block `block` are among those of the old one."""
        first = self.first + block // (len(self.upcycled) // self.period)
        return slice(first, first + self.period * self.repeat, self.period)

    def layer(self, block: int, r: int) -> int:
        """Number of copy `r` of block `block` in the model, old and new."""
        return self.number + r * len(self.upcycled) + block


def pieces(model, layers: str) -> list[Piece]:
    """The segments that an `Model` config has to have where some layers change.

    A segment all of whose copies change alike stays one; others are cut into as few
    as a greedy choice finds, so that "every:2" of one repeated layer is a pattern of
    two. The order of the layers never changes.

    Raises:
      ConfigError: if no layer is dense, or `layers` names one that is not.
    """
    dense = [
        n for n, (at, _) in enumerate(layers_of(model)) if isinstance(at.ffn, Dense)
    ]
    if not dense:
        raise ConfigError("config.model: has no dense layer; there is none to upcycle.")
    chosen = set(chosen_layers(layers, dense))
    found = []
    for i, group in itertools.groupby(sites(model), key=lambda site: site.segment):
        own = list(group)
        rows = [
            tuple(number in chosen for number in numbers)
            for numbers in zip(*(site.numbers for site in own), strict=True)
        ]
        at = 0
        while at < len(rows):
            period, repeat = _longest(rows[at:])
            upcycled = sum(rows[at : at + period], ())
            found.append(Piece(i, at, period, repeat, upcycled, own[0].numbers[at]))
            at += period * repeat
    return found


def _longest(rows) -> tuple[int, int]:
    """(period, repeat) of the start of `rows` that covers most; the shortest period."""
    best = (1, 0)
    for period in range(1, max(len(rows) // 2, 1) + 1):
        repeat = 1
        while rows[repeat * period :][:period] == rows[:period]:
            repeat += 1
        # A longer pattern is worth its compile time only if it repeats.
        if (period == 1 or repeat > 1) and period * repeat > best[0] * best[1]:
            best = (period, repeat)
    return best


def moe_model(model, options: Upcycle):
    """A copy of a `Model` config in which the named dense layers are MoE layers.

    Dense layers inside `Narrow` and shared experts stay.

    Raises:
      ConfigError: if there is no such layer, or `split` does not divide its width.
    """
    segments = []
    for piece in pieces(model, options.layers):
        old = model.layers[piece.segment]
        stride = len(old.pattern)
        pattern = []
        for block, upcycled in enumerate(piece.upcycled):
            place = block % stride
            ffn = old.pattern[place]
            if upcycled:
                where = f"config.model.layers[{piece.segment}].pattern[{place}]"
                ffn = moe_of_dense(ffn, options, where)
            pattern.append(_at_copies(ffn, piece.copies(block)))
        attention = old.attention and tuple(old.attention) * piece.period
        new = {"pattern": tuple(pattern), "repeat": piece.repeat}
        segments.append(dataclasses.replace(old, **new, attention=attention))
    return dataclasses.replace(model, layers=tuple(segments))


def _at_copies(ffn, copies: slice):
    """A feed-forward config whose values per copy are cut to some copies."""
    ffn = copy.deepcopy(ffn)
    for _, node in walk(ffn, ""):
        if isinstance(node, RouterConfig):
            node.keep_copies(copies)
    return ffn


def upcycle_params(params, state, model, options: Upcycle):
    """`(params, state)` of `moe_model(model, options)`.

    Args:
      params, state: nested dicts of arrays of the old model; not changed.

    Returns:
      New nested dicts; layers that stay dense, and all else, have the old values.
    """
    found = pieces(model, options.layers)
    params, state = (_cut(tree, found, model) for tree in (params, state))
    doing, total = "making experts", len(upcycled_layers(model, options.layers))
    with phase(doing, total, "layers") as at:
        _upcycle(params, found, options, at.add)
    return params, state


def _upcycle(params, found: list[Piece], options: Upcycle, count) -> None:
    """Replace feed-forwards in parameters by new segment; `count` counts layers."""
    for i, piece in enumerate(found):
        blocks = params["segments"][str(i)]["blocks"]
        for block, upcycled in enumerate(piece.upcycled):
            if upcycled:
                old = jax.device_get(blocks[str(block)]["ffn"])
                layers = []
                for r in range(piece.repeat):
                    weights = {name: value[r] for name, value in old.items()}
                    number = piece.layer(block, r)
                    layers.append(layer_of_dense(weights, options, number))
                    count(1)
                stacked = jax.tree.map(lambda *a: np.stack(a), *layers)
                blocks[str(block)]["ffn"] = stacked


def _cut(tree, found: list[Piece], model) -> dict:
    """Parameters or state by new segment and block; the dicts on the way are new."""
    old = tree.get("segments", {})
    segments: dict[str, dict] = {}
    for i, piece in enumerate(found):
        old_blocks = old.get(str(piece.segment), {}).get("blocks", {})
        segment = model.layers[piece.segment]
        stride, whole = len(segment.pattern), piece.repeat == segment.repeat
        for block in range(len(piece.upcycled)):
            values = old_blocks.get(str(block % stride))
            if values is None:  # for example a block without state
                continue
            if not whole:
                at = piece.copies(block)
                values = jax.tree.map(lambda a, at=at: jax.device_get(a)[at], values)
            blocks = segments.setdefault(str(i), {"blocks": {}})["blocks"]
            blocks[str(block)] = dict(values)
    return {**tree, "segments": segments} if segments else dict(tree)


def upcycled_layers(model, layers: str) -> list[int]:
    """Numbers of the layers of a `Model` config that become MoE layers."""
    return sorted(
        piece.layer(block, r)
        for piece in pieces(model, layers)
        for block, upcycled in enumerate(piece.upcycled)
        if upcycled
        for r in range(piece.repeat)
    )
