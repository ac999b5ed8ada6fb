"""Top-k routing.

T tokens · D model width · E experts · K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moex.config import Config, require, require_choice
from moex.moe.routing import Routing, normalize_gates, router_logits
from moex.nn.param import RouterBias, param

SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(kw_only=True, slots=True)
class TopK(Config):
    """Each token goes to its k best experts."""

    k: int  # slots per token, 1 <= k <= num_experts
    score: str = "softmax"  # "softmax" over experts, or "sigmoid" of each logit
    normalize: bool = True  # gates of a token sum to 1; False: the raw scores
    scale: float = 1.0  # factor on the gates, after normalisation, > 0
    bias_rate: float = 0.0  # step of the aux-free bias per optimizer step; 0: no bias
    init_std: float = 0.02  # standard deviation of the initial router weights

    def validate(self, path):
        require(self.k >= 1, f"{path}.k", self.k, "at least 1")
        require_choice(f"{path}.score", self.score, SCORES)
        require(self.scale > 0, f"{path}.scale", self.scale, "above 0")
        require(self.bias_rate >= 0, f"{path}.bias_rate", self.bias_rate, ">= 0")
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")

    def validate_experts(self, num_experts, path):
        """Checks that need the number of experts, which only the layer knows."""
        require(
            self.k <= num_experts,
            f"{path}.k",
            self.k,
            f"at most num_experts = {num_experts}; lower k or add experts",
        )

    def slots(self, num_experts) -> int:
        """K: slots per token."""
        return self.k

    def make(self, dim, num_experts, rngs):
        return TopKRouter(self, dim, num_experts, rngs)


class TopKRouter(nnx.Module):
    """scores = softmax or sigmoid of x W; the k highest (scores + bias) are chosen.

    The bias, if there is one, only selects: gates are the scores without it, and no
    gradient reaches it. Ties go to the lowest expert.

    Parameters: w_DE [D, E]; bias_E float32 [E], state that the train step moves.

    Source: Shazeer et al. 2017, arXiv:1701.06538 (top-k gating; theirs normalises after
    selection, as `normalize=True`); bias: Wang et al. 2024, arXiv:2408.15664.
    """

    def __init__(self, cfg, dim, num_experts, rngs):
        self.k = cfg.k
        self.score = cfg.score
        self.normalize = cfg.normalize
        self.scale = cfg.scale
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)
        # One assignment: nnx fixes at the first whether an attribute holds arrays.
        self.bias_E: RouterBias | None = (
            RouterBias(
                jnp.zeros(num_experts, jnp.float32), axes=(None,), rate=cfg.bias_rate
            )
            if cfg.bias_rate > 0
            else None
        )

    def __call__(self, x_TD, ctx) -> Routing:
        logits_TE = router_logits(x_TD, self.w_DE[...])
        if self.score == "softmax":
            score_TE = probs_TE = jax.nn.softmax(logits_TE, axis=-1)
        else:
            score_TE = jax.nn.sigmoid(logits_TE)
            total_T1 = jnp.sum(score_TE, axis=-1, keepdims=True)
            probs_TE = score_TE / jnp.maximum(total_T1, 1e-20)
        choice_TE = jax.lax.stop_gradient(score_TE)
        if self.bias_E is not None:
            choice_TE = choice_TE + self.bias_E[...][None]
        _, expert_TK = jax.lax.top_k(choice_TE, self.k)
        keep_TK = jnp.ones(expert_TK.shape, bool)
        gate_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
        if self.normalize:
            gate_TK = normalize_gates(gate_TK, keep_TK)
        return Routing(
            expert_TK=expert_TK.astype(jnp.int32),
            gate_TK=gate_TK * self.scale,
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )
