"""The MoE layer: router -> dispatch -> experts -> combine, plus optional shared expert.

B batch · L length · T = B * L tokens · D model width · E experts · K slots per token
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas import make_plan
from moex.config import Config, require
from moex.moe import losses, metrics
from moex.moe.dispatch import combine, dispatch, drop_over_capacity, expert_capacity


@dataclasses.dataclass(kw_only=True, slots=True)
class MoE(Config):
    """A sparse feed-forward: `router` chooses among `num_experts` of kind `experts`."""

    num_experts: int  # E, >= 1
    router: Config  # how tokens choose, such as TopK(k=2)
    experts: Config  # what an expert is, such as Glu(hidden=512)
    shared: Config | None = None  # a feed-forward for every token, such as Dense(...)
    capacity_factor: float | None = (
        None  # rows per expert over the mean; None: dropless
    )

    def validate(self, path):
        require(
            self.num_experts >= 1, f"{path}.num_experts", self.num_experts, "at least 1"
        )
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"{path}.capacity_factor",
            self.capacity_factor,
            "above 0, or None for dropless",
        )
        require(
            hasattr(self.router, "validate_experts"),
            f"{path}.router",
            type(self.router).__name__,
            "a router config such as TopK",
        )
        router: Any = self.router
        router.validate_experts(self.num_experts, f"{path}.router")

    def make(self, dim, rngs):
        return MoELayer(self, dim, rngs)


class MoELayer(nnx.Module):
    """y = sum over kept slots of gate * expert(x), plus shared(x).

    1. The router turns tokens into a `Routing` (float32).
    2. Padding is not routed; a capacity, if set, drops slots, and they are counted.
    3. One sort puts the kept slots in expert order (`Plan`).
    4. The experts compute their rows; dropped slots cost nothing.
    5. Rows come back to their tokens, weighted by the gates.

    Returns (y_BLD, aux) with aux = {losses, load, stats}: unscaled float32.
    """

    def __init__(self, cfg, dim, rngs):
        self.num_experts = cfg.num_experts
        self.capacity_factor = cfg.capacity_factor
        self.router = cfg.router.make(dim, cfg.num_experts, rngs)
        self.experts = cfg.experts.make(dim, cfg.num_experts, rngs)
        self.shared = None if cfg.shared is None else cfg.shared.make(dim, rngs)

    def __call__(self, x_BLD, ctx):
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        valid_T = ctx.valid_BL.reshape(-1)
        with jax.named_scope("router"):
            routing = self.router(x_TD, ctx).keep_only(valid_T[:, None])
        with jax.named_scope("dispatch"):
            kept, plan, load_E = self._plan(routing, ctx.mode)
        with jax.named_scope("experts"):
            if hasattr(self.experts, "fused"):
                y_TD = self.experts.fused(x_TD, kept.gate_TK, plan, ctx)
            else:
                y_ND = self.experts(dispatch(x_TD, plan), plan.group_sizes_E, ctx)
                y_TD = combine(y_ND, kept.gate_TK, plan)
        y_BLD = y_TD.reshape(x_BLD.shape)
        if self.shared is not None:
            with jax.named_scope("shared"):
                y_BLD = y_BLD + self.shared(x_BLD, ctx)[0]
        num_kept = jnp.sum(plan.group_sizes_E).astype(jnp.float32)
        stats = metrics.routing_stats(routing, valid_T, load_E, num_kept)
        return y_BLD, self._aux(stats)

    def _plan(self, routing, mode):
        """The routing after capacity, its plan, and the load before capacity."""
        E = self.num_experts
        plan = make_plan(routing.expert_TK, routing.keep_TK, E)
        load_E = plan.group_sizes_E.astype(jnp.float32)
        # Decoding drops nothing, or a row would depend on the rest of its batch.
        if self.capacity_factor is None or mode == "decode":
            return routing, plan, load_E
        num_slots = routing.expert_TK.size
        capacity = expert_capacity(self.capacity_factor, num_slots, E)
        kept = drop_over_capacity(routing, E, capacity)
        return kept, make_plan(kept.expert_TK, kept.keep_TK, E), load_E

    def _aux(self, stats):
        tokens = stats["num_tokens"]
        load_E = jax.lax.stop_gradient(stats["load_E"])
        return {
            "losses": {
                "load_balance": losses.load_balance_loss(
                    load_E, stats["prob_sum_E"], tokens
                ),
                "router_z": losses.router_z_loss(stats["z_sum"], tokens),
            },
            "load": load_E,
            "stats": jax.tree.map(jax.lax.stop_gradient, stats),
        }
