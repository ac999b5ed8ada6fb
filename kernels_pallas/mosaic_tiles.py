"""The parts that Hopper (Mosaic GPU) kernels share: tiles of a group's rows, pipeline.

One persistent kernel: a block per SM walks over tiles of rows and columns. One of its
three warpgroups loads (TMA) and runs ahead, also into the next tile; the other two
multiply (WGMMA), each half of the tile's rows, and run the caller's epilogue.

A tile starts where its group starts or the tile before it ends, so that the rows of one
tile meet one matrix. The last tile of a group reaches into the rows of the next one, or
past the array; those rows are computed as well and not stored. Rows of a product are
independent, so their contents do not matter, and products need no masks.

Legend: M rows, K contraction, N columns, G groups, V visits (tiles of one group's
rows), R rows of one WGMMA, C columns of one store.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # rows of one WGMMA
LINE = 128  # bytes of a row in swizzled shared memory
COMPUTE_WGS = 2
# 128 threads * (40 + 2 * 232) registers = 64512 of the 65536 of an SM.
LOAD_REGISTERS, COMPUTE_REGISTERS = 40, 232
# Memory of an SM for one block, less alignment and barriers (1104 bytes in "down_vjp").
SHARED_BYTES = 227 * 1024 - 1536
HOPPER = ("H100", "H200", "H800", "H20")


class Visits(NamedTuple):
    """Tiles of rows in order; `group_V` is -1 for rows of no group."""

    group_V: jax.Array
    start_V: jax.Array
    stop_V: jax.Array  # where the group ends; the tile may end before
    total: jax.Array  # int32[1], how many of the V visits are real


class Tile(NamedTuple):
    """The tile that a compute warpgroup works on."""

    wg: jax.Array
    visit: jax.Array
    row: jax.Array  # the first of this warpgroup's rows
    stop: jax.Array  # where the group ends: rows from here on are not stored
    column: jax.Array
    column_tile: jax.Array


def plan_visits(bounds, num_rows, tile_rows, every_row):
    """Plan visits of all groups; with `every_row` also of rows before and after."""
    group = jnp.arange(bounds.shape[0] - 1, dtype=jnp.int32)
    start, stop = bounds[:-1], bounds[1:]
    if every_row:
        none = jnp.full(1, -1, jnp.int32)
        group = jnp.concatenate([none, group, none])
        start = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds])
        stop = jnp.concatenate([bounds, jnp.full(1, num_rows, jnp.int32)])
    tiles = (stop - start + tile_rows - 1) // tile_rows
    upto = jnp.cumsum(tiles, dtype=jnp.int32)
    visit_V = jnp.arange(max_visits(num_rows, group.size, tile_rows), dtype=jnp.int32)
    # Visits from `total` on are never made; they only have to be in bounds.
    at_V = jnp.minimum(
        jnp.searchsorted(upto, visit_V, side="right", method="compare_all"),
        group.size - 1,
    )
    start_V = start[at_V] + (visit_V - (upto - tiles)[at_V]) * tile_rows
    return Visits(group[at_V], start_V, stop[at_V], upto[-1:])


def max_visits(num_rows, num_groups, tile_rows):
    """The most tiles that there can be, one of each group not full."""
    return num_rows // tile_rows + min(num_groups, num_rows)


def place_of_rows(bounds, num_rows, tile_rows):
    """The place of each row if visits (not of every row) follow each other, [M]."""
    row_M = jnp.arange(num_rows, dtype=jnp.int32)
    tiles = (bounds[1:] - bounds[:-1] + tile_rows - 1) // tile_rows
    before = jnp.cumsum(tiles, dtype=jnp.int32) - tiles
    group_M = jnp.searchsorted(bounds[1:], row_M, side="right")
    group_M = jnp.minimum(group_M, tiles.size - 1)
    place_M = before[group_M] * tile_rows + row_M - bounds[group_M]
    last = max_visits(num_rows, tiles.size, tile_rows) * tile_rows - 1
    return jnp.clip(place_M, 0, last)  # rows of no group lie somewhere


def swizzled(shape, dtype, tile_rows=8):
    """The type of shared memory in the layout that TMA and WGMMA share.

    With `tile_rows` of 1 any range of rows can be copied out. If the last dim is one
    line, the bytes lie the same for any `tile_rows`.
    """
    line = LINE // jnp.dtype(dtype).itemsize
    transforms = (
        plgpu.TilingTransform((tile_rows, line)),
        plgpu.SwizzleTransform(LINE),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def store_columns(dtype):
    """The columns of one store: a line of shared memory."""
    return LINE // jnp.dtype(dtype).itemsize


def staging(dtype):
    """The shared memory of `store_blocks`: two blocks for each compute warpgroup."""
    shape = (COMPUTE_WGS, 2, ROWS, store_columns(dtype))
    return swizzled(shape, dtype, tile_rows=1)


def on_hopper():
    """Whether the device traced for is a Hopper GPU; None if it is no GPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if device.platform not in ("gpu", "cuda"):
            return None
        return any(name in device.device_kind for name in HOPPER)
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return None
    return getattr(device, "compute_capability", None) == "9.0"


