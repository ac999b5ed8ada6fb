"""Rows times the matrices of their groups on a TPU; both operations share this.

A visit is one tile of rows and one group that has rows in it. The list of visits is
made by XLA and prefetched into scalar memory, so that it decides which blocks the
pipeline reads. A tile that holds a boundary is visited once for each of its groups, one
after another while it stays in VMEM, and every visit writes its own rows only.

The grid is (column tiles, visits, tiles of the contraction), the last one innermost.
The contraction is one tile wherever it fits: then a group's weights are read once from
HBM for all of its visits, and the rows once per column tile.

Legend: M rows, K contraction, N columns, G groups, S segments (G + 2: the rows before
the first group, the groups, the rows after the last), V visits. Small letters are the
sizes of one tile. `bounds` is int32[G + 1].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# The VMEM that a kernel may use: v5p has 64 MiB, v5e and v6e 128, v4 only 16 (and is
# not served). The tiles are chosen for BUDGET; the compiler spills into the rest.
LIMIT_BYTES = 48 * 2**20
BUDGET_BYTES = 24 * 2**20
LANES = 128


class Tiling(NamedTuple):
    """Rows, contraction and columns of one tile.

    In "weight", `m` is the contraction, and `k` by `n` the tile of the result.
    """

    m: int
    k: int
    n: int


class Visits(NamedTuple):
    """The scalar-prefetched arrays, all int32.

    Attributes:
      segment_V: group + 1; 0 and G + 1 are the rows of no group.
      tile_V: the row tile that is written.
      source_V: the row tile that is read; rows of no group have the nearest of a group.
      edges: [S + 1], where the segments begin and end.
      total_1: number of real visits; those after them repeat the last and do nothing.
    """

    segment_V: jax.Array
    tile_V: jax.Array
    source_V: jax.Array
    edges: jax.Array
    total_1: jax.Array


def make_visits(bounds, num_rows, tile_m, *, rest=False, empty=False):
    """The visits of `num_rows` rows in tiles of `tile_m`, in rising order.

    Args:
      bounds: int32[G + 1].
      num_rows: M.
      tile_m: m.
      rest: whether rows of no group are visited.
      empty: whether a group without rows is visited once.
    """
    num_tiles = pl.cdiv(num_rows, tile_m)
    num_groups = bounds.shape[0] - 1
    edges = jnp.concatenate(
        [jnp.zeros(1, jnp.int32), bounds, jnp.full(1, num_rows, jnp.int32)]
    )
    begin_S, end_S = edges[:-1], edges[1:]
    first_S = jnp.minimum(begin_S // tile_m, num_tiles - 1)
    count_S = jnp.where(
        end_S > begin_S, pl.cdiv(end_S, tile_m) - first_S, jnp.int32(empty)
    )
    if not rest or empty:
        count_S = count_S.at[jnp.array([0, num_groups + 1])].set(0)
    upto_S = jnp.cumsum(count_S, dtype=jnp.int32)
    # Each segment but the first adds at most one visit to the number of tiles.
    num_visits = num_tiles + num_groups + (1 if rest else -1)
    total = upto_S[-1]
    visit_V = jnp.arange(num_visits, dtype=jnp.int32)
    visit_V = jnp.clip(visit_V, 0, jnp.maximum(total - 1, 0))
    segment_V = jnp.searchsorted(
        upto_S, visit_V, side="right", method="compare_all"
    ).astype(jnp.int32)
    segment_V = jnp.minimum(segment_V, num_groups + 1)
    tile_V = first_S[segment_V] + visit_V - (upto_S - count_S)[segment_V]
    tile_V = jnp.clip(tile_V, 0, num_tiles - 1)
    # Visits that only write zeros stay on the nearest tile read: nothing more is read.
    last = jnp.clip((bounds[-1] - 1) // tile_m, 0, num_tiles - 1)
    source_V = jnp.clip(tile_V, jnp.minimum(first_S[1], last), last)
    return Visits(segment_V, tile_V, source_V, edges, total.reshape(1))


def rows_of(visits, v, tile_m, axis=0):
    """The mask of a visit's rows in the visited tile, bool[m, 1] or bool[1, m]."""
    shape = (tile_m, 1) if axis == 0 else (1, tile_m)
    row = visits.tile_V[v] * tile_m + lax.broadcasted_iota(jnp.int32, shape, axis)
    segment = visits.segment_V[v]
    return (row >= visits.edges[segment]) & (row < visits.edges[segment + 1])


def inside(size, tile, index, shape, axis):
    """The mask of a tile's entries inside of the array along `axis`, bool `shape`."""
    return index * tile + lax.broadcasted_iota(jnp.int32, shape, axis) < size


def write_rows(ref, mine_m1, value):
    """Overwrites the rows of a visit; other visits write the tile's other rows.

    It selects in float32: vectors of 16-bit numbers do not take masks of 32-bit ones.
    """
    old = ref[...].astype(jnp.float32)
    ref[...] = jnp.where(mine_m1, value, old).astype(ref.dtype)


