"""The MoE layer: router -> dispatch -> experts -> combine, plus optional shared expert.

B batch · L length · T = B * L tokens · D model width · E experts · K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.device import on_a_mesh
from moex.config.base import require, walk
from moex.config.schedule import static_value
from moex.moe import losses, metrics, offload, steering
from moex.moe.capacity import drop_over_capacity, expert_capacity
from moex.moe.contract import ExpertsConfig, RouterConfig, check_decision
from moex.moe.experts.zero import Zero
from moex.moe.parallel import Rows, run_experts
from moex.moe.stored import stored_state, to_stored
from moex.nn.context import Context
from moex.nn.contract import FeedForward, FeedForwardConfig
from moex.nn.param import param
from moex.nn.projection import tell_of_rows
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class MoE(FeedForwardConfig):
    """A sparse feed-forward: `router` chooses among `num_experts` of kind `experts`."""

    num_experts: int  # E, >= 1
    router: RouterConfig  # how tokens choose, such as TopK(k=2)
    experts: ExpertsConfig  # the kind of experts, such as Glu(hidden=512)
    shared: FeedForwardConfig | None = None  # for every token, such as Dense(...)
    shared_gate: bool = False  # the shared output times sigmoid(x w), as in Qwen2-MoE
    zero: Zero | None = None  # choices that cost nothing, besides the experts
    capacity_factor: float | None = (
        None  # rows per expert over the mean if all slots are used; None: dropless
    )
    buffer_slots: float | None = (
        None  # kept slots per token that buffers are made for; None: all there are
    )
    stored_experts: int | None = (
        None  # sets of weights that the experts share, 1 to E; None: one for each
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
            1 <= self.num_stored() <= self.num_experts,
            f"{path}.stored_experts",
            self.stored_experts,
            f"from 1 to num_experts = {self.num_experts}, or None",
        )
        check_router(self.router, self.num_choices(), f"{path}.router")
        check_capacity(self, self.router, f"{path}.capacity_factor")
        require(
            self.buffer_slots is None or self.buffer_slots > 0,
            f"{path}.buffer_slots",
            self.buffer_slots,
            "above 0, or None for buffers that hold all slots",
        )
        require(
            self.buffer_slots is None or self.experts.takes_buffer_rows(),
            f"{path}.buffer_slots",
            self.buffer_slots,
            f"None with {type(self.experts).__name__}: for Glu without biases",
        )
        require(
            not any(
                isinstance(node, RouterConfig) for _, node in walk(self.shared, "")
            ),
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
        self.experts.validate_sizes(self.num_stored(), dim, f"{path}.experts")
        if self.shared is not None:
            self.shared.validate_dim(dim, f"{path}.shared")

    def validate_repeat(self, repeat, path):
        self.router.validate_repeat(repeat, f"{path}.router")

    def num_choices(self) -> int:
        """The number of choices of a router: experts and zero-computation experts."""
        return self.num_experts + (self.zero.count() if self.zero else 0)

    def num_stored(self) -> int:
        """The number of sets of weights G that the experts have."""
        return self.num_experts if self.stored_experts is None else self.stored_experts

    def expected_experts(self) -> float:
        """The number of experts that compute for a token before anything is trained.

        All choices are alike then, so zero-computation experts get their share.
        """
        choices = self.num_choices()
        return self.router.expected_slots(choices) * self.num_experts / choices

    def param_use(self, name, experts_per_token=None) -> tuple[float, float]:
        if name.startswith("shared/") and self.shared is not None:
            return self.shared.param_use(name.removeprefix("shared/"))
        if not name.startswith("experts/"):  # zero-computation ones see every token
            return 1.0, 1.0
        if experts_per_token is None:
            experts_per_token = self.expected_experts()
        return self.expert_use(name, [float(experts_per_token)])

    def expert_use(self, name, rounds: list[float]) -> tuple[float, float]:
        """The `param_use` of the experts when each of `rounds` uses this many slots.

        Slots are counted as if no two of a token met in one set of weights.
        """
        G, last = self.num_stored(), name.split("/")[-1]

        def frac(slots):
            return self.experts.expert_frac(G, slots, last)

        return frac(min(sum(rounds), G)), sum(map(frac, rounds))

    def describe(self):
        kinds = (type(self.router).__name__, type(self.experts).__name__)
        sets = "" if self.stored_experts is None else f" in {self.stored_experts}"
        return f"MoE({self.num_experts}{sets}, {', '.join(kinds)})"

    def make(self, dim, rngs):
        return MoELayer(self, dim, rngs)


def check_router(router: RouterConfig, num_choices: int, path: str) -> None:
    """Check a router for this number of choices, and the names of its losses."""
    router.validate_experts(num_choices, path)
    own = router.losses()
    require(isinstance(own, dict), f"{path}.losses()", own, "a dict of coefficients")
    for name in own:
        require(
            name.isidentifier() and name not in losses.TAKEN,
            f"{path}.losses()",
            name,
            f"identifiers other than {', '.join(losses.TAKEN)}",
        )


def loss_weights(router: RouterConfig) -> tuple:
    """The pairs (name, coefficient) of a router's own losses, for its layer to keep."""
    return tuple((k, static_value(v)) for k, v in sorted(router.losses().items()))


