"""Affinity of experts: how many tokens go from one expert to another, in counts.

Between consecutive MoE layers (or rounds of a chain) it is the tokens by their experts
of greatest gate here and there. Within a layer it is the tokens that have both of two
experts. Rounds of a chain have one set of experts, so they are one layer here.

Source: ExFlow, arXiv:2401.08383 (between layers).

A, B experts of two layers · E experts of a layer · G sets of weights that they share
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from moex.analysis.header import LayerInfo
from moex.analysis.statistics import (
    load_counts,
    pair_counts,
    top_expert,
    top_pair_counts,
)
from moex.analysis.sums import Sums
from moex.analysis.trace import Trace
from moex.config.base import ConfigError, require_choice

OBJECTIVES = ("transitions", "coactivation")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose experts are placed."""

    number: int  # its number in the model, from 0; dense layers count
    experts: int  # E, without zero-computation experts; or G, where they share weights
    # Sizes of groups of neighbours that must stay whole, such as those of a router.
    blocks: tuple[int, ...] = ()


class Term(NamedTuple):
    """Counts of tokens between two layers, or inside one (a = b)."""

    a: int  # index of a layer
    b: int
    count_AB: np.ndarray  # int64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affinity:
    """The counts of a text in a model; ids of experts that compute nothing are out."""

    layers: tuple[Layer, ...]
    terms: tuple[Term, ...]
    load: tuple[np.ndarray, ...]  # int64[E] of each layer: kept slots of its experts
    tokens: int
    objective: str = "transitions"  # one of `OBJECTIVES`
    run: str = ""  # the run that was traced, and its step; for people
    step: int = 0
    base: str = ""  # `runs.base.base_hash` of its model; "": not known

    @property
    def total(self) -> int:
        """The number of pairs that are counted."""
        return sum(int(term.count_AB.sum()) for term in self.terms)

    def check(self, where) -> None:
        """Raise `ConfigError` if there is nothing to place by."""
        if not self.terms:
            raise ConfigError(
                f"{where}: the model has one MoE layer, and no token goes from one to "
                "the next; --by=coactivation places the experts of one layer."
            )
        if self.total == 0:
            pairs = "two experts of a layer"
            if self.objective == "transitions":
                pairs = "experts in two consecutive layers"
            raise ConfigError(f"{where}: no token has {pairs}; nothing to place by.")

    def same_layers(self, other: "Affinity") -> bool:
        """Tell whether another text was counted in a model with the same experts."""
        ours, theirs = (
            [(own.number, own.experts) for own in a.layers] for a in (self, other)
        )
        return ours == theirs

    def shuffled(self, seed: int) -> "Affinity":
        """The control without affinity: experts are as popular, and nothing else.

        Between layers it is the table of counts after the tokens of each layer were
        shuffled independently, drawn from its exact distribution. Within a layer it is
        the product of popularities, without chance.
        """
        rng = np.random.default_rng(seed)
        drawn = _table if self.objective == "transitions" else _product
        terms = [Term(a, b, drawn(count_AB, rng)) for a, b, count_AB in self.terms]
        return dataclasses.replace(self, terms=tuple(terms))

    def told(
        self, stored: Mapping[int, np.ndarray], blocks: Mapping[int, tuple[int, ...]]
    ) -> "Affinity":
        """The same with what a model tells of its layers, by their numbers.

        Args:
          stored: int[E], the set of weights of each expert, where they share; the sets
            are placed then, as they are what devices hold.
          blocks: as in `Layer`.
        """
        sets = [stored.get(own.number) for own in self.layers]
        sizes = [
            own.experts if of_E is None else int(of_E.max()) + 1
            for own, of_E in zip(self.layers, sets, strict=True)
        ]
        ones = [
            np.eye(size, dtype=np.int64)[np.arange(size) if of_E is None else of_E]
            for size, of_E in zip(sizes, sets, strict=True)
        ]
        terms = [Term(a, b, ones[a].T @ n @ ones[b]) for a, b, n in self.terms]
        load = [n_E @ one for n_E, one in zip(self.load, ones, strict=True)]
        layers = [
            Layer(own.number, size, blocks.get(own.number, ()))
            for own, size in zip(self.layers, sizes, strict=True)
        ]
        return dataclasses.replace(
            self, layers=tuple(layers), terms=tuple(terms), load=tuple(load)
        )


