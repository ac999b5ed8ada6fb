"""Statistics of routing: counts that add over the chunks of a trace, and figures.

The same idea as `moe/metrics.py`: counts of parts of a trace may be added, figures may
not, and every figure is made from counts. Pure functions on numpy arrays.

N tokens · K slots per token · E experts (zero-computation ones included) · G groups
(domains, buckets of positions, token ids) · A, B experts of two layers or rounds
"""

import numpy as np

# Counts of parts of a trace, which may be added.


def multi_hot(expert_NK, keep_NK, num_experts) -> np.ndarray:
    """float32[N, E]: 1 where an expert has a kept slot of a token, else 0."""
    hot_NE = np.zeros((len(expert_NK), num_experts), np.float32)
    row_NK = np.broadcast_to(np.arange(len(expert_NK))[:, None], expert_NK.shape)
    hot_NE[row_NK[keep_NK], expert_NK[keep_NK]] = 1.0
    return hot_NE


def load_counts(expert_NK, keep_NK, num_experts) -> np.ndarray:
    """int64[E]: kept slots of each expert."""
    return np.bincount(expert_NK[keep_NK], minlength=num_experts)


def group_counts(group_N, num_groups, expert_NK, keep_NK, num_experts) -> np.ndarray:
    """int64[G, E]: kept slots of each expert from tokens of each group.

    Args:
      group_N: int in [0, num_groups).
    """
    at = (num_groups, num_experts)
    key_NK = group_N[:, None].astype(np.int64) * num_experts + expert_NK
    return np.bincount(key_NK[keep_NK], minlength=at[0] * at[1]).reshape(at)


def position_bucket(position_N) -> np.ndarray:
    """int64[N] bucket of positions: 0 | 1 | 2, 3 | 4 to 7 | ..., doubling."""
    return np.frexp(np.asarray(position_N, np.float64))[1].astype(np.int64)


def bucket_label(bucket: int) -> str:
    """The positions of a bucket for people, such as "4-7"."""
    first, last = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
    return str(first) if first == last else f"{first}-{last}"


def pair_counts(
    expert_NK, keep_NK, other_NJ, keep_NJ, num_a: int, num_b: int
) -> np.ndarray:
    """int64[A, B]: tokens that have expert a in one layer and b in another.

    For a layer with itself this is the co-activation: it is symmetric, and its
    diagonal is the load.
    """
    counts = np.zeros(num_a * num_b, np.int64)
    # `bincount` is used, not a product of multi-hot matrices: few entries are 1, and
    # the threads of a matrix product wait for each other where cores are busy.
    used_J = keep_NJ.any(axis=0)
    other_NJ, keep_NJ = other_NJ[:, used_J], keep_NJ[:, used_J]
    for k in np.flatnonzero(keep_NK.any(axis=0)):
        key_NJ = expert_NK[:, k, None] * num_b + other_NJ
        both_NJ = keep_NK[:, k, None] & keep_NJ
        if not both_NJ.all():
            key_NJ = key_NJ[both_NJ]
        counts += np.bincount(key_NJ.reshape(-1), minlength=len(counts))
    return counts.reshape(num_a, num_b)


def top_expert(expert_NK, keep_NK, gate_NK) -> np.ndarray:
    """int64[N]: the kept expert with the greatest gate, the first of equals; else -1.

    It is not always in the first slot: a selection bias reorders slots.
    """
    gate_NK = np.where(keep_NK, gate_NK, -np.inf)
    slot_N1 = np.argmax(gate_NK, axis=1)[:, None]
    top_N = np.take_along_axis(expert_NK, slot_N1, axis=1)[:, 0].astype(np.int64)
    return np.where(keep_NK.any(axis=1), top_N, -1)


def top_pair_counts(top_NA, top_NB, num_a, num_b) -> np.ndarray:
    """int64[A, B]: tokens by their top experts in two layers; -1 is left out.

    Args:
      top_NA, top_NB: int[N], from `top_expert`.
    """
    both_N = (top_NA >= 0) & (top_NB >= 0)
    key_N = top_NA[both_N] * num_b + top_NB[both_N]
    return np.bincount(key_N, minlength=num_a * num_b).reshape(num_a, num_b)


