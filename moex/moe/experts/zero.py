"""Zero-computation experts: choices besides the real experts that cost almost nothing.

T tokens · D model width · E real experts · Z zero-computation ones · J constant ones ·
K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moex.config.base import Config, require
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class Zero(Config):
    """The number of experts of each kind; their ids follow those of the real ones."""

    null: int = 0  # experts whose output is 0
    copy: int = 0  # experts whose output is their input
    constant: int = 0  # experts that mix their input with a learned vector

    def validate(self, path):
        for name in ("null", "copy", "constant"):
            value = getattr(self, name)
            require(value >= 0, f"{path}.{name}", value, ">= 0")
        require(self.count() >= 1, path, self.count(), "at least one expert of a kind")

    def count(self) -> int:
        """The number Z of zero-computation experts."""
        return self.null + self.copy + self.constant

    def make(self, dim, rngs):
        return ZeroExperts(self, dim, rngs)


class ZeroExperts(nnx.Module):
    """null: 0. copy: x. constant j: a_1 x + a_2 v_j, a = softmax(x W_j).

    Parameters: v_JD [J, D], w_JD2 [J, D, 2].

    Source: MoE++, Jin et al. 2024, arXiv:2410.07348, section 3.1 (from memory: its
    text was not available to us).
    """

    def __init__(self, cfg, dim, rngs):
        self.null, self.copy, self.constant = cfg.null, cfg.copy, cfg.constant
        J = cfg.constant
        self.v_JD: nnx.Param | None = (
            param(rngs, (J, dim), (None, "embed"), std=0.02) if J else None
        )
        self.w_JD2: nnx.Param | None = (
            param(rngs, (J, dim, 2), (None, "embed", None), std=0.02) if J else None
        )

    def __call__(self, x_TD, expert_TK, gate_TK, first_id):
        """Sum gate * output over the slots with ids from `first_id` on, in x's dtype.

        Args:
          x_TD: tokens.
          expert_TK: int32 ids; smaller ones are real experts and add nothing here.
          gate_TK: float32, 0 where not kept.
          first_id: E.
        """
        x32_TD = x_TD.astype(jnp.float32)

        def gates(start, count):
            id_Z = first_id + start + jnp.arange(count, dtype=jnp.int32)
            here_TKZ = expert_TK[:, :, None] == id_Z[None, None]
            return jnp.sum(jnp.where(here_TKZ, gate_TK[:, :, None], 0.0), axis=1)

        y_TD = jnp.sum(gates(self.null, self.copy), axis=1, keepdims=True) * x32_TD
        if self.v_JD is not None and self.w_JD2 is not None:
            gate_TJ = gates(self.null + self.copy, self.constant)
            mix_TJ2 = jax.nn.softmax(
                jnp.einsum("td,jdm->tjm", x32_TD, self.w_JD2[...]), axis=-1
            )
            own_TJ, learned_TJ = gate_TJ * mix_TJ2[..., 0], gate_TJ * mix_TJ2[..., 1]
            y_TD += jnp.sum(own_TJ, axis=1, keepdims=True) * x32_TD
            y_TD += learned_TJ @ self.v_JD[...]
        return y_TD.astype(x_TD.dtype)
