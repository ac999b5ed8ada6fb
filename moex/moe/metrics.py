"""The figures of a layer's routing: sums made on the device, figures made from sums.

Sums can be added over microbatches and devices; figures cannot. `routing_stats` makes
the sums inside the layer, `layer_metrics` turns them into what is logged. `FIGURES` is
the one list of figures: charts, reports and the table of docs/monitoring.md, which
`python -m moex.moe.metrics` prints, are made from it.

B batch · L length · T = B * L tokens · D model width · E experts (zero-computation ones
included) · K slots per token · C slots per expert · S bins of a histogram · ... leading
dims (layers, chain steps)
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moex.moe.losses import LOSSES, OWN, Entropy

MOST_SLOTS = 32  # the last bin of a histogram of slots: this many or more


def routing_stats(
    routing, valid_BL, load_BE, real_T, num_kept, num_lost, num_experts, y_TD
) -> dict:
    """The float32 sums over the valid tokens of one layer call.

    Sums that losses are made of are differentiable; the others keep nothing for the
    backward pass.

    Args:
      routing: as the router returned it, without padding, before capacity.
      valid_BL: bool[B, L], False at padding.
      load_BE: float32[B, E], slots per sequence and expert before capacity.
      real_T: float32[T], slots per token at experts that compute.
      num_kept: float32 scalar, rows that were computed.
      num_lost: float32 scalar, rows that found no room on their way to the experts.
      num_experts: experts that compute.
      y_TD: gated sums of the routed experts.
    """
    most = min(routing.most_slots(), num_experts)
    watched = jax.lax.stop_gradient((routing.logits_TE, routing.probs_TE, y_TD))
    logits_TE, still_TE, y_TD = watched
    valid_T, load_E = valid_BL.reshape(-1), jnp.sum(load_BE, axis=0)
    valid_T1 = valid_T[:, None].astype(jnp.float32)
    prob_TE = routing.probs_TE * valid_T1
    stats = {
        "load_E": load_E,
        "prob_sum_E": jnp.sum(prob_TE, axis=0),
        "num_tokens": jnp.sum(valid_T1),
        "num_slots": jnp.sum(load_E),
        "num_zero": jnp.sum(load_E[num_experts:]),
        "num_kept": num_kept,
        "num_lost": num_lost,
        "real_sq_sum": jnp.sum(real_T**2),
        "num_unrouted": jnp.sum(jnp.where(real_T == 0, valid_T1[:, 0], 0.0)),
        "top_gate_sum": jnp.sum(jnp.max(still_TE, axis=-1) * valid_T1[:, 0]),
        "logit_sq_sum": _square_sum(logits_TE, valid_T),
        "output_sq_sum": _square_sum(y_TD, valid_T),
        "slots_S": _slots_histogram(real_T, valid_T, most),
    }
    for loss in LOSSES:
        stats |= loss.sums(routing, load_BE, valid_BL)
    return stats | routing.sums


def _square_sum(x_TX, valid_T):
    """The sum of the squares of all numbers of the valid tokens."""
    square_T = jnp.sum(jnp.square(x_TX.astype(jnp.float32)), axis=-1)
    return jnp.sum(jnp.where(valid_T, square_T, 0))  # no mask of the size of x


def _slots_histogram(real_T, valid_T, most):
    """Count the tokens with 0, 1, ... slots, float32[S]; bin `MOST_SLOTS` is open."""
    bins_S = jnp.arange(min(most, MOST_SLOTS) + 1, dtype=jnp.float32)
    slots_T1 = jnp.minimum(real_T, MOST_SLOTS)[:, None]
    return jnp.sum((slots_T1 == bins_S[None]) & valid_T[:, None], 0, dtype=jnp.float32)


def mean(total, count):
    """The mean as a figure for people: NaN where there is nothing to count."""
    return total / jnp.where(count > 0, count, jnp.nan)


class Figure(NamedTuple):
    """A figure of an MoE layer, with the ways to make it and to show it."""

    name: str  # as in logs; it ends in "_E" with a value per expert, in "_S" per bin
    title: str  # for people
    unit: str  # the unit or quantity, for the axis of a chart
    # Makes it, float32[...] or float32[..., E], from the sums of `routing_stats`; None:
    # `model/figures.py` makes it, where the devices are known.
    of: Callable[[dict], jax.Array] | None
    chart: str | None = None  # page of charts that it is on; None: on none
    # `max` or `min`, where the worst layer is; None: none is worse.
    worst: Callable | None = None
    # The figure is 0 in most runs, and a report leaves it out where it is 0.
    rare: bool = False

    @property
    def short_name(self) -> str:
        """The name in routing.jsonl, without the letter of a shape."""
        return re.sub(r"_[A-Z]$", "", self.name)

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number per layer."""
        return self.short_name == self.name


def _frac_E(stats):
    return stats["load_E"] / jnp.maximum(stats["num_slots"], 1.0)[..., None]


def _max_violation(stats):
    violation = jnp.max(_frac_E(stats), axis=-1) * stats["load_E"].shape[-1] - 1.0
    return jnp.where(stats["num_slots"] > 0, violation, 0.0)


def _dead_frac(stats):
    return jnp.mean((stats["load_E"] == 0).astype(jnp.float32), axis=-1)