def matmul(lhs, rhs, contract):
    """Multiply `lhs` by `rhs` over the axes in `contract`, with a float32 sum.

    bfloat16 products are exact in float32 at any precision, and Mosaic refuses a higher
    one; float32 follows `jax_default_matmul_precision`, as XLA does.
    """
    precision = lax.Precision.DEFAULT if lhs.dtype == jnp.bfloat16 else None
    return lax.dot_general(
        lhs,
        rhs,
        ((contract[:1], contract[1:]), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


class Epilogue(NamedTuple):
    """The code that stores the sums of one tile, with its inputs and outputs.

    Attributes:
      write: (visits, v, column_tile, sums, extra_refs, output_refs) -> None, called
        once for each visit and column tile; `sums` are float32[m, n].
      outputs: (ShapeDtypeStruct, BlockSpec) of each output.
      extras: (array, BlockSpec) of each further input.
    """

    write: Callable
    outputs: list[tuple[Any, Any]]
    extras: list[tuple[Any, Any]]


def multiply_rows(lhs, weights, visits, epilogue, tiling, *, transpose, **options):
    """Multiply rows by the matrices of their groups, in one pass.

    Args:
      lhs: [M, K], or [2, M, K]: then each half is multiplied by one of the weights.
      weights: one or two pairs (array [G, K, N], offset); `offset` is added to the
        block index of the last axis, so that two pairs may be halves of one array.
        With lhs [M, K] each pair has its own sum, with [2, M, K] they share one.
      visits: Visits of `tiling.m`.
      epilogue: Epilogue.
      tiling: Tiling, no larger than the arrays.
      transpose: whether the weights are [G, N, K].
      **options: name and interpret of `pl.pallas_call`.

    Returns:
      The outputs, as a list.
    """
    num_halves = lhs.shape[0] if lhs.ndim == 3 else 1
    num_rows, size_k = lhs.shape[-2:]
    num_groups = weights[0][0].shape[0]
    size_n = epilogue.outputs[0][0].shape[-1]
    m, k, n = tiling
    steps_k = pl.cdiv(size_k, k)
    num_sums = 1 if num_halves == 2 else len(weights)
    num_weights, num_extras = len(weights), len(epilogue.extras)

    def body(*refs):
        visits = Visits(*refs[:5])
        lhs_ref, *rest = refs[5:]
        weight_refs, rest = rest[:num_weights], rest[num_weights:]
        extra_refs, rest = rest[:num_extras], rest[num_extras:]
        output_refs, sum_refs = rest[:-num_sums], rest[-num_sums:]
        column_tile, v, step = (pl.program_id(i) for i in range(3))
        segment = visits.segment_V[v]

        @pl.when(v < visits.total_1[0])
        def visit():
            @pl.when(step == 0)
            def begin():
                for ref in sum_refs:
                    ref[...] = jnp.zeros_like(ref)

            @pl.when((segment > 0) & (segment <= num_groups))
            def add():
                for i, ref in enumerate(weight_refs):
                    left_mk = lhs_ref[i] if num_halves == 2 else lhs_ref[...]
                    right = ref[...]
                    if size_k % k:  # numbers past the end of an array may be NaN
                        left_mk = only_inside(size_k, k, step, left_mk, 1)
                        right = only_inside(size_k, k, step, right, int(transpose))
                    out_mn = matmul(left_mk, right, (1, int(transpose)))
                    sum_refs[i % num_sums][...] += out_mn

            @pl.when(step == steps_k - 1)
            def end():
                sums = [ref[...] for ref in sum_refs]
                epilogue.write(visits, v, column_tile, sums, extra_refs, output_refs)

    def weight_spec(offset):
        def index(column_tile, v, step, segment_V, *_):
            group = jnp.clip(segment_V[v] - 1, 0, num_groups - 1)
            if transpose:
                return group, column_tile, step + offset
            return group, step, column_tile + offset

        return pl.BlockSpec((None, n, k) if transpose else (None, k, n), index)

    if num_halves == 2:
        lhs_spec = pl.BlockSpec(
            (2, m, k), lambda c, v, step, g, t, source_V, *_: (0, source_V[v], step)
        )
    else:
        lhs_spec = pl.BlockSpec(
            (m, k), lambda c, v, step, g, t, source_V, *_: (source_V[v], step)
        )
    arrays = [lhs, *(array for array, _ in weights), *(a for a, _ in epilogue.extras)]
    return pl.pallas_call(
        body,
        out_shape=[shape for shape, _ in epilogue.outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(size_n, n), visits.tile_V.shape[0], steps_k),
            in_specs=[
                lhs_spec,
                *(weight_spec(offset) for _, offset in weights),
                *(spec for _, spec in epilogue.extras),
            ],
            out_specs=[spec for _, spec in epilogue.outputs],
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)] * num_sums,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * size_k * size_n * num_weights,
            transcendentals=0,
            bytes_accessed=lhs.nbytes * pl.cdiv(size_n, n)
            + num_groups * size_k * size_n * num_weights * lhs.dtype.itemsize
            + sum(s.size * s.dtype.itemsize for s, _ in epilogue.outputs),
        ),
        **options,
    )(*visits, *arrays)


def only_inside(size, tile, index, value, axis):
    """Put zeros in `value` where the tile sticks out of an array of `size`."""
    return jnp.where(inside(size, tile, index, value.shape, axis), value, 0)


def tile_spec(tiling, halves=None):
    """The BlockSpec of the visited tile of an array [M, N], or [halves, M, N]."""
    block = (tiling.m, tiling.n)
    if halves is None:
        return pl.BlockSpec(block, lambda c, v, k, g, tile_V, *_: (tile_V[v], c))
    return pl.BlockSpec(
        (halves, *block), lambda c, v, k, g, tile_V, *_: (0, tile_V[v], c)
    )
