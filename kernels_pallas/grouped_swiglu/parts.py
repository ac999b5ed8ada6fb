"""What the backends of grouped_swiglu share: the activation and the combine.

Legend: T tokens, K slots per token, N sorted rows (T*K), D model width, F expert
hidden width, C pre-activation columns (2F: gate half, then up half).
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.tiles import take


def swiglu(a_NC):
    """silu(gate half) * up half, in float32."""
    gate_NF, up_NF = jnp.split(a_NC.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate_NF) * up_NF


def swiglu_and_vjp(a_NC, dh_NF):
    """(swiglu(a_NC), the gradient of sum(dh_NF * swiglu(a_NC))), in float32."""
    gate_NF, up_NF = jnp.split(a_NC.astype(jnp.float32), 2, axis=-1)
    sigmoid_NF = jax.nn.sigmoid(gate_NF)
    silu_NF = gate_NF * sigmoid_NF
    dsilu_NF = sigmoid_NF + silu_NF * (1 - sigmoid_NF)
    da_NC = jnp.concatenate([dh_NF * up_NF * dsilu_NF, dh_NF * silu_NF], axis=-1)
    return silu_NF * up_NF, da_NC


def combine(y_ND, plan, weight_TK=None):
    """Sums each token's rows, times `weight_TK` if given, into [T, D].

    K gathers and no scatter. Rows of slots that are not kept must be zero, and so
    must their weights. The result has the dtype of `y_ND`, the sum is float32.
    """
    total_TD: Any = None
    for j in range(plan.row_TK.shape[1]):
        term_TD = take(y_ND, plan.row_TK[:, j]).astype(jnp.float32)
        if weight_TK is not None:
            term_TD = weight_TK[:, j : j + 1] * term_TD
        total_TD = term_TD if total_TD is None else total_TD + term_TD
    return total_TD.astype(y_ND.dtype)
