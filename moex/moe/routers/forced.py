"""Forced routing: a load that you choose, for benchmarks, with live gates.

T tokens · D model width · E experts · K slots per token

There is no router for the replay of a recorded assignment: every router replays what
`Context.forced` holds.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moex.config.base import require, require_choice
from moex.moe.contract import FixedK, Router
from moex.moe.routing import Routing, replayed, router_scores, slot_gates, top_k
from moex.nn.param import param

LOADS = ("balanced", "random", "skewed", "adversarial")


@dataclasses.dataclass(kw_only=True, slots=True)
class Forced(FixedK):
    """Experts are assigned without looking at the tokens; gates are those of top-k."""

    load: str = "balanced"  # "balanced", "random", "skewed" or "adversarial"
    skew: float = 1.0  # "skewed": expert e is drawn with weight (e + 1)^-skew, >= 0
    seed: int = 0  # seed of "random" and "skewed"
    init_std: float = 0.02  # standard deviation of the initial router weights

    def validate(self, path):
        FixedK.validate(self, path)
        require_choice(f"{path}.load", self.load, LOADS)
        require(self.skew >= 0, f"{path}.skew", self.skew, ">= 0")
        require(0 <= self.seed < 2**31, f"{path}.seed", self.seed, "in [0, 2**31)")
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")

    def make(self, dim, num_experts, rngs):
        return ForcedRouter(self, dim, num_experts, rngs)


class ForcedRouter(Router):
    """The assignment depends on the token's place in the batch only.

    "balanced": slot j of token t goes to expert (t k + j) mod E. "random": k different
    experts, all equally likely; "skewed": drawn in turn with falling weights.
    "adversarial": all tokens go to experts 0 to k - 1, the worst case for a device.
    Gates are normalised softmax scores of x W at these experts (raw ones for k = 1), so
    the cost and the gradients of a real router are there. Layers and rounds of a chain
    draw differently.

    Parameters: w_DE [D, E].

    Source: the forced loads of Megatron Core and OLMo-core; "skewed" is ours.
    """

    PROJECTED = ("w_DE",)

    def __init__(self, cfg, dim, num_experts, rngs):
        self.k, self.load, self.skew, self.seed = cfg.k, cfg.load, cfg.skew, cfg.seed
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)

    def __call__(self, x_TD, ctx) -> Routing:
        logits_TE = self.logits(x_TD, ctx)
        scores = router_scores(logits_TE, "softmax")
        T, E = logits_TE.shape
        key = jax.random.fold_in(jax.random.key(self.seed), ctx.chain_round)
        if ctx.depth is not None:
            key = jax.random.fold_in(key, ctx.depth)
        expert_TK = forced_experts(T, E, self.k, self.load, self.skew, key)
        # A single gate normalised to 1 would have no gradient.
        normalize = "after" if self.k > 1 else "none"
        expert_TK, keep_TK = replayed(
            ctx, "expert", expert_TK, jnp.ones((T, self.k), bool)
        )
        return Routing(
            expert_TK=expert_TK,
            gate_TK=slot_gates(scores, expert_TK, keep_TK, normalize),
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=scores.probs_TE,
        )


def forced_experts(num_tokens, num_experts, k, load, skew=1.0, key=None) -> jax.Array:
    """Assign experts, int32[T, k], by one of `LOADS`; random ones need a random key."""
    T, E = num_tokens, num_experts
    slot_TK = jnp.arange(T * k, dtype=jnp.int32).reshape(T, k)
    if load == "balanced":
        return slot_TK % E
    if load == "adversarial":
        return slot_TK % k
    # The k largest of log-weight + Gumbel noise are k draws without replacement.
    noise_TE = jax.random.gumbel(key, (T, E))
    if load == "skewed":
        noise_TE -= skew * jnp.log1p(jnp.arange(E, dtype=jnp.float32))[None]
    return top_k(noise_TE, k)[1].astype(jnp.int32)
