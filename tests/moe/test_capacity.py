"""Capacity: who is dropped, how many; and rows that go out and come back.

T tokens · K slots per token · E experts · D model width
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas import combine, dispatch, make_plan
from moex.moe.capacity import drop_over_capacity, expert_capacity
from moex.moe.routing import Routing
from tests.tolerances import assert_close

T, K, E, D = 9, 2, 4, 3


def routing_of(expert_TK, keep_TK=None, num_experts=E) -> Routing:
    expert_TK = jnp.asarray(expert_TK, jnp.int32)
    shape = expert_TK.shape
    keep_TK = jnp.ones(shape, bool) if keep_TK is None else jnp.asarray(keep_TK)
    gate_TK = 1.0 + jnp.arange(expert_TK.size, dtype=jnp.float32).reshape(shape)
    scores_TE = jnp.zeros((shape[0], num_experts))
    return Routing(
        expert_TK=expert_TK,
        gate_TK=jnp.where(keep_TK, gate_TK, 0.0),
        keep_TK=keep_TK,
        logits_TE=scores_TE,
        probs_TE=scores_TE,
    )


drop = functools.partial(jax.jit, static_argnums=(1,))(drop_over_capacity)


@st.composite
def decisions(draw):
    """(expert_TK without repeats in a row, keep_TK)."""
    rows = st.permutations(range(E)).map(lambda order: order[:K])
    expert_TK = draw(st.lists(rows, min_size=T, max_size=T))
    keep = st.lists(st.booleans(), min_size=K, max_size=K)
    return np.array(expert_TK), np.array(draw(st.lists(keep, min_size=T, max_size=T)))


@pytest.mark.parametrize(
    ("factor", "slots", "experts", "capacity"),
    [
        (1.0, 16, 8, 2),
        (1.25, 16, 8, 3),
        (1.0, 17, 8, 3),
        (0.01, 16, 8, 1),
        (8, 4, 4, 8),
        (1.1, 90, 3, 33),  # 1.1 * 90 / 3 is 33.00000000000001 in float64
        (1.15, 300, 3, 115),
        (0.07, 100, 1, 7),
        (0.07, 101, 1, 8),  # 7.07
        (1.0 / 3.0, 3, 1, 1),
    ],
)
def test_capacity_by_hand(factor, slots, experts, capacity):
    assert expert_capacity(factor, slots, experts) == capacity


def test_first_choices_come_before_second_ones_and_early_tokens_before_late_ones():
    # Expert 0 is first choice of tokens 1 and 2, second choice of token 0.
    expert_TK = [[1, 0], [0, 2], [0, 3]]
    kept = drop(routing_of(expert_TK), E, 1)
    assert kept.keep_TK.tolist() == [[True, False], [True, True], [False, True]]
    assert kept.gate_TK.tolist() == [[1, 0], [3, 4], [0, 6]], "not renormalised"
    kept = drop(routing_of(expert_TK), E, 2)
    assert kept.keep_TK.tolist() == [[True, False], [True, True], [True, True]]


def test_slots_not_kept_take_no_room():
    kept = drop(routing_of([[0, 1], [0, 2]], [[False, True], [True, True]]), E, 1)
    assert kept.keep_TK.tolist() == [[False, True], [True, True]]


def keep_within(capacity, expert_TK, keep_TK):
    """All first slots in order of tokens, then all second ones."""
    room_E = [capacity] * E
    kept_TK = np.zeros(expert_TK.shape, bool)
    for j in range(K):
        for t in range(T):
            if keep_TK[t, j] and room_E[expert_TK[t, j]] > 0:
                room_E[expert_TK[t, j]] -= 1
                kept_TK[t, j] = True
    return kept_TK


@given(decision=decisions(), capacity=st.integers(1, T))
def test_drops_are_those_of_the_loop(decision, capacity):
    expert_TK, keep_TK = decision
    routing = routing_of(expert_TK, keep_TK)
    kept = drop(routing, E, capacity)
    expected_TK = keep_within(capacity, expert_TK, keep_TK)
    np.testing.assert_array_equal(kept.keep_TK, expected_TK)
    np.testing.assert_array_equal(
        kept.gate_TK, np.where(expected_TK, routing.gate_TK, 0)
    )
    load_E = np.bincount(expert_TK[expected_TK], minlength=E)
    wanted_E = np.bincount(expert_TK[keep_TK], minlength=E)
    np.testing.assert_array_equal(load_E, np.minimum(wanted_E, capacity))


@given(decision=decisions())
def test_rows_go_out_sorted_and_come_back_weighted(decision):
    expert_TK, keep_TK = decision
    x_TD = jnp.arange(T * D, dtype=jnp.float32).reshape(T, D)
    gate_TK = routing_of(expert_TK, keep_TK).gate_TK
    plan = make_plan(jnp.asarray(expert_TK), jnp.asarray(keep_TK), E)
    x_ND = dispatch(x_TD, plan)
    slots = [
        (t, j) for e in range(E) for t, j in np.argwhere(keep_TK & (expert_TK == e))
    ]
    for row_D, (t, _) in zip(x_ND, slots, strict=False):
        np.testing.assert_array_equal(row_D, x_TD[t])
    y_TD = combine(x_ND, gate_TK, plan)
    total_T1 = np.sum(gate_TK, axis=1, keepdims=True)
    assert_close(y_TD, total_T1 * x_TD, "float32")


def test_combine_keeps_the_dtype_of_the_rows():
    plan = make_plan(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool), 1)
    y_TD = combine(jnp.ones((2, D), jnp.bfloat16), jnp.full((2, 1), 0.5), plan)
    assert y_TD.dtype == jnp.bfloat16
    assert jnp.all(y_TD == 0.5)
