"""grouped_matmul for CPU: a dense matmul per tile of one group's rows.

Legend: M rows, K contraction, N columns, G groups, R rows of one tile. `bounds` is
int32[G + 1]: rows bounds[g] to bounds[g + 1] are those of group g.
"""

import jax.numpy as jnp

from kernels_pallas import cpu_tiles as tiles


def product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
    """Multiply rows by the matrix of their group; rows of no group are zero."""
    num_rows = lhs_MK.shape[0]
    num_columns = rhs_GKN.shape[1 if transpose_rhs else 2]

    def body(out_MN, tile):
        rhs_KN = tiles.read_group(rhs_GKN, tile).astype(lhs_MK.dtype)
        if transpose_rhs:
            rhs_KN = rhs_KN.T
        return tiles.write(out_MN, tile, tiles.dot(tiles.read(lhs_MK, tile), rhs_KN))

    out_MN = jnp.zeros((num_rows, num_columns), out_dtype)
    return _for_each_tile(bounds, num_rows, body, out_MN)


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype):
    """Sum the outer products of the rows of each group, [G, K, N]."""
    num_rows = lhs_MK.shape[0]

    def body(out_GKN, tile):
        lhs_RK = tiles.mask(tiles.read(lhs_MK, tile), tile)
        rhs_RN = tiles.mask(tiles.read(rhs_MN, tile), tile)
        return tiles.add(out_GKN, tile, tiles.dot(lhs_RK.T, rhs_RN))

    shape = (bounds.shape[0] - 1, lhs_MK.shape[1], rhs_MN.shape[1])
    out_GKN = jnp.zeros(shape, jnp.float32)
    return _for_each_tile(bounds, num_rows, body, out_GKN).astype(out_dtype)


def _for_each_tile(bounds, num_rows, body, out):
    sizes = tiles.tile_sizes(num_rows, bounds.shape[0] - 1)
    sizes = tuple(sorted({min(size, num_rows) for size in sizes}))
    return tiles.for_each_tile(
        bounds[:-1], bounds[1:] - bounds[:-1], sizes, body, out, num_rows
    )
