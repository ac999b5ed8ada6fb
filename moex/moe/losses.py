"""Auxiliary losses of routing: pure functions, float32, never scaled here.

Coefficients are applied in `tasks/base.py`. Arguments are sums over all tokens of a
microbatch (over all devices, since the arrays are global), so the same functions serve
any scope. All losses are 0 where there is no token: nothing can be learned there.

E experts · ... any leading dims (layers, chain steps, sequences)
"""

import jax.numpy as jnp

from moex.config.schedule import value_at

# Prefixes for the sums of a router's own losses among the stats of its layer.
OWN, WEIGHTED = "own_loss:", "own_loss_weighted:"
# Names that a router's own losses cannot have: every layer has losses of these names.
TAKEN = (
    *("z", "load_balance", "sequence_balance", "router_z", "entropy", "importance"),
)


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


def layer_losses(stats) -> dict:
    """Every loss of one layer, or of stacked layers, from its sums; float32[...] each.

    Args:
      stats: sums of `metrics.routing_stats`, over any number of microbatches.
    """
    tokens, prob_sum_E = stats["num_tokens"], stats["prob_sum_E"]
    return {
        "load_balance": load_balance_loss(stats["load_E"], prob_sum_E, tokens),
        "sequence_balance": mean_loss(
            stats["sequence_balance_sum"], stats["num_sequences"]
        ),
        "router_z": mean_loss(stats["z_sum"], tokens),
        "entropy": mean_loss(stats["entropy_sum"], tokens),
        "importance": importance_loss(prob_sum_E),
        **{
            f"{name.removeprefix(OWN)}_loss": mean_loss(total, tokens)
            for name, total in stats.items()
            if name.startswith(OWN)
        },
    }


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
      layers: `{path: aux of a layer}`.
      num_tokens: tokens of the whole optimizer step.
      over_layers: `Loss.over_layers`, "sum" or "mean".

    Returns:
      float32 scalars by name, over all layers and chain rounds.
    """
    total: dict = {}
    count = 0
    for layer in layers.values():
        count += layer["losses"]["load_balance"].size
        for key, value in layer["stats"].items():
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
    """The mean over tokens or sequences; 0 if there are none.

    The mean of logsumexp(logits)^2 is the router z-loss (Zoph et al. 2022,
    arXiv:2202.08906, equation 5). The mean entropy of the routing distribution, in
    nats, is L_d of Huang et al. 2024, arXiv:2403.07652, which keeps a top-p router from
    getting more experts by being unsure.
    """
    return total / jnp.maximum(count, 1.0)


def importance_loss(prob_sum_E):
    """Squared coefficient of variation of the summed probabilities of the experts.

    Source: Shazeer et al. 2017, arXiv:1701.06538, equations 6 and 7, with the variance
    over E and the whole distribution in place of its top-k part (as in V-MoE).
    """
    mean = jnp.mean(prob_sum_E, axis=-1)
    variance = jnp.mean((prob_sum_E - mean[..., None]) ** 2, axis=-1)
    return variance / jnp.maximum(mean**2, 1e-10)


def update_bias(bias_E, load_E, rate):
    """Raise the bias of underloaded experts by `rate`: balancing without a loss.

    b_e += rate * sign(mean(load) - load_e), once per optimizer step with the load of
    all its microbatches.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    mean = jnp.mean(load_E, axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)
