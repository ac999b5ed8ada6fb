"""grouped_matmul by XLA's own ragged dot: the fallback of accelerators.

On CPU it expands to all groups times all rows: right, slow, and large in memory.

Legend: M rows, K contraction, N columns, G groups.
"""

import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.vjp import differentiable


def product(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs, out_dtype):
    """Rows times the matrix of their group, zero past the last group."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out_MN = lax.ragged_dot_general(
        keep_rows(lhs_MK, group_sizes_G),
        rhs_GKN,
        group_sizes_G,
        dims,
        preferred_element_type=jnp.float32,
    )
    return keep_rows(out_MN, group_sizes_G).astype(out_dtype)


def weight_product(lhs_MK, rhs_MN, group_sizes_G, out_dtype):
    """For each group the sum over its rows of outer products, [G, K, N]."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    out_GKN = lax.ragged_dot_general(
        keep_rows(lhs_MK, group_sizes_G),
        keep_rows(rhs_MN, group_sizes_G),
        group_sizes_G,
        dims,
        preferred_element_type=jnp.float32,
    )
    return out_GKN.astype(out_dtype)


def keep_rows(array_MN, group_sizes_G):
    """`array_MN` with the rows past the last group set to zero.

    XLA promises nothing about them on every backend, so this is done on both
    sides; on accelerators it fuses with its neighbours.
    """
    row_M1 = jnp.arange(array_MN.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(row_M1 < jnp.sum(group_sizes_G, dtype=jnp.int32), array_MN, 0)


grouped_matmul = differentiable(product, weight_product)
