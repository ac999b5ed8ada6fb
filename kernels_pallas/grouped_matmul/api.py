"""grouped_matmul: signature, contract and validation; the backends are in this folder.

Legend: M rows, K contraction, N columns, G groups (of this shard), A groups of all
shards.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from kernels_pallas.implementations import Request, choose

DTYPES = ("float32", "bfloat16")
WEIGHT_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


def grouped_matmul(
    lhs_MK,
    rhs_GKN,
    group_sizes_G,
    *,
    transpose_rhs=False,
    group_offset=None,
    rhs_scale_GN=None,
    out_dtype=None,
    implementation=None,
):
    """Multiply each row of `lhs_MK` by the matrix of the group that it belongs to.

    Group g owns the `group_sizes_G[g]` rows after those of group g - 1. Sums are
    float32. Rows of no group are exactly zero in the output and in the
    gradient, and reach no weight gradient, whatever they or their cotangents hold,
    NaN included. A group without rows has a zero weight gradient. The backward
    pass rounds the cotangent to the dtype of the inputs.

    Args:
      lhs_MK: float32 or bfloat16 [M, K], rows sorted by group.
      rhs_GKN: [G, K, N] of the same dtype, or [G, N, K] with `transpose_rhs`. With
        `rhs_scale_GN` its dtype is in WEIGHT_DTYPES, and it is constant: no gradient.
      group_sizes_G: int32[G], not negative, with a sum of at most M. Known values are
        checked; unknown ones only under `checkify.checkify(..., user_checks)`.
      transpose_rhs: whether `rhs_GKN` has its last two axes swapped.
      group_offset: int32 scalar, for a shard of the experts: `group_sizes_G` is then
        int32[A] with A >= G, and `rhs_GKN` holds the groups from this one on. Rows of
        other groups are rows of no group.
      rhs_scale_GN: float32[G, N]; the weights are rhs * scale, column by column of
        the product.
      out_dtype: dtype of the result; None means that of `lhs_MK`.
      implementation: see `implementations.choose`.

    Returns:
      [M, N] of `out_dtype`.

    Raises:
      ValueError: on an implementation that cannot do this, shapes or dtypes that do
        not fit, or known group sizes that are wrong.
    """
    _validate_shapes(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs, group_offset)
    _validate_dtypes(lhs_MK, rhs_GKN, group_sizes_G, rhs_scale_GN)
    _check_group_sizes(lhs_MK, rhs_GKN, group_sizes_G, group_offset)
    G, K, N = rhs_GKN.shape
    if transpose_rhs:
        K, N = N, K
    request = Request(
        "grouped_matmul", lhs_MK.dtype.name, K, N, G, weights=rhs_GKN.dtype.name
    )
    chosen = choose(implementation, request)
    out_dtype = jnp.dtype(lhs_MK.dtype if out_dtype is None else out_dtype)
    bounds = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes_G, dtype=jnp.int32)]
    )
    if group_offset is not None:
        bounds = lax.dynamic_slice_in_dim(bounds, group_offset, G + 1)
    if rhs_scale_GN is None:
        return chosen.grouped_matmul(
            lhs_MK, rhs_GKN, bounds, bool(transpose_rhs), out_dtype
        )
    if rhs_scale_GN.shape != (G, N):
        raise ValueError(
            "grouped_matmul needs one scale per group and column of the product, "
            f"{(G, N)}; got {rhs_scale_GN.shape}."
        )
    out_MN = chosen.grouped_matmul(
        lhs_MK, rhs_GKN, bounds, bool(transpose_rhs), jnp.dtype(jnp.float32)
    )
    row_M = jnp.arange(lhs_MK.shape[0], dtype=jnp.int32)
    group_M = jnp.searchsorted(bounds[1:], row_M, side="right")
    scale_MN = rhs_scale_GN.at[group_M].get(mode="clip")
    return (out_MN * scale_MN).astype(out_dtype)


def _validate_shapes(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs, group_offset):
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
    A, G = group_sizes_G.shape[0], rhs_GKN.shape[0]
    if A != G if group_offset is None else A < G:
        raise ValueError(
            "grouped_matmul needs one rhs matrix per group"
            f"{'' if group_offset is None else ' of the shard'}; got {A} from "
            f"group_sizes {group_sizes_G.shape} and {G} from rhs {rhs_GKN.shape}."
        )
    if lhs_MK.shape[0] == 0 or G == 0:
        raise ValueError(
            "grouped_matmul needs at least one row and one group; got lhs "
            f"{lhs_MK.shape} and rhs {rhs_GKN.shape}."
        )


def _validate_dtypes(lhs_MK, rhs_GKN, group_sizes_G, rhs_scale_GN):
    if rhs_scale_GN is not None:
        if lhs_MK.dtype.name not in DTYPES or rhs_GKN.dtype.name not in WEIGHT_DTYPES:
            raise ValueError(
                f"grouped_matmul with rhs_scale needs lhs among {DTYPES} and rhs among "
                f"{WEIGHT_DTYPES}; got lhs {lhs_MK.dtype} and rhs {rhs_GKN.dtype}."
            )
    elif lhs_MK.dtype != rhs_GKN.dtype or lhs_MK.dtype.name not in DTYPES:
        raise ValueError(
            f"grouped_matmul needs lhs and rhs of one dtype among {DTYPES}; got lhs "
            f"{lhs_MK.dtype} and rhs {rhs_GKN.dtype}. Cast one of them, or give "
            f"rhs_scale with weights among {WEIGHT_DTYPES}."
        )
    if group_sizes_G.dtype != jnp.int32:
        raise ValueError(
            f"grouped_matmul needs int32 group_sizes; got {group_sizes_G.dtype}."
        )


def _check_group_sizes(lhs_MK, rhs_GKN, group_sizes_G, group_offset):
    """Check values: now if they are known, else if checkify turns the check on."""
    M, G, A = lhs_MK.shape[0], rhs_GKN.shape[0], group_sizes_G.shape[0]
    if isinstance(group_sizes_G, jax.core.Tracer):
        checkify.debug_check(
            jnp.all(group_sizes_G >= 0),
            "grouped_matmul needs group_sizes >= 0; got {sizes}",
            sizes=group_sizes_G,
        )
        checkify.debug_check(
            jnp.sum(group_sizes_G) <= M,
            f"grouped_matmul has {M} rows; got group_sizes {{sizes}} for more",
            sizes=group_sizes_G,
        )
    else:
        sizes_A = np.asarray(group_sizes_G)
        if (sizes_A < 0).any():
            raise ValueError(f"grouped_matmul needs group_sizes >= 0; got {sizes_A}.")
        if sizes_A.sum() > M:
            raise ValueError(
                f"grouped_matmul has {M} rows; got group_sizes {sizes_A} for "
                f"{sizes_A.sum()}."
            )
    if group_offset is None:
        return
    if isinstance(group_offset, jax.core.Tracer):
        checkify.debug_check(
            (group_offset >= 0) & (group_offset <= A - G),
            f"grouped_matmul needs a group_offset in [0, {A - G}]; got {{offset}}",
            offset=group_offset,
        )
    elif not 0 <= int(group_offset) <= A - G:
        raise ValueError(
            f"grouped_matmul needs a group_offset in [0, {A - G}], for {G} of {A} "
            f"groups; got {int(group_offset)}."
        )
