"""Replays under a cost model, against times counted by hand and by plain loops."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.offload.cache import ExpertCache, allocate
from moex.offload.costs import Costs
from moex.offload.forecasts import affinity, known, recorded
from moex.offload.policies import Belady, Lfu, Lru, Mrs, Predicted, Random, Static
from moex.offload.routes import in_step
from moex.offload.schedule import SCHEDULERS, all_device, best, static
from moex.offload.simulate import needs_of, simulate
from tests.offload.routes import random_routes, routes_of

LAYERS, EXPERTS = 3, 8


def replay(routes, slots, policy, costs, *, batch=1, shared=False, **options):
    shape = routes.num_layers, routes.num_experts
    per_layer = None if shared else allocate([1] * shape[0], slots, shape[1])
    cache = ExpertCache(*shape, slots, policy, per_layer=per_layer, expert_bytes=10)
    return simulate(routes, in_step(routes, batch), cache, costs, **options)


def lru(routes):
    return Lru(routes.num_layers, routes.num_experts)


SIX = routes_of([[[e]] for e in (0, 1, 2, 0, 3, 0)])
# The device needs 1 for an expert, the link 4, the rest of a layer 2.
SLOW = Costs(device=1.0, move=4.0, layer=2.0)


def test_the_oracle_of_six_tokens():
    steps = in_step(SIX)
    found = replay(SIX, 2, lru(SIX), SLOW)
    assert found.statistics.hits_L.tolist() == [1]
    assert found.time == 6 * 2 + 5 * (4 + 1) + 1
    assert found.stall == 5 * 4
    assert found.moves_per_token == 5 / 6
    policy = Belady(1, 4, needs_of(SIX, steps))
    assert replay(SIX, 2, policy, SLOW).statistics.hits_L.tolist() == [2]


def test_residents_compute_while_the_link_moves_others():
    routes = routes_of([[[0, 1]], [[0, 2]], [[1, 2]]])
    found = replay(routes, 2, lru(routes), SLOW)
    # Two moves one after another, then one move beside a resident, twice.
    assert found.time == 3 * 2 + (8 + 1) + (4 + 1) + (4 + 1)


def test_fewer_slots_than_experts_of_a_token():
    routes = routes_of([[[0, 1, 2]]] * 2)
    found = replay(routes, 1, lru(routes), SLOW)
    # One after another: a move waits until the expert before it has computed.
    assert found.time == 2 * 2 + 6 * 5 - 5 + 1
    assert found.statistics.hits_L.tolist() == [1]


def test_tokens_without_experts_cost_what_a_layer_costs():
    routes = routes_of([[[-1, -1]], [[0, -1]], [[-1, -1]]], experts=2)
    found = replay(routes, 1, lru(routes), SLOW, forecast=recorded_none)
    assert found.time == 3 * 2 + 4 + 1
    assert found.hit_rate == 0.0
    assert np.allclose(routes.scores_of([0, 1], 0), [0.25, 0])


def recorded_none(rows, router):
    """A forecast that knows nothing."""
    return []


def test_a_layer_that_missed_something_runs_again():
    again = dataclasses.replace(SLOW, again=0.5)
    found = replay(SIX, 2, lru(SIX), again)
    assert found.time == replay(SIX, 2, lru(SIX), SLOW).time + 5 * 0.5
    parts = routes_of([[[0, 1, 2]]])
    assert replay(parts, 1, lru(parts), again).time == 2 + 3 * (5 + 0.5)
    mixed = routes_of([[[0, 1]], [[0, 2]]])
    both = 2 * 4 + 0.5 + 2 * 1  # both move, then both compute
    one = 1 + 4 + 0.5 + 1  # a resident computes, then the other one moves
    assert replay(mixed, 2, lru(mixed), again).time == 2 * 2 + both + one


def test_a_prefetched_expert_that_is_late_is_waited_for():
    routes = routes_of([[[0], [1]]] * 1, experts=2)
    perfect = known(routes.expert_NRK, 2)
    found = replay(routes, 2, lru(routes), SLOW, forecast=perfect)
    # Both moves begin at 0 and arrive at 4 and 8. Layer 0 ends at 5.
    assert found.time == 9
    assert found.statistics.useful_L.tolist() == [1, 1]
    assert found.hit_rate == 1.0
    assert replay(routes, 2, lru(routes), SLOW).time == 2 * (2 + 4 + 1)


def test_a_move_that_has_begun_holds_up_one_that_is_needed_now():
    routes = routes_of([[[0], [1]]], experts=3)
    wrong = known(np.array([[[-1], [2]]]), 3)
    found = replay(routes, 4, lru(routes), SLOW, forecast=wrong)
    # 2 of layer 1 moves from 0 to 4, 0 of layer 0 to 8; 1 of layer 1 from 11 to 15.
    assert found.time == 16
    assert found.statistics.prefetched_L.tolist() == [0, 1]
    assert found.statistics.useful_L.tolist() == [0, 0]


def plain(routes, slots_a_layer, batch, costs):
    """LRU caches of layers, all on the device: loops over lists."""
    order = sorted(
        range(len(routes)),
        key=lambda n: (routes.example_N[n] // batch, routes.index_N[n]),
    )
    held = [[] for _ in routes.layer_R]
    time = hits = moves = 0
    while order:
        first = order[0]
        group = [
            n
            for n in order
            if routes.example_N[n] // batch == routes.example_N[first] // batch
            and routes.index_N[n] == routes.index_N[first]
        ]
        order = order[len(group) :]
        for router, layer in enumerate(routes.layer_R):
            needed = {int(e) for n in group for e in routes.expert_NRK[n, router]}
            needed -= {-1}
            here = needed & set(held[layer])
            hits, moves = hits + len(here), moves + len(needed) - len(here)
            clock = len(here) * costs.device
            for i in range(len(needed) - len(here)):
                clock = max(clock, (i + 1) * costs.move) + costs.device
            time += costs.layer + clock
            kept = [e for e in held[layer] if e not in needed]
            too_many = max(0, len(kept) + len(needed) - slots_a_layer)
            held[layer] = kept[too_many:] + sorted(needed)
    return time, hits, moves


@given(st.integers(0, 9), st.integers(1, 3), st.integers(0, 2))
def test_demand_loading_is_a_plain_loop(seed, batch, more):
    routes, costs = random_routes(seed), Costs(device=0.3, move=0.7, layer=0.2)
    slots = 2 * batch + more
    found = replay(routes, LAYERS * slots, lru(routes), costs, batch=batch)
    time, hits, moves = plain(routes, slots, batch, costs)
    assert found.time == pytest.approx(time)
    assert found.statistics.hits_L.sum() == hits
    assert found.statistics.loads == moves
    assert found.tokens == len(routes)


def policies(routes, batch):
    shape = routes.num_layers, routes.num_experts
    needs = needs_of(routes, in_step(routes, batch))
    return [
        *(Lru(*shape), Lfu(*shape), Random(*shape), Predicted(*shape)),
        *(Mrs(*shape, top=4), Static(routes.counts()), Belady(*shape, needs)),
    ]


HYBRID = Costs(cpu_first=0.2, cpu_row=0.5, device=0.3, move=0.7, layer=0.2)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shared", [False, True])
def test_whatever_is_done_the_same_experts_are_needed(name, shared):
    first, second = random_routes(1, examples=4).halves()
    steps = in_step(second, 2)
    needed = sum(len(experts) for _, experts in needs_of(second, steps))
    forecasts = (None, affinity(first, second), recorded(second, 2))
    for i, slots in enumerate((6, 12, 24, 6, 12, 24, 6)):
        found = replay(
            second,
            slots,
            policies(second, 2)[i],
            HYBRID,
            batch=2,
            shared=shared,
            scheduler=SCHEDULERS[name],
            forecast=forecasts[i % 2 + (i > 3)],
        )
        told = found.statistics
        assert told.hits_L.sum() + told.misses_L.sum() == needed
        assert found.time >= found.steps * 3 * HYBRID.layer
        assert 0 <= found.stall <= found.time
        assert told.bytes_L.sum() == 10 * told.loads


@pytest.mark.parametrize("slots", [12, 18])
def test_no_policy_beats_belady_without_prefetches(slots):
    routes = random_routes(1, examples=4)
    rates = {
        type(policy).__name__: replay(routes, slots, policy, HYBRID, batch=2).hit_rate
        for policy in policies(routes, 2)
    }
    assert len(rates) == 7
    assert max(rates.values()) == rates["Belady"] > rates["Lru"]


def test_a_cache_of_all_experts_moves_each_once():
    routes = random_routes()
    found = replay(routes, LAYERS * EXPERTS, lru(routes), HYBRID)
    distinct = (routes.counts() > 0).sum()
    assert found.statistics.loads == distinct
    assert found.statistics.evictions_L.sum() == 0


def test_perfect_forecasts_and_a_fast_link_leave_no_stall():
    routes = random_routes()
    fast = Costs(device=0.3, move=0.01, layer=0.2)
    found = replay(routes, 12, lru(routes), fast, forecast=recorded(routes))
    first = replay(routes, 12, lru(routes), fast)
    assert found.time < first.time
    # Only the first layer of a token is not foretold.
    assert found.statistics.misses_L[1:].sum() == 0
    whole = known(routes.expert_NRK, EXPERTS)
    assert replay(routes, 12, lru(routes), fast, forecast=whole).hit_rate == 1.0


def test_free_moves_cost_nothing():
    routes, free = random_routes(), Costs(device=0.5, move=0.0, layer=1.0)
    found = replay(routes, 6, lru(routes), free)
    assert found.stall == 0
    assert found.time == pytest.approx(len(routes) * LAYERS * (1.0 + 2 * 0.5))


def test_the_host_helps_and_never_hurts_in_a_layer():
    routes = random_routes()
    rows = {
        f.__name__: replay(routes, 6, lru(routes), HYBRID, scheduler=f).time
        for f in (all_device, static, best)
    }
    assert rows["best"] < rows["all_device"]


def test_impact_leaves_out_prefetches_that_save_nothing():
    routes = random_routes()
    whole = known(routes.expert_NRK, EXPERTS)
    slow_link = dataclasses.replace(HYBRID, cpu_row=0.01, cpu_first=0.0)
    options = {"scheduler": best, "forecast": whole}
    plain = replay(routes, 6, lru(routes), slow_link, **options)
    chosen = replay(routes, 6, lru(routes), slow_link, impact=True, **options)
    assert plain.statistics.prefetched_L.sum() > 0
    assert chosen.statistics.prefetched_L.sum() == 0


def test_the_same_arguments_give_the_same_result():
    routes = random_routes()
    results = []
    for _ in range(2):
        found = replay(
            routes,
            9,
            Random(LAYERS, EXPERTS, seed=4),
            HYBRID,
            forecast=recorded(routes),
        )
        results.append((found.time, found.statistics.hits_L.tolist()))
    assert results[0] == results[1]


def test_a_link_that_is_not_there_prefetches_nothing():
    routes = random_routes()
    costs = dataclasses.replace(HYBRID, move=math.inf)
    options = {"scheduler": static, "forecast": recorded(routes)}
    found = replay(routes, 6, lru(routes), costs, **options)
    assert found.statistics.loads == 0
    with pytest.raises(ConfigError, match="no resource can compute"):
        replay(routes, 6, lru(routes), costs)


def test_forecasts_by_affinity_are_the_likeliest_followers():
    profile = routes_of([[[0], [1]]] * 3 + [[[0], [2]], [[1], [2]]], experts=3)
    forecast = affinity(profile, routes_of([[[0], [0]], [[1], [0]]], experts=3))
    ((later, count_E),) = forecast(np.array([0, 1]), 0)
    assert later == 1
    assert count_E.tolist() == [0, 1, 1]
    assert list(forecast(np.array([0]), 1)) == []
    assert list(forecast(np.array([0]), -1)) == []


def test_forecasts_by_logits_need_them():
    with pytest.raises(ConfigError, match="`moex trace --logits` records them"):
        recorded(SIX)
    with pytest.raises(ConfigError, match="ahead = 0: must be 1 or more"):
        recorded(random_routes(), 0)
