"""Moves rows into expert order and back, by gathers alone, forward and backward.

Every slot has one row, so that the transpose of either direction is again a gather: no
scatter-add, and the same sums in the same order in every run. A `plan` here is a `Plan`
or a `Layout`.

Legend: T tokens, K slots per token, N sorted rows, D row width.
"""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dispatch(x_TD, plan):
    """Put rows of x in plan order: row i is the token of slot `order_N[i]`."""
    with jax.named_scope("dispatch"):
        return take(x_TD, plan.token_N)


def _dispatch_forward(x_TD, plan):
    return dispatch(x_TD, plan), plan


def _dispatch_backward(plan, dx_ND):
    with jax.named_scope("dispatch"):
        return sum_rows(dx_ND, plan), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(y_ND, gate_TK, plan):
    """Sum over the kept slots of each token of gate * row, [T, D] in the dtype of y.

    A slot that is not kept contributes nothing and has a zero gate gradient, whatever
    its gate holds. Sums are float32.

    Args:
      y_ND: float[N, D] rows in plan order; rows past the last group are not read.
      gate_TK: float32[T, K].
      plan: Plan.
    """
    with jax.named_scope("combine"):
        return sum_rows(y_ND, plan, gate_TK)


def _combine_forward(y_ND, gate_TK, plan):
    return combine(y_ND, gate_TK, plan), (y_ND, gate_TK, plan)


@jax.named_scope("combine")
def _combine_backward(saved, dy_TD):
    y_ND, gate_TK, plan = saved
    dy_ND = take(dy_TD, plan.token_N).astype(jnp.float32)
    gate_N1 = take(gate_TK.reshape(-1, 1), plan.order_N)
    dgate_N = jnp.sum(dy_ND * y_ND.astype(jnp.float32), axis=1)
    return (
        jnp.where(plan.real_N[:, None], gate_N1 * dy_ND, 0).astype(y_ND.dtype),
        slot_values(dgate_N, plan),
        None,
    )


combine.defvjp(_combine_forward, _combine_backward)


def sum_rows(y_ND, plan, weight_TK=None, place_N=None):
    """Sums each token's kept rows, times `weight_TK` if given, into [T, D].

    The result has the dtype of `y_ND`, the sum is float32. `place_N` says where each
    sorted row lies in `y_ND`, if not in order.
    """
    row_TK = plan.safe_row_TK
    if place_N is not None:
        row_TK = take(place_N, row_TK)
    total_TD: Any = None
    for j in range(row_TK.shape[1]):
        term_TD = take(y_ND, row_TK[:, j]).astype(jnp.float32)
        if weight_TK is not None:
            term_TD = weight_TK[:, j : j + 1] * term_TD
        term_TD = jnp.where(plan.kept_TK[:, j : j + 1], term_TD, 0)
        total_TD = term_TD if total_TD is None else total_TD + term_TD
    return total_TD.astype(y_ND.dtype)


def slot_values(value_N, plan):
    """Give each slot the value of its row, [T, K]; 0 for slots that are not kept."""
    return jnp.where(plan.kept_TK, take(value_N, plan.safe_row_TK), 0)


def take(array, index):
    """Take rows of `array`; indices are promised to be in bounds (2.4 times faster)."""
    return array.at[index].get(mode="promise_in_bounds")
