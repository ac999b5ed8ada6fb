"""The MoE layer: router -> dispatch -> experts -> combine, plus optional shared expert.

B batch · L length · T = B * L tokens · D model width · E experts · K slots per token
"""

import dataclasses
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moex.config.base import Config, require, walk
from moex.moe import losses, metrics
from moex.moe.capacity import drop_over_capacity, expert_capacity
from moex.moe.experts.glu import Glu
from moex.moe.experts.zero import Zero
from moex.moe.parallel import Rows, run_experts
from moex.moe.routing import ExpertRouting
from moex.nn.block import is_feed_forward
from moex.nn.param import param
from moex.sharding import constrain, on_a_mesh


@dataclasses.dataclass(kw_only=True, slots=True)
class MoE(Config):
    """A sparse feed-forward: `router` chooses among `num_experts` of kind `experts`."""

    num_experts: int  # E, >= 1
    router: Config  # how tokens choose, such as TopK(k=2)
    experts: Config  # what an expert is, such as Glu(hidden=512)
    shared: Config | None = None  # a feed-forward for every token, such as Dense(...)
    shared_gate: bool = False  # the shared output times sigmoid(x w), as in Qwen2-MoE
    zero: Zero | None = None  # choices that cost nothing, beside the experts
    capacity_factor: float | None = (
        None  # rows per expert over the mean if all slots are used; None: dropless
    )
    buffer_slots: float | None = (
        None  # kept slots per token that buffers are made for; None: all there are
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
        check_router(self.router, self.num_choices(), f"{path}.router")
        check_capacity(self, self.router, f"{path}.capacity_factor")
        require(
            _makes(self.experts, "dim", "num_experts", "rngs")
            and not hasattr(self.experts, "validate_experts"),
            f"{path}.experts",
            type(self.experts).__name__,
            "an experts config such as Glu",
        )
        require(
            self.buffer_slots is None or self.buffer_slots > 0,
            f"{path}.buffer_slots",
            self.buffer_slots,
            "above 0, or None for buffers that hold all slots",
        )
        require(
            self.buffer_slots is None
            or (isinstance(self.experts, Glu) and not self.experts.bias),
            f"{path}.buffer_slots",
            self.buffer_slots,
            f"None with {type(self.experts).__name__}: for Glu without biases",
        )
        require(
            self.shared is None
            or (is_feed_forward(self.shared) and not _has_router(self.shared)),
            f"{path}.shared",
            type(self.shared).__name__,
            "a dense feed-forward config such as Dense, or None",
        )
        require(
            self.shared is not None or not self.shared_gate,
            f"{path}.shared_gate",
            self.shared_gate,
            "False without a shared expert",
        )

    def validate_dim(self, dim, path):
        """Checks that need the model width."""
        experts: Any = self.experts
        if hasattr(experts, "validate_sizes"):
            experts.validate_sizes(self.num_experts, dim, f"{path}.experts")
        shared: Any = self.shared
        if hasattr(shared, "validate_dim"):
            shared.validate_dim(dim, f"{path}.shared")

    def num_choices(self) -> int:
        """What a router chooses among: experts and zero-computation experts."""
        return self.num_experts + (self.zero.count() if self.zero else 0)

    def expected_experts(self) -> float:
        """Experts that compute for a token, before anything is trained.

        All choices are alike then, so zero-computation experts get their share.
        """
        choices = self.num_choices()
        router: Any = self.router
        return router.expected_slots(choices) * self.num_experts / choices

    def param_use(self, name, experts_per_token=None) -> tuple[float, float]:
        """How a token uses a parameter: the share it meets, the times it meets it.

        Zero-computation experts are computed for every token.

        Args:
          name: path of the parameter in the layer, such as "experts/w_out_EFD".
          experts_per_token: measured; None: as expected before training.
        """
        shared: Any = self.shared
        if name.startswith("shared/") and hasattr(shared, "param_use"):
            return shared.param_use(name.removeprefix("shared/"))
        if not name.startswith("experts/"):
            return 1.0, 1.0
        if experts_per_token is None:
            experts_per_token = self.expected_experts()
        return self.expert_use(name, [float(experts_per_token)])

    def expert_use(self, name, rounds: list[float]) -> tuple[float, float]:
        """`param_use` of the experts when tokens come in `rounds` of so many slots."""
        E = self.num_experts
        experts: Any = self.experts

        def frac(slots):
            if hasattr(experts, "expert_frac"):
                return experts.expert_frac(E, slots, name.split("/")[-1])
            return slots / E

        return frac(min(sum(rounds), E)), sum(map(frac, rounds))

    def make(self, dim, rngs):
        return MoELayer(self, dim, rngs)


def check_router(router: Any, num_choices: int, path: str) -> None:
    """Check that a config is a router, and one for this number of choices."""
    require(
        hasattr(router, "validate_experts")
        and _makes(router, "dim", "num_experts", "rngs"),
        path,
        type(router).__name__,
        "a router config such as TopK",
    )
    router.validate_experts(num_choices, path)


def check_capacity(moe: MoE, router: Any, path: str) -> None:
    """A capacity is for routers in which tokens choose."""
    require(
        moe.capacity_factor is None or hasattr(router, "slots"),
        path,
        moe.capacity_factor,
        f"None: {type(router).__name__} fills its experts evenly",
    )


def _makes(config: Any, *names: str) -> bool:
    """Whether a config has `make` with exactly these parameters."""
    make = getattr(config, "make", None)
    return make is not None and tuple(signature(make).parameters) == names


def _has_router(config) -> bool:
    return any(hasattr(node, "validate_experts") for _, node in walk(config, ""))


def split_experts(moe: MoE, parts: int) -> MoE:
    """Fine-grained splitting: `parts` times the experts and k, of 1/`parts` the width.

    The same parameters and FLOPs, and many more combinations.

    Raises:
      ValueError: if the width is not a multiple, or the router has no k.

    Source: DeepSeekMoE, arXiv:2401.06066, section 3.1.
    """
    router: Any = moe.router
    experts: Any = moe.experts
    if not hasattr(router, "k") or not isinstance(experts, Glu) or experts.bias:
        raise ValueError(
            "split_experts needs a router with k and Glu experts without biases; got "
            f"{type(router).__name__} and {experts}."
        )
    if parts < 1 or experts.hidden % parts:
        raise ValueError(
            f"split_experts needs parts >= 1 that divide the expert width; got "
            f"parts={parts}, hidden={experts.hidden}."
        )
    return dataclasses.replace(
        moe,
        num_experts=moe.num_experts * parts,
        router=dataclasses.replace(router, k=router.k * parts),
        experts=dataclasses.replace(experts, hidden=experts.hidden // parts),
    )


class SparseLayer(nnx.Module):
    """Everything of an MoE layer but its router: what a chain goes round with."""

    def __init__(self, cfg, dim, rngs):
        self.num_experts = cfg.num_experts
        self.capacity_factor = cfg.capacity_factor
        self.buffer_slots = cfg.buffer_slots
        self.experts = cfg.experts.make(dim, cfg.num_experts, rngs)
        self.zero = None if cfg.zero is None else cfg.zero.make(dim, rngs)
        self.shared = None if cfg.shared is None else cfg.shared.make(dim, rngs)
        self.w_shared_gate_D1: nnx.Param | None = (
            param(rngs, (dim, 1), ("embed", None), std=0.02)
            if cfg.shared_gate
            else None
        )

    def mix(self, x_BLD, router, ctx):
        """`(y_BLD, aux)` of the routed experts alone."""
        B, L, D = x_BLD.shape
        x_TD = constrain(x_BLD.reshape(-1, D), "tokens", None)
        valid_T = ctx.valid_BL.reshape(-1)
        with jax.named_scope("router"):
            routing = router(x_TD, ctx)
            if not isinstance(routing, ExpertRouting):  # which takes no padding
                routing = routing.keep_only(valid_T[:, None])
            load_BE, real_T = metrics.loads(routing, (B, L), self.num_experts)
        if isinstance(routing, ExpertRouting):
            y_TD, num_kept, num_lost = self._sums_of_experts(x_TD, routing, ctx)
        else:
            y_TD, num_kept, num_lost = self._sums(x_TD, routing, ctx)
        stats = metrics.routing_stats(
            routing,
            ctx.valid_BL,
            load_BE,
            real_T,
            num_kept,
            num_lost,
            self.num_experts,
            y_TD,
        )
        aux = {
            "losses": losses.layer_losses(stats),
            "load": stats["load_E"],
            "stats": stats,
        }
        if ctx.collect:
            aux["trace"] = routing.trace()
            aux["scores"] = {"logits": routing.logits_TE, "probs": routing.probs_TE}
            aux["inputs"] = x_BLD
        return y_TD.reshape(B, L, D), aux

    def _sums(self, x_TD, routing, ctx, per_expert=None):
        """(gated sums over the slots of each row of x, rows computed, rows lost)."""
        E = self.num_experts
        # Decoding drops nothing, or a row would depend on the rest of its batch.
        if self.capacity_factor is not None and ctx.mode != "decode":
            num_slots = routing.expert_TK.size
            choices = routing.probs_TE.shape[-1]
            capacity = expert_capacity(self.capacity_factor, num_slots, choices)
            routing = drop_over_capacity(routing, E, capacity)
        rows = Rows(self.buffer_slots, per_expert)
        y_TD, num_lost = run_experts(self.experts, x_TD, routing, E, ctx, rows=rows)
        if self.zero is not None:
            with jax.named_scope("zero"):
                y_TD += self.zero(x_TD, routing.expert_TK, routing.gate_TK, E)
        computed_TK = routing.keep_TK & (routing.expert_TK < E)
        return y_TD, jnp.sum(computed_TK, dtype=jnp.float32) - num_lost, num_lost

    def _sums_of_experts(self, x_TD, routing, ctx):
        """`_sums` where experts choose."""
        if on_a_mesh():
            # Tokens stay where they are: every one says which experts chose it.
            per_expert = routing.token_EC.shape[1]
            return self._sums(x_TD, routing.by_token(), ctx, per_expert)
        token_N, rows = routing.by_row()
        y_ND, num_kept, num_lost = self._sums(x_TD[token_N], rows, ctx)
        y32_TD = jnp.zeros(x_TD.shape).at[token_N].add(y_ND.astype(jnp.float32))
        return y32_TD.astype(x_TD.dtype), num_kept, num_lost

    def shared_output(self, x_BLD, ctx):
        """What the shared expert adds; call only if there is one."""
        assert self.shared is not None
        with jax.named_scope("shared"):
            y_BLD = self.shared(x_BLD, ctx)[0]
            if self.w_shared_gate_D1 is not None:
                logit_BL1 = x_BLD.astype(jnp.float32) @ self.w_shared_gate_D1[...]
                y_BLD = y_BLD * jax.nn.sigmoid(logit_BL1).astype(y_BLD.dtype)
        return y_BLD


class MoELayer(SparseLayer):
    """y = sum over kept slots of gate * expert(x), plus shared(x).

    1. The router turns tokens into a `Routing` (float32), or an `ExpertRouting`.
    2. Padding is not routed; a capacity, if set, drops slots, and they are counted.
    3. One sort puts the kept slots in expert order (`Plan`); on a mesh, tokens first
       travel to the devices of their experts (`moe/parallel.py`).
    4. The experts compute their rows; dropped slots cost nothing.
    5. Rows come back to their tokens, weighted by the gates; zero-computation experts
       are added.

    Returns (y_BLD, aux) with aux = {losses, load, stats}, unscaled float32, and trace,
    scores and inputs if the context collects them.
    """

    def __init__(self, cfg, dim, rngs):
        self.router = cfg.router.make(dim, cfg.num_choices(), rngs)
        super().__init__(cfg, dim, rngs)

    def __call__(self, x_BLD, ctx):
        y_BLD, aux = self.mix(x_BLD, self.router, ctx)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared_output(x_BLD, ctx)
        return y_BLD, aux
