"""grouped_glu as row gathers around XLA's ragged dot.

Legend: T tokens, N sorted rows, D model width, F expert hidden width, C pre-activation
columns (2F), E experts.
"""

import jax.numpy as jnp

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul.xla import product, weight_product
from kernels_pallas.permute import take


def _up(x_TD, w_in_EDC, token_N, bounds, activation, save):
    a_NC = product(take(x_TD, token_N), w_in_EDC, bounds, False, x_TD.dtype)
    h_NF = ACTIVATIONS[activation].value(*_halves(a_NC)).astype(x_TD.dtype)
    return (a_NC if save else None), h_NF


def _down(h_NF, w_out_EFD, bounds):
    return product(h_NF, w_out_EFD, bounds, False, h_NF.dtype)


def _down_vjp(dy_TD, w_out_EFD, a_NC, weight_N, token_N, bounds, activation):
    dh_NF = product(take(dy_TD, token_N), w_out_EFD, bounds, True, jnp.float32)
    weight_N1 = weight_N[:, None]
    h_NF, dgate_NF, dup_NF = ACTIVATIONS[activation].vjp(
        *_halves(a_NC), weight_N1 * dh_NF
    )
    da_NC = jnp.concatenate([dgate_NF, dup_NF], axis=1).astype(a_NC.dtype)
    weighted_NF = (weight_N1 * h_NF).astype(a_NC.dtype)
    return da_NC, weighted_NF, jnp.sum(dh_NF * h_NF, axis=1)


def _dx(da_NC, w_in_EDC, bounds):
    return product(da_NC, w_in_EDC, bounds, True, da_NC.dtype)


def _dw_in(x_TD, da_NC, token_N, bounds, dtype):
    return weight_product(take(x_TD, token_N), da_NC, bounds, dtype)


def _dw_out(weighted_NF, dy_TD, token_N, bounds, dtype):
    return weight_product(weighted_NF, take(dy_TD, token_N), bounds, dtype)


def _halves(a_NC):
    return jnp.split(a_NC.astype(jnp.float32), 2, axis=1)


KERNELS = Kernels(_up, _down, _down_vjp, _dx, _dw_in, _dw_out)
forward, backward = compose(KERNELS)
