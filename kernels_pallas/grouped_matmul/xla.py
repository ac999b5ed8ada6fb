"""grouped_matmul by XLA's own ragged dot.

It is slow and large where XLA expands it to all groups times all rows: on CPU, on an
H100 (a [G, M, K] temporary), and for weight gradients on TPU with JAX 0.10.

Legend: M rows, K contraction, N columns, G groups. `bounds` is int32[G + 1]: rows
bounds[g] to bounds[g + 1] are those of group g.
"""

import jax.numpy as jnp
from jax import lax


def product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
    """Multiply rows by the matrix of their group; rows of no group are zero."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out_MN = lax.ragged_dot_general(
        _to_front(lhs_MK, bounds),
        rhs_GKN.astype(lhs_MK.dtype),
        bounds[1:] - bounds[:-1],
        dims,
        preferred_element_type=jnp.float32,
    )
    # The rows of no group were rolled to the end.
    return keep_rows(jnp.roll(out_MN, bounds[0], axis=0), bounds).astype(out_dtype)


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype):
    """Sum the outer products of the rows of each group, [G, K, N]."""
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    out_GKN = lax.ragged_dot_general(
        _to_front(lhs_MK, bounds),
        _to_front(rhs_MN, bounds),
        bounds[1:] - bounds[:-1],
        dims,
        preferred_element_type=jnp.float32,
    )
    return out_GKN.astype(out_dtype)


def keep_rows(array_MN, bounds):
    """Set the rows of no group in `array_MN` to zero.

    Not every XLA backend promises anything about them, so this is done on both
    sides; on accelerators it fuses with its neighbours.
    """
    row_M1 = jnp.arange(array_MN.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where((row_M1 >= bounds[0]) & (row_M1 < bounds[-1]), array_MN, 0)


def _to_front(array_MN, bounds):
    """Roll the groups to row 0, where ragged dots begin; other rows become zeros."""
    return jnp.roll(keep_rows(array_MN, bounds), -bounds[0], axis=0)
