"""Tiles for NVIDIA GPUs: who computes which, and masked loads and stores of them.

Both Triton files share it. Every array is a matrix here, [G, K, N] as [G * K, N], and
every tile is read and written by explicit row and column indices with masks: a tile of
one group may begin at any row, and no size has to be a multiple of anything.

Legend: M rows, K contraction, N columns, G groups, S segments (runs of rows that are
treated alike), B blocks of rows, C chunks of rows; in lowercase the same of one tile.
`bounds` is int32[G + 1]: rows bounds[g] to bounds[g + 1] are those of group g.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


@dataclass(frozen=True)
class Tiling:
    """The tile that one program computes, and how.

    Attributes:
      rows: rows of the tile; for a weight gradient, rows of the matrix.
      columns: columns of the tile; for up projections, columns of each of the halves.
      depth: contraction of one step.
      num_warps: warps of a program. Hopper's wgmma wants 4 for each 64 rows.
      num_stages: steps whose loads are in flight; each holds its operands in shared
        memory.
      band: row blocks that programs go down before they go to the next columns, so
        that those running together share operands in the L2 cache.
      cut: only for weight gradients: the least rows of a piece, where a group is summed
        in pieces; 0 means never.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 4
    band: int = 8
    cut: int = 0

    @property
    def compiler_params(self):
        """The parameters of Pallas' compiler."""
        return plt.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


class RowBlocks(NamedTuple):
    """Blocks of neighbouring rows, each of one group.

    Attributes:
      group_B: int32, the group; -1 for rows of no group, and for blocks without rows:
        there are up to G of these, since the number of blocks is static.
      start_B: int32, the first row.
      stop_B: int32, the row after the last.
    """

    group_B: jax.Array
    start_B: jax.Array
    stop_B: jax.Array


class RowChunks(NamedTuple):
    """Pieces of the groups for sums over rows; those of cut groups come first.

    Attributes:
      group_C: int32, the group; -1 for chunks that do not exist.
      start_C: int32, the first row.
      stop_C: int32, the row after the last.
      nth_C: int32, which piece of its group it is.
      pieces_C: int32, pieces of the group; 1 if it is not cut.
    """

    group_C: jax.Array
    start_C: jax.Array
    stop_C: jax.Array
    nth_C: jax.Array
    pieces_C: jax.Array


def row_blocks(bounds, num_rows, tile_rows, cover):
    """Make RowBlocks of at most `tile_rows` rows.

    It costs a cumulative sum over G and one fused compare-and-count over [B, G], 1e6
    integer compares at 4000 blocks and 256 groups. Calls with the same arguments in
    one program are computed once (XLA's common subexpressions).

    Args:
      bounds: int32[G + 1].
      num_rows: M.
      tile_rows: rows of a block.
      cover: whether rows of no group get blocks too.
    """
    # The contract allows no bound past the end; if it is broken, wrong rows are read,
    # but no memory of others is written.
    edges = jnp.minimum(bounds, num_rows)
    num_groups = bounds.shape[0] - 1
    if cover:
        zero, end = jnp.zeros(1, jnp.int32), jnp.full(1, num_rows, jnp.int32)
        edges = jnp.concatenate([zero, edges, end])
    start_S, size_S = edges[:-1], edges[1:] - edges[:-1]
    # At most one row less than this many segments can end in a part-filled block.
    full = min(start_S.shape[0], num_rows)
    num_blocks = (num_rows - full) // tile_rows + full
    segment_B, nth_B, real_B = _deal(_ceil(size_S, tile_rows), num_blocks)
    group_B = segment_B - 1 if cover else segment_B
    in_group_B = real_B & (group_B >= 0) & (group_B < num_groups)
    start_B = start_S[segment_B] + nth_B * tile_rows
    stop_B = jnp.minimum(start_B + tile_rows, (start_S + size_S)[segment_B])
    return RowBlocks(
        jnp.where(in_group_B, group_B, -1), start_B, jnp.where(real_B, stop_B, start_B)
    )


