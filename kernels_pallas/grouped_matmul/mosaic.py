"""grouped_matmul for NVIDIA Hopper, by Pallas Mosaic GPU: TMA, WGMMA, bfloat16.

Triton's kernels compute weight gradients, which are sums over rows: others measured
them on an H100, five times as fast as those of Mosaic GPU, which mask every tile.

Legend: M rows, K contraction, N columns, G groups. `bounds` is int32[G + 1]: rows
bounds[g] to bounds[g + 1] are those of group g.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import mosaic_tiles as tiles
from kernels_pallas.grouped_matmul import triton
from kernels_pallas.tuned import measured_or

OPERATIONS = ("product", "product_t", "weight", "up", "down_vjp")


class Tiling(NamedTuple):
    """Sizes of a tile, and the number of its steps that are loaded ahead.

    The two compute warpgroups have m / 2 rows each, so m is a multiple of 128.
    """

    m: int = 128
    n: int = 256  # columns of each accumulator; "up" has two
    k: int = 64
    stages: int = 4


def unsupported(request):
    """The reason why this backend cannot do a `Request`, or None."""
    if tiles.on_hopper() is False:
        return "it needs an NVIDIA Hopper GPU (compute capability 9.0)"
    if request.dtype != "bfloat16":
        return (
            f"it multiplies bfloat16 only, not {request.dtype}; float32 would be "
            "rounded to the 10 bits of TF32"
        )
    if request.weights not in (None, request.dtype):
        return f"weights must be {request.dtype} as the rows are, not {request.weights}"
    columns = request.N // 2 if request.operation == "grouped_glu" else request.N
    if request.K % 64 or columns % 64:
        return f"it needs sizes that are multiples of 64, not {request.K} x {columns}"
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
    every_row=True,
):
    """Multiply rows by the matrix of their group; rows of no group are zero.

    Args:
      lhs_MK: bfloat16; K a multiple of 64.
      rhs_GKN: bfloat16, [G, N, K] with `transpose_rhs`; N a multiple of 64.
      bounds: int32[G + 1].
      transpose_rhs: whether `rhs_GKN` has its last two axes swapped.
      out_dtype: float32 or bfloat16.
      tiling: Tiling; None: `tiling_for`.
      interpret: False, or InterpretGPUParams.
      every_row: False leaves rows of no group unwritten.

    Returns:
      [M, N] of `out_dtype`.

    Raises:
      ValueError: on a tiling that does not fit.
    """
    (M, K), dtype = lhs_MK.shape, jnp.dtype(out_dtype)
    G, N = rhs_GKN.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2]
    operation = "product_t" if transpose_rhs else "product"
    tiling = tiling or tiling_for(operation, M, K, N, G, lhs_MK.dtype)
    check_tiling(tiling, operation, K, N)
    columns = tiles.store_columns(dtype)

    def epilogue(tile, accumulators, inputs, outs, scratch):
        del inputs
        (total,), (out,) = accumulators, outs
        blocks = (
            (tiles.block_of(total, block, first, columns), out, block, first, 0)
            for block, first in tiles.blocks_of(tiling, dtype)
        )
        tiles.store_blocks(tile, scratch["staging"], N, blocks)

    (out_MN,) = tiles.persistent_matmul(
        "grouped_matmul_t" if transpose_rhs else "grouped_matmul",
        lhs_MK,
        rhs_GKN,
        tiles.plan_visits(bounds, M, tiling.m, every_row),
        tiling=tiling,
        transpose_rhs=transpose_rhs,
        num_columns=N,
        halves=1,
        epilogue=epilogue,
        out_type=(jax.ShapeDtypeStruct((M, N), dtype),),
        scratch={"staging": tiles.staging(dtype)},
        interpret=interpret,
    )
    return out_MN


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype, *, tiling=None, interpret=False):
    """Sum the outer products of the rows of each group, by Triton's kernel.

    `tiling` is a tiling of that kernel.
    """
    return triton.weight_product(
        lhs_MK, rhs_MN, bounds, out_dtype, tiling=tiling, interpret=bool(interpret)
    )


def default_tiling(operation, M, K, N, G, dtype):
    """Choose a Tiling that fits.

    Args:
      operation: one of OPERATIONS; "up" and "down_vjp" belong to grouped_glu: K is the
        model width and N the hidden width. For "weight" Triton answers.
      M, K, N, G: sizes.
      dtype: dtype of the operands.
    """
    if operation == "weight":
        return triton.default_tiling(operation, M, K, N, G, dtype)
    # A compute thread has 232 registers. Sums of 64 x 256 take 128 of them; "up" has
    # them as two of 64 x 128, and "down_vjp" has one of 64 x 128 and in its epilogue
    # seven blocks of 64 x 64, 32 registers each if all were alive at once.
    # A tile has 128 rows, so that the last tile of a group wastes few: 256 x 128 would
    # load as many bytes for each product as 128 x 256.
    widest = 256 if operation in ("product", "product_t") else 128
    return _with_stages(operation, 128, min(widest, N), 64)


def candidates(operation, M, K, N, G, dtype):
    """List the tilings that are worth timing, the default first."""
    default = default_tiling(operation, M, K, N, G, dtype)
    if operation == "weight":
        return triton.candidates(operation, M, K, N, G, dtype)
    found = [default]
    for m, n in ((128, 256), (128, 192), (256, 128), (128, 128), (256, 64), (128, 64)):
        for k in (64, 128):
            tiling = _with_stages(operation, m, n, k)
            halves = 2 if operation == "up" else 1
            if m // 2 * n * halves // 128 > 128 or n > N or K % k or tiling.stages < 2:
                continue
            for stages in {tiling.stages, max(2, tiling.stages - 1)}:
                smaller = tiling._replace(stages=stages)
                if smaller not in found:
                    found.append(smaller)
    return found


def check_tiling(tiling, operation, K, N):
    """Raises ValueError if the kernel of `operation` cannot have this tiling."""
    if tiling.m % 128 or tiling.n % 64 or tiling.n > min(256, N):
        raise ValueError(
            "mosaic needs m a multiple of 128 and n one of 64, up to 256 and the "
            f"{N} columns there are; got {tiling}."
        )
    if tiling.k % 64 or K % tiling.k or tiling.stages < 2:
        raise ValueError(
            "mosaic needs k a multiple of 64 that divides the contraction, and two "
            f"stages or more; got {tiling} for a contraction of {K}."
        )
    used = shared_bytes(tiling, operation)
    if used > tiles.SHARED_BYTES:
        raise ValueError(
            f"mosaic has {tiles.SHARED_BYTES} bytes of shared memory; {tiling} takes "
            f"{used} in {operation!r}. Lower m, n, k or stages."
        )


def _with_stages(operation, m, n, k):
    """The Tiling with as many stages as fit; more than six hide no more latency."""
    one, two = (shared_bytes(Tiling(m, n, k, s), operation) for s in (1, 2))
    stages = 1 + (tiles.SHARED_BYTES - one) // (two - one)
    return Tiling(m, n, k, max(0, min(6, stages)))


def shared_bytes(tiling, operation):
    """The shared memory of a kernel: stages, staged stores, inputs of its epilogue."""
    m, n, k, stages = tiling
    halves = 2 if operation == "up" else 1
    staging = tiles.COMPUTE_WGS * 2 * tiles.ROWS * tiles.LINE
    # Both halves of `a` in bfloat16; weights and their gradients in float32.
    epilogue = m * n * 2 * 2 + m * 4 * 2 if operation == "down_vjp" else 0
    return stages * (m + halves * n) * k * 2 + staging + epilogue


tiling_for = measured_or("mosaic", Tiling, default_tiling)