def size_counts(expert_NK, keep_NK, num_experts, group_N, num_groups) -> np.ndarray:
    """int64[G, K + 1]: tokens of each group that use 0, 1, ... K experts that compute.

    Args:
      num_experts: experts that compute; ids from here on are free and not counted.
    """
    K = expert_NK.shape[1]
    used_N = np.sum(keep_NK & (expert_NK < num_experts), axis=1)
    key_N = group_N.astype(np.int64) * (K + 1) + used_N
    counts = np.bincount(key_N, minlength=num_groups * (K + 1))
    return counts.reshape(num_groups, K + 1)


def overlap_sums(hot_NE, other_NE, group_N, num_groups) -> np.ndarray:
    """float64[G, 2]: summed overlaps of two choices, and the tokens that were compared.

    The overlap of a token is |A & B| / max(|A|, |B|), with A and B its experts here and
    there: |A & B| / k where both have k. Tokens without experts in both are left out.
    """
    both_N = np.sum(hot_NE * other_NE, axis=1)
    most_N = np.maximum(hot_NE.sum(axis=1), other_NE.sum(axis=1))
    any_N = most_N > 0
    overlap_N = np.where(any_N, both_N / np.maximum(most_N, 1), 0.0)
    sums = [np.bincount(group_N, w, minlength=num_groups) for w in (overlap_N, any_N)]
    return np.stack(sums, axis=1)


# Figures, made from counts.


def share(count, axis=None) -> np.ndarray:
    """float64: counts over their sum along `axis` (None: all); 0 where that is 0."""
    return _ratio(count, np.sum(count, axis=axis, keepdims=True))


def _ratio(part, whole) -> np.ndarray:
    """float64: `part / whole`, of the shape of `part`; 0 where `whole` is 0."""
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=np.greater(whole, 0))


def specialisation(count_GE, tokens_G) -> np.ndarray:
    """float64[G, E]: share of the tokens of a group that an expert gets; P(e | group).

    Rows sum to the experts per token; an expert that does not care has the same figure
    everywhere, and k / E if routing is uniform (`uniform_share`). 0 for empty groups.

    Source: OLMoE, arXiv:2409.02060, section 5: domain specialisation with domains as
    groups, vocabulary specialisation with token ids.
    """
    return _ratio(count_GE, np.asarray(tokens_G, np.float64)[:, None])


def uniform_share(count_GE, tokens_G) -> float:
    """The value of `specialisation` under uniform routing, everywhere k / E."""
    return float(np.sum(count_GE) / max(np.sum(tokens_G), 1) / count_GE.shape[1])


def mutual_information(count_AB) -> float:
    """Nats that a row and a column tell of each other; 0 if they are independent.

    Counts of n slots overestimate it by about (A - 1) (B - 1) / (2 n).
    """
    joint_AB = share(count_AB)
    product_AB = joint_AB.sum(axis=1, keepdims=True) * joint_AB.sum(axis=0)
    seen_AB = joint_AB > 0
    ratio = joint_AB[seen_AB] / product_AB[seen_AB]
    return max(float(np.sum(joint_AB[seen_AB] * np.log(ratio))), 0.0)


def entropy(count_E) -> float:
    """Nats of the distribution that counts describe."""
    share_E = share(count_E)
    return float(-np.sum(share_E * np.log(np.where(share_E > 0, share_E, 1.0))))


def load_figures(load_E) -> dict[str, float]:
    """Figures of how even a load is.

    Returns:
      max_violation: greatest load over its mean, minus 1; 0 is balanced.
      dead_frac: share of experts without a slot.
      effective_frac: exp(entropy of the load) / E; 1 is balanced.
    """
    share_E = share(load_E)
    violation = float(share_E.max() * len(share_E) - 1) if any(load_E) else 0.0
    return {
        "max_violation": violation,
        "dead_frac": float(np.mean(np.asarray(load_E) == 0)),
        "effective_frac": float(np.exp(entropy(load_E)) / len(share_E)),
    }


def coactivation(count_EE) -> np.ndarray:
    """float64[E, E]: P(j | i), the share of expert i's tokens that j has too.

    The diagonal is 1, and 0 for experts without tokens.

    Source: OLMoE, arXiv:2409.02060, section 5.2.
    """
    return _ratio(count_EE, np.diagonal(count_EE)[:, None])


