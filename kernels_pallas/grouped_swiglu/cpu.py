"""grouped_swiglu for CPU: the whole expert inside a loop over tiles of rows.

Gathered rows, activations and their gradients live for one tile only. The single
large residual is the pre-activations; the gate gradient is taken before the down
projection, so expert outputs are neither kept nor recomputed.

Legend: T tokens, K slots per token, N sorted rows (T*K), D model width, F expert
hidden width, C pre-activation columns (2F), E experts, R rows of one tile.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import tiles
from kernels_pallas.grouped_swiglu.parts import combine, swiglu, swiglu_and_vjp
from kernels_pallas.tiles import dot, take


@jax.jit
def grouped_swiglu(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan):
    """See `api.grouped_swiglu`."""
    num_experts, dim = w_in_ED2F.shape[:2]
    w_in_EDC = w_in_ED2F.reshape(num_experts, dim, -1)
    return _experts(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan)


@jax.custom_vjp
def _experts(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan):
    y_TD, _ = _run(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, save=False)
    return y_TD


def _forward(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan):
    y_TD, a_NC = _run(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, save=True)
    return y_TD, (a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan)


def _run(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, save):
    """Returns y_TD and, if `save`, the pre-activations a_NC (else None)."""
    dtype, num_rows = x_TD.dtype, plan.order_N.shape[0]
    token_N = plan.token_N

    def body(carry, tile):
        y_ND, a_NC = carry
        x_RD = take(x_TD, tiles.read(token_N, tile))
        a_RC = dot(x_RD, tiles.read_group(w_in_EDC, tile)).astype(dtype)
        h_RF = swiglu(a_RC).astype(dtype)
        y_RD = dot(h_RF, tiles.read_group(w_out_EFD, tile))
        if save:
            a_NC = tiles.write(a_NC, tile, a_RC)
        return tiles.write(y_ND, tile, y_RD), a_NC

    carry = (
        jnp.zeros((num_rows, x_TD.shape[1]), dtype),
        jnp.zeros((num_rows, w_in_EDC.shape[2]), dtype) if save else None,
    )
    y_ND, a_NC = tiles.for_each_tile(plan.group_sizes_E, num_rows, body, carry)
    return combine(y_ND, plan, jnp.where(plan.kept_TK, gate_TK, 0)), a_NC


def _backward(saved, dy_TD):
    a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan = saved
    dtype, num_rows = x_TD.dtype, plan.order_N.shape[0]
    token_N, gate_N1 = plan.token_N, take(gate_TK.reshape(-1, 1), plan.order_N)

    def body(carry, tile):
        dx_ND, dgate_N, dw_in_EDC, dw_out_EFD = carry
        token_R = tiles.read(token_N, tile)
        # All that a sum over rows reads is masked: rows of a neighbour may be NaN.
        x_RD = tiles.mask(take(x_TD, token_R), tile)
        dy_RD = tiles.mask(take(dy_TD, token_R), tile)
        a_RC = tiles.mask(tiles.read(a_NC, tile), tile)
        gate_R1 = tiles.mask(tiles.read(gate_N1, tile), tile)

        dh_RF = dot(dy_RD, tiles.read_group(w_out_EFD, tile).T)  # before the gate
        h_RF, da_RC = swiglu_and_vjp(a_RC, gate_R1 * dh_RF)
        dgate_R = jnp.sum(dh_RF * h_RF, axis=1)  # = dy . y
        da_RC = da_RC.astype(dtype)

        weighted_RF = (gate_R1 * h_RF).astype(dtype)
        dx_RD = dot(da_RC, tiles.read_group(w_in_EDC, tile).T)
        return (
            tiles.write(dx_ND, tile, dx_RD),
            tiles.write(dgate_N, tile, dgate_R),
            tiles.add(dw_in_EDC, tile, dot(x_RD.T, da_RC)),
            tiles.add(dw_out_EFD, tile, dot(weighted_RF.T, dy_RD)),
        )

    carry = (
        jnp.zeros((num_rows, x_TD.shape[1]), dtype),
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(w_in_EDC.shape, jnp.float32),
        jnp.zeros(w_out_EFD.shape, jnp.float32),
    )
    carry = tiles.for_each_tile(plan.group_sizes_E, num_rows, body, carry)
    dx_ND, dgate_N, dw_in_EDC, dw_out_EFD = carry
    dgate_TK = jnp.where(plan.kept_TK, take(dgate_N, plan.row_TK), 0)
    return (
        combine(dx_ND, plan),
        dw_in_EDC.astype(w_in_EDC.dtype),
        dw_out_EFD.astype(w_out_EFD.dtype),
        dgate_TK,
        None,
    )


_experts.defvjp(_forward, _backward)
