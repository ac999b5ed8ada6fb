"""What a layer tells about its routing: sums made on the device, figures from sums.

Sums can be added over microbatches and devices; figures cannot. `routing_stats` makes
the sums inside the layer, `layer_metrics` turns them into what is logged.

B batch · L length · T = B * L tokens · D model width · E experts (zero-computation ones
included) · K slots per token · C slots per expert · S bins of a histogram · ... leading
dims (layers, chain steps)
"""

import jax
import jax.numpy as jnp

from moex.moe.losses import layer_losses, sequence_balance_sums
from moex.moe.routing import ExpertRouting

MOST_SLOTS = 32  # the last bin of a histogram of slots: so many or more


def loads(routing, shape_BL, num_experts) -> tuple[jax.Array, jax.Array]:
    """`(load_BE, real_T)`: slots per sequence and expert, and per token.

    Args:
      routing: after padding was taken out, before capacity.
      shape_BL: batch and length of the tokens.
      num_experts: experts that compute; only their slots count in `real_T`.
    """
    B, L = shape_BL
    E = routing.probs_TE.shape[-1]
    if isinstance(routing, ExpertRouting):
        keep_EC = routing.keep_EC.astype(jnp.float32)
        expert_E1 = jnp.arange(E)[:, None]
        row_EC = routing.token_EC // L
        load_BE = jnp.zeros((B, E)).at[row_EC, expert_E1].add(keep_EC)
        real_EC = jnp.where(expert_E1 < num_experts, keep_EC, 0.0)
        return load_BE, jnp.zeros(B * L).at[routing.token_EC].add(real_EC)
    # Compare and sum: fuses, needs no scatter, and stays where its sequences are.
    expert_BSE = routing.expert_TK.reshape(B, -1, 1) == jnp.arange(E)[None, None]
    kept_BSE = expert_BSE & routing.keep_TK.reshape(B, -1, 1)
    load_BE = jnp.sum(kept_BSE, axis=1, dtype=jnp.float32)
    real_TK = routing.keep_TK & (routing.expert_TK < num_experts)
    return load_BE, jnp.sum(real_TK, axis=-1, dtype=jnp.float32)


