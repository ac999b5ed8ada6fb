"""Policies of the cache of experts, against plain loops, oracles and exhaustive search.

L layers · E experts
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.offload.cache import ExpertCache
from moex.offload.policies import Belady, Lfu, Lru, Mrs, Predicted, Random, Static

E = 6


def hits(needs, slots, policy, layers=1, experts=E):
    """How many needed experts are resident, loading only what is needed."""
    cache = ExpertCache(layers, experts, slots, policy)
    for layer, wanted in needs:
        cache.routed(layer, np.isin(np.arange(experts), list(wanted)) / len(wanted))
        assert not cache.need(layer, wanted).left
    return int(cache.statistics.hits_L.sum())


def every_policy(needs, layers=1, experts=E):
    shape = layers, experts
    count_LE = np.zeros(shape)
    for layer, wanted in needs:
        count_LE[layer, list(wanted)] += 1
    return [
        *(Lru(*shape), Lfu(*shape), Random(*shape, seed=3), Predicted(*shape)),
        *(Mrs(*shape, top=2, alpha=a) for a in (0.25, 0.5)),
        *(Static(count_LE), Belady(*shape, needs)),
    ]


def test_the_oracle_of_six_requests():
    needs = [(0, [e]) for e in (0, 1, 2, 0, 3, 0)]
    assert hits(needs, 2, Lru(1, 4), experts=4) == 1
    assert hits(needs, 2, Belady(1, 4, needs), experts=4) == 2


single = st.lists(
    st.tuples(st.just(0), st.sets(st.integers(0, E - 1), min_size=1, max_size=2)),
    max_size=12,
)
pair = st.sets(st.integers(0, E - 1), min_size=1, max_size=2)
two_layers = st.lists(st.tuples(st.integers(0, 1), pair), max_size=9)


def most_hits(needs, slots):
    """The most hits of any evictions, by search through all of them."""
    states = {frozenset(): 0}
    for layer, wanted in needs:
        wanted = {(layer, e) for e in wanted}
        after: dict = {}
        for held, count in states.items():
            count += len(held & wanted)
            others = held - wanted
            stay = min(len(others), slots - len(wanted))
            for kept in itertools.combinations(sorted(others), stay):
                new = frozenset(wanted | set(kept))
                after[new] = max(after.get(new, 0), count)
        states = after
    return max(states.values())


@given(two_layers, st.integers(2, 4))
def test_no_choice_of_victims_has_more_hits_than_belady(needs, slots):
    found = hits(needs, slots, Belady(2, E, needs), layers=2)
    assert found == most_hits(needs, slots)


@given(single, st.integers(2, 5))
def test_no_policy_has_more_hits_than_belady(needs, slots):
    bound = hits(needs, slots, Belady(1, E, needs))
    for policy in every_policy(needs):
        assert hits(needs, slots, policy) <= bound, type(policy).__name__


@given(single)
def test_more_slots_give_lru_and_belady_no_fewer_hits(needs):
    """Both are stack algorithms: a larger cache holds all that a smaller one holds."""
    for make in (lambda: Lru(1, E), lambda: Belady(1, E, needs)):
        found = [hits(needs, slots, make()) for slots in range(2, E + 1)]
        assert found == sorted(found)
    distinct = len({e for _, wanted in needs for e in wanted})
    assert found[-1] == sum(len(wanted) for _, wanted in needs) - distinct


@given(single, st.integers(2, 5))
def test_lru_is_a_list_in_the_order_of_use(needs, slots):
    held, count = [], 0
    for _, wanted in needs:
        count += len(set(held) & wanted)
        old = [e for e in held if e not in wanted]
        held = [*old[max(0, len(old) + len(wanted) - slots) :], *sorted(wanted)]
    assert hits(needs, slots, Lru(1, E)) == count


def test_lfu_keeps_what_was_used_most():
    needs = [(0, [e]) for e in (0, 0, 0, 1, 2, 1, 0)]
    assert hits(needs, 2, Lfu(1, E)) == 3  # 2 takes the place of 1, and 1 that of 2


def test_static_keeps_the_hottest():
    policy = Static([[5.0, 4.0, 0.0, 1.0, 0.0, 0.0]])
    needs = [(0, [e]) for e in (0, 1, 2, 3, 0, 1, 4, 0)]
    assert hits(needs, 3, policy) == 3


def test_predicted_experts_stay_until_their_layer_was_passed():
    cache = ExpertCache(1, E, 2, Predicted(1, E))
    cache.need(0, [0])
    cache.need(0, [1])
    cache.predicted(0, [0])
    assert cache.need(0, [2]).evicted == ((0, 1),)  # LRU takes 0
    cache.routed(0, None)
    assert cache.need(0, [3]).evicted == ((0, 0),)


def test_a_new_prediction_of_a_layer_replaces_the_old_one():
    policy = Predicted(1, E)
    policy.predicted(0, [0, 1])
    policy.predicted(0, [2])
    assert policy.worth_LE().tolist() == [[0, 0, 1, 0, 0, 0]]


SCORES = (0.05, 0.10, 0.30, 0.02, 0.20, 0.03, 0.25, 0.05)


def test_recent_scores_belong_to_their_experts():
    """The released code writes the sorted scores in the order of experts."""
    policy = Mrs(1, 8, top=4, alpha=0.5)
    policy.routed(0, SCORES)
    want = [0, 0.05, 0.15, 0, 0.10, 0, 0.125, 0]
    np.testing.assert_allclose(policy.worth_LE()[0], want, rtol=1e-12)


@given(st.lists(st.lists(st.floats(0, 1), min_size=E, max_size=E), max_size=5))
def test_recent_scores_are_a_plain_loop(rows):
    policy, sums = Mrs(2, E, top=3, alpha=0.25), [0.0] * E
    for row in rows:
        policy.routed(1, row)
        order = sorted(range(E), key=lambda e: (-row[e], e))[:3]
        for e in range(E):
            own = row[e] / sum(row) if e in order and sum(row) > 0 else 0.0
            sums[e] = 0.75 * sums[e] + 0.25 * own
    np.testing.assert_allclose(policy.worth_LE(), [[0.0] * E, sums], atol=1e-12)


def test_sigmoid_scores_count_as_shares():
    ours, scaled = Mrs(1, 8, top=4), Mrs(1, 8, top=4)
    ours.routed(0, SCORES)
    scaled.routed(0, 3 * np.array(SCORES))
    np.testing.assert_allclose(ours.worth_LE(), scaled.worth_LE(), rtol=1e-12)


def test_fewer_experts_than_scores_to_keep():
    policy = Mrs(1, 2, top=16)
    policy.routed(0, [0.25, 0.75])
    assert policy.worth_LE().tolist() == [[0.125, 0.375]]


def test_equal_scores_evict_what_was_used_longest_ago():
    cache = ExpertCache(1, 4, 3, Mrs(1, 4, top=8))
    for e in (2, 0, 1):
        cache.routed(0, [0.25] * 4)
        cache.need(0, [e])
    assert cache.need(0, [3]).evicted == ((0, 2),)


@pytest.mark.parametrize("score", [[np.nan, 0.5], [-0.1, 0.5], [np.inf, 0.5]])
def test_scores_that_are_none_are_refused(score):
    with pytest.raises(ConfigError, match="MoE layer 0: must be finite and 0 or more"):
        Mrs(1, 2, top=2).routed(0, score)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"alpha = 0: must be in \(0, 1\]"):
        Mrs(1, 2, top=2, alpha=0)
    with pytest.raises(ConfigError, match="top = 0: must be 1 or more"):
        Mrs(1, 2, top=0)
    with pytest.raises(ConfigError, match="must be finite"):
        Static([[np.nan]])


def test_a_future_that_does_not_come_is_seen():
    policy = Belady(1, 2, [(0, [0])])
    policy.used((0, 0))
    with pytest.raises(ValueError, match="more often than was foretold"):
        policy.used((0, 0))


def test_random_victims_depend_on_the_seed_alone():
    needs = [(0, [e]) for e in np.random.default_rng(0).integers(0, E, 200)]
    found = [hits(needs, 3, Random(1, E, seed=s)) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
