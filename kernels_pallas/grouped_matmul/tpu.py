"""grouped_matmul on TPUs, in Pallas.

It runs on v5e, v5p, v6e and later, in float32 and bfloat16. Every size is served: a
tile divides an axis, is all of it, or is masked where it sticks out. float32 follows
`jax_default_matmul_precision`, which on TPUs is one pass of bfloat16 unless it is set.

Legend: M rows, K contraction, N columns, G groups. Small letters are the sizes of one
tile. `bounds` is int32[G + 1]: rows bounds[g] to bounds[g + 1] are those of group g.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tpu_rows
from kernels_pallas.tpu_rows import BUDGET_BYTES, LANES, Tiling, Visits
from kernels_pallas.tuned import measured_or

__all__ = [
    "Tiling",
    "candidates",
    "default_tiling",
    "product",
    "tiling_for",
    "unsupported",
    "weight_product",
]


def product(
    lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype, *, tiling=None, interpret=False
):
    """Multiply rows by the matrix of their group; rows of no group are zero.

    Args:
      lhs_MK: float32 or bfloat16 [M, K].
      rhs_GKN: [G, K, N] of the same dtype, [G, N, K] with `transpose_rhs`.
      bounds: int32[G + 1].
      transpose_rhs: whether the last two axes of `rhs_GKN` are swapped.
      out_dtype: dtype of the result.
      tiling: Tiling; None means `tiling_for`.
      interpret: whether to run in Python, on any platform.

    Returns:
      [M, N] of `out_dtype`.
    """
    (M, K), G = lhs_MK.shape, rhs_GKN.shape[0]
    N = rhs_GKN.shape[1 if transpose_rhs else 2]
    if tiling is None:
        operation = "product_t" if transpose_rhs else "product"
        tiling = tiling_for(operation, M, K, N, G, lhs_MK.dtype)
    tiling = Tiling(min(tiling.m, M), min(tiling.k, K), min(tiling.n, N))

    def write(visits, v, column_tile, sums, extra_refs, output_refs):
        del column_tile, extra_refs
        mine_m1 = tpu_rows.rows_of(visits, v, tiling.m)
        tpu_rows.write_rows(output_refs[0], mine_m1, sums[0])

    out = jax.ShapeDtypeStruct((M, N), out_dtype)
    return tpu_rows.multiply_rows(
        lhs_MK,
        [(rhs_GKN, 0)],
        tpu_rows.make_visits(bounds, M, tiling.m, rest=True),
        tpu_rows.Epilogue(write, [(out, tpu_rows.tile_spec(tiling))], []),
        tiling,
        transpose=transpose_rhs,
        name="grouped_matmul",
        interpret=interpret,
    )[0]


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype, *, tiling=None, interpret=False):
    """Sum the outer products of the rows of each group, [G, K, N].

    A group's visits follow one another, so its sum stays in VMEM and is written once;
    a group without rows is visited once, to write zeros.

    Args:
      lhs_MK: float32 or bfloat16 [M, K].
      rhs_MN: [M, N] of the same dtype; or [2, M, N / 2], the halves of its columns,
        where `tiling.n` divides a half.
      bounds: int32[G + 1].
      out_dtype: dtype of the result.
      tiling: Tiling; None means `tiling_for`.
      interpret: whether to run in Python, on any platform.
    """
    (M, K), G = lhs_MK.shape, bounds.shape[0] - 1
    num_halves = 2 if rhs_MN.ndim == 3 else 1
    N = rhs_MN.shape[-1] * num_halves
    if tiling is None:
        tiling = tiling_for("weight", M, K, N, G, lhs_MK.dtype)
    m, k, n = min(tiling.m, M), min(tiling.k, K), min(tiling.n, N)
    visits = tpu_rows.make_visits(bounds, M, m, empty=True)

    def body(*refs):
        visits = Visits(*refs[:5])
        lhs_ref, rhs_ref, out_ref, sum_ref = refs[5:]
        v = pl.program_id(2)
        segment = visits.segment_V[v]
        total = visits.total_1[0]

        @pl.when(v < total)
        def visit():
            before = visits.segment_V[jnp.maximum(v - 1, 0)]
            after = visits.segment_V[jnp.minimum(v + 1, total - 1)]

            @pl.when((v == 0) | (before != segment))
            def begin():
                sum_ref[...] = jnp.zeros_like(sum_ref)

            @pl.when(visits.edges[segment] < visits.edges[segment + 1])
            def add():
                # Mask both: rows of other groups or past the end may be NaN.
                mine_m1 = tpu_rows.rows_of(visits, v, m)
                lhs_mk = jnp.where(mine_m1, lhs_ref[...], 0)
                rhs_mn = jnp.where(mine_m1, rhs_ref[...], 0)
                sum_ref[...] += tpu_rows.matmul(lhs_mk, rhs_mn, (0, 0))

            @pl.when((v == total - 1) | (after != segment))
            def end():
                out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    def lhs_index(i, j, v, segment_V, tile_V, *_):
        return tile_V[v], i

    def rhs_index(i, j, v, segment_V, tile_V, *_):
        return tile_V[v], j

    def half_index(i, j, v, segment_V, tile_V, *_):
        # We use lax: // and % handle signs, which does not lower without a device.
        tiles = jnp.int32(N // 2 // n)
        return lax.div(j, tiles), tile_V[v], lax.rem(j, tiles)

    def out_index(i, j, v, segment_V, *_):
        return segment_V[v] - 1, i, j

    if num_halves == 2:
        rhs_spec = pl.BlockSpec((None, m, n), half_index)
    else:
        rhs_spec = pl.BlockSpec((m, n), rhs_index)
    out = jax.ShapeDtypeStruct((G, K, N), out_dtype)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(K, k), pl.cdiv(N, n), visits.tile_V.shape[0]),
            in_specs=[pl.BlockSpec((m, k), lhs_index), rhs_spec],
            out_specs=pl.BlockSpec((None, k, n), out_index),
            scratch_shapes=[pltpu.VMEM((k, n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tpu_rows.LIMIT_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * N,
            transcendentals=0,
            bytes_accessed=lhs_MK.nbytes * pl.cdiv(N, n)
            + rhs_MN.nbytes * pl.cdiv(K, k)
            + out.size * out.dtype.itemsize,
        ),
        name="grouped_weight_product",
        interpret=interpret,
    )(*visits, lhs_MK, rhs_MN)


def unsupported(request) -> str | None:
    """The reason why this backend cannot do a Request, or None."""
    if request.dtype not in ("float32", "bfloat16"):
        return f"it multiplies float32 or bfloat16, not {request.dtype}"
    if request.weights not in (None, request.dtype):
        return f"it has no weights of {request.weights} with tokens of {request.dtype}"
    return None


def default_tiling(operation, M, K, N, G, dtype):
    """The Tiling of one operation, by the arithmetic of VMEM and of HBM traffic.

    Rows: a boundary costs one more visit per group, so the mean group should fill
    several tiles. A tile has at least 128 rows, which keep the matrix unit busy.

    Columns and contraction of "product", "product_t", "up", "down_vjp": with all of
    the contraction in one tile, weights are read once and rows N / n times, which is
    n FLOPs for each byte of bfloat16. A v5e needs 240 to be busy, a v5p 166, a v6e
    560. So n is 1024 ("up": 512 of each half) if it fits, and not below a quarter of
    that; then the contraction is split, and weights are read for every visit.

    "weight": a tile of the result reads k + n numbers for k * n products, so 1024 by
    1024 is 512 FLOPs for each byte.

    Args:
      operation: "product", "product_t" (transposed weights), "weight", "up" or
        "down_vjp". "up" has N columns in each of its halves.
      M, K, N, G: rows, contraction, columns and groups. For "weight", the result is
        [G, K, N] and M is the contraction.
      dtype: dtype of rows and weights.
    """
    rows = M // G
    m = 512 if rows >= 4096 else 256 if rows >= 512 else LANES
    m = min(m, M)
    n = min(N, 512 if operation == "up" else 1024)
    tiling = Tiling(m, min(K, 1024) if operation == "weight" else K, n)
    tiling = tiling._replace(k=_even(K, tiling.k), n=_fit_columns(operation, N, n))
    smallest = 128 if operation == "up" else 256
    while _vmem_bytes(operation, tiling, dtype) > BUDGET_BYTES:
        if operation != "weight" and tiling.n > smallest and n > LANES:
            n = max(n // 2, LANES)
            tiling = tiling._replace(n=_fit_columns(operation, N, n))
        elif tiling.k > LANES:
            tiling = tiling._replace(k=_even(K, max(tiling.k // 2, LANES)))
        else:
            break
    return tiling


def candidates(operation, M, K, N, G, dtype):
    """List the tilings that fit in VMEM and are worth timing; the default is first."""
    found = [default_tiling(operation, M, K, N, G, dtype)]
    for m in (128, 256, 512, 1024):
        for k in (512, 1024, 2048, K):
            for n in (256, 512, 1024, 2048):
                tiling = Tiling(
                    min(m, M), _even(K, min(k, K)), _fit_columns(operation, N, n)
                )
                fits = _vmem_bytes(operation, tiling, dtype) <= BUDGET_BYTES
                if fits and tiling not in found:
                    found.append(tiling)
    return found


def _vmem_bytes(operation, tiling, dtype):
    """The bytes of sums, temporaries and two copies of each block (one is moving)."""
    m, k, n = tiling
    size = jnp.dtype(dtype).itemsize
    if operation == "weight":  # two masked operands, one of them transposed as well
        blocks = size * m * (k + n) + 4 * k * n
        return 2 * blocks + size * m * (2 * k + n) + 4 * 2 * k * n
    if operation == "up":
        blocks = size * (m * k + 2 * k * n + 3 * m * n)
        return 2 * blocks + 4 * 5 * m * n
    if operation == "down_vjp":
        blocks = size * (m * k + k * n + 5 * m * n)
        return 2 * blocks + 4 * 8 * m * n
    blocks = size * (m * k + k * n) + 4 * m * n
    return 2 * blocks + 4 * 2 * m * n


def _fit_columns(operation, N, limit):
    """The column tile, at most `limit`.

    In "up" and "down_vjp" it divides N where a multiple of 128 does, so that the two
    halves of one array are whole numbers of tiles.
    """
    if operation in ("up", "down_vjp"):
        return divisor(N, limit)
    return _even(N, limit)


def divisor(size, limit):
    """The largest multiple of 128 up to `limit` that divides `size`, else `_even`."""
    if size % LANES:
        return _even(size, limit)
    limit = min(size, max(limit, LANES))
    return next(
        tile for tile in range(limit // LANES * LANES, 0, -LANES) if size % tile == 0
    )


def _even(size, limit):
    """All of `size` if it is within `limit`, else equal multiples of 128."""
    if size <= limit:
        return size
    num_tiles = pl.cdiv(size, limit)
    return pl.cdiv(pl.cdiv(size, num_tiles), LANES) * LANES


tiling_for = measured_or("tpu", Tiling, default_tiling)
