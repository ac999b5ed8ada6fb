"""Dense projections: one product, written for the platform.

Legend: M rows, K inner width, N outer width.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.device import platform
from kernels_pallas.grouped_matmul import native
from kernels_pallas.implementations import (
    DEFAULTS,
    IMPLEMENTATIONS,
    Request,
    split_names,
)
from kernels_pallas.names import GROUPED_MATMUL
from moex.sharding import on_a_mesh

FEW_ROWS = 32  # of so few a product costs less than laying the weights out for it in C


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
    rows = math.prod(x.shape[: x.ndim - contract])
    if rows < FEW_ROWS or not in_c(x.dtype, ctx.kernels):
        return jnp.tensordot(x, w, contract)
    return _project_in_c(x, w, contract)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project_in_c(x, w, contract):
    M, K, N = _sizes(x, w, contract)
    group = jnp.array([0, M], jnp.int32)
    y_MN = native.product(x.reshape(M, K), w.reshape(1, K, N), group, False, x.dtype)
    return y_MN.reshape(x.shape[: x.ndim - contract] + w.shape[contract:])


def _forward(x, w, contract):
    # Weights as they came: a scan over layers would keep a reshaped copy of each.
    return checkpoint_name(_project_in_c(x, w, contract), GROUPED_MATMUL), (x, w)


def _backward(contract, saved, dy):
    x, w = saved
    M, K, N = _sizes(x, w, contract)
    group, dy_MN = jnp.array([0, M], jnp.int32), dy.reshape(M, N)
    dx_MK = native.product(dy_MN, w.reshape(1, K, N), group, True, x.dtype)
    dw_1KN = native.weight_product(x.reshape(M, K), dy_MN, group, w.dtype)
    return dx_MK.reshape(x.shape), dw_1KN.reshape(w.shape)


_project_in_c.defvjp(_forward, _backward)


def _sizes(x, w, contract):
    rows, inner = x.shape[: x.ndim - contract], w.shape[:contract]
    return math.prod(rows), math.prod(inner), math.prod(w.shape[contract:])


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
