"""grouped_glu for NVIDIA Hopper, by Pallas Mosaic GPU.

The kernel that sums the up projections computes the activation too; the kernel that
sums dh also computes its gradient, the weighting and the gradient of the gates. `a` and
`da` are [N, C]: the gate half, then the up half.

Token rows are gathered by XLA before `up` and `down_vjp`. On Hopper TMA cannot gather;
one copy per row and step would move only 128 bytes (a line of swizzled shared memory),
and each tile of columns would do so again: for 24576 tokens, 8 experts each, width
1536 and 2 tiles of columns that is 9.4 million copies, 71 thousand on each of 132 SMs.
The gather writes 0.6 GB and reads as much, about 0.4 ms at 3 TB/s, 9 cycles for each of
those copies; it would have to be issued and served faster than that, in the loop that
feeds the tensor cores. Weight gradients are Triton's kernels, which do gather.

Legend: T tokens, N sorted rows, D model width, F expert hidden width, C pre-activation
columns (2F), E experts, V visits (tiles of one expert's rows), P rows of all visits,
J tiles of columns, R rows and B columns of a block. `bounds` is int32[E + 1].
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_tiles as tiles
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_glu import triton
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul.mosaic import check_tiling, product, tiling_for
from kernels_pallas.permute import take


def up(
    x_TD, w_in_EDC, token_N, bounds, activation, save, *, tiling=None, interpret=False
):
    """Return (a or None, h_NF); see `compose.Kernels`.

    h is computed from float32 sums, before `a` is rounded to the dtype of x.
    """
    (E, D, C), N, dtype = w_in_EDC.shape, token_N.shape[0], x_TD.dtype
    F = C // 2
    tiling = tiling or tiling_for("up", N, D, F, E, dtype)
    check_tiling(tiling, "up", D, F)
    columns = tiles.store_columns(dtype)
    act = ACTIVATIONS[activation].value

    def epilogue(tile, accumulators, inputs, outs, scratch):
        del inputs
        h, *a = outs

        def blocks():
            for block, first in tiles.blocks_of(tiling, dtype):
                gate_RB, up_RB = (
                    tiles.block_of(total, block, first, columns)
                    for total in accumulators
                )
                for out in a:
                    yield gate_RB, out, block, first, 0
                    yield up_RB, out, block, first, F
                yield act(gate_RB, up_RB), h, block, first, 0

        tiles.store_blocks(tile, scratch["staging"], F, blocks())

    out_type = [jax.ShapeDtypeStruct((N, F), dtype)]
    if save:
        out_type.append(jax.ShapeDtypeStruct((N, C), dtype))
    h_NF, *a = tiles.persistent_matmul(
        "grouped_glu_up",
        take(x_TD, token_N),
        w_in_EDC,
        tiles.plan_visits(bounds, N, tiling.m, every_row=False),
        tiling=tiling,
        transpose_rhs=False,
        num_columns=F,
        halves=2,
        epilogue=epilogue,
        out_type=out_type,
        scratch={"staging": tiles.staging(dtype)},
        interpret=interpret,
    )
    return (a[0] if save else None), h_NF


def down(h_NF, w_out_EFD, bounds, *, interpret=False):
    """Return y_ND; see `compose.Kernels`."""
    return product(
        h_NF, w_out_EFD, bounds, False, h_NF.dtype, interpret=interpret, every_row=False
    )


def down_vjp(
    dy_TD,
    w_out_EFD,
    a_NC,
    weight_N,
    token_N,
    bounds,
    activation,
    *,
    tiling=None,
    interpret=False,
):
    """Return (da_NC, weighted_NF, dweight_N); see `compose.Kernels`.

    Weights go in and their gradients come out by visit, P = V * tiling.m rows, so that
    copies of them are aligned and need no masks.
    """
    (E, F, D), N, dtype = w_out_EFD.shape, token_N.shape[0], a_NC.dtype
    tiling = tiling or tiling_for("down_vjp", N, D, F, E, dtype)
    check_tiling(tiling, "down_vjp", D, F)
    m, wg_rows, columns = tiling.m, tiling.m // 2, tiles.store_columns(dtype)
    blocks = tuple(tiles.blocks_of(tiling, dtype))
    vjp = ACTIVATIONS[activation].vjp
    visits = tiles.plan_visits(bounds, N, m, every_row=False)

    def prefetch(tile, inputs, scratch):
        weight_P, a = inputs
        ready = scratch["ready"].at[tile.wg]
        mine = pl.ds(tile.visit * m + tile.wg * wg_rows, wg_rows)
        plgpu.copy_gmem_to_smem(weight_P.at[mine], scratch["weight"].at[tile.wg], ready)
        for i, (block, first) in enumerate(blocks):
            rows = pl.ds(tile.row + block * tiles.ROWS, tiles.ROWS)
            for half in range(2):
                at = pl.ds(half * F + tile.column + first, columns)
                plgpu.copy_gmem_to_smem(
                    a.at[rows, at], scratch["a"].at[tile.wg, i, half], ready
                )

    def epilogue(tile, accumulators, inputs, outs, scratch):
        del inputs
        da, weighted, dweight_JP = outs
        plgpu.barrier_wait(scratch["ready"].at[tile.wg])
        sums: dict[int, jax.Array] = {}

        def per_row(block):
            rows = pl.ds(block * tiles.ROWS, tiles.ROWS)
            return scratch["weight"].at[tile.wg, rows], scratch["sum"].at[tile.wg, rows]

        def parts():
            for i, (block, first) in enumerate(blocks):
                dh_RB = tiles.block_of(accumulators[0], block, first, columns)
                gate_RB, up_RB = (
                    scratch["a"][tile.wg, i, half].astype(jnp.float32)
                    for half in range(2)
                )
                weight_R = plgpu.layout_cast(per_row(block)[0][...], ROW_LAYOUT)
                weight_RB = jax.lax.broadcast_in_dim(weight_R, dh_RB.shape, (0,))
                h_RB, dgate_RB, dup_RB = vjp(gate_RB, up_RB, weight_RB * dh_RB)
                yield dgate_RB, da, block, first, 0
                yield dup_RB, da, block, first, F
                yield weight_RB * h_RB, weighted, block, first, 0
                sum_R = jnp.sum(dh_RB * h_RB, axis=1)
                # Past the last column TMA reads zeros; an interpreter may read NaN.
                sum_R = jnp.where(tile.column + first < F, sum_R, 0)
                sums[block] = sums[block] + sum_R if block in sums else sum_R

        tiles.store_blocks(tile, scratch["staging"], F, parts())
        for block, sum_R in sums.items():
            per_row(block)[1][...] = sum_R
        plgpu.commit_smem()
        mine = pl.ds(tile.visit * m + tile.wg * wg_rows, wg_rows)
        plgpu.copy_smem_to_gmem(
            scratch["sum"].at[tile.wg], dweight_JP.at[tile.column_tile, mine]
        )

    num_rows = visits.group_V.shape[0] * m
    row_m = jnp.arange(m, dtype=jnp.int32)
    row_P = (visits.start_V[:, None] + row_m[None, :]).reshape(num_rows)
    per_wg = (tiles.COMPUTE_WGS, wg_rows)
    da_NC, weighted_NF, dweight_JP = tiles.persistent_matmul(
        "grouped_glu_down_vjp",
        take(dy_TD, token_N),
        w_out_EFD,
        visits,
        tiling=tiling,
        transpose_rhs=True,
        num_columns=F,
        halves=1,
        epilogue=epilogue,
        prefetch=prefetch,
        inputs=(take(weight_N, jnp.clip(row_P, 0, N - 1)), a_NC),
        out_type=(
            jax.ShapeDtypeStruct(a_NC.shape, dtype),
            jax.ShapeDtypeStruct((N, F), dtype),
            jax.ShapeDtypeStruct((pl.cdiv(F, tiling.n), num_rows), jnp.float32),
        ),
        scratch={
            "staging": tiles.staging(dtype),
            "a": tiles.swizzled(
                (tiles.COMPUTE_WGS, len(blocks), 2, tiles.ROWS, columns), dtype
            ),
            "weight": plgpu.SMEM(per_wg, jnp.float32),
            "sum": plgpu.SMEM(per_wg, jnp.float32),
            "ready": plgpu.Barrier(
                num_arrivals=1 + 2 * len(blocks), num_barriers=tiles.COMPUTE_WGS
            ),
        },
        interpret=interpret,
    )
    place_N = tiles.place_of_rows(bounds, N, m)
    return da_NC, weighted_NF, take(jnp.sum(dweight_JP, axis=0), place_N)


def dx(da_NC, w_in_EDC, bounds, *, interpret=False):
    """Return dx_ND; see `compose.Kernels`."""
    return product(
        da_NC, w_in_EDC, bounds, True, da_NC.dtype, interpret=interpret, every_row=False
    )


def dw_in(x_TD, da_NC, token_N, bounds, dtype, *, interpret=False):
    """Return dw_in_EDC; see `compose.Kernels`."""
    return triton.dw_in(x_TD, da_NC, token_N, bounds, dtype, interpret=bool(interpret))


def dw_out(weighted_NF, dy_TD, token_N, bounds, dtype, *, interpret=False):
    """Return dw_out_EFD; see `compose.Kernels`."""
    return triton.dw_out(
        weighted_NF, dy_TD, token_N, bounds, dtype, interpret=bool(interpret)
    )


ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one value of each row of a WGMMA result
KERNELS = Kernels(up, down, down_vjp, dx, dw_in, dw_out)
forward, backward = compose(KERNELS)