def interpreter():
    """The value of `interpret` in tests: copies may read out of bounds.

    They then read zeros, as on the hardware; NaN in JAX 0.10. The interpreter of JAX
    0.10 has neither layouts nor transposed operands of WGMMA: it runs only `up` and
    products without transposed weights.
    """
    if hasattr(plgpu, "InterpretGPUParams"):
        params = plgpu.InterpretGPUParams
    else:  # not public yet
        from jax._src.pallas.mosaic_gpu.interpret import params as private

        params = private.InterpretGPUParams
    return params(out_of_bounds_reads="uninitialized")


def num_cores(interpret):
    """The number of blocks: one per SM; one if interpreted, where they take turns."""
    if interpret:
        return 1
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].core_count if device is None else device.num_cores


def store_rows(value_RC, staging_RC, out, row, count, column):
    """Starts storing the first `count` rows of a value, through shared memory.

    TMA copies have static sizes, so rows go in powers of two: there are seven
    descriptors, and a full block uses one of them.

    Args:
      value_RC: [64, C] in registers, C one line.
      staging_RC: shared memory that no copy reads any more.
      out: [M, N] in global memory.
      row, count, column: first row, rows to store (0 to 64), first column.
    """
    staging_RC[...] = value_RC.astype(staging_RC.dtype)
    plgpu.commit_smem()
    done: int | jax.Array = 0  # not an array of 0, of which Mosaic makes no slice
    for size in (64, 32, 16, 8, 4, 2, 1):

        @pl.when((count & size) != 0)
        def _copy(done=done, size=size):
            plgpu.copy_smem_to_gmem(
                staging_RC.at[pl.ds(done, size)],
                out.at[pl.ds(row + done, size), pl.ds(column, value_RC.shape[1])],
                commit_group=False,
            )

        done += count & size
    # Commit once per store, even one of no rows, so that waiting can count stores.
    plgpu.commit_smem_to_gmem_group()


