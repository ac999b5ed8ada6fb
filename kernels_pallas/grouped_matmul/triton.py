"""grouped_matmul for NVIDIA GPUs, from Ampere on, by Pallas through Triton.

`product`: one program for each tile of a block of rows, all of one group. Rows of no
group have blocks too, which write zeros without reading anything.
`weight_product`: one program for each tile of a group's matrix and chunk of its rows.
Groups with very many rows are cut into chunks whose float32 sums a second kernel adds
in order: work follows the rows, whoever owns them, and every run gives the same bits.

Rows may be read through indices inside the kernels, which saves writing a gathered
copy. TF32 is used for float32 where XLA's own dots use it: see `triton_tiles.dot`.

Legend: M rows, K contraction, N columns, G groups, B blocks of rows, C chunks of rows,
S partial sums; in lowercase the same of one tile. `bounds` is int32[G + 1]: rows
bounds[g] to bounds[g + 1] are those of group g.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import triton_tiles as tiles
from kernels_pallas.triton_tiles import Tiling
from kernels_pallas.tuned import measured_or

DTYPES = ("float32", "bfloat16")
PROCESSORS = 132  # those of an H100; only guides how far weight gradients are cut


def unsupported(request):
    """The reason why this backend cannot do a `Request`, or None; any size is taken."""
    if request.dtype not in DTYPES:
        return f"it computes in {' or '.join(DTYPES)}, not in {request.dtype}"
    if request.weights not in (None, request.dtype):
        return f"weights must be {request.dtype} as the rows are, not {request.weights}"
    return None


def product(
    lhs_MK,
    rhs_GKN,
    bounds,
    transpose_rhs,
    out_dtype,
    *,
    tiling=None,
    interpret=False,
    cover=True,
):
    """Multiply rows by the matrix of their group, [M, N]; rows of no group are zero.

    Args:
      lhs_MK: float32 or bfloat16.
      rhs_GKN: array of the same dtype; [G, N, K] with `transpose_rhs`.
      bounds: int32[G + 1].
      transpose_rhs: whether `rhs_GKN` has its last two axes swapped.
      out_dtype: dtype of the result; sums are float32.
      tiling: Tiling; None means that of `tiling_for`.
      interpret: whether to run on the CPU, for tests.
      cover: False leaves rows of no group unwritten.
    """
    (M, K), G = lhs_MK.shape, rhs_GKN.shape[0]
    N = rhs_GKN.shape[1 if transpose_rhs else 2]
    if tiling is None:
        operation = "product_t" if transpose_rhs else "product"
        tiling = tiling_for(operation, M, K, N, G, lhs_MK.dtype)
    blocks = tiles.row_blocks(bounds, M, tiling.rows, cover)
    num_blocks, num_columns = blocks.group_B.shape[0], pl.cdiv(N, tiling.columns)
    kernel = partial(
        _product_kernel, size=(num_blocks, K, N), tiling=tiling, swapped=transpose_rhs
    )
    return tiles.call(
        kernel,
        "grouped_matmul",
        (num_blocks * num_columns,),
        jax.ShapeDtypeStruct((M, N), out_dtype),
        tiling,
        interpret,
        (*blocks, lhs_MK, rhs_GKN.reshape(-1, rhs_GKN.shape[2])),
    )


def _product_kernel(group_B, start_B, stop_B, lhs, rhs, out, *, size, tiling, swapped):
    """Compute one tile of the product; the rows of `rhs` are all groups' matrices."""
    num_blocks, K, N = size
    block, across = tiles.place(
        pl.program_id(0), num_blocks, pl.cdiv(N, tiling.columns), tiling.band
    )
    group = group_B[block]
    row_m = tiles.span(start_B[block], tiling.rows)
    row_ok = tiles.row_mask(row_m, stop_B[block])
    column_n = tiles.span(across * tiling.columns, tiling.columns)
    column_ok = tiles.edge_mask(column_n, N, tiling.columns)

    def step(i, sum_mn):
        at_k = tiles.span(i * tiling.depth, tiling.depth)
        k_ok = tiles.edge_mask(at_k, K, tiling.depth)
        lhs_mk = tiles.load(lhs, row_m, at_k, row_ok, k_ok)
        if swapped:
            rhs_nk = tiles.load(rhs, group * N + column_n, at_k, column_ok, k_ok)
            return sum_mn + tiles.dot(lhs_mk, rhs_nk, (1, 1))
        rhs_kn = tiles.load(rhs, group * K + at_k, column_n, k_ok, column_ok)
        return sum_mn + tiles.dot(lhs_mk, rhs_kn, (1, 0))

    steps = tiles.steps(group, K, tiling.depth)
    zero_mn = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    sum_mn = lax.fori_loop(0, steps, step, zero_mn)
    tiles.store(out, row_m, column_n, row_ok, column_ok, sum_mn)


