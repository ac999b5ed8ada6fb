"""Chain of experts: the layer goes round several times with the same experts.

B batch · L length · D model width · C iterations
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moex.config.base import require
from moex.moe import offload
from moex.moe.contract import Router, RouterConfig
from moex.moe.layer import MoE, SparseLayer, check_capacity, check_router, loss_weights
from moex.nn.context import Context, fold_key
from moex.nn.contract import FeedForwardConfig

ROUTERS = ("independent", "shared")


@dataclasses.dataclass(kw_only=True, slots=True)
class Chain(FeedForwardConfig):
    """`iterations` rounds through the experts of `moe`; k counts experts per round."""

    moe: MoE  # the experts, held once, and the router of every round
    iterations: int  # C, >= 1
    routers: str | tuple[RouterConfig, ...] = (
        "independent"  # or "shared"; or one per round
    )
    inner_residual: bool = True  # a round adds to its input
    shared_once: bool = False  # the shared expert runs in the first round only

    def validate(self, path):
        require(
            self.iterations >= 1, f"{path}.iterations", self.iterations, "at least 1"
        )
        if not isinstance(self.routers, str):
            require(
                len(self.routers) == self.iterations,
                f"{path}.routers",
                f"{len(self.routers)} routers",
                f"one router per round, iterations = {self.iterations}",
            )
            for i, router in enumerate(self.routers):
                where = f"{path}.routers[{i}]"
                check_router(router, self.moe.num_choices(), where)
                check_capacity(self.moe, router, f"{path}.moe.capacity_factor")
        else:
            require(
                self.routers in ROUTERS,
                f"{path}.routers",
                self.routers,
                "'independent', 'shared', or a tuple of router configs",
            )

    def validate_dim(self, dim, path):
        self.moe.validate_dim(dim, f"{path}.moe")

    def validate_repeat(self, repeat, path):
        self.moe.validate_repeat(repeat, f"{path}.moe")
        if not isinstance(self.routers, str):
            for i, router in enumerate(self.routers):
                router.validate_repeat(repeat, f"{path}.routers[{i}]")

    def rounds(self) -> list[RouterConfig]:
        """The router config of each round."""
        if isinstance(self.routers, str):
            return [self.moe.router] * self.iterations
        return list(self.routers)

    def param_use(self, name, experts_per_token=None) -> tuple[float, float]:
        """The same as `MoE.param_use`; `experts_per_token` has a value per round.

        The rounds share the experts: the share in use is counted as if no two rounds
        chose the same expert, and is at most 1.
        """
        if name.startswith("experts/"):
            if experts_per_token is None:
                moes = [dataclasses.replace(self.moe, router=r) for r in self.rounds()]
                experts_per_token = [moe.expected_experts() for moe in moes]
            return self.moe.expert_use(name, list(map(float, experts_per_token)))
        share, times = self.moe.param_use(name)
        once = self.shared_once and name.startswith(("shared/", "w_shared_gate"))
        if once or name.startswith("routers/"):
            return share, times
        return share, times * self.iterations

    def describe(self):
        return f"Chain({self.iterations}, {self.moe.describe()})"

    def make(self, dim, rngs):
        return ChainLayer(self, dim, rngs)


class ChainLayer(SparseLayer):
    """z_t = z_{t-1} + M_t(z_{t-1}) for t = 1 to C; returns z_C - z_0.

    M_t is the whole MoE with the router of round t; with C = 1 this is the plain layer,
    bit for bit. Without the inner residual z_t = M_t(z_{t-1}), and z_C is returned.
    There is no norm between rounds. The block decides how the result is added to the
    residual stream (`Segment.residual`). Losses, load and stats have a leading dim [C].

    Parameters: experts, zero and shared as in `MoE`, held once; `routers/t`, or one
    `router` if they are shared.

    Source: Chain-of-Experts, arXiv:2506.18945, and its code (modeling_coe.py).
    """

    def __init__(self, cfg, dim, rngs):
        choices = cfg.moe.num_choices()
        self.iterations = cfg.iterations
        self.inner_residual = cfg.inner_residual
        self.shared_once = cfg.shared_once
        shared = cfg.routers == "shared"
        self.router: Router | None = (
            cfg.moe.router.make(dim, choices, rngs) if shared else None
        )
        self.routers: nnx.List | None = (
            None
            if shared
            else nnx.List(r.make(dim, choices, rngs) for r in cfg.rounds())
        )
        self.loss_weights = tuple(map(loss_weights, cfg.rounds()))
        super().__init__(cfg.moe, dim, rngs)

    def __call__(self, x_BLD, ctx=None):
        ctx = Context.of(x_BLD) if ctx is None else ctx
        z_BLD, sum_BLD = x_BLD, None
        rounds: list[dict] = []
        for t in range(self.iterations):
            router = self.router if self.routers is None else self.routers[t]
            own = offload.in_round(self._context(ctx, t), t, rounds)
            y_BLD, aux = self.mix(z_BLD, router, self.loss_weights[t], own)
            if self.shared is not None and (t == 0 or not self.shared_once):
                y_BLD = y_BLD + self.shared_output(z_BLD, ctx)
            rounds.append(aux)
            # We keep the sum of the rounds: z_C - z_0 would be rounded differently.
            sum_BLD = y_BLD if sum_BLD is None else sum_BLD + y_BLD
            z_BLD = x_BLD + sum_BLD if self.inner_residual else y_BLD
        return (sum_BLD if self.inner_residual else z_BLD), stack_rounds(rounds)

    def _context(self, ctx, t):
        """The context of round t, with its own noise key and its part of a replay."""
        # The first round keeps the key: a chain of one round is the plain layer.
        key = ctx.key if t == 0 else fold_key(ctx.key, t)
        forced = None if ctx.forced is None else ctx.forced[str(t)]
        return dataclasses.replace(ctx, key=key, forced=forced, chain_round=t)


def stack_rounds(rounds: list[dict]) -> dict:
    """The aux of all rounds with a leading dim [C]; some parts stay apart, by round.

    Sums and losses that only some routers report are 0 for the others, and the
    histograms of slots are as long as the longest.
    """
    apart = {
        name: {str(t): aux.pop(name) for t, aux in enumerate(rounds) if name in aux}
        for name in ("trace", "answers", "offload")
    }
    for part in ("stats", "losses"):
        names: dict[str, Any] = {}
        for aux in rounds:
            names |= {k: v for k, v in aux[part].items() if k not in names}
        for aux in rounds:
            missing = {k: jnp.zeros_like(v) for k, v in names.items()}
            aux[part] = missing | aux[part]
    longest = max(len(aux["stats"]["slots_S"]) for aux in rounds)
    for aux in rounds:
        slots_S = aux["stats"]["slots_S"]
        aux["stats"]["slots_S"] = jnp.pad(slots_S, (0, longest - len(slots_S)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rounds)
    return stacked | {name: own for name, own in apart.items() if own}
