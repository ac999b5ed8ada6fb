"""Experts that share weights: a layer of E choices that stores G sets of weights.

The router has E choices, and losses, figures, capacity and traces are about them. A
state variable `stored_E` names the set of weights of each, so that nothing is copied.

T tokens · K slots per token · E experts, without zero-computation ones · G stored ones
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moex.moe.routing import Routing
from moex.nn.param import RouterState


def stored_state(num_experts: int, num_stored: int) -> RouterState:
    """Make the variable of a fresh layer: neighbours share, as evenly as can be.

    No rule moves it: a conversion sets it, and checkpoints keep it.
    """
    first_E = np.arange(num_experts, dtype=np.int64) * num_stored // num_experts
    return RouterState(jnp.asarray(first_E, jnp.int32), axes=(None,), rule=None)


def to_stored(routing: Routing, stored_E, num_stored: int) -> Routing:
    """The routing with the ids of stored experts, for the same gated sums.

    Slots of a token that meet in one set become one slot with the sum of their gates:
    g f(x) + h f(x) = (g + h) f(x). So the kept slots of a token still name different
    experts, and each set computes a token once. Slots of zero-computation experts are
    not kept.

    Args:
      routing: of the E experts, after capacity.
      stored_E: int32[E] in [0, G).
      num_stored: G.
    """
    expert_TK, E = routing.expert_TK, len(stored_E)
    keep_TK = routing.keep_TK & (expert_TK < E)
    gate_TK = jnp.where(keep_TK, routing.gate_TK, 0.0)
    stored_TK = stored_E.at[expert_TK].get(mode="clip")
    T, K = stored_TK.shape
    if num_stored < K:  # a slot for each set
        at = (jnp.arange(T)[:, None], stored_TK)
        stored_TK = jnp.broadcast_to(
            jnp.arange(num_stored, dtype=jnp.int32)[None], (T, num_stored)
        )
        gate_TK = jnp.zeros(stored_TK.shape).at[at].add(gate_TK)
        keep_TK = jnp.zeros(stored_TK.shape, bool).at[at].max(keep_TK)
    else:
        same_TKK = stored_TK[:, :, None] == stored_TK[:, None, :]
        same_TKK &= keep_TK[:, None, :]
        before_KK = jnp.tril(jnp.ones((K, K), bool), -1)[None]
        keep_TK &= ~jnp.any(same_TKK & before_KK, axis=2)
        gate_TK = jnp.sum(jnp.where(same_TKK, gate_TK[:, None, :], 0.0), axis=2)
        gate_TK = jnp.where(keep_TK, gate_TK, 0.0)
    return dataclasses.replace(
        routing, expert_TK=stored_TK, gate_TK=gate_TK, keep_TK=keep_TK
    )