def weight_product(
    lhs_MK,
    rhs_MN,
    bounds,
    out_dtype,
    *,
    tiling=None,
    interpret=False,
    lhs_row_M=None,
    rhs_row_M=None,
):
    """Sum the outer products of the rows of each group, [G, K, N].

    Args:
      lhs_MK: float32 or bfloat16.
      rhs_MN: array of the same dtype.
      bounds: int32[G + 1].
      out_dtype: dtype of the result; sums are float32.
      tiling: Tiling; None means that of `tiling_for`.
      interpret: whether to run on the CPU, for tests.
      lhs_row_M: int32, the row of `lhs_MK` to take for each row; None: the same one.
      rhs_row_M: the same for `rhs_MN`.
    """
    indices = [i for i in (lhs_row_M, rhs_row_M) if i is not None]
    M = indices[0].shape[0] if indices else lhs_MK.shape[0]
    K, N, G = lhs_MK.shape[1], rhs_MN.shape[1], bounds.shape[0] - 1
    if tiling is None:
        tiling = tiling_for("weight", M, K, N, G, lhs_MK.dtype)
    if indices:
        # Triton shares its stages between the loads of indices and the loads that wait
        # for them; with these, operands are as many steps ahead as without indices.
        tiling = replace(tiling, num_stages=2 * tiling.num_stages - 1)
    chunks, num_sums = tiles.row_chunks(bounds, M, tiling)
    num_tiles = pl.cdiv(K, tiling.rows) * pl.cdiv(N, tiling.columns)
    kernel = partial(
        _weight_kernel,
        size=(K, N),
        tiling=tiling,
        gathered=(lhs_row_M is not None, rhs_row_M is not None),
    )
    # There is at least one row: a buffer without any is trouble in Triton.
    sums = jax.ShapeDtypeStruct((max(num_sums * K, 1), N), jnp.float32)
    out, sums = tiles.call(
        kernel,
        "grouped_matmul_weight",
        (chunks.group_C.shape[0] * num_tiles,),
        (jax.ShapeDtypeStruct((G * K, N), out_dtype), sums),
        tiling,
        interpret,
        (*chunks, lhs_MK, rhs_MN, *indices),
    )
    if num_sums:
        out = _add_pieces(chunks, sums.reshape(num_sums, K * N), out, interpret)
    return out.reshape(G, K, N)


