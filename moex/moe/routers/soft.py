"""Soft routing: every token uses every expert, weighted by the router.

T tokens · D model width · E experts
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import require, require_choice
from moex.moe import steering
from moex.moe.contract import Router, RouterConfig
from moex.moe.routing import SCORES, Routing, replayed, router_scores
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class Soft(RouterConfig):
    """The dense mixture: no selection, no savings; gates sum to 1."""

    takes_bans = reorders = True

    score: str = "softmax"  # "softmax", "sigmoid" or "sqrt_softplus" of the logits
    init_std: float = 0.02  # standard deviation of the initial router weights

    def validate(self, path):
        require_choice(f"{path}.score", self.score, SCORES)
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")

    def expected_slots(self, num_experts) -> float:
        return num_experts

    def keep_experts(self, keep, num_experts):
        return dataclasses.replace(self)

    def make(self, dim, num_experts, rngs):
        return SoftRouter(self, dim, num_experts, rngs)


class SoftRouter(Router):
    """Gates of all experts are probs = scores of x W that sum to 1.

    Parameters: w_DE [D, E].

    Source: Jacobs et al. 1991, "Adaptive mixtures of local experts"; the routing of
    LoRAMoE, arXiv:2312.09979.
    """

    PROJECTED = ("w_DE",)

    def __init__(self, cfg, dim, num_experts, rngs):
        self.score = cfg.score
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)

    def __call__(self, x_TD, ctx) -> Routing:
        logits_TE = self.logits(x_TD, ctx)
        scores = router_scores(logits_TE, self.score)
        probs_TE = scores.probs_TE
        scores = steering.steered_scores(scores, self.score, ctx.steer)
        T, E = logits_TE.shape
        expert_TK = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[None], (T, E))
        keep_TK = steering.kept(jnp.ones((T, E), bool), expert_TK, ctx.steer)
        expert_TK, keep_TK = replayed(ctx, "expert", expert_TK, keep_TK)
        gate_TK = jnp.take_along_axis(scores.probs_TE, expert_TK, axis=-1)
        return Routing(
            expert_TK=expert_TK,
            gate_TK=jnp.where(keep_TK, gate_TK, 0.0),
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )
