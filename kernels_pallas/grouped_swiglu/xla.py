"""grouped_swiglu as row gathers around XLA's ragged dot: the accelerator fallback.

One custom VJP around the whole, with the same residuals as `cpu`: the
pre-activations and the inputs.

Legend: T tokens, K slots per token, N sorted rows (T*K), D model width, F expert
hidden width, C pre-activation columns (2F), E experts.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.grouped_matmul.xla import product, weight_product
from kernels_pallas.grouped_swiglu.parts import combine, swiglu, swiglu_and_vjp
from kernels_pallas.tiles import take


@jax.jit
def grouped_swiglu(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan):
    """See `api.grouped_swiglu`."""
    num_experts, dim = w_in_ED2F.shape[:2]
    w_in_EDC = w_in_ED2F.reshape(num_experts, dim, -1)
    return _experts(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan)


@jax.custom_vjp
def _experts(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan):
    return _forward(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan)[0]


def _forward(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan):
    dtype, sizes_E = x_TD.dtype, plan.group_sizes_E
    x_ND = take(x_TD, plan.token_N)
    a_NC = product(x_ND, w_in_EDC, sizes_E, False, dtype)
    y_ND = product(swiglu(a_NC).astype(dtype), w_out_EFD, sizes_E, False, dtype)
    y_TD = combine(y_ND, plan, jnp.where(plan.kept_TK, gate_TK, 0))
    return y_TD, (a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan)


def _backward(saved, dy_TD):
    a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan = saved
    dtype, sizes_E = x_TD.dtype, plan.group_sizes_E
    gate_N1 = take(gate_TK.reshape(-1, 1), plan.order_N)
    dy_ND = take(dy_TD, plan.token_N)

    dh_NF = product(dy_ND, w_out_EFD, sizes_E, True, jnp.float32)  # before the gate
    h_NF, da_NC = swiglu_and_vjp(a_NC, gate_N1 * dh_NF)
    dgate_N = jnp.sum(dh_NF * h_NF, axis=1)  # = dy . y, so y need not be kept
    da_NC = da_NC.astype(dtype)

    weighted_NF = (gate_N1 * h_NF).astype(dtype)
    dw_out_EFD = weight_product(weighted_NF, dy_ND, sizes_E, w_out_EFD.dtype)
    x_ND = take(x_TD, plan.token_N)
    dw_in_EDC = weight_product(x_ND, da_NC, sizes_E, w_in_EDC.dtype)
    dx_TD = combine(product(da_NC, w_in_EDC, sizes_E, True, dtype), plan)
    dgate_TK = jnp.where(plan.kept_TK, take(dgate_N, plan.row_TK), 0)
    return dx_TD, dw_in_EDC, dw_out_EFD, dgate_TK, None


_experts.defvjp(_forward, _backward)