def _weight_kernel(*refs, size, tiling, gathered):
    """Write one tile of a chunk's sum: to the result, or a partial sum if it is cut."""
    group_C, start_C, stop_C, _, pieces_C, lhs, rhs, *indices, out, sums = refs
    (K, N), index = size, pl.program_id(0)
    num_down, num_across = pl.cdiv(K, tiling.rows), pl.cdiv(N, tiling.columns)
    chunk = lax.div(index, num_down * num_across)
    tile = lax.rem(index, num_down * num_across)
    down, across = tiles.place(tile, num_down, num_across, tiling.band)
    at_k = tiles.span(down * tiling.rows, tiling.rows)
    at_n = tiles.span(across * tiling.columns, tiling.columns)
    k_ok = tiles.edge_mask(at_k, K, tiling.rows)
    n_ok = tiles.edge_mask(at_n, N, tiling.columns)
    group, start, stop = group_C[chunk], start_C[chunk], stop_C[chunk]
    indices = list(indices)
    row_of = [indices.pop(0) if through else None for through in gathered]

    def step(i, sum_kn):
        row_m = tiles.span(start + i * tiling.depth, tiling.depth)
        # Mask both operands: 0 times the NaN of another group's row is NaN.
        row_ok = tiles.row_mask(row_m, stop)
        lhs_row, rhs_row = (
            row_m if ref is None else plt.load(ref.at[row_m], mask=row_ok, other=0)
            for ref in row_of
        )
        lhs_mk = tiles.load(lhs, lhs_row, at_k, row_ok, k_ok)
        rhs_mn = tiles.load(rhs, rhs_row, at_n, row_ok, n_ok)
        return sum_kn + tiles.dot(lhs_mk, rhs_mn, (0, 0))

    steps = lax.div(stop - start + (tiling.depth - 1), tiling.depth)
    zero_kn = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    sum_kn = lax.fori_loop(0, steps, step, zero_kn)

    def write(ref, first_row):
        # Store two halves: stores go through shared memory, where all of 128 x 256
        # sums would take more than the operands.
        for j, half_kn in enumerate(jnp.split(sum_kn, 2, axis=1)):
            width = half_kn.shape[1]
            at_h = tiles.span(across * tiling.columns + j * width, width)
            h_ok = tiles.edge_mask(at_h, N, tiling.columns)
            tiles.store(ref, first_row + at_k, at_h, k_ok, h_ok, half_kn)

    whole = pieces_C[chunk] == 1
    pl.when((group >= 0) & whole)(lambda: write(out, group * K))
    # Chunks of cut groups come first: their numbers count the partial sums.
    pl.when((group >= 0) & ~whole)(lambda: write(sums, chunk * K))


def _add_pieces(chunks, sums_SX, out, interpret):
    """Write into `out`, for each group that was cut, the sum of its pieces in order."""
    S, X = sums_SX.shape  # X: entries of a matrix
    tiling = Tiling(rows=1, columns=min(2048, pl.next_power_of_2(X)), depth=1)
    G = out.size // X
    return tiles.call(
        partial(_add_kernel, tiling=tiling),
        "grouped_matmul_add",
        (S, pl.cdiv(X, tiling.columns)),
        jax.ShapeDtypeStruct((G, X), out.dtype),
        tiling,
        interpret,
        (chunks.group_C, chunks.nth_C, chunks.pieces_C, sums_SX, out.reshape(G, X)),
        {4: 0},
    )


def _add_kernel(group_C, nth_C, pieces_C, sums, whole, out, *, tiling):
    """Adds up one stretch of a group's matrix, if `chunk` is the group's first."""
    del whole  # the same memory as `out`
    chunk = pl.program_id(0)
    pieces = pieces_C[chunk]
    at_x = tiles.span(pl.program_id(1) * tiling.columns, tiling.columns)
    x_ok = tiles.edge_mask(at_x, out.shape[1], tiling.columns)

    @pl.when((group_C[chunk] >= 0) & (nth_C[chunk] == 0) & (pieces > 1))
    def _add():
        def step(i, sum_1x):
            row = tiles.span(chunk + i, 1)
            return sum_1x + tiles.load(sums, row, at_x, None, x_ok)

        zero_1x = jnp.zeros((1, tiling.columns), jnp.float32)
        sum_1x = lax.fori_loop(0, pieces, step, zero_1x)
        tiles.store(out, tiles.span(group_C[chunk], 1), at_x, None, x_ok, sum_1x)