def row_chunks(bounds, num_rows, tiling):
    """Make RowChunks; returns (RowChunks, most pieces of cut groups there can be).

    A group of at least twice `tiling.cut` rows is cut into equal pieces of at least
    that many. The longest chunks come first: one that starts last would leave the other
    processors idle. A group without rows has one chunk, which writes its zeros. It
    costs about the same as `row_blocks`.
    """
    edges = jnp.minimum(bounds, num_rows)
    start_G, size_G = edges[:-1], edges[1:] - edges[:-1]
    num_groups = start_G.shape[0]
    cut = tiling.cut or num_rows
    most_pieces = num_rows // cut if num_rows >= 2 * cut else 0
    pieces_G = jnp.maximum(size_G // cut, 1)
    is_cut_G = pieces_G > 1
    is_long_G = ~is_cut_G & (size_G > cut)
    count_S = jnp.concatenate(
        [
            jnp.where(is_cut_G, pieces_G, 0),
            is_long_G.astype(jnp.int32),
            (~is_cut_G & ~is_long_G).astype(jnp.int32),
        ]
    )
    segment_C, nth_C, real_C = _deal(count_S, most_pieces + num_groups)
    group_C = segment_C % num_groups
    pieces_C = pieces_G[group_C]
    length_C = _ceil(_ceil(size_G[group_C], pieces_C), tiling.depth) * tiling.depth
    end_C = start_G[group_C] + size_G[group_C]
    start_C = jnp.minimum(start_G[group_C] + nth_C * length_C, end_C)
    stop_C = jnp.minimum(start_C + length_C, end_C)
    chunks = RowChunks(
        jnp.where(real_C, group_C, -1),
        start_C,
        jnp.where(real_C, stop_C, start_C),
        nth_C,
        pieces_C,
    )
    return chunks, most_pieces


def _deal(count_S, total):
    """Deal items 0 to total - 1 out in order: (segment, place in it, whether dealt)."""
    upto_S = jnp.cumsum(count_S, dtype=jnp.int32)
    item = jnp.arange(total, dtype=jnp.int32)
    done = upto_S[None, :] <= item[:, None]
    segment = jnp.minimum(jnp.sum(done, axis=1, dtype=jnp.int32), upto_S.shape[0] - 1)
    return segment, item - (upto_S - count_S)[segment], item < upto_S[-1]


def _ceil(a, b):
    """Compute a / b rounded up, for int32 arrays that are not negative."""
    return (a + (b - 1)) // b


def place(index, num_down, num_across, band):
    """The (down, across) of a program: `band` go down, then one across, and so on."""
    strip = band * num_across
    first = lax.div(index, strip) * band
    height = jnp.minimum(num_down - first, band)
    inside = lax.rem(index, strip)
    return first + lax.rem(inside, height), lax.div(inside, height)


def span(start, size):
    """The indices start to start + size - 1."""
    return start + jnp.arange(size, dtype=jnp.int32)


def steps(group, size, depth):
    """The steps through a contraction; none for rows of no group: they are not read.

    The int32 is explicit, because Triton would make an int64 of a constant.
    """
    return jnp.where(group < 0, jnp.int32(0), jnp.int32(pl.cdiv(size, depth)))


def row_mask(row, stop):
    """The mask of the rows of a tile that belong to its group."""
    return row < stop


def edge_mask(index, limit, tile):
    """The mask of the indices inside of a matrix; None if tiles fill it."""
    return None if limit % tile == 0 else index < limit


def load(ref, row, column, row_ok, column_ok):
    """The tile ref[row, column], zero where a mask is False; None masks nothing."""
    mask = _both(row_ok, column_ok, (row.shape[0], column.shape[0]))
    other = None if mask is None else 0
    return plt.load(ref.at[row[:, None], column[None, :]], mask=mask, other=other)


def store(ref, row, column, row_ok, column_ok, tile):
    """Writes a tile to ref[row, column] where both masks are True."""
    mask = _both(row_ok, column_ok, tile.shape)
    plt.store(ref.at[row[:, None], column[None, :]], tile.astype(ref.dtype), mask=mask)


def _both(row_ok, column_ok, shape):
    if row_ok is None and column_ok is None:
        return None
    if row_ok is None:
        return jnp.broadcast_to(column_ok[None, :], shape)
    if column_ok is None:
        return jnp.broadcast_to(row_ok[:, None], shape)
    return row_ok[:, None] & column_ok[None, :]


def dot(a, b, contract):
    """The product in float32, contracting one dimension of each.

    float32 operands are treated as in XLA's own dots: TF32 by default on NVIDIA GPUs,
    full float32 under `jax.default_matmul_precision("highest")`.
    """
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def call(kernel, name, grid, out_shape, tiling, interpret, arguments, aliases=None):
    """Run pallas_call on whole arrays."""
    whole = pl.no_block_spec
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[whole] * len(arguments),
        out_specs=jax.tree.map(lambda _: whole, out_shape),
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=tiling.compiler_params,
        interpret=interpret,
    )(*arguments)
