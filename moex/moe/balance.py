"""State of routers that no gradient moves, and the rules that move it.

A rule is a small frozen object kept with the variable (`RouterState(value, rule=...)`).
The train step calls it once per optimizer step with the sums of all microbatches and
devices, so neither remat nor the mesh can count anything twice.

E experts · ... leading dims (layers)
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import Config, require
from moex.config.schedule import static_value, value_at
from moex.moe.losses import update_bias
from moex.moe.quantile import SPAN, balancing_bias


@dataclasses.dataclass(frozen=True)
class SignBias:
    """Loss-free balancing by a fixed step: see `losses.update_bias`."""

    rate: float | tuple
    keeps_value = True  # in a run that starts from the parameters of another

    def __call__(self, bias_E, stats, step):
        return update_bias(bias_E, stats["load_E"], value_at(self.rate, step))


@dataclasses.dataclass(frozen=True)
class QuantileBias:
    """Loss-free balancing by quantiles of the whole step: see `moe/quantile.py`.

    The published rule has no rate: it is ours with rate 1. A rate below 1 makes a
    running mean, in which the new bias has this weight.
    """

    rate: float | tuple
    k: int
    span: float
    keeps_value = True

    def __call__(self, bias_E, stats, step):
        if "margin_EB" not in stats:  # k = E: every token takes every expert
            return bias_E
        target_E = balancing_bias(stats["margin_EB"], bias_E, self.k, self.span)
        if self.rate == 1:
            return target_E
        rate = value_at(self.rate, step)
        return rate * target_E + (1 - rate) * bias_E


BIAS_RULES = ("sign", "quantile")


@dataclasses.dataclass(frozen=True)
class ScheduledValue:
    """A value that follows a schedule; it holds the value of the coming step."""

    points: tuple
    keeps_value = False

    def __call__(self, value, stats, step):
        return jnp.broadcast_to(value_at(self.points, step + 1), value.shape)


@dataclasses.dataclass(kw_only=True, slots=True)
class Controller(Config):
    """Steers the p of a top-p router to a mean number of experts per token.

    A PI controller in velocity form, so that it cannot wind up at its limits:
    p += kp * (e - e before) + ki * e, with e = (target - mean slots) / experts. We
    divide by the experts, because p times their number is the mean where probabilities
    are even; a router that is sure answers more slowly, so with many experts raise
    `ki`. Slots at zero-computation experts count.

    Source: the idea is that of DTop-p (arXiv:2512.13996), known to us from its
    abstract only; the form and the gains are ours.
    """

    target: float  # mean experts per token, above 0
    kp: float = 0.2  # proportional gain, >= 0
    ki: float = 0.05  # integral gain per optimizer step, > 0
    shared: bool = False  # one p for all copies of a segment, steered by their mean

    def validate(self, path):
        require(self.target > 0, f"{path}.target", self.target, "above 0")
        require(self.kp >= 0, f"{path}.kp", self.kp, ">= 0")
        require(self.ki > 0, f"{path}.ki", self.ki, "above 0")


# The limits of a controller. At p = 1 top-p takes all experts at once: a router that is
# sure would jump from one expert to all of them and back.
P_MIN, P_MAX = 1e-3, 1 - 1e-6


@dataclasses.dataclass(frozen=True)
class ControlP:
    """The rule of `Controller`; the state is [..., 2]: p and the error before."""

    target: float
    kp: float
    ki: float
    shared: bool
    keeps_value = False

    def __call__(self, state, stats, step):
        num_experts = stats["load_E"].shape[-1]
        mean = stats["num_slots"] / jnp.maximum(stats["num_tokens"], 1.0)
        if self.shared:
            mean = jnp.broadcast_to(jnp.mean(mean), mean.shape)
        error = (self.target - mean) / num_experts
        p = state[..., 0] + self.kp * (error - state[..., 1]) + self.ki * error
        moved = jnp.stack([jnp.clip(p, P_MIN, P_MAX), error], axis=-1)
        return jnp.where(stats["num_tokens"][..., None] > 0, moved, state)


def bias_rule(name, rate, k, score):
    """The rule called `name`, for the bias of a router.

    Args:
      name: one of `BIAS_RULES`.
      rate: a number or a schedule.
      k: slots per token.
      score: one of `routing.SCORES`.
    """
    rate = static_value(rate)
    return SignBias(rate) if name == "sign" else QuantileBias(rate, k, SPAN[score])
