"""Gated experts: each one a feed-forward of two projections in and one out.

T tokens · N routed rows · D model width · E experts · F expert width · K slots
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from kernels_pallas import ACTIVATIONS, grouped_glu
from moex.config.base import require, require_choice
from moex.moe.contract import Experts, ExpertsConfig
from moex.nn.contract import StackReader
from moex.nn.lowered import BlockWeight, as_read
from moex.nn.param import param
from moex.nn.projection import Projector, per_row, project_rows


@dataclasses.dataclass(kw_only=True, slots=True)
class Glu(ExpertsConfig):
    """Gated experts, all of one width."""

    hidden: int  # hidden width F of each expert, >= 1
    activation: str = "silu"  # "silu" (SwiGLU), "gelu" (GEGLU) or "clamped" (GPT-OSS)
    bias: bool = False  # biases of all three projections

    def validate(self, path):
        require(self.hidden >= 1, f"{path}.hidden", self.hidden, "at least 1")
        require_choice(f"{path}.activation", self.activation, ACTIVATIONS)

    def takes_buffer_rows(self) -> bool:
        return not self.bias

    def split(self, parts):
        if parts < 1 or self.hidden % parts or self.bias:
            raise ValueError(
                "Glu experts can be cut into parts >= 1 that divide their width, and "
                f"without biases; got parts={parts}, hidden={self.hidden}, "
                f"bias={self.bias}."
            )
        return dataclasses.replace(self, hidden=self.hidden // parts)

    def make(self, dim, num_experts, rngs):
        kind = GluExperts if self.bias else FusedGluExperts
        return kind(self, dim, num_experts, rngs)


class GluExperts(Experts, StackReader, Projector):
    """E experts W_out act(W_gate x + b_gate, W_up x + b_up) + b_out.

    Parameters: w_in_ED2F [E, D, 2, F] (gate, up), w_out_EFD [E, F, D]; with biases
    bias_in_E2F [E, 2, F] and bias_out_ED [E, D]. With `ctx.whole_stack` they have a
    leading dim [repeat]: then experts are counted through all copies of the layer.
    """

    PROJECTED = ("w_in_ED2F", "w_out_EFD")

    def __init__(self, cfg, dim, num_experts, rngs):
        E, F = num_experts, cfg.hidden
        self.activation = cfg.activation
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
        self.bias_in_E2F: nnx.Param | None = (
            param(rngs, (E, 2, F), ("expert", None, "mlp"), value=0.0)
            if cfg.bias
            else None
        )
        self.bias_out_ED: nnx.Param | None = (
            param(rngs, (E, dim), ("expert", "embed"), value=0.0) if cfg.bias else None
        )

    def __call__(self, x_ND, group_sizes_E, ctx):
        a_NC = project_rows(self, "w_in_ED2F", x_ND, group_sizes_E, ctx)
        F = a_NC.shape[1] // 2
        if self.bias_in_E2F is not None:
            bias_EC = self.bias_in_E2F[...].reshape(-1, 2 * F)
            a_NC += per_row(bias_EC.astype(a_NC.dtype), group_sizes_E, len(a_NC))
        a32_NC = a_NC.astype(jnp.float32)
        h_NF = ACTIVATIONS[self.activation].value(a32_NC[:, :F], a32_NC[:, F:])
        h_NF = h_NF.astype(x_ND.dtype)
        y_ND = project_rows(self, "w_out_EFD", h_NF, group_sizes_E, ctx)
        if self.bias_out_ED is not None:
            bias_ED = ctx.tensor_share * self.bias_out_ED[...].reshape(
                -1, y_ND.shape[1]
            )
            y_ND += per_row(bias_ED.astype(y_ND.dtype), group_sizes_E, len(y_ND))
        return y_ND

    def num_copies(self) -> int:
        return self.w_out_EFD.shape[0]

    def _weights(self, dtype, ctx):
        weights = [w[...].astype(dtype) for w in (self.w_in_ED2F, self.w_out_EFD)]
        if ctx.whole_stack:
            weights = [w.reshape(-1, *w.shape[2:]) for w in weights]
        return weights


class FusedGluExperts(GluExperts):
    """Gated experts without biases: dispatch and combine are part of the kernel."""

    def sums(self, x_TD, gate_TK, plan, ctx, buffer_rows=None):
        low = as_read(self.w_in_ED2F, ctx) is not None
        # Adapters change what is inside of the fused kernel, which takes plain weights.
        if self.adapters or low or isinstance(self.w_in_ED2F, BlockWeight):
            return super().sums(x_TD, gate_TK, plan, ctx)
        w_in, w_out = self._weights(x_TD.dtype, ctx)
        return grouped_glu(
            x_TD,
            w_in,
            w_out,
            gate_TK,
            plan,
            activation=self.activation,
            buffer_rows=buffer_rows,
            implementation=ctx.compute.kernels,
        )
