"""The definition of grouped_matmul: every group's matrix on every row, then select.

Costs G times the needed work. Its gradient is JAX's own, in float32.

Legend: M rows, K contraction, N columns, G groups.
"""

import jax.numpy as jnp


def grouped_matmul(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs, out_dtype):
    """See `api.grouped_matmul`."""
    if transpose_rhs:
        rhs_GKN = jnp.swapaxes(rhs_GKN, 1, 2)
    num_rows, num_groups = lhs_MK.shape[0], rhs_GKN.shape[0]
    row_M1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    end_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    out_MN = jnp.zeros((num_rows, rhs_GKN.shape[2]), jnp.float32)
    for g in range(num_groups):
        mine_M1 = (row_M1 >= end_G[g] - group_sizes_G[g]) & (row_M1 < end_G[g])
        # Selecting before the product as well keeps other rows out of the gradient.
        mine_MK = jnp.where(mine_M1, lhs_MK, 0).astype(jnp.float32)
        out_MN += jnp.where(mine_M1, mine_MK @ rhs_GKN[g].astype(jnp.float32), 0)
    return out_MN.astype(out_dtype)
