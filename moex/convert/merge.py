"""Merging experts: which experts of a layer become one, and how many groups it gets.

Pure functions of numpy arrays, in float64. The weights of the experts: `align.py`; a
whole model: `to_merged.py`.

Source: Li et al. 2024, arXiv:2310.01334 (M-SMoE), and its code (grouping_mixtral.py);
Jha et al. 2026, arXiv:2604.04356 (REAM), and its code (ream.py).

L layers · E experts of a layer, which may differ between layers
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

EPS = 1e-7  # the least norm of a vector in a cosine: that of zeros is 0 with all others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Used:
    """How the experts of a layer are used: sums over tokens, and rounds of a chain."""

    tokens: int  # that the sums are over
    count_E: np.ndarray  # slots of each expert
    gram_EE: np.ndarray  # sums of z z^T of the raw router logits z
    # Sums of gate * |f_e(x)| over the tokens of each expert, gates divided by their sum
    # over the slots of a token.
    gate_norm_E: np.ndarray
    # Products of the outputs of every two experts: means of f_i(x) f_j(x) over the
    # same tokens; from a file of sums those of the mean outputs.
    output_gram_EE: np.ndarray
    # The rest is None from a file of sums. Sums of g g^T of the gates g, 0 where not
    # chosen.
    gate_gram_EE: np.ndarray | None = None
    # Products of the mean inputs of every two experts, each over its own tokens.
    input_gram_EE: np.ndarray | None = None
    # Only if they are asked for: products of gradients of the loss by the weights of
    # every two experts; and the error of merging these two, per token of the layer.
    gradient_gram_EE: np.ndarray | None = None
    merge_error_EE: np.ndarray | None = None

    def reap(self) -> np.ndarray:
        """The mean of gate * |f_e(x)| over the tokens of each expert; 0 for none.

        Source: Lasby et al. 2025, arXiv:2510.13999.
        """
        return self.gate_norm_E / np.maximum(self.count_E, 1)


def usage(count_E) -> np.ndarray:
    """The share of the slots that each expert got; 0 for all where there is none."""
    count_E = np.asarray(count_E, np.float64)
    return count_E / max(count_E.sum(), 1.0)


def similarity(gram_EE) -> np.ndarray:
    """(cos + 1) / 2 of vectors, in [0, 1], from the products of every two of them.

    Args:
      gram_EE: the products of vectors, such as the router logits of each expert for
        all tokens; raw logits, not centred.
    """
    gram_EE = np.asarray(gram_EE, np.float64)
    norm_E = np.sqrt(np.maximum(np.diag(gram_EE), EPS**2))
    return (np.clip(gram_EE / np.outer(norm_E, norm_E), -1, 1) + 1) / 2


def by_rank(score_E) -> list[int]:
    """The experts by falling score; ties to the lowest expert."""
    return np.argsort(-np.asarray(score_E), kind="stable").tolist()


def adaptive_groups(usages: Sequence[np.ndarray], groups: int) -> list[int]:
    """The groups of each layer, `groups` on average: much used experts stay apart.

    The largest usage of each layer counts as 1, so that each layer has a group. With a
    budget of B groups in all, the B-th value from 0, by falling usage in all layers, is
    the threshold: experts above it are dominant. So far it is the rule of the authors'
    code. Where experts tie with the threshold, fewer than B are above it: with equal
    usage everywhere only one in each layer. We fill the budget with those that tie, in
    rounds over the layers, so that each layer gets as many as the others.

    Args:
      usages: of each layer, from `usage`.
      groups: the mean over the layers, at least 1.
    """
    values = [np.array(usage_E, np.float64) for usage_E in usages]
    for value_E in values:
        value_E[np.argmax(value_E)] = 1.0
    falling = np.sort(np.concatenate(values))[::-1]
    budget = min(groups * len(values), len(falling))
    threshold = falling[min(budget, len(falling) - 1)]
    counts = [int(np.sum(value_E > threshold)) for value_E in values]
    ties = [int(np.sum(value_E == threshold)) for value_E in values]
    # The k-th of a layer that tie comes in round k.
    rounds = [(k, layer) for layer, count in enumerate(ties) for k in range(count)]
    for _, layer in sorted(rounds)[: budget - sum(counts)]:
        counts[layer] += 1
    return counts


def nearest_groups(
    score_E, similarity_EE, num_groups: int, largest: int | None = None
) -> list[list[int]]:
    """Groups around the experts with the highest scores, which come first in theirs.

    The others, by falling score, join the dominant expert that is most similar to
    them; ties go to the one with the higher score.

    Args:
      largest: the most experts of a group; others look for the next group. None: any.
    """
    order = by_rank(score_E)
    groups = [[dominant] for dominant in order[:num_groups]]
    for expert in order[num_groups:]:
        room = [g for g in groups if largest is None or len(g) < largest]
        near = [similarity_EE[expert, g[0]] for g in room]
        room[int(np.argmax(near))].append(expert)
    return groups


def greedy_groups(
    score_E, similarity_EE, num_groups: int, largest: int
) -> list[list[int]]:
    """Groups as REAM forms them: dominant experts, by falling score, take their like.

    Each takes the experts that are most similar to it, up to `largest` in a group, of
    those that nobody took. So the first groups are large, and most experts stay alone.
    """
    order = by_rank(score_E)
    groups = [[dominant] for dominant in order[:num_groups]]
    rest = sorted(order[num_groups:])
    for group in groups:
        nearest = by_rank([similarity_EE[group[0], e] for e in rest])
        group += [rest[i] for i in nearest[: largest - 1]]
        rest = [rest[i] for i in sorted(nearest[largest - 1 :])]
    assert not rest, "too small groups: check num_groups * largest first"
    return groups


def error_bound(i: int, j: int, gate_gram_EE, output_gram_EE, num_tokens: int) -> float:
    """The least mean square error of merging two experts, whatever the merged one is.

    One expert h in place of f_i and f_j gives (g_i + g_j) h for g_i f_i + g_j f_j. With
    r = g_i / (g_i + g_j) the best h = a f_i + (1 - a) f_j has the error
    E[(g_i + g_j)^2] Var[r] |f_i - f_j|^2, where r is weighted by (g_i + g_j)^2 and the
    outputs are taken as independent of the gates. So it is 0 only where the gates of
    the two always have the same ratio.

    Source: Lasby et al. 2025, arXiv:2510.13999 (REAP), section 3.

    Args:
      gate_gram_EE: sums over tokens of g_i g_j, 0 where an expert is not chosen.
      output_gram_EE: means over tokens of the products of outputs f_i(x) f_j(x).
      num_tokens: of the sums.
    """
    g, f = np.asarray(gate_gram_EE, np.float64), np.asarray(output_gram_EE, np.float64)
    both = g[i, i] + 2 * g[i, j] + g[j, j]  # sum of (g_i + g_j)^2
    if both <= 0 or num_tokens < 1:
        return 0.0
    spread = g[i, i] - (g[i, i] + g[i, j]) ** 2 / both
    distance = f[i, i] - 2 * f[i, j] + f[j, j]
    return float(max(spread, 0.0) / num_tokens * max(distance, 0.0))
