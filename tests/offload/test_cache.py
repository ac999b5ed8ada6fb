"""The cache of experts: what it holds, what it never lets go, and what it counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.offload.cache import ExpertCache, allocate
from moex.offload.policies import Lru, Mrs, Predicted, Random

L, E = 3, 5


def lru(slots, **options):
    return ExpertCache(L, E, slots, Lru(L, E), **options)


def check(cache):
    """Every slot has at most one expert, and counts add up."""
    slots = cache.slot_of_LE[cache.slot_of_LE >= 0]
    assert len(set(slots.tolist())) == len(slots)
    assert (slots < cache.slots).all()
    told = cache.statistics
    assert told.loads - told.evictions_L.sum() == len(slots)
    assert (told.useful_L <= np.minimum(told.hits_L, told.prefetched_L)).all()
    loads_L = told.misses_L - told.hosted_L + told.prefetched_L
    np.testing.assert_array_equal(told.bytes_L, 7 * loads_L)
    return slots


experts = st.sets(st.integers(0, E - 1), max_size=E)
layer = st.integers(0, L - 1)
events = st.lists(
    st.one_of(
        st.tuples(st.just("need"), layer, experts),
        st.tuples(st.just("prefetch"), layer, experts),
        st.tuples(st.just("predicted"), layer, experts),
        st.tuples(st.just("pin"), layer, experts),
    ),
    max_size=25,
)
kinds = st.sampled_from([Lru, Predicted, Random, lambda *s: Mrs(*s, top=2)])


@given(events, kinds, st.integers(1, L * E), st.booleans())
def test_nothing_in_use_is_evicted_and_counts_add_up(events, kind, slots, shared):
    per_layer = None if shared or slots < L else allocate([1] * L, slots, E)
    cache = ExpertCache(*(L, E, slots, kind(L, E)), per_layer=per_layer, expert_bytes=7)
    now, pinned = [], []
    for what, number, wanted in events:
        if what == "predicted":
            cache.predicted(number, wanted)
        elif what == "pin":
            cache.unpin(pinned)
            pinned = [(number, e) for e in wanted if cache.slot_of_LE[number, e] >= 0]
            # Leave a slot of every pool to others.
            pinned = pinned[: (per_layer[number] if per_layer else slots) - 1]
            cache.pin(pinned)
        elif what == "prefetch":
            found = cache.prefetch(number, wanted, budget=2)
            assert len(found.loads) <= 2
            assert not {*now, *pinned} & {*found.evicted}
            parts = {*found.hits, *(e for e, _ in found.loads), *found.left}
            assert parts == wanted
        else:
            now = []
            before_LE, left, first = cache.slot_of_LE >= 0, wanted, True
            while left:
                found = cache.need(number, left)
                parts = [*found.hits, *(e for e, _ in found.loads), *found.left]
                assert sorted(parts) == sorted(left)
                assert len(found.left) < len(left)
                if first:
                    assert {*found.hits} == {e for e in wanted if before_LE[number, e]}
                now = [(number, e) for e in parts if e not in found.left]
                assert all(cache.slot_of_LE[key] >= 0 for key in [*now, *pinned])
                for e, slot in found.loads:
                    assert cache.slot_of_LE[number, e] == slot
                left, first = set(found.left), False
                check(cache)
        check(cache)
        if per_layer:
            ends = np.cumsum([0, *per_layer])
            for i in range(L):
                own = cache.slot_of_LE[i][cache.slot_of_LE[i] >= 0]
                assert ((ends[i] <= own) & (own < ends[i + 1])).all()


def test_a_cache_of_all_experts_loads_each_once():
    cache = lru(L * E)
    for _ in range(3):
        for number in range(L):
            cache.need(number, range(E))
    told = cache.statistics
    assert (told.misses_L == E).all()
    assert (told.hits_L == 2 * E).all()
    assert told.evictions_L.sum() == 0
    assert told.hit_rate == 2 / 3


def test_fewer_slots_than_a_token_needs_give_parts():
    cache = lru(2)
    first = cache.need(0, [0, 1, 2, 3, 4])
    assert first.loads == ((0, 0), (1, 1))
    assert first.left == (2, 3, 4)
    second = cache.need(0, first.left)
    assert second.evicted == ((0, 0), (0, 1))
    assert second.left == (4,)
    assert cache.need(0, [4]).loads == ((4, 0),)
    assert cache.statistics.misses_L[0] == 5


def test_residents_compute_before_what_must_be_loaded():
    cache = lru(2)
    cache.need(0, [3, 4])
    found = cache.need(0, range(E))
    assert found.hits == (3, 4)
    assert found.loads == ()
    assert found.left == (0, 1, 2)


def test_what_the_host_computes_is_counted_and_gets_no_slot():
    cache = lru(2)
    cache.need(0, [0, 1])
    found = cache.need(0, [2], hosted=[1, 3])
    assert found.evicted == ((0, 0),)  # 1 was used later, by the host
    told = cache.statistics
    assert told.hits_L[0] == 1
    assert told.misses_L[0] == 4
    assert told.hosted_L[0] == 1
    assert told.loads == 3
    assert cache.slot_of_LE[0].tolist() == [-1, 1, 0, -1, -1]


def test_a_prefetched_expert_is_a_useful_hit_once():
    cache = lru(4)
    cache.need(0, [0])
    assert cache.prefetch(1, [2, 3]).loads == ((2, 1), (3, 2))
    assert cache.prefetch(1, [2, 3]).loads == ()
    cache.need(1, [2])
    cache.need(1, [2])
    told = cache.statistics
    assert told.useful_L.tolist() == [0, 1, 0]
    assert told.hits_L.tolist() == [0, 2, 0]
    assert told.prefetched_L.tolist() == [0, 2, 0]


def test_what_was_prefetched_for_other_layers_leaves_last():
    """Though it was never used, which is longest ago."""
    cache = lru(4)
    cache.need(0, [0, 1])
    cache.prefetch(2, [3])
    assert cache.need(1, [2, 4]).evicted == ((0, 0),)
    found = cache.need(0, [2, 3, 4])
    assert found.evicted == ((0, 1), (1, 2), (1, 4))
    assert cache.need(1, [0]).evicted == ((0, 2),)
    cache.need(1, [0, 1, 2])
    assert cache.slot_of_LE[2, 3] >= 0
    assert (2, 3) in cache.need(1, [0, 1, 2, 4]).evicted


def test_a_prefetch_takes_no_slot_of_an_expert_in_use_or_of_another_prefetch():
    cache = lru(2)
    cache.need(0, [0])
    cache.prefetch(1, [1])
    found = cache.prefetch(2, [4])
    assert found.loads == ()
    assert found.left == (4,)
    cache.need(1, [1])  # 0 of layer 0 is done
    assert cache.prefetch(2, [4]).evicted == ((0, 0),)


def test_a_prefetch_loads_the_likeliest_within_its_budget():
    found = lru(9).prefetch(0, [4, 1, 3], budget=2)
    assert found.loads == ((4, 0), (1, 1))
    assert found.left == (3,)


def test_pins_add_up():
    cache = lru(2)
    cache.need(0, [0, 1])
    cache.pin([(0, 0), (0, 1)])
    cache.pin([(0, 0)])
    with pytest.raises(ValueError, match="all slots that layer 1 may use are pinned"):
        cache.need(1, [0])
    cache.unpin([(0, 0), (0, 1)])
    assert cache.need(1, [0, 1]).evicted == ((0, 1),)
    cache.unpin([(0, 0)])
    assert cache.need(1, [1]).evicted == ((0, 0),)
    with pytest.raises(ValueError, match="is not pinned"):
        cache.unpin([(0, 0)])
    with pytest.raises(ValueError, match="is not resident"):
        cache.pin([(0, 0)])


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="slots = 0: must be 1 or more"):
        lru(0)
    with pytest.raises(ConfigError, match="3 numbers of 1 or more that sum to 6"):
        lru(6, per_layer=[0, 3, 3])


demands = st.lists(st.floats(0, 100), min_size=1, max_size=6)


@given(demands, st.integers(0, 40))
def test_slots_are_divided_whole_and_more_slots_take_from_no_layer(demand, more):
    slots = len(demand) + more
    given = allocate(demand, slots, 6)
    assert sum(given) == min(slots, 6 * len(demand))
    assert all(1 <= n <= 6 for n in given)
    larger = allocate(demand, slots + 1, 6)
    assert all(a <= b for a, b in zip(given, larger, strict=True))
    order = np.argsort(demand, kind="stable")
    assert (np.diff(np.array(given)[order]) >= -1).all()


def test_slots_follow_demand():
    assert allocate([1, 2, 5], 16, 64) == [2, 4, 10]
    assert allocate([0, 0, 0], 7, 64) == [3, 2, 2]
    assert allocate([1, 0, 100], 12, 8) == [3, 1, 8]


def test_a_bad_demand_is_refused():
    with pytest.raises(ConfigError, match="slots = 2: must be 3 or more, one a layer"):
        allocate([1, 1, 1], 2, 8)
    with pytest.raises(ConfigError, match="demand = .* finite numbers of 0 or more"):
        allocate([1, np.nan], 8, 8)