def _table(count_AB, rng) -> np.ndarray:
    """A table of counts with the same sums of rows and columns."""
    if not count_AB.any():
        return count_AB
    sums = (count_AB.sum(axis=1), count_AB.sum(axis=0))
    return stats.random_table(*sums).rvs(random_state=rng).astype(np.int64)


def _product(count_EE, rng) -> np.ndarray:
    """Counts of pairs of different experts in proportion to how often each is in one.

    Args:
      rng: not used.
    """
    share_E = count_EE.sum(axis=0) + count_EE.sum(axis=1)
    product_EE = np.triu(np.outer(share_E, share_E), 1)
    scale = count_EE.sum() / max(product_EE.sum(), 1)
    return np.rint(product_EE * scale).astype(np.int64)


def _layers(infos: list[LayerInfo]) -> tuple[Layer, ...]:
    sizes = {info.layer: info.num_experts for info in infos}
    return tuple(Layer(number, E) for number, E in sorted(sizes.items()))


def read(file, *, objective: str = "transitions", every: int = 0):
    """The affinity of a trace, or of recorded sums (.npz).

    Args:
      file: of `moex trace`.
      objective: one of `OBJECTIVES`.
      every: every so many examples of a trace one is held out; 0: none.

    Returns:
      (of the text, of what is held out or None).

    Raises:
      ConfigError: if the file cannot be read, or does not hold this.
    """
    require_choice("--by", objective, OBJECTIVES)
    if str(file).endswith(".npz"):
        return of_sums(Sums.read(file), objective), None
    with Trace.open(file) as trace:
        found = of_trace(trace, objective=objective, every=every)
    return found


def of_sums(sums: Sums, objective: str = "transitions") -> Affinity:
    """The affinity of recorded sums.

    Raises:
      ConfigError: for the affinity within layers, which sums do not have.
    """
    if objective != "transitions":
        raise ConfigError(
            f"--by = {objective!r}: sums do not count pairs of experts within a layer; "
            "give a trace."
        )
    routers = list(sums.layers.values())
    layers = _layers([own.info for own in routers])
    index = {own.number: i for i, own in enumerate(layers)}
    load = [np.zeros(own.experts, np.int64) for own in layers]
    for own in routers:
        load[index[own.layer]] += own.count_E[: own.info.num_experts].astype(np.int64)
    terms = []
    for own, after in itertools.pairwise(routers):
        assert own.transitions_AB is not None
        a, b = own.info.num_experts, after.info.num_experts
        count_AB = own.transitions_AB[:a, :b].astype(np.int64)
        terms.append(Term(index[own.layer], index[after.layer], count_AB))
    return Affinity(
        layers=layers,
        terms=tuple(terms),
        load=tuple(load),
        tokens=sums.tokens,
        run=sums.run,
        step=sums.step,
        base=sums.base,
    )


def of_trace(
    trace: Trace, *, objective: str = "transitions", every: int = 0
) -> tuple[Affinity, Affinity | None]:
    """The affinity of a trace, and that of the examples that are held out.

    Args:
      objective: one of `OBJECTIVES`.
      every: every so many examples one is held out, the last of them; 0: none.

    Raises:
      ConfigError: if one of the two parts would be empty.
    """
    infos = list(trace.layers.values())
    parts = [_Counts(infos, objective) for _ in range(2 if every else 1)]
    for chunk in trace.chunks(values=("gate",)):
        held_N = np.zeros(len(chunk.tokens), bool)
        if every:
            held_N = held_out(chunk.tokens.example_N, every)
        for part, own_N in zip(parts, (~held_N, held_N), strict=False):
            part.add(chunk.layers, own_N)
    for part, name in zip(parts, ("to place by", "held out"), strict=False):
        if part.tokens == 0:
            raise ConfigError(
                f"{trace.path}: no example is {name} if one of {every} is held out; "
                "give a longer trace, or another one as --held-out."
            )
    made = [part.affinity(trace.header.run, trace.header.step) for part in parts]
    return made[0], (made[1] if every else None)


