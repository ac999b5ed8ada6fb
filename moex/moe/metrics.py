"""What a layer tells about its routing: sums made on the device, figures from sums.

Sums can be added over microbatches and devices; figures cannot. `routing_stats` makes
the sums inside the layer, `layer_metrics` turns them into what is logged.

T tokens · E experts · ... any leading dims (layers, chain steps)
"""

import jax
import jax.numpy as jnp


def routing_stats(routing, valid_T, load_E, num_kept) -> dict:
    """Float32 sums over the valid tokens of one layer call.

    Args:
      routing: as the router returned it, before capacity.
      valid_T: bool[T], False at padding.
      load_E: float32[E], slots per expert before capacity.
      num_kept: float32 scalar, slots left after capacity.
    """
    valid_T1 = valid_T[:, None].astype(jnp.float32)
    probs_TE = jnp.where(valid_T[:, None], routing.probs_TE, 1.0)
    entropy_TE = -probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30))
    lse_T = jax.nn.logsumexp(routing.logits_TE, axis=-1)
    return {
        "load_E": load_E,
        "prob_sum_E": jnp.sum(routing.probs_TE * valid_T1, axis=0),
        "num_tokens": jnp.sum(valid_T1),
        "num_slots": jnp.sum(load_E),
        "num_kept": num_kept,
        "entropy_sum": jnp.sum(entropy_TE * valid_T1),
        "z_sum": jnp.sum(lse_T**2 * valid_T1[:, 0]),
        "top_gate_sum": jnp.sum(jnp.max(routing.probs_TE, axis=-1) * valid_T1[:, 0]),
    }


def layer_metrics(stats: dict) -> dict:
    """Figures of one layer (or of stacked layers) from its sums.

    Returns a dict of float32:
      load_frac_E [..., E]: share of the slots that each expert received.
      max_violation [...]: max load / mean load - 1; 0 is perfect balance.
      dead_frac [...]: share of experts that received nothing.
      effective_frac [...]: exp(entropy of the load) / E; 1 is perfect balance.
      entropy [...]: mean over tokens of the entropy of router_probs, nats.
      confidence [...]: mean over tokens of the largest router probability.
      experts_per_token [...]: kept slots per token.
      dropped_frac [...]: share of slots dropped by capacity.
    """
    load_E = stats["load_E"]
    num_experts = load_E.shape[-1]
    tokens = jnp.maximum(stats["num_tokens"], 1.0)
    slots = jnp.maximum(stats["num_slots"], 1.0)
    frac_E = load_E / slots[..., None]
    load_entropy = -jnp.sum(frac_E * jnp.log(jnp.maximum(frac_E, 1e-30)), axis=-1)
    return {
        "load_frac_E": frac_E,
        "max_violation": jnp.max(frac_E, axis=-1) * num_experts - 1.0,
        "dead_frac": jnp.mean((load_E == 0).astype(jnp.float32), axis=-1),
        "effective_frac": jnp.exp(load_entropy) / num_experts,
        "entropy": stats["entropy_sum"] / tokens,
        "confidence": stats["top_gate_sum"] / tokens,
        "experts_per_token": stats["num_kept"] / tokens,
        "dropped_frac": 1.0 - stats["num_kept"] / slots,
    }
