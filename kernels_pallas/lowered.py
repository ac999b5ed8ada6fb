"""Matrices in fewer bytes, and products with them.

A number is bfloat16, or a level of a block that shares a scale; a block is along the
inner dim. Levels of int8 are the integers; int4 has the 16 of LEVELS, eight to a word
of int32, the first in the low bits. On one CPU, C reads the numbers as they are.

Legend: M rows, G groups, K inner dim, N columns, S scales of a column.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.native import library

# The levels of int4, over 127: near where numbers lie that are normal but for the
# scale of their block. Source: kvalues_iq4nl of llama.cpp, ggml/src/ggml-common.h.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IN_WORD = 8  # numbers of int4 in a word
KINDS = ("bfloat16", "int8", "int32")  # dtypes of `Lowered.values`, in the order of C


class Lowered(NamedTuple):
    """Numbers of any shape, in blocks along one dim.

    Attributes:
      values: bfloat16 or int8, in the shape of the numbers; or int32 words of int4,
        where the blocked dim has the number of words.
      scales: float32 or bfloat16, where the blocked dim has the number of blocks; None
        with bfloat16. If no dim differs from that of `values`, it is the last.
    """

    values: jax.Array
    scales: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        shape, dim = list(self.values.shape), self._dim()
        if self.values.dtype == jnp.int32:
            shape[dim] *= IN_WORD
        return tuple(shape)

    def raised(self) -> jax.Array:
        """The numbers, float32."""
        values, shape, dim = self.values, self.shape, self._dim()
        if self.scales is None:
            return values.astype(jnp.float32)
        if values.dtype == jnp.int32:
            shifts = _shifts(values.ndim + 1, dim + 1)
            level = (jnp.expand_dims(values, dim + 1) >> shifts) & 15
            values = jnp.asarray(LEVELS, jnp.float32)[level]
        blocks = self.scales.shape[dim]
        parts = (*shape[:dim], blocks, shape[dim] // max(blocks, 1), *shape[dim + 1 :])
        scales = jnp.expand_dims(self.scales.astype(jnp.float32), dim + 1)
        return (values.reshape(parts).astype(jnp.float32) * scales).reshape(shape)

    def copy_of(self, i) -> "Lowered":
        """The numbers with index `i` in the first dim."""
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False), self
        )

    def matrices(self, lead: int, inner: int) -> "Lowered":
        """The same as [G, K, N]; the blocked dim is the last of the inner ones.

        Args:
          lead: number of dims before the inner ones.
          inner: number of inner dims.
        """

        def flat(a):
            cuts = (0, lead, lead + inner, a.ndim)
            return a.reshape([math.prod(a.shape[i:j]) for i, j in pairwise(cuts)])

        scales = None if self.scales is None else flat(self.scales)
        return Lowered(flat(self.values), scales)

    def _dim(self) -> int:
        """The blocked dim."""
        if self.scales is None:
            return self.values.ndim - 1
        pairs = enumerate(zip(self.values.shape, self.scales.shape, strict=True))
        return next((d for d, (n, m) in pairs if n != m), self.values.ndim - 1)


@jax.custom_vjp
def lowered_matmul(x_MK, weight: Lowered, bounds):
    """Multiply rows by the matrix of their group, in C; rows of no group are zero.

    Args:
      x_MK: float32, sorted by group.
      weight: [G, K, N], whose blocks are along K.
      bounds: int32[G + 1]; rows bounds[g] to bounds[g + 1] - 1 are those of group g.

    Returns:
      float32[M, N]. The only gradient is that of the rows.

    Raises:
      ValueError: on shapes that do not fit, and on rows or bounds of other types.
    """
    M, K = x_MK.shape
    G, own, N = weight.shape
    if own != K or bounds.shape != (G + 1,):
        raise ValueError(
            f"lowered_matmul needs rows [M, K], weights [G, K, N] and G + 1 bounds; "
            f"got {x_MK.shape}, {weight.shape} and {bounds.shape}."
        )
    if (x_MK.dtype, bounds.dtype) != (jnp.float32, jnp.int32):
        raise ValueError(
            "lowered_matmul needs float32 rows and int32 bounds; got "
            f"{x_MK.dtype} and {bounds.dtype}."
        )
    scales = weight.scales
    if scales is None:
        scales = jnp.zeros((1, 1, 1), jnp.float32)
    kind = KINDS.index(weight.values.dtype.name)
    wide = scales.dtype == jnp.float32
    inputs = (x_MK, weight.values, scales, bounds)
    (y_MN,) = library.call(
        "moex_lowered", [(M, N)], inputs, kind=kind, wide_scales=int(wide)
    )
    return y_MN


def _forward(x_MK, weight, bounds):
    return lowered_matmul(x_MK, weight, bounds), (weight, bounds)


def _backward(saved, dy_MN):
    weight, bounds = saved
    (dx_MK,) = library.call(
        "moex_product",
        [(dy_MN.shape[0], weight.shape[1])],
        (dy_MN, weight.raised(), bounds),
        transposed=True,
    )
    return dx_MK, None, None


lowered_matmul.defvjp(_forward, _backward)


def words(level: np.ndarray | jax.Array, dim: int) -> jax.Array:
    """Put numbers of levels, 0 to 15, into words along a dim: a multiple of IN_WORD."""
    shape = level.shape
    parts = (*shape[:dim], shape[dim] // IN_WORD, IN_WORD, *shape[dim + 1 :])
    level = level.astype(jnp.uint32).reshape(parts)
    shifts = _shifts(len(parts), dim + 1).astype(jnp.uint32)
    word = jnp.sum(level << shifts, axis=dim + 1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def _shifts(ndim: int, dim: int) -> jax.Array:
    """The bits before each number of a word, along a dim of `ndim`."""
    shape = [1] * ndim
    shape[dim] = IN_WORD
    return 4 * jax.lax.broadcasted_iota(jnp.int32, shape, dim)
