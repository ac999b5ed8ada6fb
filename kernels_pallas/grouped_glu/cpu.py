"""grouped_glu for CPU: the whole expert inside a loop over tiles of rows.

Gathered rows, activations and their gradients live for one tile only. The single
large residual is the pre-activations; the gate gradient is taken before the down
projection, so expert outputs are neither kept nor recomputed.

Legend: T tokens, K slots per token, N sorted rows, D model width, F expert hidden
width, C pre-activation columns (2F), E experts, P padded rows, R rows of one tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import cpu_tiles as tiles
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.cpu_tiles import dot
from kernels_pallas.permute import slot_values, sum_rows, take


class _Padded(NamedTuple):
    """Rows where every expert's group begins at a multiple of the smallest tile.

    A padding row repeats its expert's last row with a weight of 0. So tiles need no
    masks, and numbers that are not finite stay with the experts that have them anyway.
    """

    begin_E: jax.Array  # int32, where each group begins
    size_E: jax.Array  # int32, kept rows
    token_P: jax.Array  # int32
    slot_P: jax.Array  # int32
    real_P: jax.Array  # bool, False in padding
    row_N: jax.Array  # int32, the padded row of each sorted row


def _pad(plan, step):
    num_rows, num_experts = plan.order_N.shape[0], plan.bounds.shape[0] - 1
    size_E = plan.group_sizes_E
    end_E = jnp.cumsum((size_E + step - 1) // step * step, dtype=jnp.int32)
    begin_E = jnp.concatenate([jnp.zeros(1, jnp.int32), end_E[:-1]])
    # A group with rows wastes at most step - 1; at most num_rows groups have any.
    spare = (step - 1) * min(num_experts, num_rows)
    row_P = jnp.arange(-(-(num_rows + spare) // step) * step, dtype=jnp.int32)
    expert_P = _group_of(end_E, row_P)
    place_P = row_P - begin_E[expert_P]
    real_P = (place_P < size_E[expert_P]) & (row_P < end_E[-1])
    last_P = jnp.minimum(place_P, size_E[expert_P] - 1)
    slot_P = take(plan.order_N, jnp.maximum(plan.bounds[expert_P] + last_P, 0))
    row_N = jnp.arange(num_rows, dtype=jnp.int32)
    shift_E = begin_E - plan.bounds[:-1]
    return _Padded(
        begin_E=begin_E,
        size_E=size_E,
        token_P=slot_P // plan.row_TK.shape[1],
        slot_P=slot_P,
        real_P=real_P,
        row_N=row_N + shift_E[_group_of(plan.bounds[1:], row_N)],
    )


def _group_of(end_E, row):
    expert = jnp.searchsorted(end_E, row, side="right").astype(jnp.int32)
    return jnp.minimum(expert, end_E.shape[0] - 1)


def forward(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, save):
    """Run the forward pass: returns `(y_TD, pre-activations or None)`."""
    dtype, act = x_TD.dtype, ACTIVATIONS[activation]
    sizes = tiles.tile_sizes(plan.order_N.shape[0], w_in_EDC.shape[0])
    rows = _pad(plan, sizes[0])
    num_rows = rows.token_P.shape[0]

    def body(carry, tile):
        y_PD, a_PC = carry
        x_RD = take(x_TD, tiles.read(rows.token_P, tile))
        a_RC = dot(x_RD, tiles.read_group(w_in_EDC, tile)).astype(dtype)
        h_RF = act.value(*_halves(a_RC)).astype(dtype)
        y_RD = dot(h_RF, tiles.read_group(w_out_EFD, tile))
        if save:
            a_PC = tiles.write(a_PC, tile, a_RC)
        return tiles.write(y_PD, tile, y_RD), a_PC

    carry = (
        jnp.zeros((num_rows, x_TD.shape[1]), dtype),
        jnp.zeros((num_rows, w_in_EDC.shape[2]), dtype) if save else None,
    )
    y_PD, a_PC = tiles.for_each_tile(rows.begin_E, rows.size_E, sizes, body, carry)
    with jax.named_scope("combine"):
        return sum_rows(y_PD, plan, gate_TK, rows.row_N), a_PC


def backward(a_PC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, dy_TD):
    """Run the backward pass: returns `(dx_TD, dw_in_EDC, dw_out_EFD, dgate_TK)`."""
    dtype, act = x_TD.dtype, ACTIVATIONS[activation]
    sizes = tiles.tile_sizes(plan.order_N.shape[0], w_in_EDC.shape[0])
    rows = _pad(plan, sizes[0])
    num_rows = rows.token_P.shape[0]
    weight_P = jnp.where(rows.real_P, take(gate_TK.reshape(-1), rows.slot_P), 0)

    def body(carry, tile):
        dx_PD, dgate_P, dw_in_EDC, dw_out_EFD = carry
        token_R = tiles.read(rows.token_P, tile)
        x_RD, dy_RD = take(x_TD, token_R), take(dy_TD, token_R)
        weight_R1 = tiles.read(weight_P, tile)[:, None]

        dh_RF = dot(dy_RD, tiles.read_group(w_out_EFD, tile).T)  # before the weight
        h_RF, dgate_RF, dup_RF = act.vjp(
            *_halves(tiles.read(a_PC, tile)), weight_R1 * dh_RF
        )
        dgate_R = jnp.sum(dh_RF * h_RF, axis=1)  # = dy . y
        da_RC = jnp.concatenate([dgate_RF, dup_RF], axis=1).astype(dtype)
        weighted_RF = (weight_R1 * h_RF).astype(dtype)
        dx_RD = dot(da_RC, tiles.read_group(w_in_EDC, tile).T)
        return (
            tiles.write(dx_PD, tile, dx_RD),
            tiles.write(dgate_P, tile, dgate_R),
            tiles.add(dw_in_EDC, tile, _rows_dot(x_RD, da_RC)),
            tiles.add(dw_out_EFD, tile, _rows_dot(weighted_RF, dy_RD)),
        )

    carry = (
        jnp.zeros((num_rows, x_TD.shape[1]), dtype),
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(w_in_EDC.shape, jnp.float32),
        jnp.zeros(w_out_EFD.shape, jnp.float32),
    )
    carry = tiles.for_each_tile(rows.begin_E, rows.size_E, sizes, body, carry)
    dx_PD, dgate_P, dw_in_EDC, dw_out_EFD = carry
    with jax.named_scope("dispatch"):
        dx_TD = sum_rows(dx_PD, plan, None, rows.row_N)
    with jax.named_scope("combine"):
        dgate_TK = slot_values(take(dgate_P, rows.row_N), plan)
    return (
        dx_TD,
        dw_in_EDC.astype(w_in_EDC.dtype),
        dw_out_EFD.astype(w_out_EFD.dtype),
        dgate_TK,
    )


def _rows_dot(a_RK, b_RN):
    """Multiply a.T @ b, by way of a transposed copy where both are large.

    XLA:CPU's own dot of a transposed operand misses its quick path: 39 and 75 GFLOP/s
    for 256 rows, K = 256 and N = 1024 (one core, JAX 0.10.2). With N = 128, or tiles of
    128 rows, the copy costs more than it gains.
    """
    large = a_RK.shape[0] >= 256 and b_RN.shape[1] >= 512
    return dot(lax.optimization_barrier(a_RK.T) if large else a_RK.T, b_RN)


def _halves(a_RC):
    return jnp.split(a_RC.astype(jnp.float32), 2, axis=1)