def check_capacity(moe: MoE, router: RouterConfig, path: str) -> None:
    """Check that a capacity is only set for a router in which tokens choose."""
    require(
        moe.capacity_factor is None or not router.experts_choose,
        path,
        moe.capacity_factor,
        f"None: {type(router).__name__} fills its experts evenly",
    )


def split_experts(moe: MoE, parts: int) -> MoE:
    """Make `parts` times the experts and k, of 1/`parts` the width each.

    Parameters and FLOPs stay the same; there are many more combinations of experts.

    Raises:
      ValueError: if `parts` does not divide the width, or the router or experts cannot.

    Source: DeepSeekMoE, arXiv:2401.06066, section 3.1.
    """
    return dataclasses.replace(
        moe,
        num_experts=moe.num_experts * parts,
        stored_experts=moe.stored_experts and moe.stored_experts * parts,
        router=moe.router.split(parts),
        experts=moe.experts.split(parts),
    )


class SparseLayer(FeedForward):
    """Everything in an MoE layer but its router; a chain runs it several times."""

    def __init__(self, cfg, dim, rngs):
        self.num_experts, self.num_choices = cfg.num_experts, cfg.num_choices()
        self.capacity_factor = cfg.capacity_factor
        self.buffer_slots = cfg.buffer_slots
        self.num_stored = cfg.num_stored()
        self.experts = cfg.experts.make(dim, self.num_stored, rngs)
        self.stored_E = (
            None
            if cfg.stored_experts is None
            else stored_state(cfg.num_experts, cfg.stored_experts)
        )
        self.zero = None if cfg.zero is None else cfg.zero.make(dim, rngs)
        self.shared = None if cfg.shared is None else cfg.shared.make(dim, rngs)
        self.w_shared_gate_D1: nnx.Param | None = (
            param(rngs, (dim, 1), ("embed", None), std=0.02)
            if cfg.shared_gate
            else None
        )

    def mix(self, x_BLD, router, loss_weights, ctx):
        """Compute the routed experts alone, without the shared expert.

        Args:
          x_BLD: input of the layer.
          router: `Router`.
          loss_weights: coefficients of the router's own losses, from `loss_weights`.
          ctx: `Context`.

        Returns:
          (y_BLD, aux); aux has "losses" (`losses.layer_losses`), "load" and "stats"
          (`metrics.routing_stats`), and where `ctx.collect` what a trace needs.
        """
        B, L, D = x_BLD.shape
        x_TD = constrain(x_BLD.reshape(-1, D), "tokens", None)
        valid_T = ctx.valid_BL.reshape(-1)
        with jax.named_scope("router"):
            routing = router(x_TD, ctx)
            check_decision(router, routing, x_TD, self.num_choices, loss_weights)
            routing = steering.scaled(routing, ctx.steer)
            routing = routing.without_padding(valid_T)
            load_BE, real_T = routing.loads((B, L), self.num_experts)
        kept = self.within_capacity(routing, ctx)
        sums = self._sums_of_experts if routing.experts_choose else self._sums
        y_TC, num_kept, num_lost, told = sums(x_TD, kept, ctx)
        tell_of_rows(self.experts, y_TC[:, D:], ctx)
        y_TD = y_TC[:, :D]
        stats = metrics.routing_stats(
            routing,
            ctx.valid_BL,
            load_BE,
            real_T,
            num_kept,
            num_lost,
            self.num_experts,
            y_TD,
        ) | losses.own_sums(routing.losses, loss_weights, valid_T, ctx.step)
        aux = {
            "losses": losses.layer_losses(stats),
            "load": stats["load_E"],
            "stats": stats,
        }
        if told is not None:
            aux["offload"] = told
        if ctx.collect:
            aux["trace"] = routing.trace()
            aux["scores"] = {"logits": routing.logits_TE, "probs": routing.probs_TE}
            aux["inputs"] = x_BLD
        if ctx.measure:
            aux["answers"] = self._answers(x_TD, routing, kept, ctx)
        return y_TD.reshape(B, L, D), aux

    def within_capacity(self, routing, ctx):
        """The routing without the slots that a capacity drops."""
        # Decoding drops nothing: else a row would depend on the rest of its batch.
        if self.capacity_factor is None or ctx.mode == "decode":
            return routing
        num_slots = routing.expert_TK.size
        capacity = expert_capacity(self.capacity_factor, num_slots, self.num_choices)
        return drop_over_capacity(routing, self.num_experts, capacity)

    def _answers(self, x_TD, routing, kept, ctx) -> dict:
        """The slots that are computed, and the norms of what their experts answer.

        It computes the layer once more, slot by slot: so this holds for every kind of
        experts, on every mesh.

        Returns:
          {"expert", "keep", "gate", "norm": [T, K], "chosen_T": int32 slots before a
          capacity, "sum_ED": float32, sum of the answers of each expert}.
        """
        if kept.experts_choose:
            routing = kept = kept.by_token()
        expert_E, D = jnp.arange(self.num_choices, dtype=jnp.int32), x_TD.shape[1]

        def answer(sum_ED, slot):
            expert_T1, keep_T1 = (column[:, None] for column in slot)
            own = {"expert_TK": expert_T1, "keep_TK": keep_T1}
            own["gate_TK"] = keep_T1.astype(jnp.float32)
            y_TC, *_ = self._sums(x_TD, dataclasses.replace(kept, **own), ctx)
            y_TD = y_TC[:, :D].astype(jnp.float32)
            of_TE = ((expert_T1 == expert_E[None]) & keep_T1).astype(jnp.float32)
            sum_ED += jnp.dot(of_TE.T, y_TD, precision=jax.lax.Precision.HIGHEST)
            return sum_ED, jnp.linalg.norm(y_TD, axis=1)

        zeros_ED = jnp.zeros((self.num_choices, D))
        slots = (kept.expert_TK.T, kept.keep_TK.T)
        sum_ED, norm_KT = jax.lax.scan(answer, zeros_ED, slots)
        return kept.trace() | {
            "norm": norm_KT.T,
            "chosen_T": jnp.sum(routing.keep_TK, axis=1, dtype=jnp.int32),
            "sum_ED": sum_ED,
        }

    def _sums(self, x_TD, routing, ctx, per_expert=None):
        """Sum up what the experts answer.

        Returns:
          (`Experts.sums` for each row of x, rows computed, rows lost, what is told of
          experts that are not all on the device, or None).
        """
        E = self.num_experts
        rows, own, G = Rows(self.buffer_slots, per_expert), routing, self.num_stored
        if self.stored_E is not None:
            own = to_stored(routing, self.stored_E[...], G)
            if per_expert is not None:
                rows = Rows(self.buffer_slots, in_all=E * per_expert)
        if ctx.offload is None:
            told = None
            y_TC, num_lost = run_experts(self.experts, x_TD, own, G, ctx, rows=rows)
        else:
            y_TC, num_lost, told = offload.run_resident(
                self.experts, x_TD, own, G, ctx, rows=rows
            )
            stored_E = None if self.stored_E is None else self.stored_E[...]
            told["score_E"] = offload.mean_scores(routing, G, stored_E)
        if self.zero is not None:
            with jax.named_scope("zero"):
                own_TD = self.zero(x_TD, routing.expert_TK, routing.gate_TK, E)
                gates = y_TC.shape[1] - x_TD.shape[1]  # columns with gates of adapters
                y_TC += jnp.pad(own_TD, ((0, 0), (0, gates)))
        computed_TK = routing.keep_TK & (routing.expert_TK < E)
        num_kept = jnp.sum(computed_TK, dtype=jnp.float32) - num_lost
        return y_TC, num_kept, num_lost, told

    def _sums_of_experts(self, x_TD, routing, ctx):
        """The same as `_sums`, for a router in which experts choose."""
        if on_a_mesh() or ctx.offload is not None:
            # Tokens stay in their places: their slots say which experts chose them.
            per_expert = routing.token_EC.shape[1]
            return self._sums(x_TD, routing.by_token(), ctx, per_expert)
        token_N, rows = routing.by_row()
        y_NC, num_kept, num_lost, told = self._sums(x_TD[token_N], rows, ctx)
        y32_TC = jnp.zeros((len(x_TD), y_NC.shape[1]))
        y32_TC = y32_TC.at[token_N].add(y_NC.astype(jnp.float32))
        return y32_TC.astype(x_TD.dtype), num_kept, num_lost, told

    def shared_output(self, x_BLD, ctx):
        """The output of the shared expert; call this only if there is one."""
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
    3. Where experts share weights (`stored_experts`), slots get the ids of the sets.
    4. One sort puts the kept slots in expert order (`Plan`); on a mesh, tokens first
       travel to the devices of their experts (`moe/parallel.py`).
    5. The experts compute their rows; dropped slots cost nothing.
    6. Rows come back to their tokens, weighted by the gates; zero-computation experts
       are added.

    Returns (y_BLD, aux) with aux = {losses, load, stats}, unscaled float32, and trace,
    scores and inputs if the context collects them.
    """

    def __init__(self, cfg, dim, rngs):
        self.router = cfg.router.make(dim, cfg.num_choices(), rngs)
        self.loss_weights = loss_weights(cfg.router)
        super().__init__(cfg, dim, rngs)

    def __call__(self, x_BLD, ctx=None):
        ctx = Context.of(x_BLD) if ctx is None else ctx
        own = offload.in_round(ctx, 0, [])
        y_BLD, aux = self.mix(x_BLD, self.router, self.loss_weights, own)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared_output(x_BLD, ctx)
        return y_BLD, aux
