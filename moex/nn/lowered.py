"""Weights in fewer bytes: bfloat16, or int8 or int4 with a scale for each block.

A weight in int8 or int4 is a module of two parameters, `values` and `scales`, which
stands in the place of the parameter: `module.w[...]` is the weight again, in float32. A
block is along the last input dim: at most 64 numbers of int8, the largest divisor of
that dim; 32 or 16 of int4, and a dim that neither divides stays in int8.
"""

import math
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import Lowered
from kernels_pallas.dense import computes_in_c
from kernels_pallas.lowered import IN_WORD, LEVELS, words

BLOCK = 64  # most numbers of a block of int8
BLOCKS_OF_4 = (32, 16)  # numbers of a block of int4
LARGEST = 127  # of int8; -128 is not used, so that a block is symmetric
SMALLEST = float(np.finfo(np.float32).tiny)  # a block of smaller scales is 0
# Scales of int4 that are tried: the number of largest magnitude is these times the
# level of largest magnitude, and the scale with the smallest sum of squares is taken.
TRIALS = np.linspace(0.82, 1.1, 8)
VALUES, SCALES = "/values", "/scales"  # the ends of paths
DTYPES = ("bfloat16", "int8", "int4")


class BlockWeight(nnx.Module):
    """A weight whose blocks share a scale.

    Attributes:
      values: int8 in the shape of the weight; or int32, eight numbers to a word.
      scales: float32 or bfloat16; the blocked dim has the number of blocks.
      PARTS: their names; they are computed with in these types alone.
    """

    PARTS = ("values", "scales")
    round: ClassVar[Any]  # (float32 array, shape of the scales, their dtype) -> parts

    def __init__(self, variable: nnx.Param, dim: int, block: int, scales: str):
        metadata = variable.get_metadata()
        axes = metadata["axes"]
        dim += len(variable.shape) - len(axes)  # copies of the layer come first
        shape = list(variable.shape)
        shape[dim] //= block
        values, scale = self.round(variable[...], tuple(shape), jnp.dtype(scales))
        own = dim - len(variable.shape) + len(axes)
        # Devices that split the inputs of experts have the blocks of theirs alone.
        split = "mlp" if axes[own] == "mlp" else None
        parts = (*axes[:own], split, *axes[own + 1 :])
        self.values = nnx.Param(values, axes=axes, frozen=True)
        self.scales = nnx.Param(scale, axes=parts, frozen=True)

    def lowered(self) -> Lowered:
        """The parts, for kernels."""
        return Lowered(self.values[...], self.scales[...])

    def __getitem__(self, index) -> jax.Array:
        """The weight in float32; `index` is `...`, as for a parameter."""
        return self.lowered().raised()[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.lowered().shape


def to_int8(w: jax.Array, scales_shape: tuple[int, ...], dtype=jnp.float32):
    """Round a weight: `(int8 values, scales)`.

    No number moves by more than half of its block's scale, which is the largest
    magnitude in the block / 127, rounded to `dtype`.
    """
    parts, blocks = _blocks(w.shape, scales_shape)
    w = w.astype(jnp.float32).reshape(parts)
    scale = jnp.max(jnp.abs(w), axis=blocks, keepdims=True) / LARGEST
    scale = jnp.where(scale < SMALLEST, 0, scale).astype(dtype)
    over = jnp.where(scale == 0, jnp.inf, scale.astype(jnp.float32))
    values = jnp.round(w / over).astype(jnp.int8)
    return values.reshape(_joined(parts, blocks)), scale.reshape(scales_shape)


def to_int4(w: jax.Array, scales_shape: tuple[int, ...], dtype=jnp.bfloat16):
    """Round a weight to the nearest of LEVELS: `(int32 words, scales)`.

    The level of largest magnitude is negative, so a scale may be too.
    """
    parts, blocks = _blocks(w.shape, scales_shape)
    w = w.astype(jnp.float32).reshape(parts)
    high = jnp.max(w, axis=blocks, keepdims=True)
    low = jnp.min(w, axis=blocks, keepdims=True)
    far = jnp.where(high > -low, high, low) / LEVELS[0]

    def scale_of(factor):
        scale = (far * factor).astype(dtype).astype(jnp.float32)
        return jnp.where(jnp.abs(scale) < SMALLEST, 0, scale)

    def error_of(factor):
        # The error is that of ratios: squares of small weights are 0 in float32.
        ratio = _ratio(w, scale_of(factor))
        nearest = jnp.full(w.shape, LEVELS[0] * 1.0)
        for below, above in pairwise(LEVELS):
            nearest = jnp.where(ratio > (below + above) / 2, above * 1.0, nearest)
        # A sum that XLA fuses with this goes number by number, 10 times as slowly.
        square = jax.lax.optimization_barrier((ratio - nearest) ** 2)
        return jnp.sum(square, axis=blocks, keepdims=True) * factor**2

    # One trial after the other, so that the numbers of none are kept.
    factors = jnp.asarray(TRIALS, jnp.float32)
    scale = scale_of(factors[jnp.argmin(jax.lax.map(error_of, factors), axis=0)])
    ratio = _ratio(w, scale)
    level = jnp.zeros(w.shape, jnp.int32) + sum(
        (ratio > (below + above) / 2).astype(jnp.int32)
        for below, above in pairwise(LEVELS)
    )
    level = level.reshape(_joined(parts, blocks))
    return words(level, blocks - 1), scale.reshape(scales_shape).astype(dtype)


def _ratio(w: jax.Array, scale: jax.Array) -> jax.Array:
    """The numbers over their scale; 0 where that is 0."""
    return w / jnp.where(scale == 0, jnp.inf, scale)


class Int8Weight(BlockWeight):
    """A weight in int8."""

    round = staticmethod(to_int8)

    def __init__(self, variable: nnx.Param, dim: int, scales: str = "float32"):
        size = variable.shape[dim - len(variable.get_metadata()["axes"])]
        block = max(b for b in range(1, BLOCK + 1) if size % b == 0)
        super().__init__(variable, dim, block, scales)


class Int4Weight(BlockWeight):
    """A weight in int4, eight numbers to a word."""

    round = staticmethod(to_int4)


def from_int8(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Undo `to_int8`, but for the rounding: float32."""
    return Lowered(values, scales).raised()


def _blocks(shape, scales_shape) -> tuple[tuple[int, ...], int]:
    """(shape with the blocked dim as blocks and the numbers of one, that dim)."""
    pairs = list(zip(shape, scales_shape, strict=True))
    dim = next((d for d, (n, m) in enumerate(pairs) if n != m), len(shape) - 1)
    n, m = pairs[dim]
    return (*shape[:dim], m, n // m, *shape[dim + 1 :]), dim + 1


def _joined(parts: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*parts[: dim - 1], parts[dim - 1] * parts[dim], *parts[dim + 1 :])


def lower(owner: nnx.Module, name: str, dtype: str) -> None:
    """Keep a frozen weight of a module in `dtype`: "bfloat16" or "int8".

    Weights that are no matrices between hidden vectors, such as embeddings and logits,
    are in bfloat16 for both.
    """
    variable = getattr(owner, name)
    matrix = variable.get_metadata().get("matrix")
    if dtype == "int8" and matrix is not None:
        setattr(owner, name, Int8Weight(variable, matrix[0][-1]))
    else:
        variable.set_value(variable[...].astype(jnp.bfloat16))


def lower_model(model: nnx.Module, dtype: str) -> None:
    """Keep the matrices of a model that is not trained in one of DTYPES.

    They are those that modules multiply by through `project` and `project_rows`.
    Routers stay as they are; embeddings are in bfloat16, or stay where they make the
    logits too; with int4 other logits are in int8.
    """
    for where, module in list(nnx.iter_modules(model, graph=False)):
        for name in getattr(module, "PROJECTED", ()):
            variable, kept = getattr(module, name), getattr(module, "READ_WHOLE", ())
            untied = getattr(module, "w_logits_DV", None) is not None
            if name == "w_embed_VD" and untied:
                variable.set_value(variable[...].astype(jnp.bfloat16))
            if not isinstance(variable, nnx.Param) or name in kept:
                continue
            if any(str(part).startswith("router") for part in where):
                continue
            matrix = variable.get_metadata().get("matrix")
            dim = 0 if matrix is None else matrix[0][-1]
            size = variable.shape[dim - len(variable.get_metadata()["axes"])]
            block = next((b for b in BLOCKS_OF_4 if size % b == 0), None)
            if dtype == "bfloat16":
                variable.set_value(variable[...].astype(jnp.bfloat16))
            elif dtype == "int4" and block and matrix is not None:
                setattr(module, name, Int4Weight(variable, dim, block, "bfloat16"))
            else:
                setattr(module, name, Int8Weight(variable, dim, "bfloat16"))


def as_read(weight, ctx) -> Lowered | None:
    """The form of a weight that C reads; None: it is read as an array.

    Args:
      weight: parameter or `BlockWeight`.
      ctx: `Context`; training reads arrays.
    """
    float32, kernels = np.dtype(np.float32), ctx.compute.kernels
    if ctx.mode == "train" or not computes_in_c(float32, kernels):
        return None
    if isinstance(weight, BlockWeight):
        return weight.lowered()
    return Lowered(weight[...]) if weight[...].dtype == jnp.bfloat16 else None


def lowered(params: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Parameters by path, in the types and the form of `wanted`.

    Args:
      params: arrays by path, of any type.
      wanted: arrays or `ShapeDtypeStruct`s by path, all of the model.
    """
    whole = {
        n.removesuffix(VALUES): from_int8(a, params[n.removesuffix(VALUES) + SCALES])
        for n, a in params.items()
        if n.endswith(VALUES) and n not in wanted
    }
    params = {n: a for n, a in params.items() if n.rpartition("/")[0] not in whole}
    new = {}
    for name, array in (params | whole).items():
        if name + VALUES in wanted:
            parts = wanted[name + VALUES], wanted[name + SCALES]
            new[name + VALUES], new[name + SCALES] = rounded(array, *parts)
        elif name in wanted:
            new[name] = array.astype(wanted[name].dtype)
        else:
            new[name] = array
    return new


def rounded(w: jax.Array, values, scales) -> tuple[jax.Array, jax.Array]:
    """The parts of a weight, in the shapes and dtypes of `values` and `scales`."""
    how = to_int4 if values.dtype == jnp.int32 else to_int8
    return how(w, scales.shape, scales.dtype)


def weight_sizes(params: dict[str, Any]) -> dict[str, int]:
    """The numbers of each weight by path; scales are no numbers of their own.

    Args:
      params: arrays by path; a weight in int8 or int4 is there by its parts.
    """

    def in_word(array) -> int:
        return IN_WORD if array.dtype == jnp.int32 else 1

    return {
        name.removesuffix(VALUES): math.prod(array.shape) * in_word(array)
        for name, array in params.items()
        if not name.endswith(SCALES)
    }