def blocks_of(tiling, dtype):
    """Yield (block of 64 rows, first column) of each store of a warpgroup's tile."""
    for block in range(tiling.m // (COMPUTE_WGS * ROWS)):
        for first in range(0, tiling.n, store_columns(dtype)):
            yield block, first


def block_of(value, block, first, columns):
    """The [64, columns] part of a warpgroup's tile in registers."""
    return value[block * ROWS : (block + 1) * ROWS, first : first + columns]


def store_blocks(tile, staging, num_columns, blocks):
    """Stores (value_RC, out, block, first, offset) of a tile, one after the other.

    Only rows of the tile's group and columns below `num_columns` are stored; in `out`
    they lie `offset` columns further.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for i, (value_RC, out, block, first, offset) in enumerate(blocks):
        if i > 1:  # wait for the store before the last one, which read this staging
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        row, column = tile.row + block * ROWS, tile.column + first
        store_rows(
            value_RC,
            staging.at[tile.wg, i % 2],
            out,
            row,
            rows_to_store(row, tile.stop, column, num_columns),
            offset + column,
        )


def rows_to_store(row, stop, column, num_columns):
    """The rows of a block of 64 before `stop`; none past the last column."""
    return jnp.where(column < num_columns, jnp.clip(stop - row, 0, ROWS), 0)


def persistent_matmul(
    name,
    lhs_MK,
    rhs_GKN,
    visits,
    *,
    tiling,
    transpose_rhs,
    num_columns,
    halves,
    epilogue,
    out_type,
    prefetch=None,
    inputs=(),
    scratch=None,
    interpret=False,
):
    """Call `epilogue` with every tile of the product; return the arrays it stores.

    Args:
      name: name of the kernel.
      lhs_MK: bfloat16, K a multiple of `tiling.k`.
      rhs_GKN: bfloat16, or [G, N, K] with `transpose_rhs`.
      visits: Visits of `tiling.m` rows.
      tiling: m rows, n columns, k contraction, and stages of loading.
      num_columns: tiles start below it; the last may reach past it.
      halves: 1; or 2, for a second product with the columns from `num_columns` on.
      epilogue: (tile, accumulators, inputs, outputs, scratch) -> None, run by each
        compute warpgroup; accumulators are float32 [tiling.m / 2, tiling.n].
      out_type: tuple of ShapeDtypeStruct.
      prefetch: (tile, inputs, scratch) -> None, run before the product.
      inputs, scratch: more arrays; more scratch types by name.
      interpret: False or InterpretGPUParams.

    Returns:
      Tuple of arrays.
    """
    k_tiles, n_tiles = lhs_MK.shape[1] // tiling.k, pl.cdiv(num_columns, tiling.n)
    wg_rows, cores = tiling.m // COMPUTE_WGS, num_cores(interpret)

    def kernel(group, start, stop, total, lhs, rhs, *refs, ring, **own):
        lhs_ring, rhs_ring, full, free = ring
        extra, outs = refs[: len(inputs)], refs[len(inputs) :]
        wg, core = lax.axis_index("wg"), lax.axis_index("core")
        my_tiles = lax.div(total[0] * n_tiles - core + (cores - 1), cores)

        def visit_and_column(i):
            flat = core + i * cores
            return lax.div(flat, n_tiles), lax.rem(flat, n_tiles)

        def num_steps(visit):  # rows of no group have no product: they are zero
            return jnp.where(group[visit] < 0, 0, k_tiles)

        def load_tile(i, step):
            visit, n = visit_and_column(i)
            row, matrix = start[visit], rhs.at[group[visit]]

            def load(k, step):
                slot = lax.rem(step, tiling.stages)

                @pl.when(step >= tiling.stages)
                def _until_free():
                    plgpu.barrier_wait(free.at[slot])

                ks = pl.ds(k * tiling.k, tiling.k)
                plgpu.copy_gmem_to_smem(
                    lhs.at[pl.ds(row, tiling.m), ks], lhs_ring.at[slot], full.at[slot]
                )
                for half in range(halves):
                    ns = pl.ds(half * num_columns + n * tiling.n, tiling.n)
                    plgpu.copy_gmem_to_smem(
                        matrix.at[(ns, ks) if transpose_rhs else (ks, ns)],
                        rhs_ring.at[slot, half],
                        full.at[slot],
                    )
                return step + 1

            return lax.fori_loop(0, num_steps(visit), load, step)

        def multiply(steps, first, *accumulators):
            def multiply_step(k, step):
                slot = lax.rem(step, tiling.stages)
                plgpu.barrier_wait(full.at[slot])
                rows = lhs_ring.at[slot, pl.ds(wg * wg_rows, wg_rows)]
                for half, accumulator in enumerate(accumulators):
                    matrix = rhs_ring.at[slot, half]
                    if transpose_rhs:
                        matrix = matrix.transpose((1, 0))
                    plgpu.wgmma(accumulator, rows, matrix)
                # Wait for all but the product just started: the step before is read.
                plgpu.wgmma_wait(halves)

                @pl.when(k > 0)
                def _free_last():
                    plgpu.barrier_arrive(free.at[lax.rem(step - 1, tiling.stages)])

                return step + 1

            last = lax.fori_loop(0, steps, multiply_step, first)
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _free_last():
                plgpu.barrier_arrive(free.at[lax.rem(last - 1, tiling.stages)])

            return tuple(accumulator[...] for accumulator in accumulators)

        def compute_tile(i, step):
            visit, n = visit_and_column(i)
            row = start[visit] + wg * wg_rows
            tile = Tile(wg, visit, row, stop[visit], n * tiling.n, n)
            steps = num_steps(visit)
            if prefetch is not None:
                prefetch(tile, extra, own)
            accumulator = plgpu.ACC((wg_rows, tiling.n), jnp.float32)
            totals = pl.run_scoped(
                lambda *accumulators: multiply(steps, step, *accumulators),
                *[accumulator] * halves,
            )
            epilogue(tile, totals, extra, outs, own)
            return step + steps

        @pl.when(wg == COMPUTE_WGS)
        def _load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
            steps = lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0))
            # Wait for the last use of each slot: every phase of a barrier must end.
            for slot in range(tiling.stages):

                @pl.when(steps > slot)
                def _until_free(slot=slot):
                    plgpu.barrier_wait(free.at[slot])

        @pl.when(wg < COMPUTE_WGS)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            lax.fori_loop(0, my_tiles, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    rhs_tile = (tiling.n, tiling.k) if transpose_rhs else (tiling.k, tiling.n)
    dtype = lhs_MK.dtype
    ring = (
        swizzled((tiling.stages, tiling.m, tiling.k), dtype),
        swizzled((tiling.stages, halves, *rhs_tile), dtype),
        plgpu.Barrier(num_arrivals=1 + halves, num_barriers=tiling.stages),
        plgpu.Barrier(num_arrivals=COMPUTE_WGS, num_barriers=tiling.stages),
    )
    return plgpu.kernel(
        kernel,
        out_type=tuple(out_type),
        scratch_types={"ring": ring, **(scratch or {})},
        grid=(cores,),
        grid_names=("core",),
        num_threads=COMPUTE_WGS + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            # This costs exp two units in the last place of float32.
            approx_math=True,
            # Sums of rows stay within a warp.
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )(*visits, lhs_MK, rhs_GKN, *inputs)
