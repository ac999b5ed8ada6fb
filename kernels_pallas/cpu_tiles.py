"""Loops over tiles of rows that belong to one group; the CPU backends share them.

A group's rows are cut into full tiles of the largest size and one remainder tile
of the smallest size that holds the rest. There is one loop with a dynamic trip
count per tile size, and no branch inside a loop: XLA:CPU may copy the whole loop
carry at every conditional (11 times slower on JAX 0.10.2, 2 cores, 64 experts).

A remainder tile is larger than the rest it holds. Where groups follow one another
(`grouped_matmul`), it overhangs its group, and `Tile.valid_R` says which rows count.
Where groups start at multiples of the smallest size (`grouped_glu`), nothing overhangs
and no mask is needed.

Legend: M rows, G groups, R rows of one tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tile(NamedTuple):
    """Rows [start, start + size) of which those in `valid_R` belong to `group`."""

    group: jax.Array  # int32 scalar
    start: jax.Array  # int32 scalar
    size: int  # R
    first: bool  # whether it is the group's remainder tile, which comes first
    valid_R: jax.Array | None  # bool; None when all rows are the group's


def tile_sizes(num_rows, num_groups):
    """Rising tile sizes, multiples of the first, for `num_rows` rows in `num_groups`.

    More sizes waste fewer rows and compile longer (about 0.3 s each, forward and
    backward). They were measured on 2 CPU cores, and follow the mean rows per group.
    """
    mean_rows = num_rows / num_groups
    if num_rows <= 16:  # decoding: bound by reading weights, one loop compiles fast
        return (num_rows,)
    step, largest = (16, 256) if mean_rows > 64 else (8, 128 if mean_rows > 16 else 64)
    largest = min(largest, -(-num_rows // step) * step)
    return tuple(range(step, largest + 1, step))


def for_each_tile(begin_G, size_G, sizes, body, carry, num_rows=None):
    """Folds `body(carry, tile) -> carry` over the tiles of all groups.

    Remainder tiles come before full ones, so that a sum over a group's tiles may be
    set by the first and added to by the others; see `add`.

    Args:
      begin_G, size_G: int32, where each group's rows begin and how many they are.
      sizes: rising tile sizes.
      body: traced once per tile size.
      carry: pytree.
      num_rows: number of rows, if groups may lie anywhere in them; None if each group
        has room for its remainder tile.
    """
    largest = sizes[-1]
    full_G, rest_G = size_G // largest, size_G % largest

    # Sort groups by the size of their remainder tile: class c has sizes[c - 1],
    # class 0 has no remainder.
    class_G = _searchsorted(jnp.array((0, *sizes), jnp.int32), rest_G)
    by_class_G = jnp.argsort(class_G).astype(jnp.int32)
    classes = jnp.arange(len(sizes) + 2, dtype=jnp.int32)
    class_bounds = _searchsorted(class_G[by_class_G], classes)

    for c, size in enumerate(sizes, start=1):

        def remainder(i, carry, size=size):
            group = by_class_G[i]
            begin = begin_G[group] + full_G[group] * largest
            start, valid_R = begin, None
            if num_rows is not None:
                start = jnp.minimum(begin, num_rows - size)
                row_R = start + jnp.arange(size, dtype=jnp.int32)
                valid_R = (row_R >= begin) & (row_R < begin + rest_G[group])
            return body(carry, Tile(group, start, size, True, valid_R))

        carry = lax.fori_loop(class_bounds[c], class_bounds[c + 1], remainder, carry)

    full_end_G = jnp.cumsum(full_G, dtype=jnp.int32)

    def full(i, carry):
        group = jnp.sum(full_end_G <= i, dtype=jnp.int32)
        done = i - (full_end_G[group] - full_G[group])
        start = begin_G[group] + done * largest
        return body(carry, Tile(group, start, largest, False, None))

    return lax.fori_loop(jnp.int32(0), full_end_G[-1], full, carry)


def read(array, tile):
    """Read the tile's rows of an array whose first axis is rows."""
    return lax.dynamic_slice_in_dim(array, tile.start, tile.size)


def read_group(array, tile):
    """Read the entry of the tile's group in an array whose first axis is groups."""
    return lax.dynamic_index_in_dim(array, tile.group, keepdims=False)


def mask(value, tile, other=0):
    """Replace the rows of other groups in `value` by `other`."""
    if tile.valid_R is None:
        return value
    shape = (tile.size,) + (1,) * (value.ndim - 1)
    other = jnp.broadcast_to(jnp.asarray(other, value.dtype), value.shape)
    return jnp.where(tile.valid_R.reshape(shape), value, other)


def write(array, tile, value):
    """Set the tile's valid rows in `array` to `value`."""
    value = value.astype(array.dtype)
    if tile.valid_R is not None:
        value = mask(value, tile, read(array, tile))
    return lax.dynamic_update_slice_in_dim(array, value, tile.start, 0)


def add(array, tile, value):
    """Add `value` to the entry of the tile's group in `array`, which is 0 at first."""
    if not tile.first:
        value = value + read_group(array, tile)
    return lax.dynamic_update_index_in_dim(array, value, tile.group, 0)


def dot(a, b):
    """Compute a matrix product with float32 accumulation and float32 result."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _searchsorted(sorted_array, query):
    return jnp.searchsorted(sorted_array, query).astype(jnp.int32)
