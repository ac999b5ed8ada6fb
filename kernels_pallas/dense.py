"""Dense matmuls, written for the platform: `x @ w` over several axes.

Legend: M rows, K inner width, N outer width.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.device import on_a_mesh, platform
from kernels_pallas.grouped_matmul import native
from kernels_pallas.implementations import (
    DEFAULTS,
    IMPLEMENTATIONS,
    Request,
    split_names,
)
from kernels_pallas.names import GROUPED_MATMUL

FEW_ROWS = 32  # with fewer, laying out the weights in C costs more than the product
WIDE = 8  # N / K from which the weight gradient is written for a CPU


def matmul(x, w, *, contract=1, implementation=None, out_dtype=None):
    """Multiply `x` by `w` over the last `contract` axes of `x` and the first of `w`.

    On one CPU it is a grouped matmul of one group in C: XLA:CPU copies each transposed
    operand of a weight gradient, which costs more than half as much as the products
    (8 x 256 tokens, width 256).

    Args:
      x: float [..., *inner].
      w: [*inner, *outer] of the same dtype.
      implementation: names of `IMPLEMENTATIONS`, or None: as for `grouped_matmul`. It
        only says whether C is wanted; anything else is XLA.
      out_dtype: dtype of the result and of its sums; None: that of `x`.

    Returns:
      [..., *outer].
    """
    M, K, N = _sizes(x, w, contract)
    out_dtype = out_dtype or x.dtype
    if M >= FEW_ROWS and computes_in_c(x.dtype, implementation):
        return _in_c(x, w, contract).astype(out_dtype)
    if platform() == "cpu" and x.dtype == jnp.float32 and N >= WIDE * K:
        return _wide_on_cpu(x, w, contract).astype(out_dtype)
    return jax.lax.dot_general(
        x, w, _inner_axes(x, contract), preferred_element_type=out_dtype
    )


def computes_in_c(dtype, implementation) -> bool:
    """Whether matmuls are computed in C here: on one CPU, with a compiler.

    Args:
      dtype: dtype of both operands.
      implementation: names of `IMPLEMENTATIONS`, or None: those of the platform.
    """
    if platform() != "cpu" or on_a_mesh():
        return False
    names = split_names(implementation) if implementation else DEFAULTS["cpu"]
    if names[0] != "native":
        return False
    request = Request("grouped_matmul", dtype.name, 1, 1, 1)
    return IMPLEMENTATIONS["native"].unsupported(request) is None


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_c(x, w, contract):
    M, K, N = _sizes(x, w, contract)
    group = jnp.array([0, M], jnp.int32)
    y_MN = native.product(x.reshape(M, K), w.reshape(1, K, N), group, False, x.dtype)
    return y_MN.reshape(x.shape[: x.ndim - contract] + w.shape[contract:])


def _in_c_forward(x, w, contract):
    # Save weights as they came: a scan over layers would keep a reshaped copy of each.
    return checkpoint_name(_in_c(x, w, contract), GROUPED_MATMUL), (x, w)


def _in_c_backward(contract, saved, dy):
    x, w = saved
    M, K, N = _sizes(x, w, contract)
    group, dy_MN = jnp.array([0, M], jnp.int32), dy.reshape(M, N)
    dx_MK = native.product(dy_MN, w.reshape(1, K, N), group, True, x.dtype)
    dw_1KN = native.weight_product(x.reshape(M, K), dy_MN, group, w.dtype)
    return dx_MK.reshape(x.shape), dw_1KN.reshape(w.shape)


_in_c.defvjp(_in_c_forward, _in_c_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_on_cpu(x, w, contract):
    """Multiply by XLA; the weight gradient transposes the smaller operand first.

    For that gradient XLA:CPU alone makes one dot of two transposed operands, at a third
    of the speed (2 cores, JAX 0.10.2: [2048, 256] and [2048, 8192], 23 and 73 GFLOP/s).
    """
    return jax.lax.dot_general(x, w, _inner_axes(x, contract))


def _wide_forward(x, w, contract):
    return _wide_on_cpu(x, w, contract), (x, w)


def _wide_backward(contract, saved, dy):
    x, w = saved
    M, K, N = _sizes(x, w, contract)
    dy_MN = dy.reshape(M, N)
    x_KM = jax.lax.optimization_barrier(x.reshape(M, K).T)
    dx_MK = dy_MN @ w.reshape(K, N).T
    return dx_MK.reshape(x.shape), (x_KM @ dy_MN).reshape(w.shape)


_wide_on_cpu.defvjp(_wide_forward, _wide_backward)


def _inner_axes(x, contract):
    """The axes that `dot_general` sums over."""
    last = tuple(range(x.ndim - contract, x.ndim))
    return (last, tuple(range(contract))), ((), ())


def _sizes(x, w, contract):
    rows, inner = x.shape[: x.ndim - contract], w.shape[:contract]
    return math.prod(rows), math.prod(inner), math.prod(w.shape[contract:])
