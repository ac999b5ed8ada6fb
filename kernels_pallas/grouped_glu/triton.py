"""grouped_glu for NVIDIA GPUs, from Ampere on, by Pallas through Triton.

Token rows are read through `token_N` inside the kernels: no gathered copy of them is
written. The kernel that sums the up projections computes the activation too; the kernel
that sums dh also computes its gradient, the weighting and the gate gradient. `a` and
`da` are [N, C], C = 2F: gate half, then up half, in the dtype of the tokens.

For the gate gradient one program per tile of F makes float32 sums of each row, and XLA
adds them: there are no atomics, so every run gives the same bits.

Legend: T tokens, N sorted rows, D model width, F expert hidden width, C pre-activation
columns (2F), E experts, J tiles of F; in lowercase m rows, k contraction, f columns of
one tile, h half of them. `bounds` is int32[E + 1]: rows bounds[e] to bounds[e + 1] are
those of expert e; rows past the last are neither read nor written.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import triton_tiles as tiles
from kernels_pallas.activations import ACTIVATIONS, Activation
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul.triton import product, tiling_for, weight_product


def _gelu_glu(gate, up):
    """The same as `activations.gelu_glu`."""
    return gate * _normal(gate)[0] * up


def _gelu_glu_vjp(gate, up, dh):
    """The same as `activations.gelu_glu_vjp`."""
    cdf, density = _normal(gate)
    gelu = gate * cdf
    return gelu * up, dh * up * (cdf + gate * density), dh * gelu


def _normal(x):
    """Compute the distribution function and density of the normal, from one exp.

    It uses the rational approximation of Abramowitz and Stegun (1964), 7.1.26, for the
    complement of erf; the distribution function has an absolute error below 1e-7.
    """
    bell = jnp.exp(-0.5 * x * x)
    t = 1 / (1 + np.float32(0.3275911 * 0.5**0.5) * jnp.abs(x))
    series = jnp.zeros_like(x)
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(c)) * t
    beyond = 0.5 * series * bell
    return jnp.where(x < 0, beyond, 1 - beyond), np.float32((2 * np.pi) ** -0.5) * bell


# Triton has no erf.
IN_KERNELS = {**ACTIVATIONS, "gelu": Activation(_gelu_glu, _gelu_glu_vjp)}


def up(
    x_TD, w_in_EDC, token_N, bounds, activation, save, *, tiling=None, interpret=False
):
    """Return (a or None, h_NF); see `compose.Kernels`.

    h is computed from float32 sums, before `a` is rounded to the dtype of x.
    """
    (E, D, C), N, dtype = w_in_EDC.shape, token_N.shape[0], x_TD.dtype
    F = C // 2
    tiling = tiling or tiling_for("up", N, D, F, E, dtype)
    blocks = tiles.row_blocks(bounds, N, tiling.rows, cover=False)
    num_blocks = blocks.group_B.shape[0]
    out_shape = [jax.ShapeDtypeStruct((N, F), dtype)]
    if save:
        out_shape.append(jax.ShapeDtypeStruct((N, C), dtype))
    h_NF, *a = tiles.call(
        partial(
            _up_kernel,
            size=(num_blocks, D, F),
            tiling=tiling,
            activation=IN_KERNELS[activation].value,
        ),
        "grouped_glu_up",
        (num_blocks * pl.cdiv(F, tiling.columns),),
        tuple(out_shape),
        tiling,
        interpret,
        (*blocks, token_N, x_TD, w_in_EDC.reshape(E * D, C)),
    )
    return (a[0] if save else None), h_NF


def _up_kernel(
    group_B, start_B, stop_B, token_N, x, w_in, h, *a, size, tiling, activation
):
    """Compute one tile of h, from two tiles of sums side by side."""
    num_blocks, D, F = size
    block, across = tiles.place(
        pl.program_id(0), num_blocks, pl.cdiv(F, tiling.columns), tiling.band
    )
    group = group_B[block]
    row_m = tiles.span(start_B[block], tiling.rows)
    row_ok = tiles.row_mask(row_m, stop_B[block])
    token_m = plt.load(token_N.at[row_m], mask=row_ok, other=0)
    at_f = tiles.span(across * tiling.columns, tiling.columns)
    f_ok = tiles.edge_mask(at_f, F, tiling.columns)

    def step(i, sums):
        at_k = tiles.span(i * tiling.depth, tiling.depth)
        k_ok = tiles.edge_mask(at_k, D, tiling.depth)
        x_mk = tiles.load(x, token_m, at_k, row_ok, k_ok)
        gate_kf = tiles.load(w_in, group * D + at_k, at_f, k_ok, f_ok)
        up_kf = tiles.load(w_in, group * D + at_k, F + at_f, k_ok, f_ok)
        gate_mf = sums[0] + tiles.dot(x_mk, gate_kf, (1, 0))
        return gate_mf, sums[1] + tiles.dot(x_mk, up_kf, (1, 0))

    steps = tiles.steps(group, D, tiling.depth)
    zero_mf = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    gate_mf, up_mf = lax.fori_loop(0, steps, step, (zero_mf, zero_mf))
    tiles.store(h, row_m, at_f, row_ok, f_ok, activation(gate_mf, up_mf))
    for a_NC in a:
        tiles.store(a_NC, row_m, at_f, row_ok, f_ok, gate_mf)
        tiles.store(a_NC, row_m, F + at_f, row_ok, f_ok, up_mf)


def down(h_NF, w_out_EFD, bounds, *, interpret=False):
    """Return y_ND; see `compose.Kernels`."""
    return product(
        h_NF, w_out_EFD, bounds, False, h_NF.dtype, interpret=interpret, cover=False
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
    """Return (da_NC, weighted_NF, dweight_N); see `compose.Kernels`."""
    (E, F, D), N, dtype = w_out_EFD.shape, token_N.shape[0], a_NC.dtype
    tiling = tiling or tiling_for("down_vjp", N, D, F, E, dtype)
    blocks = tiles.row_blocks(bounds, N, tiling.rows, cover=False)
    num_blocks, num_columns = blocks.group_B.shape[0], pl.cdiv(F, tiling.columns)
    da_NC, weighted_NF, dweight_JN = tiles.call(
        partial(
            _down_vjp_kernel,
            size=(num_blocks, D, F),
            tiling=tiling,
            activation=IN_KERNELS[activation].vjp,
        ),
        "grouped_glu_down_vjp",
        (num_blocks * num_columns,),
        (
            jax.ShapeDtypeStruct(a_NC.shape, dtype),
            jax.ShapeDtypeStruct((N, F), dtype),
            jax.ShapeDtypeStruct((num_columns, N), jnp.float32),
        ),
        tiling,
        interpret,
        (*blocks, token_N, dy_TD, w_out_EFD.reshape(E * F, D), a_NC, weight_N),
    )
    return da_NC, weighted_NF, jnp.sum(dweight_JN, axis=0)


def _down_vjp_kernel(*refs, size, tiling, activation):
    """Compute one tile of dh, and all that is made from it."""
    group_B, start_B, stop_B, token_N, dy, w_out, a, weight_N, *outputs = refs
    da, weighted, dweight_JN = outputs
    num_blocks, D, F = size
    block, across = tiles.place(
        pl.program_id(0), num_blocks, pl.cdiv(F, tiling.columns), tiling.band
    )
    group = group_B[block]
    row_m = tiles.span(start_B[block], tiling.rows)
    row_ok = tiles.row_mask(row_m, stop_B[block])
    token_m = plt.load(token_N.at[row_m], mask=row_ok, other=0)
    at_f = tiles.span(across * tiling.columns, tiling.columns)
    f_ok = tiles.edge_mask(at_f, F, tiling.columns)

    def step(i, dh_mf):
        at_k = tiles.span(i * tiling.depth, tiling.depth)
        k_ok = tiles.edge_mask(at_k, D, tiling.depth)
        dy_mk = tiles.load(dy, token_m, at_k, row_ok, k_ok)
        w_fk = tiles.load(w_out, group * F + at_f, at_k, f_ok, k_ok)
        return dh_mf + tiles.dot(dy_mk, w_fk, (1, 1))

    steps = tiles.steps(group, D, tiling.depth)
    zero_mf = jnp.zeros((tiling.rows, tiling.columns), jnp.float32)
    dh_mf = lax.fori_loop(0, steps, step, zero_mf)

    # Work in two halves, or the epilogue's tiles would not fit the registers: 128 x 128
    # at once took 1056 bytes of local memory per thread (ptxas 12.9 for sm_90a).
    # Columns past F hold zeros of `a` and of dh, whose products add nothing to dweight.
    weight_m1 = plt.load(weight_N.at[row_m], mask=row_ok, other=0)[:, None]
    half = tiling.columns // 2
    weight_mh = jnp.broadcast_to(weight_m1, (tiling.rows, half))
    dweight_m = jnp.zeros(tiling.rows, jnp.float32)
    for j, dh_mh in enumerate(jnp.split(dh_mf, 2, axis=1)):
        at_h = tiles.span(across * tiling.columns + j * half, half)
        h_ok = tiles.edge_mask(at_h, F, tiling.columns)
        gate_mh = tiles.load(a, row_m, at_h, row_ok, h_ok).astype(jnp.float32)
        up_mh = tiles.load(a, row_m, F + at_h, row_ok, h_ok).astype(jnp.float32)
        h_mh, dgate_mh, dup_mh = activation(gate_mh, up_mh, weight_mh * dh_mh)
        tiles.store(da, row_m, at_h, row_ok, h_ok, dgate_mh)
        tiles.store(da, row_m, F + at_h, row_ok, h_ok, dup_mh)
        tiles.store(weighted, row_m, at_h, row_ok, h_ok, weight_mh * h_mh)
        dweight_m += jnp.sum(dh_mh * h_mh, axis=1)
    plt.store(dweight_JN.at[across, row_m], dweight_m, mask=row_ok)


def dx(da_NC, w_in_EDC, bounds, *, interpret=False):
    """Return dx_ND; see `compose.Kernels`."""
    return product(
        da_NC, w_in_EDC, bounds, True, da_NC.dtype, interpret=interpret, cover=False
    )


def dw_in(x_TD, da_NC, token_N, bounds, dtype, *, interpret=False):
    """Return dw_in_EDC; see `compose.Kernels`."""
    return weight_product(
        x_TD, da_NC, bounds, dtype, interpret=interpret, lhs_row_M=token_N
    )


def dw_out(weighted_NF, dy_TD, token_N, bounds, dtype, *, interpret=False):
    """Return dw_out_EFD; see `compose.Kernels`."""
    return weight_product(
        weighted_NF, dy_TD, bounds, dtype, interpret=interpret, rhs_row_M=token_N
    )


KERNELS = Kernels(up, down, down_vjp, dx, dw_in, dw_out)
forward, backward = compose(KERNELS)
