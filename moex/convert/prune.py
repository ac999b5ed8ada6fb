"""Pruning: which experts of a layer stay.

Pure functions of numpy arrays and of sums. A whole model: `to_pruned.py`.

Source: Lu et al. 2025, arXiv:2505.17639 (PreMoe); Lasby et al. 2025, arXiv:2510.13999
(REAP).

E experts of a layer, without zero-computation ones
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from moex.analysis.scores import SCORES
from moex.analysis.sums import LayerSums
from moex.config.base import ConfigError


def by_layer(sums: Mapping[str, LayerSums]) -> dict[int, LayerSums]:
    """The sums of each layer: those of its router, or of all rounds of a chain.

    A chain has one set of experts, so what its rounds use is added up.
    """
    found = {}
    ordered = sorted(sums.values(), key=lambda own: (own.layer, own.round))
    for layer, rounds in itertools.groupby(ordered, key=lambda own: own.layer):
        first, *rest = rounds
        for own in rest:
            added = {
                name: getattr(first, name) + getattr(own, name)
                for name in ("tokens", *_BY_EXPERT)
            }
            first = dataclasses.replace(first, **added)
        found[layer] = first
    return found


_BY_EXPERT = tuple(
    f"{name}_E"
    for name in ("count", "gate", "norm", "gate_norm", "logit", "tcess", "peu")
)


def scores(parts: Sequence[LayerSums], score: str) -> np.ndarray:
    """float64[E]: the scores of the experts of a layer.

    Args:
      parts: the sums of each domain. Of several the scores are averaged: experts are
        ranked once for all domains, as the best of each domain may be needed by it
        alone.
      score: one of `SCORES`.
    """
    E = parts[0].info.num_experts
    mean_E = np.mean([SCORES[score](own)[:E] for own in parts], axis=0)
    if not np.isfinite(mean_E).all():
        e = int(np.argmin(np.isfinite(mean_E)))
        raise ConfigError(
            f"layer {parts[0].layer}: the {score} score of expert {e} is {mean_E[e]}."
        )
    return mean_E


def random_scores(seed: int, layer: int, num_experts: int) -> np.ndarray:
    """float64[E]: other numbers for each layer and seed."""
    return np.random.default_rng((seed, layer)).random(num_experts)


def ranked(score_E, count_E) -> list[int]:
    """The experts from the best to the worst.

    Among equal scores, such as 0 of experts that no token looked at, the more used one
    comes first; then the lowest.
    """
    score_E, count_E = np.asarray(score_E), np.asarray(count_E)
    return np.lexsort((np.arange(len(score_E)), -count_E, -score_E)).tolist()


def kept(order: Sequence[int], keep: int, parts: int = 1) -> tuple[int, ...]:
    """The best experts of an order, rising: equally many of each part.

    Args:
      order: all experts from the best to the worst.
      keep: how many stay, a multiple of `parts`.
      parts: neighbours that count together, such as the groups of a router.
    """
    size = len(order) // parts
    found = []
    for part in range(parts):
        own = [e for e in order if e // size == part]
        found += own[: keep // parts]
    return tuple(sorted(found))


def permutations(order_LE: Sequence[Sequence[int]]) -> list[list[int]]:
    """Maps from the experts of the first layer to those of equal rank in the others.

    Keeping the experts A of the first layer and their images keeps the best |A| of
    every layer, if A are the best of the first one. Layers have equal E.

    Args:
      order_LE: the experts of each layer, from the best to the worst.

    Source: the code of PreMoe, `build_logits_permutations`.
    """
    first, *rest = order_LE
    rank = {e: r for r, e in enumerate(first)}
    return [[order[rank[e]] for e in range(len(first))] for order in rest]
