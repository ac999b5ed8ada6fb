"""Dynamic-confidence (top-p) routing: as many experts as the router needs to be sure.

T tokens · D model width · E experts · K = k_max slots per token
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from moex.config.base import caution, require, require_choice
from moex.config.schedule import Schedule, points_of, require_values, value_at
from moex.moe import steering
from moex.moe.balance import Controller, ControlP, ScheduledValue
from moex.moe.contract import Router, RouterConfig
from moex.moe.routing import Routing, replayed, router_scores, slot_gates, top_k
from moex.nn.param import RouterState, param
from moex.numbers import exact


@dataclasses.dataclass(kw_only=True, slots=True)
class TopP(RouterConfig):
    """Each token goes to its best experts until their probability exceeds p."""

    takes_bans = takes_forces = reorders = True

    p: float | tuple[float, ...] | Schedule  # in (0, 1]; a tuple: per segment copy
    k_max: int | None = None  # most experts of a token; None: all of them
    k_min: int = 1  # fewest experts of a token
    normalize: str = "none"  # "none": gates are raw probabilities; or "after" selection
    control: Controller | None = None  # steers p, from the given one, to a mean count
    logit_norm: bool = False  # logits to mean 0 and deviation 1, times a learned scale
    init_std: float = 0.02  # standard deviation of the initial router weights

    def validate(self, path):
        for p in self.p if isinstance(self.p, (tuple, list)) else (self.p,):
            require_values(lambda v: 0 < v <= 1, f"{path}.p", p, "in (0, 1]")
        require(self.k_min >= 1, f"{path}.k_min", self.k_min, "at least 1")
        if self.k_max is None:
            caution(
                f"{path}.k_max = None: rows for all experts of every token are kept "
                "in memory; set the most experts that a token may use."
            )
        else:
            require(
                self.k_max >= self.k_min,
                f"{path}.k_max",
                self.k_max,
                f"at least k_min = {self.k_min}",
            )
        require_choice(f"{path}.normalize", self.normalize, ("none", "after"))
        require(
            self.control is None or isinstance(self.p, (int, float)),
            f"{path}.p",
            self.p,
            "one number, where a controller starts",
        )
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")

    def validate_experts(self, num_experts, path):
        for name in ("k_min", "k_max"):
            k = getattr(self, name)
            require(
                k is None or k <= num_experts,
                f"{path}.{name}",
                k,
                f"at most num_experts = {num_experts}",
            )
        if self.control is not None:
            K = self.slots(num_experts)
            require(
                self.k_min <= self.control.target <= K,
                f"{path}.control.target",
                self.control.target,
                f"in [k_min, k_max] = [{self.k_min}, {K}]",
            )

    def validate_repeat(self, repeat, path):
        require(
            not isinstance(self.p, (tuple, list)) or len(self.p) == repeat,
            f"{path}.p",
            self.p,
            f"one p per copy of the segment, repeat = {repeat}",
        )

    def keep_copies(self, copies):
        if isinstance(self.p, (tuple, list)):
            self.p = tuple(self.p[copies])

    def slots(self, num_experts) -> int:
        return num_experts if self.k_max is None else self.k_max

    def expected_slots(self, num_experts) -> float:
        """The experts per token of uniform routing, floor(p E) + 1, or the target."""
        if self.control is not None:
            return self.control.target
        ps = tuple(self.p) if isinstance(self.p, (tuple, list)) else (self.p,)
        last = [p.points[-1][1] if isinstance(p, Schedule) else p for p in ps]
        K = self.slots(num_experts)
        counts = [math.floor(exact(p) * num_experts) + 1 for p in last]
        return sum(min(max(n, self.k_min), K) for n in counts) / len(counts)

    def keep_experts(self, keep, num_experts):
        most, control = len(keep), self.control
        if control is not None:
            target = min(control.target, most)
            control = dataclasses.replace(control, target=target)
        k_max = self.k_max and min(self.k_max, most)
        least = min(self.k_min, most)
        return dataclasses.replace(self, k_min=least, k_max=k_max, control=control)

    def make(self, dim, num_experts, rngs):
        return TopPRouter(self, dim, num_experts, rngs)


class TopPRouter(Router):
    """Keeps experts in falling order of probability until they hold more than p.

    Expert j of the order is kept if the sum of the j - 1 before it is not above p, so
    at least one is kept. The sums are inclusive ones, shifted, as in the authors' code,
    so that rounding agrees with it; p = 1 keeps all K whatever the rounding. Ties go to
    the lowest expert. Gates are the raw probabilities unless `normalize="after"`.

    Parameters: w_DE [D, E]; logit_scale [] with `logit_norm`. State: p_and_error [2]
    (controlled), p [] (scheduled).

    Source: Huang et al. 2024, "Harder Tasks Need More Experts", arXiv:2403.07652
    (routing is in float32 here; theirs runs in the model's dtype). Control of p and
    normalised logits: after DTop-p, arXiv:2512.13996 (abstract).
    """

    PROJECTED = ("w_DE",)

    def __init__(self, cfg, dim, num_experts, rngs):
        self.num_slots = cfg.slots(num_experts)
        self.k_min = cfg.k_min
        self.normalize = cfg.normalize
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)
        self.logit_scale: nnx.Param | None = (
            param(rngs, (), (), value=1.0) if cfg.logit_norm else None
        )
        points = points_of(cfg.p) if isinstance(cfg.p, Schedule) else None
        fixed = tuple(cfg.p) if isinstance(cfg.p, (tuple, list)) else cfg.p
        self.p_fixed = fixed if points is None and cfg.control is None else None
        self.p: RouterState | None = (
            None
            if points is None
            else RouterState(
                jnp.float32(value_at(points, 0)), axes=(), rule=ScheduledValue(points)
            )
        )
        control = cfg.control
        self.p_and_error: RouterState | None = (
            None
            if control is None
            else RouterState(
                jnp.array([cfg.p, 0.0], jnp.float32),
                axes=(None,),
                rule=ControlP(control.target, control.kp, control.ki, control.shared),
            )
        )

    def __call__(self, x_TD, ctx) -> Routing:
        logits_TE = self.logits(x_TD, ctx)
        if self.logit_scale is not None:
            logits_TE = self.logit_scale[...] * standardize(logits_TE)
        scores = router_scores(logits_TE, "softmax")
        probs_TE = scores.probs_TE
        scores = steering.steered_scores(scores, "softmax", ctx.steer)
        choice_TE = jax.lax.stop_gradient(scores.probs_TE)
        choice_TK, expert_TK = top_k(choice_TE, self.num_slots)
        keep_TK = keep_until(choice_TK, self._p(ctx), self.k_min)
        keep_TK = steering.kept(keep_TK, expert_TK, ctx.steer)
        expert_TK, keep_TK = replayed(
            ctx, "expert", expert_TK.astype(jnp.int32), keep_TK
        )
        return Routing(
            expert_TK=expert_TK,
            gate_TK=slot_gates(scores, expert_TK, keep_TK, self.normalize),
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )

    def _p(self, ctx):
        if self.p is not None:
            return self.p[...]
        if self.p_and_error is not None:
            return self.p_and_error[..., 0]
        if isinstance(self.p_fixed, tuple):
            layer = 0 if ctx.layer is None else ctx.layer
            return jnp.array(self.p_fixed, jnp.float32)[layer]
        return jnp.float32(self.p_fixed)


def keep_until(choice_TK, p, k_min=1):
    """Keep slots until the probability of those before exceeds p (strictly).

    Args:
      choice_TK: float32, probabilities in falling order.
      p: float32 scalar; at 1 or above all slots are kept.
      k_min: slots that are kept in any case, >= 1.
    """
    total_TK = jnp.cumsum(choice_TK, axis=-1)
    keep_TK = jnp.pad(total_TK[:, :-1] <= p, ((0, 0), (1, 0)), constant_values=True)
    first_K = jnp.arange(choice_TK.shape[-1]) < max(k_min, 1)
    return keep_TK | first_K[None] | (p >= 1)


def standardize(logits_TE):
    """Scale each row to mean 0 and deviation 1; a constant row gives exactly 0."""
    # Subtract the largest first: the mean of equal numbers is not always that number.
    top_T1 = jnp.max(logits_TE, axis=-1, keepdims=True)
    logits_TE = logits_TE - jax.lax.stop_gradient(top_T1)
    centred_TE = logits_TE - jnp.mean(logits_TE, axis=-1, keepdims=True)
    variance_T1 = jnp.mean(centred_TE**2, axis=-1, keepdims=True)
    return centred_TE * jax.lax.rsqrt(variance_T1 + 1e-6)
