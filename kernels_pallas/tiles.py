"""Loops over tiles of rows that belong to one group: what the CPU backends share.

A group's rows are cut into full tiles of the largest size and one remainder tile
of the smallest size that holds the rest. There is one loop with a dynamic trip
count per tile size, and no branch inside a loop: XLA:CPU may copy the whole loop
carry at every conditional (11 times slower on JAX 0.10.2, 2 cores, 64 experts).

Tiles are windows on the rows as they lie; nothing is padded. A remainder window
may overhang its group on either side, and `Tile.valid_R` says which rows count:
`mask` them before a sum over rows (a neighbour's NaN times zero is NaN), and
`write` leaves the others as they were.

Legend: M rows, G groups, R rows of one tile.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tile(NamedTuple):
    """Rows [start, start + size) of which those in `valid_R` belong to `group`."""

    group: jax.Array  # int32 scalar
    start: jax.Array  # int32 scalar
    size: int  # R
    valid_R: jax.Array | None  # bool; None when all rows are the group's


def tile_sizes(num_rows, num_groups):
    """Rising tile sizes for `num_rows` rows in `num_groups` groups.

    More sizes waste fewer rows and compile longer (about 0.3 s each, forward and
    backward). Measured on 2 CPU cores; the rows per group that count are the mean.
    """
    mean_rows = num_rows / num_groups
    sizes: Iterable[int]
    if num_rows <= 16:  # decoding: bound by reading weights, one loop compiles fast
        sizes = (num_rows,)
    elif mean_rows <= 16:
        sizes = (8, 16, 32, 64)
    elif mean_rows <= 64:
        sizes = range(8, 129, 8)
    elif mean_rows <= 256:
        sizes = range(16, 257, 16)
    else:
        sizes = range(32, 257, 32)
    return tuple(sorted({min(size, num_rows) for size in sizes}))


def for_each_tile(group_sizes_G, num_rows, body, carry):
    """Folds `body(carry, tile) -> carry` over the tiles of all groups.

    A group's remainder tile comes before its full tiles, so that a sum over a
    group's tiles may be set by the first and added to by the others; see `add`.
    """
    sizes = tile_sizes(num_rows, group_sizes_G.shape[0])
    largest = sizes[-1]
    end_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    full_G = group_sizes_G // largest
    rest_G = group_sizes_G % largest

    # Groups in order of the size of their remainder tile: class c is sizes[c - 1],
    # class 0 has no remainder.
    class_G = _searchsorted(jnp.array((0, *sizes), jnp.int32), rest_G)
    by_class_G = jnp.argsort(class_G).astype(jnp.int32)
    classes = jnp.arange(len(sizes) + 2, dtype=jnp.int32)
    bounds = _searchsorted(class_G[by_class_G], classes)

    for c, size in enumerate(sizes, start=1):

        def remainder(i, carry, size=size):
            group = by_class_G[i]
            stop = end_G[group]
            begin = stop - rest_G[group]
            start = jnp.minimum(begin, num_rows - size)
            row_R = start + jnp.arange(size, dtype=jnp.int32)
            valid_R = (row_R >= begin) & (row_R < stop)
            return body(carry, Tile(group, start, size, valid_R))

        carry = lax.fori_loop(bounds[c], bounds[c + 1], remainder, carry)

    full_end_G = jnp.cumsum(full_G, dtype=jnp.int32)

    def full(i, carry):
        group = jnp.sum(full_end_G <= i, dtype=jnp.int32)
        tiles_to_come = full_end_G[group] - i
        start = end_G[group] - rest_G[group] - tiles_to_come * largest
        return body(carry, Tile(group, start, largest, None))

    return lax.fori_loop(jnp.int32(0), full_end_G[-1], full, carry)


def read(array, tile):
    """The tile's rows of an array with rows in front."""
    return lax.dynamic_slice_in_dim(array, tile.start, tile.size)


def read_group(array, tile):
    """The entry of the tile's group in an array with groups in front."""
    return lax.dynamic_index_in_dim(array, tile.group, keepdims=False)


def mask(value, tile, other=0):
    """`value` with the rows of other groups replaced."""
    if tile.valid_R is None:
        return value
    shape = (tile.size,) + (1,) * (value.ndim - 1)
    other = jnp.broadcast_to(jnp.asarray(other, value.dtype), value.shape)
    return jnp.where(tile.valid_R.reshape(shape), value, other)


def write(array, tile, value):
    """`array` with the tile's valid rows set to `value`."""
    value = value.astype(array.dtype)
    if tile.valid_R is not None:
        value = mask(value, tile, read(array, tile))
    return lax.dynamic_update_slice_in_dim(array, value, tile.start, 0)


def add(array, tile, value):
    """`array`, zero at first, with `value` added to the entry of the tile's group."""
    if tile.valid_R is None:  # else this is the group's first tile: no need to read
        value = value + read_group(array, tile)
    return lax.dynamic_update_index_in_dim(array, value, tile.group, 0)


def dot(a, b):
    """Matrix product with float32 accumulation and float32 result."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def take(array, index):
    """Rows of `array`; the indices are known to be in bounds (2.4 times faster)."""
    return array.at[index].get(mode="promise_in_bounds")


def _searchsorted(sorted_array, query):
    return jnp.searchsorted(sorted_array, query).astype(jnp.int32)