def _slots_hist_S(stats):
    return stats["slots_S"] / jnp.maximum(stats["num_tokens"], 1.0)[..., None]


def _effective_frac(stats):
    frac_E = _frac_E(stats)
    entropy = -jnp.sum(frac_E * jnp.log(jnp.maximum(frac_E, 1e-30)), axis=-1)
    return jnp.exp(entropy) / frac_E.shape[-1]


def _slots_deviation(stats):
    """The deviation over tokens of their computed slots, before capacity."""
    count = stats["num_tokens"]
    mean_real = mean(stats["num_slots"] - stats["num_zero"], count)
    square = mean(stats["real_sq_sum"], count)
    return jnp.sqrt(jnp.maximum(square - mean_real**2, 0.0))


def _dropped_frac(stats):
    dropped = stats["num_slots"] - stats["num_kept"] - stats["num_zero"]
    return dropped / jnp.maximum(stats["num_slots"], 1.0)


def _token_mean(name):
    return lambda stats: mean(stats[name], stats["num_tokens"])


def _slot_share(name):
    return lambda stats: stats[name] / jnp.maximum(stats["num_slots"], 1.0)


def _length(name):
    return lambda stats: jnp.sqrt(mean(stats[name], stats["num_tokens"]))


def _loss(loss):
    return lambda stats: jnp.where(stats["num_tokens"] > 0, loss.value(stats), jnp.nan)


BALANCE, ROUTERS, EXPERTS = "balance", "routers", "experts per token"
FAULTS = "faults"  # these figures are 0 in most healthy runs
UNSCALED = "before its coefficient"  # the unit of losses
# Charts and reports show the figures in this order. Means over tokens are NaN where
# there is no token; shares of slots are 0 where there is no slot.
# fmt: off
FIGURES: tuple[Figure, ...] = (
    Figure("load_frac_E", "Load of the experts", "share of slots", _frac_E),
    Figure("max_violation", "Max violation", "max load / mean load − 1",
           _max_violation, BALANCE, max),
    Figure("effective_frac", "Effective experts", "exp(entropy of load) / experts",
           _effective_frac, BALANCE, min),
    Figure("dead_frac", "Experts without a token", "share of experts",
           _dead_frac, FAULTS, max, True),
    Figure("entropy", "Router entropy", "nats per token",
           _loss(Entropy()), ROUTERS, min),
    Figure("confidence", "Router confidence", "largest probability, mean over tokens",
           _token_mean("top_gate_sum"), ROUTERS, max),
    Figure("experts_per_token", "Experts per token", "mean number, computed ones",
           _token_mean("num_kept"), EXPERTS, max),
    Figure("experts_per_token_std", "Experts per token, deviation", "over tokens",
           _slots_deviation, EXPERTS, None, True),
    Figure("dropped_frac", "Dropped slots, lost ones too", "share of slots",
           _dropped_frac, FAULTS, max, True),
    Figure("lost_frac", "Slots lost on the way to their experts", "share of slots",
           _slot_share("num_lost"), FAULTS, max, True),
    Figure("unrouted_frac", "Tokens without a computing expert", "share of tokens",
           _token_mean("num_unrouted"), FAULTS, max, True),
    Figure("zero_frac", "Zero-computation slots", "share of slots",
           _slot_share("num_zero"), EXPERTS, None, True),
    Figure("logit_norm", "Router logits", "L2 norm, RMS over tokens",
           _length("logit_sq_sum"), ROUTERS, max),
    Figure("output_norm", "Output of the routed experts", "L2 norm, RMS over tokens",
           _length("output_sq_sum"), ROUTERS, max),
    Figure("device_violation", "Balance of devices", "max load / mean load − 1",
           None, BALANCE, max),
    *(Figure(loss.name, loss.title, UNSCALED, _loss(loss), ROUTERS)
      for loss in LOSSES if loss.title),
    Figure("slots_hist_S", "Computing experts of a token, before capacity",
           f"share of tokens with 0, 1, 2, ...; from {MOST_SLOTS} on in one",
           _slots_hist_S),
)
# fmt: on


def own_figures(names) -> tuple[Figure, ...]:
    """The figures of the losses that routers define themselves, by name of the loss."""
    return tuple(
        Figure(
            f"{name}_loss",
            f"Router's own loss {name}",
            UNSCALED,
            _token_mean(f"{OWN}{name}"),
            ROUTERS,
        )
        for name in sorted(names)
    )


def layer_metrics(stats: dict) -> dict:
    """The figures of one layer (or of stacked layers) from its sums, by name.

    They are those of `FIGURES`, and the losses that the router itself defines.
    """
    own = own_figures(n.removeprefix(OWN) for n in stats if n.startswith(OWN))
    return {figure.name: figure.of(stats) for figure in (*FIGURES, *own) if figure.of}


def documentation() -> str:
    """Write `FIGURES` as a table for docs/monitoring.md."""
    lines = [
        "| figure, in `moe/` | what it is | unit | worst layer |",
        "|---|---|---|---|",
    ]
    for figure in FIGURES:
        worst = {max: "largest", min: "smallest", None: ""}[figure.worst]
        name = f"`{figure.short_name}`"
        lines.append(f"| {name} | {figure.title} | {figure.unit} | {worst} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(documentation())
