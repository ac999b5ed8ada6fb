"""Scores of experts: for a task (PreMoe, REAP), and for given tokens (RICE).

N tokens · K slots per token · P experts of a token's pool · E experts · G tasks ·
M markers
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moex.analysis.sums import LayerSums
from moex.analysis.trace import Slots
from moex.config.base import ConfigError


def pool(slots: Slots, size: int | None = None) -> tuple[np.ndarray, ...]:
    """The experts of each token with the greatest logits: `(expert, logit, valid)_NP`.

    These are of all experts where the trace has their logits, else of the chosen ones.
    A router with a selection bias or groups may choose others than these.

    Args:
      size: P, the most experts per token; None: those that were chosen, at least 1.

    Raises:
      ValueError: if `size` is below 1, or above the slots of a trace without logits.
    """
    if slots.logits_NE is None:
        assert slots.logit_NK is not None
        expert_NC, valid_NC, logit_NC = slots.expert_NK, slots.keep_NK, slots.logit_NK
    else:
        logit_NC = slots.logits_NE
        expert_NC = np.broadcast_to(np.arange(logit_NC.shape[1]), logit_NC.shape)
        valid_NC = np.ones(logit_NC.shape, bool)
    most = logit_NC.shape[1]
    P = min(slots.expert_NK.shape[1], most) if size is None else size
    if not 1 <= P <= most:
        raise ValueError(
            f"a pool has 1 to {most} experts, not {P}; a trace with the logits of all "
            "experts (moex trace --logits) allows more."
        )
    # The sort is stable, so that among equal logits the first expert wins.
    order_NP = np.argsort(np.where(valid_NC, -logit_NC, np.inf), axis=1, kind="stable")
    order_NP = order_NP[:, :P]
    expert_NP, logit_NP, valid_NP = (
        np.take_along_axis(a, order_NP, axis=1) for a in (expert_NC, logit_NC, valid_NC)
    )
    if size is None and slots.logits_NE is not None:
        chosen_N1 = slots.keep_NK.sum(axis=1)[:, None]
        valid_NP = valid_NP & (np.arange(P) < chosen_N1)
    return expert_NP, logit_NP, valid_NP


def pool_probs(logit_NP, valid_NP) -> np.ndarray:
    """float64[N, P]: softmax over the pool of each token; 0 where not valid."""
    logit_NP = np.where(valid_NP, np.asarray(logit_NP, np.float64), -np.inf)
    top_N1 = np.max(logit_NP, axis=1, keepdims=True)
    top_N1 = np.where(np.isfinite(top_N1), top_N1, 0.0)
    exp_NP = np.exp(logit_NP - top_N1)
    return exp_NP / np.maximum(exp_NP.sum(axis=1, keepdims=True), 1e-300)


def threshold_sums(logit_NP, valid_NP, group_N, num_groups) -> np.ndarray:
    """float64[G]: sums of the greatest probability in a token's pool.

    Divided by the tokens of a task this is its adaptive threshold, for PEU.
    """
    top_N = pool_probs(logit_NP, valid_NP).max(axis=1)
    return np.bincount(group_N, top_N, minlength=num_groups)


def score_sums(
    expert_NP,
    logit_NP,
    valid_NP,
    group_N,
    num_groups,
    num_experts,
    *,
    threshold_G=None,
    positive=False,
) -> np.ndarray:
    """float64[G, E]: selection scores of each expert, summed over the tokens of a task.

    The score of an expert for a token is its logit where it is in the pool with a
    probability of at least the threshold, else 0. Over the number of tokens of the task
    (all of them) it is TCESS, the task-conditioned expected selection score; with
    `positive` and the adaptive threshold it is PEU, the predicted expert utility.

    Args:
      expert_NP, logit_NP, valid_NP: from `pool`.
      group_N: the task of each token, in [0, num_groups).
      threshold_G: threshold of each task; None: no threshold.
      positive: scores are max(s, sigmoid(s)) of the logit s, so that a chosen expert
        never scores below one that was not.

    Source: PreMoe, arXiv:2505.17639: version 1 (TCESS), version 3 (PEU, section 3.2).
    """
    score_NP = np.asarray(logit_NP, np.float64)
    counted_NP = np.asarray(valid_NP)
    if threshold_G is not None:
        limit_N1 = np.asarray(threshold_G)[group_N][:, None]
        # By rounding, a mean of equal numbers may lie slightly above them.
        limit_N1 = limit_N1 * (1 - 1e-12)
        counted_NP = counted_NP & (pool_probs(logit_NP, valid_NP) >= limit_N1)
    if positive:
        score_NP = np.maximum(score_NP, 0.5 * (1 + np.tanh(0.5 * score_NP)))
    key_NP = np.asarray(group_N, np.int64)[:, None] * num_experts + expert_NP
    size = num_groups * num_experts
    sums = np.bincount(key_NP[counted_NP], score_NP[counted_NP], minlength=size)
    return sums.reshape(num_groups, num_experts)


def npmi(hits_ME, markers_M, load_E, tokens: int) -> np.ndarray:
    """float64[M, E]: how much an expert and a marker go together, in [-1, 1].

    Normalised pointwise mutual information: 1 if the expert is chosen at the marker
    and nowhere else, 0 if they are independent, -1 if never together. An expert that
    fired once, by luck at the marker, scores high too: look at `hits_ME`. NaN for
    markers that do not occur.

    Args:
      hits_ME: occurrences of each marker at which an expert is chosen.
      markers_M: occurrences of each marker.
      load_E: tokens at which an expert is chosen.

    Source: RICE, arXiv:2505.14681.
    """
    hits_ME = np.asarray(hits_ME, np.float64)
    markers_M1 = np.asarray(markers_M, np.float64)[:, None]
    load_E = np.asarray(load_E, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pointwise_ME = np.log(hits_ME / markers_M1) + np.log(tokens / load_E)
        out_ME = pointwise_ME / np.log(tokens / hits_ME)
    out_ME = np.where(hits_ME == 0, -1.0, out_ME)
    # If both occur at every token, -log P(both) is 0, and nPMI would be 0 / 0.
    out_ME = np.where(hits_ME == tokens, 1.0, out_ME)
    return np.where(markers_M1 == 0, np.nan, np.clip(out_ME, -1.0, 1.0))


def combined_npmi(
    hits_ME,
    markers_M,
    load_E,
    tokens: int,
    *,
    weight_M: Sequence[float],
    support_M: Sequence[float],
) -> np.ndarray:
    """float64[E]: the weighted sum of `npmi` over markers.

    It is -inf for an expert that has less than `support_M` of the occurrences of a
    marker with a weight above 0: it may have fired there once, by luck.

    Args:
      hits_ME, markers_M, load_E, tokens: as for `npmi`; every marker occurs.
      weight_M: such as 1 for "<think>" and -1 for "</think>".
      support_M: shares in [0, 1].

    Source: RICE, arXiv:2505.14681; the support is ours.
    """
    weight_M1 = np.asarray(weight_M, np.float64)[:, None]
    total_E = np.sum(weight_M1 * npmi(hits_ME, markers_M, load_E, tokens), axis=0)
    needed_M1 = (np.asarray(support_M) * np.asarray(markers_M))[:, None]
    lacks_ME = (np.asarray(hits_ME) < needed_M1) & (weight_M1 > 0)
    return np.where(lacks_ME.any(axis=0), -np.inf, total_E)


def risk_difference(load_E, tokens: int, other_E, other_tokens: int) -> np.ndarray:
    """float64[E]: the share of tokens that have an expert, less that in another text.

    The texts are prompts in pairs, with and without a behaviour: an expert above 0 goes
    with it, one below 0 with its absence.

    Source: SteerMoE, arXiv:2509.09660.
    """
    return np.asarray(load_E) / max(tokens, 1) - np.asarray(other_E) / max(
        other_tokens, 1
    )


def logit_similarity(gram_EE) -> np.ndarray:
    """float64[E, E]: (cosine + 1) / 2 of the router logits of two experts, in [0, 1].

    It is 0.5 for an expert whose logits are all 0.

    Args:
      gram_EE: sums of z z^T over tokens, with logits z.

    Source: M-SMoE, arXiv:2310.01334.
    """
    gram_EE = np.asarray(gram_EE, np.float64)
    norm_E = np.sqrt(np.maximum(np.diagonal(gram_EE), 0))
    size_EE = norm_E[:, None] * norm_E
    cosine_EE = np.divide(
        gram_EE, size_EE, out=np.zeros_like(gram_EE), where=size_EE > 0
    )
    return (np.clip(cosine_EE, -1, 1) + 1) / 2


class Ranked(NamedTuple):
    """An expert and its score."""

    layer: int
    expert: int
    score: float


def best(score_by_layer: Mapping[int, np.ndarray], count: int) -> list[Ranked]:
    """The `count` experts of highest score in all layers; of equals the first.

    Raises:
      ConfigError: if so few experts have a finite score.
    """
    every = [
        Ranked(layer, e, float(score))
        for layer, score_E in sorted(score_by_layer.items())
        for e, score in enumerate(score_E)
        if np.isfinite(score)
    ]
    if count > len(every):
        raise ConfigError(
            f"{count} experts are asked for, and {len(every)} have a score: lower the "
            "support that is asked for, or their number."
        )
    return sorted(every, key=lambda one: -one.score)[:count]


def _frequency(sums: LayerSums) -> np.ndarray:
    return sums.count_E / max(sums.slots, 1)


def _reap(sums: LayerSums) -> np.ndarray:
    return sums.gate_norm_E / np.maximum(sums.count_E, 1)


def _mean(name: str) -> Callable[[LayerSums], np.ndarray]:
    return lambda sums: getattr(sums, name) / max(sums.tokens, 1)


# Scores of the experts of a layer from its sums, float64[E]; the higher, the more an
# expert matters.
#   frequency: its share of the kept slots.
#   tcess, peu: PreMoe, see `score_sums`.
#   all_logits: its mean logit.
#   reap: the mean of gate times norm of its answer, over the tokens that have it; gates
#     are divided by their sum (REAP, arXiv:2510.13999, and its note of 2026-03).
SCORES: dict[str, Callable[[LayerSums], np.ndarray]] = {
    "frequency": _frequency,
    "tcess": _mean("tcess_E"),
    "peu": _mean("peu_E"),
    "all_logits": _mean("logit_E"),
    "reap": _reap,
}