def held_out(example_N, every: int) -> np.ndarray:
    """bool[N]: tokens of the examples that are held out, one of `every`."""
    return np.asarray(example_N) % every == every - 1


class _Counts:
    """The counts of one part of a trace."""

    def __init__(self, infos: list[LayerInfo], objective: str):
        self.infos, self.objective, self.tokens = infos, objective, 0
        self.layers = _layers(infos)
        self.index = {own.number: i for i, own in enumerate(self.layers)}
        self.load = [np.zeros(own.experts, np.int64) for own in self.layers]
        pairs: list[tuple[LayerInfo, LayerInfo]] = list(itertools.pairwise(infos))
        if objective == "coactivation":
            pairs = [(info, info) for info in infos]
        self.pairs = pairs
        self.counts = [np.zeros((a.num_experts, b.num_experts), int) for a, b in pairs]

    def add(self, layers, own_N) -> None:
        """Count the tokens of `own_N` of a chunk."""
        self.tokens += int(own_N.sum())
        slots, tops = {}, {}
        for info in self.infos:
            own, E = layers[info.label], info.num_experts
            expert_NK, gate_NK = own.expert_NK[own_N], own.gate_NK[own_N]
            real_NK = own.keep_NK[own_N] & (expert_NK < E)
            self.load[self.index[info.layer]] += load_counts(expert_NK, real_NK, E)
            slots[info.label] = expert_NK, real_NK
            if self.objective == "transitions":
                top_N = top_expert(expert_NK, own.keep_NK[own_N], gate_NK)
                tops[info.label] = np.where(top_N < E, top_N, -1)
        for (a, b), count_AB in zip(self.pairs, self.counts, strict=True):
            sizes = count_AB.shape
            if self.objective == "transitions":
                count_AB += top_pair_counts(tops[a.label], tops[b.label], *sizes)
            else:
                both_EE = pair_counts(*slots[a.label], *slots[a.label], *sizes)
                count_AB += np.triu(both_EE, 1)

    def affinity(self, run: str, step: int) -> Affinity:
        """The counts."""
        pairs = zip(self.pairs, self.counts, strict=True)
        at = self.index
        terms = [Term(at[a.layer], at[b.layer], n) for (a, b), n in pairs]
        return Affinity(
            layers=self.layers,
            terms=tuple(terms),
            load=tuple(self.load),
            tokens=self.tokens,
            objective=self.objective,
            run=run,
            step=step,
        )


def devices_per_token(file, device_LE: Mapping[int, np.ndarray], every: int = 0):
    """The mean number of devices that a token's experts of a router are on.

    In ordinary expert parallelism a token sends one row to each of them.

    Args:
      file: a trace.
      device_LE: the device of each expert, by number of the layer.
      every: as in `of_trace`.

    Returns:
      (of the text, of what is held out or NaN).
    """
    sums, counts = np.zeros(2), np.zeros(2)
    with Trace.open(pathlib.Path(file)) as trace:
        for chunk in trace.chunks(values=()):
            example_N = chunk.tokens.example_N
            part_N = held_out(example_N, every) if every else np.zeros(len(example_N))
            for info in trace.layers.values():
                slots, device_E = chunk.layers[info.label], device_LE[info.layer]
                real_NK = slots.keep_NK & (slots.expert_NK < info.num_experts)
                expert_NK = np.minimum(slots.expert_NK, info.num_experts - 1)
                P = int(device_E.max()) + 1
                hot_NP = np.zeros((len(example_N), P), bool)
                row_NK = np.broadcast_to(np.arange(len(hot_NP))[:, None], real_NK.shape)
                hot_NP[row_NK[real_NK], device_E[expert_NK[real_NK]]] = True
                sums += np.bincount(part_N.astype(int), hot_NP.sum(1), minlength=2)
                counts += np.bincount(part_N.astype(int), minlength=2)
    found = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return float(found[0]), float(found[1])
