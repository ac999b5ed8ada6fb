"""Frozen weights in fewer bytes: bfloat16, or int8 with a float32 scale for each block.

A weight in int8 is a module of two parameters, `values` and `scales`, which stands in
the place of the parameter: `module.w[...]` is the weight again, in float32. A block is
at most 64 numbers along the last input dim: the largest divisor of that dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

BLOCK = 64  # most numbers of a block
LARGEST = 127  # of int8; -128 is not used, so that a block is symmetric
VALUES, SCALES = "/values", "/scales"  # the ends of paths


class Int8Weight(nnx.Module):
    """A weight whose blocks have an int8 for each number and one scale.

    Attributes:
      values: int8, in the shape of the weight.
      scales: float32; the blocked dim has the number of blocks.
      PARTS: their names; they are computed with in these types alone.
    """

    PARTS = ("values", "scales")

    def __init__(self, variable: nnx.Param, dim: int):
        metadata = variable.get_metadata()
        axes = metadata["axes"]
        dim += len(variable.shape) - len(axes)  # copies of the layer come first
        size = variable.shape[dim]
        shape = list(variable.shape)
        shape[dim] = size // max(b for b in range(1, BLOCK + 1) if size % b == 0)
        values, scales = to_int8(variable[...], tuple(shape))
        own = dim - len(variable.shape) + len(axes)
        # Devices that split the inputs of experts have the blocks of theirs alone.
        split = "mlp" if axes[own] == "mlp" else None
        parts = (*axes[:own], split, *axes[own + 1 :])
        self.values = nnx.Param(values, axes=axes, frozen=True)
        self.scales = nnx.Param(scales, axes=parts, frozen=True)

    def __getitem__(self, index) -> jax.Array:
        """The weight in float32; `index` is `...`, as for a parameter."""
        return from_int8(self.values[...], self.scales[...])[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape


def to_int8(w: jax.Array, scales_shape: tuple[int, ...]):
    """Round a weight: `(int8 values, float32 scales)`.

    No number moves by more than half of its block's scale, which is the largest
    magnitude in the block / 127.
    """
    parts, blocks = _blocks(w.shape, scales_shape)
    w = w.astype(jnp.float32).reshape(parts)
    scale = jnp.max(jnp.abs(w), axis=blocks, keepdims=True) / LARGEST
    values = jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return values.reshape(_joined(parts, blocks)), scale.reshape(scales_shape)


def from_int8(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Undo `to_int8`, but for the rounding: float32."""
    parts, blocks = _blocks(values.shape, scales.shape)
    w = values.reshape(parts).astype(jnp.float32) * jnp.expand_dims(scales, blocks)
    return w.reshape(values.shape)


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
            shape = wanted[name + SCALES].shape
            new[name + VALUES], new[name + SCALES] = to_int8(array, shape)
        elif name in wanted:
            new[name] = array.astype(wanted[name].dtype)
        else:
            new[name] = array
    return new


def weight_sizes(params: dict[str, Any]) -> dict[str, int]:
    """The numbers of each weight by path; scales are no numbers of their own.

    Args:
      params: arrays by path; a weight in int8 is there by its parts.
    """
    return {
        name.removesuffix(VALUES): math.prod(array.shape)
        for name, array in params.items()
        if not name.endswith(SCALES)
    }
