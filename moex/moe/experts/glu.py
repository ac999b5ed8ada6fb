"""Gated experts: each one a SwiGLU feed-forward.

T tokens · N routed rows · D model width · E experts · F expert width · K slots
"""

import dataclasses

import jax
from flax import nnx

from kernels_pallas import grouped_matmul, grouped_swiglu
from moex.config import Config, require
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class Glu(Config):
    """SwiGLU experts, all of one width."""

    hidden: int  # hidden width F of each expert, >= 1

    def validate(self, path):
        require(self.hidden >= 1, f"{path}.hidden", self.hidden, "at least 1")

    def make(self, dim, num_experts, rngs):
        return GluExperts(self, dim, num_experts, rngs)


class GluExperts(nnx.Module):
    """E experts W_out (silu(W_gate x) * W_up x).

    Parameters: w_in_ED2F [E, D, 2, F] (gate, up), w_out_EFD [E, F, D].
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        E, F = num_experts, cfg.hidden
        self.w_in_ED2F = param(
            rngs,
            (E, dim, 2, F),
            ("expert", "embed", None, "mlp"),
            fan_in=dim,
            matrix=((1,), (3,)),
        )
        self.w_out_EFD = param(
            rngs,
            (E, F, dim),
            ("expert", "mlp", "embed"),
            fan_in=F,
            matrix=((1,), (2,)),
        )

    def __call__(self, x_ND, group_sizes_E, ctx):
        """The definition: rows sorted by expert; rows past the sum come back zero."""
        w_in, w_out = self._weights(x_ND.dtype)
        E, D, _, F = w_in.shape
        h_N2F = grouped_matmul(
            x_ND, w_in.reshape(E, D, 2 * F), group_sizes_E, implementation=ctx.kernels
        )
        h_NF = jax.nn.silu(h_N2F[:, :F]) * h_N2F[:, F:]
        return grouped_matmul(h_NF, w_out, group_sizes_E, implementation=ctx.kernels)

    def fused(self, x_TD, gate_TK, plan, ctx):
        """The same with dispatch and combine inside: tokens in, gated sums out."""
        w_in, w_out = self._weights(x_TD.dtype)
        return grouped_swiglu(
            x_TD, w_in, w_out, gate_TK, plan, implementation=ctx.kernels
        )

    def _weights(self, dtype):
        return self.w_in_ED2F[...].astype(dtype), self.w_out_EFD[...].astype(dtype)
