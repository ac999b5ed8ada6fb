"""Routing losses and the bias update, by hand.

E experts
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moex.moe.losses import (
    LOSSES,
    TAKEN,
    Importance,
    layer_losses,
    load_balance_loss,
    mean_loss,
    sequence_balance_sums,
    update_bias,
)
from moex.runs.keys import COEFFICIENTS
from tests.tolerances import assert_close


@pytest.mark.parametrize("k", [1, 2, 5])
def test_uniform_routing_costs_one_for_any_k(k):
    tokens, E = 30.0, 5
    load_E = jnp.full(E, tokens * k / E)
    prob_sum_E = jnp.full(E, tokens / E)
    loss = load_balance_loss(load_E, prob_sum_E, jnp.float32(tokens))
    assert_close(loss, 1.0, "float32")


def test_load_balance_by_hand():
    # 4 tokens, k = 1: f = (3/4, 1/4); P = (0.6, 0.4).
    # 2 * (0.75 * 0.6 + 0.25 * 0.4) = 1.1.
    loss = load_balance_loss(
        jnp.array([3.0, 1.0]), jnp.array([2.4, 1.6]), jnp.float32(4)
    )
    assert_close(loss, 1.1, "float32")


def test_all_tokens_to_one_expert_cost_the_number_of_experts():
    loss = load_balance_loss(
        jnp.array([7.0, 0.0, 0.0]), jnp.array([7.0, 0.0, 0.0]), jnp.float32(7)
    )
    assert_close(loss, 3.0, "float32")


def test_no_token_costs_nothing():
    zero = jnp.float32(0)
    assert load_balance_loss(jnp.zeros(3), jnp.zeros(3), zero) == 0
    assert mean_loss(zero, zero) == 0
    names = ("num_tokens", "num_sequences", "sequence_balance_sum", "router_z_sum")
    nothing = dict.fromkeys((*names, "entropy_sum"), zero)
    nothing |= dict.fromkeys(("load_E", "prob_sum_E"), jnp.zeros(3))
    assert set(map(float, layer_losses(nothing).values())) == {0.0}


def test_leading_dims_are_layers():
    load = jnp.array([[3.0, 1.0], [2.0, 2.0]])
    prob_sum = jnp.array([[2.4, 1.6], [2.0, 2.0]])
    loss = load_balance_loss(load, prob_sum, jnp.array([4.0, 4.0]))
    assert_close(loss, [1.1, 1.0], "float32")


def test_z_loss_by_hand():
    # Two tokens with logits (0, 0) and (log 3, 0): lse = log 2, log 4.
    # (0.480453 + 1.921812) / 2 = 1.201133.
    z_sum = jnp.float32(np.log(2) ** 2 + np.log(4) ** 2)
    assert_close(mean_loss(z_sum, jnp.float32(2)), 1.201133, "float32")


def test_bias_moves_up_where_load_is_below_the_mean():
    bias_E = update_bias(jnp.zeros(4), jnp.array([1.0, 3.0, 6.0, 2.0]), 0.5)
    assert bias_E.tolist() == [0.5, 0.0, -0.5, 0.5]


def test_bias_of_stacked_layers_compares_within_a_layer():
    load = jnp.array([[1.0, 3.0], [300.0, 100.0]])
    bias = update_bias(jnp.zeros((2, 2)), load, 1.0)
    assert bias.tolist() == [[1, -1], [-1, 1]]


def test_bias_stays_where_no_token_was_routed():
    assert update_bias(jnp.ones(3), jnp.zeros(3), 1.0).tolist() == [1, 1, 1]


def test_sequence_balance_is_the_mean_of_the_sequences():
    """One sequence all to expert 0 (loss 2), one balanced (1), one without tokens."""
    load_BE = jnp.array([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    prob_sum_BE = jnp.array([[4.0, 0.0], [2.0, 2.0], [0.0, 0.0]])
    tokens_B = jnp.array([4.0, 4.0, 0.0])
    total, count = sequence_balance_sums(load_BE, prob_sum_BE, tokens_B)
    assert_close(total, 3.0, "float32")
    assert count == 2
    # Over the whole batch: f = P = (3/4, 1/4), 2 * (9 + 1) / 16.
    whole = load_balance_loss(load_BE.sum(0), prob_sum_BE.sum(0), tokens_B.sum())
    assert_close(whole, 1.25, "float32")


def test_importance_is_the_squared_coefficient_of_variation():
    # Mean 2, deviations -1, 0, 1: variance 2/3, over 4.
    def loss(*prob_sums):
        return Importance().value({"prob_sum_E": jnp.array(prob_sums)})

    assert_close(loss(1.0, 2.0, 3.0), 1 / 6, "float32")
    assert loss(2.0, 2.0, 2.0) == 0
    assert loss(0.0, 0.0, 0.0) == 0


def test_every_trained_loss_has_a_coefficient():
    trained = {loss.name for loss in LOSSES if loss.is_trained}
    assert trained == set(COEFFICIENTS) - {"z"}
    assert set(TAKEN) == {*COEFFICIENTS, "sequence_balance"}
