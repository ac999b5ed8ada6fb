"""A router of your own: change it, or write another one beside it.

T tokens · D model width · E experts · K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp
from moex import FixedK, Router, Routing, param
from moex.config.base import require
from moex.moe.routing import replayed, router_logits, router_scores, slot_gates, top_k


@dataclasses.dataclass(kw_only=True, slots=True)
class Cosine(FixedK):
    """Each token goes to the k experts whose vectors are nearest in direction."""

    temperature: float = 0.1  # the cosines are divided by it, > 0

    def validate(self, path):
        FixedK.validate(self, path)
        ok = self.temperature > 0
        require(ok, f"{path}.temperature", self.temperature, "above 0")

    def make(self, dim, num_experts, rngs):
        return CosineRouter(self, dim, num_experts, rngs)


class CosineRouter(Router):
    """The module of `Cosine`: it holds one vector for each expert."""

    def __init__(self, cfg, dim, num_experts, rngs):
        self.k, self.temperature = cfg.k, cfg.temperature
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=0.1)

    def __call__(self, x_TD, ctx):
        x_TD, w_DE = x_TD.astype(jnp.float32), self.w_DE[...]
        cosine_TE = router_logits(unit(x_TD, axis=1), unit(w_DE, axis=0))
        logits_TE = cosine_TE / self.temperature
        _, expert_TK = top_k(logits_TE, self.k)
        keep_TK = jnp.ones(expert_TK.shape, bool)  # every slot is used
        # A recorded choice may take the place of this one: see docs/traces.md.
        expert_TK, keep_TK = replayed(ctx, "expert", expert_TK, keep_TK)
        scores = router_scores(logits_TE, "softmax")
        return Routing(
            expert_TK=expert_TK,
            gate_TK=slot_gates(scores, expert_TK, keep_TK, "after"),  # they sum to 1
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=scores.probs_TE,
        )


def unit(x, axis):
    """Scale vectors to length 1; a vector of zeros stays."""
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + 1e-6)
