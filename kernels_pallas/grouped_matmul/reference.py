"""The definition of grouped_matmul: every group's matrix on every row, then select.

It costs G times the needed work.

Legend: M rows, K contraction, N columns, G groups. `bounds` is int32[G + 1]: rows
bounds[g] to bounds[g + 1] are those of group g.
"""

import jax.numpy as jnp


def product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
    """Multiply rows by the matrix of their group; rows of no group are zero."""
    if transpose_rhs:
        rhs_GKN = jnp.swapaxes(rhs_GKN, 1, 2)
    out_MN = jnp.zeros((lhs_MK.shape[0], rhs_GKN.shape[2]), jnp.float32)
    for g in range(rhs_GKN.shape[0]):
        mine_M1 = _rows_of(g, bounds, lhs_MK.shape[0])
        all_MN = lhs_MK.astype(jnp.float32) @ rhs_GKN[g].astype(jnp.float32)
        out_MN += jnp.where(mine_M1, all_MN, 0)
    return out_MN.astype(out_dtype)


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype):
    """Sum the outer products of the rows of each group, [G, K, N]."""
    out = []
    for g in range(bounds.shape[0] - 1):
        mine_M1 = _rows_of(g, bounds, lhs_MK.shape[0])
        lhs_KM = jnp.where(mine_M1, lhs_MK, 0).astype(jnp.float32).T
        out.append(lhs_KM @ jnp.where(mine_M1, rhs_MN, 0).astype(jnp.float32))
    return jnp.stack(out).astype(out_dtype)


def _rows_of(g, bounds, num_rows):
    row_M1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return (row_M1 >= bounds[g]) & (row_M1 < bounds[g + 1])