def routing_stats(
    routing, valid_BL, load_BE, real_T, num_kept, num_lost, num_experts, y_TD
) -> dict:
    """Float32 sums over the valid tokens of one layer call.

    Those that losses are made of are differentiable; the others keep nothing for the
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
    watched = jax.lax.stop_gradient((routing.logits_TE, routing.probs_TE, y_TD))
    logits_TE, still_TE, y_TD = watched
    valid_T, load_E = valid_BL.reshape(-1), jnp.sum(load_BE, axis=0)
    valid_T1 = valid_T[:, None].astype(jnp.float32)
    prob_TE = routing.probs_TE * valid_T1
    tokens_B = jnp.sum(valid_BL, axis=1, dtype=jnp.float32)
    prob_sum_BE = jnp.sum(prob_TE.reshape(*valid_BL.shape, -1), axis=1)
    balance_sum, num_sequences = sequence_balance_sums(load_BE, prob_sum_BE, tokens_B)
    probs_TE = jnp.where(valid_T[:, None], routing.probs_TE, 1.0)
    entropy_TE = -probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30))
    lse_T = jax.nn.logsumexp(routing.logits_TE, axis=-1)
    return {
        "load_E": load_E,
        "prob_sum_E": jnp.sum(prob_TE, axis=0),
        "num_tokens": jnp.sum(valid_T1),
        "sequence_balance_sum": balance_sum,
        "num_sequences": num_sequences,
        "num_slots": jnp.sum(load_E),
        "num_zero": jnp.sum(load_E[num_experts:]),
        "num_kept": num_kept,
        "num_lost": num_lost,
        "real_sq_sum": jnp.sum(real_T**2),
        "num_unrouted": jnp.sum(jnp.where(real_T == 0, valid_T1[:, 0], 0.0)),
        "entropy_sum": jnp.sum(entropy_TE * valid_T1),
        "z_sum": jnp.sum(lse_T**2 * valid_T1[:, 0]),
        "top_gate_sum": jnp.sum(jnp.max(still_TE, axis=-1) * valid_T1[:, 0]),
        "logit_sq_sum": _square_sum(logits_TE, valid_T),
        "output_sq_sum": _square_sum(y_TD, valid_T),
        "slots_S": _slots_histogram(real_T, valid_T, _most_slots(routing, num_experts)),
    } | routing.sums


def _square_sum(x_TX, valid_T):
    """Sum of the squares of all numbers of the valid tokens."""
    square_T = jnp.sum(jnp.square(x_TX.astype(jnp.float32)), axis=-1)
    return jnp.sum(jnp.where(valid_T, square_T, 0))  # no mask of the size of x


def _most_slots(routing, num_experts) -> int:
    """The most computing experts that a token may have."""
    if isinstance(routing, ExpertRouting):
        return num_experts
    return min(routing.expert_TK.shape[1], num_experts)


def _slots_histogram(real_T, valid_T, most):
    """float32[S]: tokens with 0, 1, ... slots; the last bin of `MOST_SLOTS` is open."""
    bins_S = jnp.arange(min(most, MOST_SLOTS) + 1, dtype=jnp.float32)
    slots_T1 = jnp.minimum(real_T, MOST_SLOTS)[:, None]
    return jnp.sum((slots_T1 == bins_S[None]) & valid_T[:, None], 0, dtype=jnp.float32)


def mean(total, count):
    """A mean for people: NaN, which is no figure, over nothing."""
    return total / jnp.where(count > 0, count, jnp.nan)


def layer_metrics(stats: dict) -> dict:
    """Figures of one layer (or of stacked layers) from its sums.

    Means over tokens are NaN where there is none; shares of no slots are 0.

    Returns a dict of float32, with the losses of `losses.layer_losses` and
      load_frac_E [..., E]: share of the slots that each expert received.
      max_violation [...]: max load / mean load - 1; 0 is perfect balance.
      dead_frac [...]: share of experts that received nothing.
      effective_frac [...]: exp(entropy of the load) / E; 1 is perfect balance.
      confidence [...]: mean over tokens of the largest router probability.
      experts_per_token [...]: computed slots per token.
      experts_per_token_std [...]: their deviation over tokens, before capacity.
      unrouted_frac [...]: share of tokens that no computing expert was chosen for.
      zero_frac [...]: share of slots at zero-computation experts.
      dropped_frac [...]: share of slots dropped by capacity or lost on the way.
      lost_frac [...]: share of slots that found no room on the way to their experts.
      logit_norm [...]: root mean square over tokens of the length of their logits.
      output_norm [...]: the same of what the routed experts give a token.
      slots_hist_S [..., S]: share of the tokens with 0, 1, 2, ... computing experts,
        before capacity; with more than `MOST_SLOTS` the last bin is open.
    """
    load_E = stats["load_E"]
    num_experts = load_E.shape[-1]
    count = stats["num_tokens"]
    slots = jnp.maximum(stats["num_slots"], 1.0)
    frac_E = load_E / slots[..., None]
    load_entropy = -jnp.sum(frac_E * jnp.log(jnp.maximum(frac_E, 1e-30)), axis=-1)
    violation = jnp.max(frac_E, axis=-1) * num_experts - 1.0
    num_dropped = stats["num_slots"] - stats["num_kept"] - stats["num_zero"]
    mean_real = mean(stats["num_slots"] - stats["num_zero"], count)
    variance = jnp.maximum(mean(stats["real_sq_sum"], count) - mean_real**2, 0.0)
    losses = layer_losses(stats)
    return {name: jnp.where(count > 0, v, jnp.nan) for name, v in losses.items()} | {
        "load_frac_E": frac_E,
        "max_violation": jnp.where(stats["num_slots"] > 0, violation, 0.0),
        "dead_frac": jnp.mean((load_E == 0).astype(jnp.float32), axis=-1),
        "effective_frac": jnp.exp(load_entropy) / num_experts,
        "confidence": mean(stats["top_gate_sum"], count),
        "experts_per_token": mean(stats["num_kept"], count),
        "experts_per_token_std": jnp.sqrt(variance),
        "unrouted_frac": mean(stats["num_unrouted"], count),
        "zero_frac": stats["num_zero"] / slots,
        "lost_frac": stats["num_lost"] / slots,
        "dropped_frac": num_dropped / slots,
        "logit_norm": jnp.sqrt(mean(stats["logit_sq_sum"], count)),
        "output_norm": jnp.sqrt(mean(stats["output_sq_sum"], count)),
        "slots_hist_S": stats["slots_S"] / jnp.maximum(count, 1.0)[..., None],
    }
