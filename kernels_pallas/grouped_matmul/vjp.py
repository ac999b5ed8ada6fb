"""The VJP of a grouped matmul, from the two kernels that every backend has.

Legend: M rows, K contraction, N columns, G groups.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.names import GROUPED_MATMUL


def differentiable(product, weight_product):
    """Make a differentiable grouped matmul out of two that are not.

    Args:
      product: (lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype) -> [M, N]; rows of
        no group are zero.
      weight_product: (lhs_MK, rhs_MN, bounds, out_dtype) -> [G, K, N], for each group
        the sum over its rows of outer products.

    Returns:
      A function with the signature of `product`, safe to call outside of jit.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(3, 4))
    def grouped_matmul(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
        return product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype)

    def forward(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
        out_MN = product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype)
        return checkpoint_name(out_MN, GROUPED_MATMUL), (lhs_MK, rhs_GKN, bounds)

    def backward(transpose_rhs, out_dtype, saved, dout_MN):
        lhs_MK, rhs_GKN, bounds = saved
        dout_MN = dout_MN.astype(lhs_MK.dtype)
        dlhs_MK = product(dout_MN, rhs_GKN, bounds, not transpose_rhs, lhs_MK.dtype)
        pair = (dout_MN, lhs_MK) if transpose_rhs else (lhs_MK, dout_MN)
        if rhs_GKN.dtype != lhs_MK.dtype:  # quantised weights are constants
            return dlhs_MK, None, None
        return dlhs_MK, weight_product(*pair, bounds, rhs_GKN.dtype), None

    grouped_matmul.defvjp(forward, backward)
    return jax.jit(grouped_matmul, static_argnums=(3, 4))