def affinity(count_AB) -> np.ndarray:
    """float64[A, B]: P(b in one layer | a in the layer before); 0 rows if a is unused.

    With counts of top experts this is the ExFlow statistic; with counts of all slots
    the share of pairs, whose rows sum to 1 too.

    Source: ExFlow, arXiv:2401.08383.
    """
    return share(count_AB, axis=1)


def predictability(count_AB) -> dict[str, float]:
    """Figures of how well the expert of a token predicts its next expert.

    Returns:
      given: share of tokens whose next expert is the most frequent one after theirs.
      blind: the same without knowing theirs: the load of the most used expert.
      information: nats of `mutual_information`.
    """
    total = max(int(np.sum(count_AB)), 1)
    return {
        "given": float(np.max(count_AB, axis=1, initial=0).sum() / total),
        "blind": float(np.max(np.sum(count_AB, axis=0), initial=0) / total),
        "information": mutual_information(count_AB),
    }


def repeats(pair_EE, load_E) -> float:
    """Share of the slots of one round of a chain whose expert the next one takes too.

    Args:
      pair_EE: from `pair_counts` of two rounds.
      load_E: the load of the first round.
    """
    return float(np.trace(pair_EE) / max(np.sum(load_E), 1))


def size_figures(count_K) -> dict[str, float]:
    """Mean and deviation of experts per token, from a row of `size_counts`."""
    size_K, share_K = np.arange(len(count_K)), share(count_K)
    mean = float(np.sum(share_K * size_K))
    return {"mean": mean, "std": float(np.sum(share_K * (size_K - mean) ** 2) ** 0.5)}


def vocabulary_figures(count_VE, tokens_V, rows: int) -> dict[str, np.ndarray]:
    """Figures of how far token ids decide the experts of one layer, and which ids do.

    Returns:
      specialisation_E: float64, the mean of P(e | id) over the expert's own slots:
        k / E under uniform routing, 1 if all occurrences of its tokens go to it; NaN
        for experts without any.
      slots_E: int64, the slots that this is a mean over.
      id_ER: int32 rows of `count_VE` with the greatest P(e | id), -1 where there are
        fewer; more frequent ones first among equals. R = `rows`.
      share_ER: float64, their P(e | id); 0 where there is none.
      count_ER: int64, their slots at the expert.

    Args:
      count_VE: from `group_counts` with token ids as groups. Rare ids look special by
        chance and should be left out.
      tokens_V: occurrences of each.
      rows: how many ids for each expert.

    Source: the vocabulary specialisation of OLMoE, arXiv:2409.02060, section 5.
    """
    share_VE = specialisation(count_VE, tokens_V)
    slots_E = np.sum(count_VE, axis=0)
    mean_E = np.full(len(slots_E), np.nan)
    sums_E = np.sum(share_VE * count_VE, axis=0)
    np.divide(sums_E, slots_E, out=mean_E, where=slots_E > 0)
    R = min(rows, len(share_VE))
    order_RE = np.lexsort((-count_VE, -share_VE), axis=0)[:R]
    share_RE = np.take_along_axis(share_VE, order_RE, axis=0)
    id_RE = np.where(share_RE > 0, order_RE, -1).astype(np.int32)
    count_RE = np.take_along_axis(count_VE, order_RE, axis=0).astype(np.int64)
    missing = ((0, 0), (0, rows - R))
    return {
        "specialisation_E": mean_E,
        "slots_E": slots_E.astype(np.int64),
        "id_ER": np.pad(id_RE.T, missing, constant_values=-1),
        "share_ER": np.pad(share_RE.T, missing),
        "count_ER": np.pad(count_RE.T, missing),
    }


def saturation(sums_G2) -> np.ndarray:
    """float64[G]: mean overlap of two choices, from `overlap_sums`; 1: no change.

    It is about k / E for unrelated choices, and NaN without tokens.

    Source: OLMoE, arXiv:2409.02060, section 5.1.
    """
    sums_G2 = np.asarray(sums_G2, np.float64)
    out = np.full(len(sums_G2), np.nan)
    return np.divide(sums_G2[:, 0], sums_G2[:, 1], out=out, where=sums_G2[:, 1] > 0)
