"""The token scheduler: fewer distinct experts, never more, and the same sequences."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.offload.routes import in_step
from moex.offload.tokens import distinct, divide, regrouped, similarity
from tests.offload.routes import random_routes


def patterns_of(rows):
    """Patterns of one layer, from words of bits."""
    return np.array([[[c == "1" for c in row]] for row in rows])


def needed(pattern, parts, slots=0):
    """Experts by loops: pairs of (layer, expert) of each batch, beyond the slots."""
    total = 0
    for rows in parts:
        for layer in range(pattern.shape[1]):
            active = {e for t in rows for e in np.flatnonzero(pattern[t, layer])}
            total += max(0, len(active) - slots)
    return total


def test_the_similarity_of_two_patterns():
    like = similarity(patterns_of(["1100", "1010"]))
    assert like.tolist() == [[1.0, 0.5], [0.5, 1.0]]


@st.composite
def patterns(draw):
    shape = draw(st.integers(0, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    bits = draw(st.lists(st.booleans(), min_size=int(np.prod(shape))))
    return np.array(bits[: int(np.prod(shape))], bool).reshape(shape)


@given(patterns(), st.integers(0, 9), st.integers(0, 3), st.integers(0, 3))
def test_sequences_are_divided_whole_and_no_worse_than_in_their_order(
    pattern, first, slots, seed
):
    total = len(pattern)
    first = min(first, total)
    parts = divide(pattern, first, slots=slots, seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(total))
    assert len(parts[0]) == first
    arrival = range(first), range(first, total)
    assert needed(pattern, parts, slots) <= needed(pattern, arrival, slots)
    for rows in parts:
        assert distinct(pattern, rows, slots) == needed(pattern, [rows], slots)
    again = divide(pattern, first, slots=slots, seed=seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


def planted(rng, size=8, layers=3, experts=16, used=4):
    """Sequences of two kinds with experts of their own, mixed."""
    kinds = rng.permutation([0] * size + [1] * size)
    pattern = np.zeros((2 * size, layers, experts), bool)
    for t, kind in enumerate(kinds):
        for layer in range(layers):
            own = rng.choice(experts // 2, used, replace=False) + kind * experts // 2
            pattern[t, layer, own] = True
    return pattern, kinds


def test_planted_clusters_are_found():
    found = 0
    for seed in range(100):
        pattern, kinds = planted(np.random.default_rng(seed))
        first, second = divide(pattern, seed=seed)
        found += len(set(kinds[first])) == 1 == len(set(kinds[second]))
    assert found >= 95


def test_small_batches_are_near_the_best_division():
    ours = least = arrival = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pattern = rng.random((8, 2, 12)) < 0.2
        ours += needed(pattern, divide(pattern, seed=seed))
        every = set(range(8))
        least += min(
            needed(pattern, (rows, every - set(rows)))
            for rows in itertools.combinations(range(8), 4)
        )
        arrival += needed(pattern, (range(4), range(4, 8)))
    assert least <= ours <= arrival - 0.5 * (arrival - least)


def test_equal_patterns_are_divided_and_the_search_ends():
    for row in ("1100", "0000"):
        parts = divide(patterns_of([row] * 6))
        assert [len(p) for p in parts] == [3, 3]


def test_odd_numbers_and_short_batches():
    pattern = patterns_of(["1000", "0001", "1000", "0001", "1000"])
    first, second = divide(pattern)
    assert first.tolist() == [0, 2, 4]
    assert second.tolist() == [1, 3]
    first, second = divide(pattern, 2)
    assert first.tolist() == [1, 3]
    assert [len(p) for p in divide(pattern[:1])] == [1, 0]
    assert [len(p) for p in divide(pattern[:0])] == [0, 0]


def test_sequences_that_have_ended_go_anywhere():
    pattern = patterns_of(["1000", "0000", "0001", "0000", "1000", "0001"])
    assert sum(distinct(pattern, rows) for rows in divide(pattern)) == 2


def test_resident_experts_cost_nothing():
    pattern = patterns_of(["1100", "0011"])
    assert distinct(pattern, [0, 1]) == 4
    assert distinct(pattern, [0, 1], slots=3) == 1
    assert distinct(pattern, [], slots=3) == 0


def test_bad_arguments_are_refused():
    pattern = patterns_of(["1100", "0011"])
    with pytest.raises(ConfigError, match="first = 3: must be from 0 to 2"):
        divide(pattern, 3)
    with pytest.raises(ConfigError, match="slots = -1: must be 0 or more"):
        divide(pattern, slots=-1)
    with pytest.raises(
        ConfigError, match=r"must be bool\[T, L, E\], not int64\[2, 1, 4\]"
    ):
        divide(pattern.astype(np.int64))


def test_steps_of_two_batches_are_divided_anew():
    routes = random_routes(examples=7)
    steps = in_step(routes, 4)
    parts = regrouped(steps, routes.patterns, 2)
    assert sorted(np.concatenate(parts)) == list(range(len(routes)))
    assert all(len(p) <= 2 for p in parts)
    arrival = [rows[half] for rows in steps for half in (slice(0, 2), slice(2, 4))]

    def total(groups):
        return sum(distinct(routes.patterns(g), range(len(g))) for g in groups)

    assert total(parts) < total(arrival)
    # One batch stays as it is.
    assert [p.tolist() for p in regrouped(steps, routes.patterns, 4)] == [
        s.tolist() for s in steps
    ]
