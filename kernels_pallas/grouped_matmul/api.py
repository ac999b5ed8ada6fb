"""grouped_matmul: signature, contract and validation; the backends are beside it.

Legend: M rows, K contraction, N columns, G groups.
"""

import jax.numpy as jnp

from kernels_pallas.implementations import choose

DTYPES = ("float32", "bfloat16")


def grouped_matmul(
    lhs_MK,
    rhs_GKN,
    group_sizes_G,
    *,
    transpose_rhs=False,
    out_dtype=None,
    implementation=None,
):
    """Rows of `lhs_MK` times the matrix of the group they belong to.

    Group g owns the `group_sizes_G[g]` rows after those of group g - 1. Sums are
    float32. Rows past the last group are exactly zero in the output and in the
    gradient, and reach no weight gradient, whatever they or their cotangents hold,
    NaN included. A group without rows has a zero weight gradient. The backward
    pass rounds the cotangent to the dtype of the inputs.

    Args:
      lhs_MK: float32 or bfloat16 [M, K], rows sorted by group.
      rhs_GKN: [G, K, N] of the same dtype, or [G, N, K] with `transpose_rhs`.
      group_sizes_G: int32[G], not negative, with a sum of at most M (not checked).
      transpose_rhs: whether `rhs_GKN` has its last two axes swapped.
      out_dtype: dtype of the result; None means that of `lhs_MK`.
      implementation: a key of IMPLEMENTATIONS; None picks by platform.

    Returns:
      [M, N] of `out_dtype`.

    Raises:
      ValueError: on an unknown implementation, or shapes or dtypes that do not fit.
    """
    chosen = choose(implementation)
    _validate(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs)
    out_dtype = jnp.dtype(lhs_MK.dtype if out_dtype is None else out_dtype)
    return chosen.grouped_matmul(
        lhs_MK, rhs_GKN, group_sizes_G, bool(transpose_rhs), out_dtype
    )


def _validate(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs):
    if (lhs_MK.ndim, rhs_GKN.ndim, group_sizes_G.ndim) != (2, 3, 1):
        raise ValueError(
            "grouped_matmul needs lhs of rank 2, rhs of rank 3 and group_sizes of "
            f"rank 1; got lhs {lhs_MK.shape}, rhs {rhs_GKN.shape} and group_sizes "
            f"{group_sizes_G.shape}."
        )
    axis = 2 if transpose_rhs else 1
    if lhs_MK.shape[1] != rhs_GKN.shape[axis]:
        raise ValueError(
            f"grouped_matmul contracts lhs dim 1 with rhs dim {axis}, which must be "
            f"equal; got {lhs_MK.shape[1]} from lhs {lhs_MK.shape} and "
            f"{rhs_GKN.shape[axis]} from rhs {rhs_GKN.shape} "
            f"(transpose_rhs={transpose_rhs})."
        )
    if group_sizes_G.shape[0] != rhs_GKN.shape[0]:
        raise ValueError(
            "grouped_matmul needs one rhs matrix per group; got "
            f"{group_sizes_G.shape[0]} from group_sizes {group_sizes_G.shape} and "
            f"{rhs_GKN.shape[0]} from rhs {rhs_GKN.shape}."
        )
    if lhs_MK.shape[0] == 0 or rhs_GKN.shape[0] == 0:
        raise ValueError(
            "grouped_matmul needs at least one row and one group; got lhs "
            f"{lhs_MK.shape} and rhs {rhs_GKN.shape}."
        )
    if lhs_MK.dtype != rhs_GKN.dtype or lhs_MK.dtype.name not in DTYPES:
        raise ValueError(
            f"grouped_matmul needs lhs and rhs of one dtype among {DTYPES}; got lhs "
            f"{lhs_MK.dtype} and rhs {rhs_GKN.dtype}. Cast one of them."
        )
    if group_sizes_G.dtype != jnp.int32:
        raise ValueError(
            f"grouped_matmul needs int32 group_sizes; got {group_sizes_G.dtype}."
        )
