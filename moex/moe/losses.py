"""Auxiliary losses of routing: pure functions, float32, never scaled here.

`LOSSES` is the one list of the losses of all MoE layers: training, logs, charts and
reports are made from it. A new one is a class here with a row in the list, and a field
of its name in `runs.keys.Loss`, its coefficient. All losses are 0 where there is no
token: nothing can be learned there.

B batch · L length · T = B * L tokens · E experts (zero-computation ones included) · ...
any leading dims (layers, chain steps, sequences)
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moex.config.schedule import value_at

# Prefixes for the sums of a router's own losses among the stats of its layer.
OWN, WEIGHTED = "own_loss:", "own_loss_weighted:"


class Share(NamedTuple):
    """The place of a microbatch in its optimizer step."""

    coefs: Any  # `runs.keys.Loss`
    counts: dict  # `step_counts` of the whole step
    num_microbatches: int = 1  # of the step
    # float32[..., E], the load of the earlier ones in this layer; None: there are none.
    load_before_E: jax.Array | None = None


class RoutingLoss(abc.ABC):
    """A loss of the routing of every MoE layer."""

    name: ClassVar[str]  # of its coefficient in `config.loss`, and of its figure
    title: ClassVar[str]  # for people; "" where `metrics.FIGURES` has a row for it
    is_trained: ClassVar[bool] = True  # False: it is a figure without a coefficient

    def sums(self, routing, load_BE, valid_BL) -> dict:
        """The sums that the loss needs besides those of `metrics.routing_stats`.

        Args:
          routing: as the router returned it, without padding, before capacity.
          load_BE: float32[B, E] slots per sequence and expert.
          valid_BL: bool, False at padding.
        """
        return {}

    @abc.abstractmethod
    def value(self, stats: dict) -> jax.Array:
        """The loss of a layer, or of stacked layers, from its sums; float32[...]."""

    def part(self, stats: dict, share: Share) -> jax.Array:
        """The part that a microbatch adds to the loss of its step; float32[...].

        Microbatches have the same weight, unless the loss is a mean over tokens.
        """
        return self.value(stats) / share.num_microbatches


class TokenMean(RoutingLoss):
    """A loss that is the mean of a number per token."""

    @abc.abstractmethod
    def per_token(self, routing) -> jax.Array:
        """The loss of each token, float32[T]; that of padding does not count."""

    def sums(self, routing, load_BE, valid_BL):
        loss_T = jnp.where(valid_BL.reshape(-1), self.per_token(routing), 0.0)
        return {f"{self.name}_sum": jnp.sum(loss_T)}

    def value(self, stats):
        return mean_loss(stats[f"{self.name}_sum"], stats["num_tokens"])

    def part(self, stats, share):
        """Divide by the tokens of the step, so that unequal microbatches add up."""
        return stats[f"{self.name}_sum"] / share.counts["tokens"]


class LoadBalance(RoutingLoss):
    """The load-balance loss, for the tokens of `config.loss.balance_scope`."""

    name, title = "load_balance", "Load-balance loss"

    def value(self, stats):
        names = ("load_E", "prob_sum_E", "num_tokens")
        return load_balance_loss(*(stats[name] for name in names))

    def part(self, stats, share):
        coefs, before_E = share.coefs, share.load_before_E
        if coefs.balance_scope == "sequence":
            loss = stats["sequence_balance_sum"] / share.counts["sequences"]
        else:
            if coefs.balance_scope == "step" and before_E is not None:
                stats = stats | {"load_E": stats["load_E"] + before_E}
            loss = self.value(stats) / share.num_microbatches
        if coefs.balance_scale == "count":
            loss *= stats["num_slots"] / jnp.maximum(stats["num_tokens"], 1.0)
        return loss


class SequenceBalance(RoutingLoss):
    """The load-balance loss of each sequence by itself, whatever is trained."""

    name, title = "sequence_balance", "Load-balance loss by sequence"
    is_trained = False  # the coefficient is that of `LoadBalance`

    def sums(self, routing, load_BE, valid_BL):
        valid_BL1 = valid_BL[..., None].astype(jnp.float32)
        prob_BLE = routing.probs_TE.reshape(*valid_BL.shape, -1) * valid_BL1
        tokens_B = jnp.sum(valid_BL, axis=1, dtype=jnp.float32)
        total, count = sequence_balance_sums(load_BE, prob_BLE.sum(axis=1), tokens_B)
        return {"sequence_balance_sum": total, "num_sequences": count}

    def value(self, stats):
        return mean_loss(stats["sequence_balance_sum"], stats["num_sequences"])


class RouterZ(TokenMean):
    """The router z-loss: logsumexp(logits)^2.

    Source: Zoph et al. 2022, arXiv:2202.08906, equation 5.
    """

    name, title = "router_z", "Router z-loss"

    def per_token(self, routing):
        return jax.nn.logsumexp(routing.logits_TE, axis=-1) ** 2


class Entropy(TokenMean):
    """The entropy of the routing distribution, in nats.

    It is L_d of Huang et al. 2024, arXiv:2403.07652, which keeps a top-p router from
    getting more experts by being unsure.
    """

    name, title = "entropy", ""

    def per_token(self, routing):
        log_TE = jnp.log(jnp.maximum(routing.probs_TE, 1e-30))
        return -jnp.sum(routing.probs_TE * log_TE, axis=-1)


class Importance(RoutingLoss):
    """Squared coefficient of variation of the summed probabilities of the experts.

    Source: Shazeer et al. 2017, arXiv:1701.06538, equations 6 and 7, with the variance
    over E and the whole distribution in place of its top-k part (as in V-MoE).
    """

    name, title = "importance", "Importance loss"

    def value(self, stats):
        prob_sum_E = stats["prob_sum_E"]
        mean = jnp.mean(prob_sum_E, axis=-1)
        variance = jnp.mean((prob_sum_E - mean[..., None]) ** 2, axis=-1)
        return variance / jnp.maximum(mean**2, 1e-10)


LOSSES: tuple[RoutingLoss, ...] = (
    LoadBalance(),
    SequenceBalance(),
    RouterZ(),
    Entropy(),
    Importance(),
)
# Names that a router's own losses cannot have; "z" is a loss of language modelling.
TAKEN = ("z", *(loss.name for loss in LOSSES))


def layer_losses(stats) -> dict:
    """Every loss of one layer, or of stacked layers, from its sums; float32[...] each.

    Args:
      stats: sums of `metrics.routing_stats`, over any number of microbatches.
    """
    return {loss.name: loss.value(stats) for loss in LOSSES} | {
        f"{name.removeprefix(OWN)}_loss": mean_loss(total, stats["num_tokens"])
        for name, total in stats.items()
        if name.startswith(OWN)
    }


def load_balance_loss(load_E, prob_sum_E, num_tokens):
    """The loss E * sum_e f_e P_e; it is 1 at uniform routing for any k.

    Args:
      load_E: float32[..., E] kept slots per expert; carries no gradient.
      prob_sum_E: float32[..., E] router probabilities summed over tokens.
      num_tokens: float32[...] tokens that were routed.

    Returns:
      float32[...]; 0 when no token was routed.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with f as share of
    kept slots (theirs has k = 1, where the two agree).
    """
    num_experts = load_E.shape[-1]
    frac_E = load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1.0)
    prob_E = prob_sum_E / jnp.maximum(num_tokens, 1.0)[..., None]
    return num_experts * jnp.sum(frac_E * prob_E, axis=-1)


def own_sums(loss_T, weights, valid_T, step) -> dict:
    """Sums over the valid tokens of a router's own losses, plain and weighted.

    Args:
      loss_T: `Routing.losses`.
      weights: ((name, coefficient), ...) of all of them.
      valid_T: bool, False at padding.
      step: optimizer step; None outside of training, where no sums are weighted.
    """
    sums = {}
    for name, weight in weights:
        total = jnp.sum(jnp.where(valid_T, loss_T[name], 0.0))
        sums[f"{OWN}{name}"] = total
        if step is not None:
            sums[f"{WEIGHTED}{name}"] = value_at(weight, step) * total
    return sums


def own_losses(layers, num_tokens, over_layers) -> dict:
    """The part that a microbatch adds to the weighted own losses of the routers.

    Args:
      layers: `{path: sums of a layer}`.
      num_tokens: tokens of the whole optimizer step.
      over_layers: `Loss.over_layers`, "sum" or "mean".

    Returns:
      float32 scalars by name, over all layers and chain rounds.
    """
    total: dict = {}
    count = 0
    for stats in layers.values():
        count += stats["num_tokens"].size
        for key, value in stats.items():
            if key.startswith(WEIGHTED):
                name = key.removeprefix(WEIGHTED)
                total[name] = total.get(name, 0.0) + jnp.sum(value)
    divisor = num_tokens * (count if over_layers == "mean" else 1)
    return {name: value / divisor for name, value in total.items()}


def sequence_balance_sums(load_BE, prob_sum_BE, num_tokens_B):
    """The sum of the load-balance losses of sequences with any token, and their number.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20; a sequence here is a row
    of the batch, which may hold several packed documents.
    """
    loss_B = load_balance_loss(load_BE, prob_sum_BE, num_tokens_B)
    any_B = (num_tokens_B > 0).astype(jnp.float32)
    return jnp.sum(loss_B * any_B), jnp.sum(any_B)


def mean_loss(total, count):
    """The mean over tokens or sequences; 0 if there are none."""
    return total / jnp.maximum(count, 1.0)


def update_bias(bias_E, load_E, rate):
    """Raise the bias of underloaded experts by `rate`: balancing without a loss.

    b_e += rate * sign(mean(load) - load_e), once per optimizer step with the load of
    all its microbatches.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    mean = jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)
