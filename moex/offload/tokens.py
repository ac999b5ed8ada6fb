"""Which sequences decode together, so that a batch needs few distinct experts.

The sequences of two batches are divided anew into two, those with like experts
together: two clusters around medoids (ExpertFlow, arXiv:2410.17954). Nothing that a
sequence computes depends on the others, so that its text stays the same.

T sequences · L layers · E experts
"""

import numpy as np

from moex.config.base import ConfigError, require

ROUNDS = 30  # of assigning and choosing medoids again


def similarity(pattern_TLE) -> np.ndarray:
    """1 - Hamming distance / (L * E) of each pair of patterns, float64[T, T]."""
    bits_TM = _bits(pattern_TLE).astype(np.float64)
    differ_TT = bits_TM @ (1 - bits_TM).T
    return 1 - (differ_TT + differ_TT.T) / max(bits_TM.shape[1], 1)


def distinct(pattern_TLE, rows, slots: int = 0) -> int:
    """How many experts some sequences need together, beyond `slots` in each layer."""
    pattern_TLE = np.asarray(pattern_TLE)
    if not len(rows):
        return 0
    active_L = pattern_TLE[np.asarray(rows)].any(0).sum(-1)
    return int(np.maximum(0, active_L - slots).sum())


def divide(
    pattern_TLE,
    first: int | None = None,
    *,
    slots: int = 0,
    seed: int = 0,
    restarts: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """Divide sequences into two batches that need few distinct experts.

    The result needs no more than the order of arrival does: the best of all that was
    found is kept, and arrival is among it.

    Args:
      pattern_TLE: bool; the experts that each sequence will need. A sequence that has
        ended needs none.
      first: sequences of the first batch; None: half of them, rounded up.
      slots: resident experts of a layer, which cost nothing.
      seed: of the first medoids.
      restarts: how often to begin with other medoids.

    Returns:
      The sequences of each batch, ascending.
    """
    pattern_TLE = np.asarray(pattern_TLE)
    T = len(_bits(pattern_TLE))
    first = (T + 1) // 2 if first is None else first
    require(0 <= first <= T, "first", first, f"from 0 to {T}, the sequences")
    require(slots >= 0, "slots", slots, "0 or more")
    best = np.arange(first), np.arange(first, T)
    if not 0 < first < T:
        return best
    cost = sum(distinct(pattern_TLE, rows, slots) for rows in best)
    rng, like_TT = np.random.default_rng(seed), similarity(pattern_TLE)
    for _ in range(restarts):
        in_first_T = _cluster(like_TT, first, rng)
        found = np.flatnonzero(in_first_T), np.flatnonzero(~in_first_T)
        needed = sum(distinct(pattern_TLE, rows, slots) for rows in found)
        if needed < cost:
            best, cost = found, needed
    return best


def _cluster(like_TT: np.ndarray, first: int, rng) -> np.ndarray:
    """Two clusters around medoids; returns who is in the first one, bool[T]."""
    T = len(like_TT)
    one = int(rng.integers(T))
    # The second medoid is the sequence that is least like the first.
    others_T = np.where(np.arange(T) == one, np.inf, like_TT[one])
    medoids = one, int(others_T.argmin())
    before: list[np.ndarray] = []
    in_first_T = np.zeros(T, bool)
    for _ in range(ROUNDS):
        in_first_T = _balanced(like_TT, medoids, first)
        if any((in_first_T == seen).all() for seen in before):
            break
        before.append(in_first_T)
        medoids = _medoid(like_TT, in_first_T), _medoid(like_TT, ~in_first_T)
    return in_first_T


def _balanced(like_TT, medoids: tuple[int, int], first: int) -> np.ndarray:
    """Each sequence with the medoid that it is more like; the first gets `first`.

    Where a cluster is too large, those stay that are most like its own medoid.
    """
    one_T, two_T = like_TT[medoids[0]], like_TT[medoids[1]]
    in_first_T = one_T >= two_T
    in_first_T[medoids[1]] = False  # of equal patterns, one each
    in_first_T[medoids[0]] = True
    sizes = first, len(like_TT) - first
    for here_T, own_T, size in zip(
        (in_first_T, ~in_first_T), (one_T, two_T), sizes, strict=True
    ):
        members = np.flatnonzero(here_T)
        if len(members) > size:
            order = members[np.argsort(-own_T[members], kind="stable")]
            here_T[order[size:]] = False
            return here_T if here_T is in_first_T else ~here_T
    return in_first_T


def _medoid(like_TT, here_T) -> int:
    """The member with the largest summed similarity to the members."""
    members = np.flatnonzero(here_T)
    return int(members[like_TT[np.ix_(members, members)].sum(1).argmax()])


def regrouped(
    steps: list[np.ndarray], patterns, batch: int, **options
) -> list[np.ndarray]:
    """The steps of a replay with every two batches divided anew at each step.

    Args:
      steps: from `in_step` with 2 * `batch` examples together.
      patterns: called with the rows of a step; gives bool[T, L, E].
      batch: the most rows of a step of the result.
      options: of `divide`.
    """
    found = []
    for rows in steps:
        first = min(batch, (len(rows) + 1) // 2)
        parts = divide(patterns(rows), first, **options) if len(rows) > batch else None
        for part in (np.arange(len(rows)),) if parts is None else parts:
            found.append(rows[part])
    return found


def _bits(pattern_TLE) -> np.ndarray:
    pattern_TLE = np.asarray(pattern_TLE)
    if pattern_TLE.ndim != 3 or pattern_TLE.dtype != bool:
        told = f"{pattern_TLE.dtype}{list(pattern_TLE.shape)}"
        raise ConfigError(f"patterns: must be bool[T, L, E], not {told}.")
    size = pattern_TLE.shape[1] * pattern_TLE.shape[2]
    return pattern_TLE.reshape(len(pattern_TLE), size)