def default_tiling(operation, M, K, N, G, dtype):
    """Choose a Tiling that fits and is near what was found best for such kernels.

    Args:
      operation: "product", "product_t" (transposed rhs), "weight", or for grouped_glu
        "up" (K is the model width, N the hidden width) and "down_vjp" (the same).
      M, K, N, G: sizes; for "weight", K and N are those of the matrices.
      dtype: dtype of the operands.
    """
    # Operands of a step fill 64 bytes of each row of a tile: at 4 stages no choice
    # below takes more than 96 KiB of shared memory (24 KiB a stage), so two programs
    # share an H100's processor (227 KiB), and one fits where there are only 99 KiB.
    depth = 64 // jnp.dtype(dtype).itemsize
    if operation == "weight":
        # 128 x 256 float32 sums are 128 registers for each thread of 8 warps.
        tiling = Tiling(
            rows=_fit(128, K), columns=_fit(256, N), depth=depth, num_warps=8
        )
        return _with_cut(tiling, M, K, N)
    # Half of the last tile of every group is wasted on average, so short groups have
    # smaller tiles. Below 64 rows there is no wgmma, but also little to compute.
    mean = M // G
    rows = 128 if mean >= 256 else 64 if mean >= 96 else 32 if mean >= 32 else 16
    rows = min(rows, _fit(128, M))
    if operation in ("product", "product_t"):
        # 128 x 128 sums are 128 registers for each thread of 4 warps. A processor has
        # two programs: one stores while the other computes.
        return Tiling(rows=rows, columns=_fit(128, N), depth=depth)
    # "up" holds two tiles of sums; "down_vjp" holds one, and four others in its
    # epilogue. With 8 warps these are 128 and 64 registers of sums per thread.
    warps = 8 if rows == 128 else 4
    return Tiling(rows=rows, columns=_fit(128, N), depth=depth, num_warps=warps)


def _fit(tile, size):
    """The lesser of `tile` and a power of two >= `size`; Triton's dots need 16."""
    return min(tile, max(16, pl.next_power_of_2(size)))


def _with_cut(tiling, M, K, N):
    """Cut so that all rows in one group make about six programs per processor.

    A cut as fine as that loses at most a sixth to a last wave that is part full. Its
    partial sums take some 6 * 132 tiles for any shape, 99 MiB, and never twice that.
    Chunks of fewer than 1024 rows would write and read more than they compute.
    """
    num_tiles = pl.cdiv(K, tiling.rows) * pl.cdiv(N, tiling.columns)
    chunks = pl.cdiv(6 * PROCESSORS, num_tiles)
    if chunks == 1:
        return tiling
    cut = max(1024, pl.cdiv(pl.cdiv(M, chunks), tiling.depth) * tiling.depth)
    return replace(tiling, cut=cut)


def candidates(operation, M, K, N, G, dtype):
    """List the tilings worth timing, the default first; all fit an H100's memory."""
    default = default_tiling(operation, M, K, N, G, dtype)
    found = [default]
    itemsize = jnp.dtype(dtype).itemsize
    pairs = 2 if operation == "up" else 1
    for rows, columns, num_warps in (
        *((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4)),
        *((64, 256, 4), (64, 128, 4), (128, 64, 4)),
    ):
        # The sums may take 128 of each thread's 255 registers, in "down_vjp" 64. There
        # 128 x 256 spilled 1432 bytes per thread; no other spilled more than 4
        # (ptxas 12.9 for sm_90a).
        most = 64 if operation == "down_vjp" else 128
        if rows * columns * pairs > most * 32 * num_warps:
            continue
        if rows > 2 * default.rows or columns > _fit(256, N):
            continue
        for depth, num_stages in ((32, 4), (32, 6), (64, 3), (64, 4)):
            depth = depth * 2 // itemsize
            stage = (rows + pairs * columns) * depth * itemsize
            if stage * num_stages > 200 * 1024:
                continue
            tiling = Tiling(rows, columns, depth, num_warps, num_stages)
            if operation == "weight":
                tiling = _with_cut(tiling, M, K, N)
            if tiling not in found:
                found.append(tiling)
    return found


tiling_for = measured_or("triton", Tiling, default_tiling)
