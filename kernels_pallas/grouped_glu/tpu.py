"""grouped_glu on TPUs, in Pallas: activations and their gradients inside the matmuls.

The up kernel keeps the sums of a gate tile and of an up tile side by side and writes
the pre-activations and their activation. The kernel of the backward pass turns the
cotangent of the activation into that of the pre-activations, and sums rows for the gate
gradient, before anything leaves VMEM.

Token rows are gathered by XLA before the kernels, not inside of them. In the layout of
an array [T, D] on a TPU a row is spread over tiles of 8 rows by 128 columns, and in
bfloat16 two rows share each 32-bit word, so that one row cannot be copied alone; and a
block of gathered rows would be hundreds of small copies. The price is an array [N, D]
that is written and read once, forward and backward.

`a` and `da` are [2, N, F], gate half first, so that one block holds a tile of both. N
is rounded up to a multiple of 128; the added rows belong to no expert. Where F is not a
multiple of 128, the halves of the input projections are copied to separate arrays.

Legend: T tokens, N sorted rows, D model width, F expert hidden width, C pre-activation
columns (2F: gate half, then up half), E experts; m and n are the rows and columns of a
tile. `bounds` is int32[E + 1]: rows bounds[e] to bounds[e + 1] are those of expert e.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tpu_rows
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul.tpu import (
    default_tiling,
    divisor,
    tiling_for,
    weight_product,
)
from kernels_pallas.permute import take
from kernels_pallas.tpu_rows import LANES, Tiling


def up(
    x_TD, w_in_EDC, token_N, bounds, activation, save, *, tiling=None, interpret=False
):
    """Compute `Kernels.up`: the two projections of each row and their activation."""
    x_ND = _gather(x_TD, token_N)
    (N, D), (E, _, C) = x_ND.shape, w_in_EDC.shape
    F = C // 2
    tiling = tiling or tiling_for("up", N, D, F, E, x_TD.dtype)
    tiling = _within(tiling, N, D, F)

    def write(visits, v, column_tile, sums, extra_refs, output_refs):
        del column_tile, extra_refs
        mine_m1 = tpu_rows.rows_of(visits, v, tiling.m)
        h_mn = ACTIVATIONS[activation].value(*sums)
        tpu_rows.write_rows(output_refs[0], mine_m1, h_mn)
        if save:
            for half, sum_mn in enumerate(sums):
                tpu_rows.write_rows(output_refs[1].at[half], mine_m1, sum_mn)

    h = jax.ShapeDtypeStruct((N, F), x_TD.dtype)
    a = jax.ShapeDtypeStruct((2, N, F), x_TD.dtype)
    outputs = [(h, tpu_rows.tile_spec(tiling))]
    if save:
        outputs.append((a, tpu_rows.tile_spec(tiling, halves=2)))
    h_NF, *rest = tpu_rows.multiply_rows(
        x_ND,
        _halves(w_in_EDC, tiling.n),
        tpu_rows.make_visits(bounds, N, tiling.m),
        tpu_rows.Epilogue(write, outputs, []),
        tiling,
        transpose=False,
        name="grouped_glu_up",
        interpret=interpret,
    )
    return (rest[0] if save else None), h_NF


def down(h_NF, w_out_EFD, bounds, *, tiling=None, interpret=False):
    """Compute `Kernels.down`: each row times the output projection of its expert."""
    (N, F), (E, _, D) = h_NF.shape, w_out_EFD.shape
    tiling = tiling or tiling_for("product", N, F, D, E, h_NF.dtype)
    options = {"transpose": False, "name": "grouped_glu_down", "interpret": interpret}
    return _plain(h_NF, [(w_out_EFD, 0)], bounds, D, _within(tiling, N, F, D), options)


def down_vjp(
    dy_TD,
    w_out_EFD,
    a_2NF,
    weight_N,
    token_N,
    bounds,
    activation,
    *,
    tiling=None,
    interpret=False,
):
    """Compute `Kernels.down_vjp`: the cotangent through down projection and activation.

    Each column tile writes its own sums of rows, and XLA adds them up, so the order of
    the sum is fixed.
    """
    dy_ND = _gather(dy_TD, token_N)
    (N, D), (E, F, _) = dy_ND.shape, w_out_EFD.shape
    tiling = tiling or tiling_for("down_vjp", N, D, F, E, dy_TD.dtype)
    tiling = _within(tiling, N, D, F)
    m, n = tiling.m, tiling.n
    num_tiles = pl.cdiv(F, n)

    def write(visits, v, column_tile, sums, extra_refs, output_refs):
        a_ref, weight_ref = extra_refs
        da_ref, weighted_ref, dweight_ref = output_refs
        mine_m1 = tpu_rows.rows_of(visits, v, m)
        # To make a column of a row of numbers, transpose a block that repeats the row:
        # Mosaic transposes whole tiles only.
        weight_m1 = jnp.broadcast_to(weight_ref[...], (LANES, m)).T[:, :1]
        dh_mn = sums[0]
        h_mn, dgate_mn, dup_mn = ACTIVATIONS[activation].vjp(
            a_ref[0].astype(jnp.float32),
            a_ref[1].astype(jnp.float32),
            weight_m1 * dh_mn,
        )
        tpu_rows.write_rows(da_ref.at[0], mine_m1, dgate_mn)
        tpu_rows.write_rows(da_ref.at[1], mine_m1, dup_mn)
        tpu_rows.write_rows(weighted_ref, mine_m1, weight_m1 * h_mn)
        term_mn = dh_mn * h_mn
        if F % n:  # the last tile sticks out
            term_mn = tpu_rows.only_inside(F, n, column_tile, term_mn, 1)
        sum_m1 = jnp.sum(term_mn, axis=1, keepdims=True)
        sum_1m = jnp.broadcast_to(sum_m1, (m, LANES)).T[:1]
        mine_1m = tpu_rows.rows_of(visits, v, m, axis=1)
        tpu_rows.write_rows(dweight_ref, mine_1m, sum_1m)

    a = jax.ShapeDtypeStruct(a_2NF.shape, a_2NF.dtype)
    weighted = jax.ShapeDtypeStruct((N, F), a_2NF.dtype)
    dweight = jax.ShapeDtypeStruct((num_tiles, 1, N), jnp.float32)
    # One number per row lies along lanes: an array [N, 1] takes 128 times the memory.
    weight_1N = jnp.pad(weight_N, (0, N - weight_N.shape[0]))[None]
    da_2NF, weighted_NF, dweight_C1N = tpu_rows.multiply_rows(
        dy_ND,
        [(w_out_EFD, 0)],
        tpu_rows.make_visits(bounds, N, m),
        tpu_rows.Epilogue(
            write,
            outputs=[
                (a, tpu_rows.tile_spec(tiling, halves=2)),
                (weighted, tpu_rows.tile_spec(tiling)),
                (dweight, _row_spec(m, partial=True)),
            ],
            extras=[
                (a_2NF, tpu_rows.tile_spec(tiling, halves=2)),
                (weight_1N, _row_spec(m)),
            ],
        ),
        tiling,
        transpose=True,
        name="grouped_glu_down_vjp",
        interpret=interpret,
    )
    return da_2NF, weighted_NF, jnp.sum(dweight_C1N, axis=(0, 1))


def dx(da_2NF, w_in_EDC, bounds, *, tiling=None, interpret=False):
    """Compute `Kernels.dx`: the gradient through both halves of the projections."""
    (_, N, F), (E, D, _) = da_2NF.shape, w_in_EDC.shape
    if tiling is None:
        tiling = default_tiling("product_t", N, 2 * F, D, E, da_2NF.dtype)
        # A step takes this much of each half.
        tiling = tiling._replace(k=divisor(F, tiling.k // 2))
    tiling = _within(tiling, N, F, D)
    options = {"transpose": True, "name": "grouped_glu_dx", "interpret": interpret}
    return _plain(da_2NF, _halves(w_in_EDC, tiling.k), bounds, D, tiling, options)


def dw_in(x_TD, da_2NF, token_N, bounds, dtype, *, tiling=None, interpret=False):
    """Compute `Kernels.dw_in`: the gradient of the input projections, [E, D, C]."""
    x_ND, E = _gather(x_TD, token_N), bounds.shape[0] - 1
    (N, D), F = x_ND.shape, da_2NF.shape[2]
    if tiling is None:
        tiling = default_tiling("weight", N, D, 2 * F, E, x_TD.dtype)
        if F % LANES == 0:
            tiling = tiling._replace(n=divisor(F, tiling.n))
    if F % tiling.n or tiling.n % LANES:  # a half is not a whole number of tiles
        da_2NF = jnp.concatenate([da_2NF[0], da_2NF[1]], axis=1)
    return weight_product(
        x_ND, da_2NF, bounds, dtype, tiling=tiling, interpret=interpret
    )


def dw_out(weighted_NF, dy_TD, token_N, bounds, dtype, *, tiling=None, interpret=False):
    """Compute `Kernels.dw_out`: the gradient of the output projections, [E, F, D]."""
    dy_ND = _gather(dy_TD, token_N)
    return weight_product(
        weighted_NF, dy_ND, bounds, dtype, tiling=tiling, interpret=interpret
    )


def _plain(lhs, weights, bounds, num_columns, tiling, options):
    """Multiply rows by matrices; rows of no group stay unwritten."""

    def write(visits, v, column_tile, sums, extra_refs, output_refs):
        del column_tile, extra_refs
        mine_m1 = tpu_rows.rows_of(visits, v, tiling.m)
        tpu_rows.write_rows(output_refs[0], mine_m1, sums[0])

    N = lhs.shape[-2]
    out = jax.ShapeDtypeStruct((N, num_columns), lhs.dtype)
    return tpu_rows.multiply_rows(
        lhs,
        weights,
        tpu_rows.make_visits(bounds, N, tiling.m),
        tpu_rows.Epilogue(write, [(out, tpu_rows.tile_spec(tiling))], []),
        tiling,
        **options,
    )[0]


def _gather(x_TD, token_N):
    """Gather the rows of tokens, then rows of token 0 up to a multiple of 128."""
    return take(x_TD, jnp.pad(token_N, (0, -token_N.shape[0] % LANES)))


def _halves(w_EDC, tile):
    """The gate and up columns as `multiply_rows` wants them; a copy if unaligned."""
    F = w_EDC.shape[2] // 2
    if F % tile == 0 and tile % LANES == 0:
        return [(w_EDC, 0), (w_EDC, F // tile)]
    return [(w_EDC[:, :, :F], 0), (w_EDC[:, :, F:], 0)]


def _within(tiling, M, K, N):
    return Tiling(min(tiling.m, M), min(tiling.k, K), min(tiling.n, N))


def _row_spec(tile_m, partial=False):
    """The visited entries of an array [1, N], or of one per column tile [C, 1, N]."""
    if partial:
        return pl.BlockSpec(
            (None, 1, tile_m), lambda c, v, k, g, tile_V, *_: (c, 0, tile_V[v])
        )
    return pl.BlockSpec((1, tile_m), lambda c, v, k, g, tile_V, *_: (0, tile_V[v]))


KERNELS = Kernels(up, down, down_vjp, dx, dw_in, dw_out)
forward, backward = compose(KERNELS)
