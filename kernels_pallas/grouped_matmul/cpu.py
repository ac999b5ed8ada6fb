"""grouped_matmul for CPU: a dense matmul per tile of one group's rows.

Legend: M rows, K contraction, N columns, G groups, R rows of one tile.
"""

import jax.numpy as jnp

from kernels_pallas import tiles
from kernels_pallas.grouped_matmul.vjp import differentiable


def product(lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs, out_dtype):
    """Rows times the matrix of their group, zero past the last group."""
    num_rows = lhs_MK.shape[0]
    num_columns = rhs_GKN.shape[1 if transpose_rhs else 2]

    def body(out_MN, tile):
        rhs_KN = tiles.read_group(rhs_GKN, tile)
        if transpose_rhs:
            rhs_KN = rhs_KN.T
        return tiles.write(out_MN, tile, tiles.dot(tiles.read(lhs_MK, tile), rhs_KN))

    out_MN = jnp.zeros((num_rows, num_columns), out_dtype)
    return tiles.for_each_tile(group_sizes_G, num_rows, body, out_MN)


def weight_product(lhs_MK, rhs_MN, group_sizes_G, out_dtype):
    """For each group the sum over its rows of outer products, [G, K, N]."""
    num_rows = lhs_MK.shape[0]

    def body(out_GKN, tile):
        lhs_RK = tiles.mask(tiles.read(lhs_MK, tile), tile)
        rhs_RN = tiles.mask(tiles.read(rhs_MN, tile), tile)
        return tiles.add(out_GKN, tile, tiles.dot(lhs_RK.T, rhs_RN))

    shape = (group_sizes_G.shape[0], lhs_MK.shape[1], rhs_MN.shape[1])
    out_GKN = jnp.zeros(shape, jnp.float32)
    out_GKN = tiles.for_each_tile(group_sizes_G, num_rows, body, out_GKN)
    return out_GKN.astype(out_dtype)


grouped_matmul = differentiable(product, weight_product)
