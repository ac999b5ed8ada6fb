"""Sums of one layer and the figures made of them, by hand.

T tokens · E experts · K slots per token
"""

import jax
import jax.numpy as jnp
import numpy as np

from moex.moe.metrics import layer_metrics, loads, routing_stats
from moex.moe.routing import ExpertRouting, Routing
from tests.tolerances import assert_close


def example():
    """Three tokens and a padding token among two experts, k = 1.

    Probabilities of expert 0: 0.5, 0.75, 0.25; NaN at the padding.
    """
    probs_TE = jnp.array([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    expert_TK = jnp.array([[0], [0], [1], [0]], jnp.int32)
    valid_T = jnp.array([True, True, True, False])
    routing = Routing(
        expert_TK=expert_TK,
        gate_TK=jnp.ones((4, 1)),
        keep_TK=valid_T[:, None],
        logits_TE=jnp.log(probs_TE),
        probs_TE=probs_TE,
    )
    load_BE, real_T = loads(routing, (2, 2), num_experts=2)
    load_E = jnp.sum(load_BE, axis=0)
    computed, lost = jnp.float32(2), jnp.float32(1)
    return routing_stats(routing, valid_T, load_E, real_T, computed, lost, 2)


def test_sums_leave_padding_out():
    stats = example()
    # Entropies: log 2 = 0.693147; -(0.75 log 0.75 + 0.25 log 0.25) = 0.562335, twice.
    # Logits are log probabilities, so their log-sum-exp is 0.
    expected = {
        "load_E": [2, 1],
        "prob_sum_E": [1.5, 1.5],
        "num_tokens": 3,
        "num_slots": 3,
        "num_zero": 0,
        "num_kept": 2,
        "num_lost": 1,
        "real_sq_sum": 3,
        "num_unrouted": 0,
        "entropy_sum": 0.693147 + 2 * 0.562335,
        "z_sum": 0,
        "top_gate_sum": 0.5 + 0.75 + 0.75,
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert stats[name].dtype == jnp.float32
        assert_close(stats[name], value, "float32", name)


def test_figures():
    figures = layer_metrics(example())
    # Load shares (2/3, 1/3): entropy 0.636514, exp of it 1.889882, over 2 experts.
    expected = {
        "load_frac_E": [2 / 3, 1 / 3],
        "max_violation": 1 / 3,
        "dead_frac": 0,
        "effective_frac": 0.944941,
        "entropy": 1.817817 / 3,
        "confidence": 2 / 3,
        "experts_per_token": 2 / 3,
        "experts_per_token_std": 0,
        "unrouted_frac": 0,
        "zero_frac": 0,
        "lost_frac": 1 / 3,
        "dropped_frac": 1 / 3,
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(figures[name], value, "float32", name)


def test_one_expert_takes_all():
    stats = example() | {"load_E": jnp.array([3.0, 0.0])}
    figures = layer_metrics(stats)
    assert_close(figures["max_violation"], 1, "float32")
    assert_close(figures["dead_frac"], 0.5, "float32")
    assert_close(figures["effective_frac"], 0.5, "float32")


def test_figures_of_sums_are_those_of_all_tokens():
    stats = example()
    doubled = jax.tree.map(lambda a: a + a, stats)
    for name, value in layer_metrics(doubled).items():
        assert_close(value, layer_metrics(stats)[name], "float32", name)


def test_no_token_gives_finite_figures():
    nothing = jax.tree.map(jnp.zeros_like, example())
    assert all(np.all(np.isfinite(v)) for v in layer_metrics(nothing).values())


def test_zero_computation_slots_are_counted_apart():
    """Four tokens among two experts and one that costs nothing (id 2), k = 2."""
    expert_TK = jnp.array([[0, 1], [0, 2], [2, 1], [2, 0]], jnp.int32)
    keep_TK = jnp.array([[True, True], [True, True], [True, False], [True, True]])
    uniform_TE = jnp.full((4, 3), 1 / 3)
    routing = Routing(
        expert_TK=expert_TK,
        gate_TK=jnp.ones((4, 2)),
        keep_TK=keep_TK,
        logits_TE=jnp.zeros((4, 3)),
        probs_TE=uniform_TE,
    )
    load_BE, real_T = loads(routing, (2, 2), num_experts=2)
    assert load_BE.tolist() == [[2, 1, 1], [1, 0, 2]]
    assert real_T.tolist() == [2, 1, 0, 1]
    load_E = jnp.sum(load_BE, axis=0)
    valid_T = jnp.ones(4, bool)
    # Capacity dropped one of the four real slots.
    stats = routing_stats(
        routing, valid_T, load_E, real_T, jnp.float32(3), jnp.float32(0), 2
    )
    figures = layer_metrics(stats)
    # Real slots per token 2, 1, 0, 1: mean 1, variance 1/2.
    expected = {
        "experts_per_token": 3 / 4,
        "experts_per_token_std": 0.5**0.5,
        "unrouted_frac": 1 / 4,
        "zero_frac": 3 / 7,
        "dropped_frac": 1 / 7,
    }
    for name, value in expected.items():
        assert_close(figures[name], value, "float32", name)


def test_loads_of_experts_that_choose():
    """Two rows of two tokens; expert 1 takes token 2 and a slot that is not kept."""
    routing = ExpertRouting(
        token_EC=jnp.array([[0, 1], [2, 3]]),
        gate_EC=jnp.ones((2, 2)),
        keep_EC=jnp.array([[True, True], [True, False]]),
        logits_TE=jnp.zeros((4, 2)),
        probs_TE=jnp.full((4, 2), 0.5),
    )
    load_BE, real_T = loads(routing, (2, 2), num_experts=2)
    assert load_BE.tolist() == [[2, 0], [0, 1]]
    assert real_T.tolist() == [1, 1, 1, 0]
