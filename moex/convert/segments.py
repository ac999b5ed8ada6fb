"""Cutting the segments of a model, where copies of one layer become different layers.

A segment holds `repeat` equal copies of its pattern. A conversion that changes some of
them, or each in another way, needs a segment of its own for each run of equal ones.

R copies of a block in a segment
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moex.config.base import ConfigError, require, walk
from moex.model.layers import sites
from moex.moe.contract import RouterConfig


def chosen_layers(layers: str, able: list[int], kind: str) -> list[int]:
    """Numbers of the layers that `--layers` names.

    Args:
      layers: "all"; "every:N", the N-th of the layers that can be converted and every
        N-th after it; "last:N", the last N of them; or numbers between commas, counted
        from 0 over all layers of the model.
      able: numbers of the layers that can be converted, rising.
      kind: what these are, such as "dense", for messages.

    Raises:
      ConfigError: if it is none of these, or names another layer.
    """
    how, _, count = layers.partition(":")
    if layers == "all":
        return able
    if how in ("every", "last"):
        fits = count.isdecimal() and 1 <= int(count) <= len(able)
        allowed = f"{how}:N with N in [1, {len(able)}], the number of {kind} layers"
        require(fits, "--layers", layers, allowed)
        n = int(count)
        return able[n - 1 :: n] if how == "every" else able[-n:]
    parts = layers.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(
            f"--layers = {layers!r}: must be all, every:N, last:N or numbers of layers "
            "such as 0,3."
        )
    for number in map(int, parts):
        allowed = f"among the {kind} layers, " + ", ".join(map(str, able))
        require(number in able, "--layers", number, allowed)
    return sorted(set(map(int, parts)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """Copies of an old segment that are a segment of the new model."""

    segment: int  # number of the old segment
    first: int  # copy that it begins with
    period: int  # copies that are one pattern of the new segment
    repeat: int  # copies of the new segment
    labels: tuple[Any, ...]  # how each of its blocks changes
    number: int  # number of its first layer in the model

    def copies(self, block: int) -> slice:
        """Where the copies of new block `block` are among those of the old one."""
        first = self.first + block // (len(self.labels) // self.period)
        return slice(first, first + self.period * self.repeat, self.period)

    def layer(self, block: int, r: int) -> int:
        """Number of copy `r` of block `block` in the model, old and new."""
        return self.number + r * len(self.labels) + block


def cut(model, labels: Mapping[int, Any]) -> list[Piece]:
    """The segments that a `Model` config has to have where its layers change.

    A segment all of whose copies change alike stays one; others are cut into as few
    as a greedy choice finds, so that a change of every second of one repeated layer
    makes a pattern of two. The order of the layers never changes.

    Args:
      labels: how layers change, by number: layers with equal labels stay equal. Layers
        without one have the label None.
    """
    found = []
    for i, group in itertools.groupby(sites(model), key=lambda site: site.segment):
        own = list(group)
        rows = [
            tuple(labels.get(number) for number in numbers)
            for numbers in zip(*(site.numbers for site in own), strict=True)
        ]
        at = 0
        while at < len(rows):
            period, repeat = _longest(rows[at:])
            changes = sum(rows[at : at + period], ())
            found.append(Piece(i, at, period, repeat, changes, own[0].numbers[at]))
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


def cut_model(model, found: list[Piece], change: Callable = lambda ffn, *_: ffn):
    """A copy of a `Model` config with these segments.

    Args:
      change: called with the config of a feed-forward, its label and its path in the
        old config; the config that it becomes.
    """
    segments = []
    for piece in found:
        old = model.layers[piece.segment]
        stride = len(old.pattern)
        pattern = []
        for block, label in enumerate(piece.labels):
            place = block % stride
            where = f"config.model.layers[{piece.segment}].pattern[{place}]"
            ffn = change(old.pattern[place], label, where)
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


def cut_arrays(tree, found: list[Piece], model) -> dict:
    """Parameters or state of a model by new segment and block.

    Args:
      tree: nested dict of arrays of the old model; not changed.
      model: the old config.

    Returns:
      A nested dict; the dicts on the way are new.
    """
    old = tree.get("segments", {})
    segments: dict[str, dict] = {}
    for i, piece in enumerate(found):
        old_blocks = old.get(str(piece.segment), {}).get("blocks", {})
        segment = model.layers[piece.segment]
        stride, whole = len(segment.pattern), piece.repeat == segment.repeat
        for block in range(len(piece.labels)):
            values = old_blocks.get(str(block % stride))
            if values is None:  # for example a block without state
                continue
            if not whole:
                at = piece.copies(block)
                values = jax.tree.map(lambda a, at=at: jax.device_get(a)[at], values)
            blocks = segments.setdefault(str(i), {"blocks": {}})["blocks"]
            blocks[str(block)] = dict(values)
    return {**tree, "segments": segments} if segments else dict(tree)
