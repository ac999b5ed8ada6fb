"""The definition of grouped_glu: every expert on every token, then select.

It costs E times the work of one expert. Its gradient is JAX's own, in float32.

Legend: T tokens, K slots per token, D model width, F expert hidden width, E experts;
2 is the pair of input projections (gate, up).
"""

import jax.numpy as jnp

from kernels_pallas.activations import ACTIVATIONS


def grouped_glu(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation, buffer_rows):
    """Compute what `api.grouped_glu` defines; `buffer_rows` does not matter here."""
    del buffer_rows
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for e in range(w_in_ED2F.shape[0]):
        mine_TK = (plan.row_TK >= plan.bounds[e]) & (plan.row_TK < plan.bounds[e + 1])
        mine_T1 = jnp.any(mine_TK, axis=1, keepdims=True)
        gate_T1 = jnp.sum(jnp.where(mine_TK, gate_TK, 0), axis=1, keepdims=True)
        # Selecting on both sides keeps other experts' NaN out of the gradients.
        mine_TD = jnp.where(mine_T1, x_TD, 0).astype(jnp.float32)
        w_in_D2F = w_in_ED2F[e].astype(jnp.float32)
        w_out_FD = w_out_EFD[e].astype(jnp.float32)
        hidden_TF = ACTIVATIONS[activation].value(
            mine_TD @ w_in_D2F[:, 0], mine_TD @ w_in_D2F[:, 1]
        )
        y_TD += jnp.where(mine_T1, gate_T1 * (hidden_TF @ w_out_FD), 0)
    return y_TD.astype(x_TD.dtype)
