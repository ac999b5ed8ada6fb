"""Dense projections: one product, written for the platform."""

import math

import jax.numpy as jnp

from kernels_pallas import grouped_matmul
from kernels_pallas.device import platform
from kernels_pallas.implementations import (
    DEFAULTS,
    IMPLEMENTATIONS,
    Request,
    split_names,
)
from moex.sharding import on_a_mesh

FEW_ROWS = 256  # below them XLA:CPU's own product is as quick


def project(x, w, ctx, contract=1):
    """`x` times `w` over the last `contract` axes of `x` and the first of `w`.

    On a CPU it is a grouped matmul of one group, where that is computed in C: XLA:CPU
    copies each operand of a weight gradient that lies the other way round, which costs
    more than half as much as the products (8 x 256 tokens, width 256).

    Args:
      x: float [..., *inner].
      w: [*inner, *outer] of the same dtype.
      ctx: Context.

    Returns:
      [..., *outer] in the dtype of `x`.
    """
    inner, outer = w.shape[:contract], w.shape[contract:]
    rows = x.shape[: x.ndim - contract]
    M, K, N = math.prod(rows), math.prod(inner), math.prod(outer)
    if M < FEW_ROWS or not in_c(x.dtype, ctx.kernels):
        return jnp.tensordot(x, w, contract)
    sizes = jnp.array([M], jnp.int32)
    y_MN = grouped_matmul(
        x.reshape(M, K), w.reshape(1, K, N), sizes, implementation="native"
    )
    return y_MN.reshape(*rows, *outer)


def in_c(dtype, kernels) -> bool:
    """Whether experts would be computed in C here: on one CPU, with a compiler.

    Args:
      dtype: of tokens and weights.
      kernels: `ctx.kernels`.
    """
    if platform() != "cpu" or on_a_mesh():
        return False
    names = split_names(kernels) if kernels else DEFAULTS["cpu"]
    if names[0] != "native":
        return False
    request = Request("grouped_matmul", dtype.name, 1, 1, 1)
    return IMPLEMENTATIONS["native"].unsupported(request) is None
