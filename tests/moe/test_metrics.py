"""Sums of one layer and the figures made of them, by hand.

T tokens · E experts · K slots per token
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    # Lengths 5, 0 and 13; what stands at the padding is not read.
    y_TD = jnp.array([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0], [jnp.nan, 1.0]])
    return routing_stats(routing, valid_T, load_E, real_T, computed, lost, 2, y_TD)


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
        # log 0.5 twice; log 0.75 and log 0.25, twice.
        "logit_sq_sum": 0.960906 + 2 * (0.082761 + 1.921812),
        "output_sq_sum": 25 + 169,
        "slots_S": [0, 3],
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
        "logit_norm": (4.970052 / 3) ** 0.5,
        "output_norm": (194 / 3) ** 0.5,
        "slots_hist_S": [0, 1],
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
    kept, y_TD = jnp.float32(3), jnp.zeros((4, 1))
    stats = routing_stats(
        routing, valid_T, load_E, real_T, kept, jnp.float32(0), 2, y_TD
    )
    figures = layer_metrics(stats)
    # Real slots per token 2, 1, 0, 1: mean 1, variance 1/2.
    expected = {
        "experts_per_token": 3 / 4,
        "experts_per_token_std": 0.5**0.5,
        "unrouted_frac": 1 / 4,
        "zero_frac": 3 / 7,
        "dropped_frac": 1 / 7,
        "slots_hist_S": [1 / 4, 2 / 4, 1 / 4],
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


def random_case(seed, T=11, E=6, K=4, D=3):
    """(routing, valid_T, y_TD) with slots and tokens left out."""
    rng = np.random.default_rng(seed)
    logits_TE = rng.normal(size=(T, E)).astype(np.float32)
    expert_TK = np.argsort(-logits_TE, axis=1)[:, :K].astype(np.int32)
    valid_T = rng.random(T) < 0.8
    keep_TK = (rng.random((T, K)) < 0.6) & valid_T[:, None]
    routing = Routing(
        expert_TK=jnp.asarray(expert_TK),
        gate_TK=jnp.ones((T, K)),
        keep_TK=jnp.asarray(keep_TK),
        logits_TE=jnp.asarray(logits_TE),
        probs_TE=jax.nn.softmax(logits_TE),
    )
    return routing, valid_T, rng.normal(size=(T, D)).astype(np.float32)


def figures_of(routing, valid_T, y_TD, num_experts):
    """The sums of one call, as the layer makes them."""
    load_BE, real_T = loads(routing, (1, len(valid_T)), num_experts)
    zero = jnp.float32(0)
    rest = (jnp.sum(load_BE, 0), real_T, zero, zero, num_experts, jnp.asarray(y_TD))
    return routing_stats(routing, jnp.asarray(valid_T), *rest)


@pytest.mark.parametrize("seed", range(3))
def test_norms_and_slots_are_those_of_a_loop_over_tokens(seed):
    """Ids 4 and 5 cost nothing, so they are no slots of a computing expert."""
    routing, valid_T, y_TD = random_case(seed)
    figures = layer_metrics(figures_of(routing, valid_T, y_TD, num_experts=4))
    squares, outputs, count = 0.0, 0.0, np.zeros(5)
    for t in np.flatnonzero(valid_T):
        squares += np.linalg.norm(routing.logits_TE[t]) ** 2
        outputs += np.linalg.norm(y_TD[t]) ** 2
        kept = np.asarray(routing.expert_TK[t])[np.asarray(routing.keep_TK[t])]
        count[sum(e < 4 for e in kept)] += 1
    n = valid_T.sum()
    assert_close(figures["logit_norm"], np.sqrt(squares / n), "float32")
    assert_close(figures["output_norm"], np.sqrt(outputs / n), "float32")
    assert_close(figures["slots_hist_S"], count / n, "float32")
    assert np.count_nonzero(count) > 2


def test_sums_of_halves_add_up_to_those_of_all_tokens():
    routing, valid_T, y_TD = random_case(0, T=12)
    whole = figures_of(routing, valid_T, y_TD, 6)
    halves = []
    for rows in (slice(0, 6), slice(6, 12)):
        fields = ("expert_TK", "gate_TK", "keep_TK", "logits_TE", "probs_TE")
        half = Routing(**{name: getattr(routing, name)[rows] for name in fields})
        halves.append(figures_of(half, valid_T[rows], y_TD[rows], 6))
    for name, value in jax.tree.map(jnp.add, *halves).items():
        assert_close(value, whole[name], "float32", name)


def test_the_histogram_of_slots_is_bounded():
    """40 experts choose: every token has all; bins end at 32 or more."""
    T, E = 3, 40
    routing = ExpertRouting(
        token_EC=jnp.tile(jnp.arange(T)[None], (E, 1)),
        gate_EC=jnp.ones((E, T)),
        keep_EC=jnp.ones((E, T), bool),
        logits_TE=jnp.zeros((T, E)),
        probs_TE=jnp.full((T, E), 1 / E),
    )
    stats = figures_of(routing, np.ones(T, bool), np.zeros((T, 1), np.float32), E)
    assert stats["slots_S"].tolist() == [0] * 32 + [3]
