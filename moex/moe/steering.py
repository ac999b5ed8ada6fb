"""Steering: which experts a trained router is made to use, and how much.

`Context.steer` holds arrays, so that other values need no other program:

  scale_E: float32, factors of the gates, after all normalisation (RICE).
  force_E: bool, experts that every token gets.
  ban_E: bool, experts that no token gets.

The last two are there together or not at all: without them a factor of 1 leaves every
bit as it is, whatever a compiler makes of where others could be chosen.

A forced expert gets the highest log-score of the token, and a little more (SteerMoE),
that of banned ones aside; a banned one has none, neither where experts are chosen nor
where scores are normalised, as if it were not there. SteerMoE gives it the lowest one
instead: that is the same choice wherever k experts are left.

Sources: RICE, arXiv:2505.14681; SteerMoE, arXiv:2509.09660.

T tokens · E experts · K slots per token
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import ConfigError
from moex.moe.routing import Scores

EPSILON = 0.01  # nats that a forced expert is above the best


def scaled(routing, steer):
    """The decision of a router with the gates times the factors of their experts.

    Raises:
      ConfigError: if a module around the layer did not give it its own part.
    """
    if steer is None:
        return routing
    if "scale_E" not in steer:
        raise ConfigError(
            "Context.steer has no arrays for an MoE layer: the feed-forward around it "
            "must run it with ctx.inside(NAME)."
        )
    scale_E = steer["scale_E"]
    if routing.experts_choose:
        gates = {"gate_EC": routing.gate_EC * scale_E[:, None]}
    else:
        gates = {"gate_TK": routing.gate_TK * scale_E[routing.expert_TK]}
    return dataclasses.replace(routing, **gates)


def chooses(steer) -> bool:
    """Whether experts may be forced or banned, and not only scaled."""
    return steer is not None and "ban_E" in steer


def steered_scores(scores: Scores, score: str, steer) -> Scores:
    """The scores of experts where some are forced or banned."""
    if not chooses(steer):
        return scores
    log_TE = jnp.where(steer["ban_E"][None], -jnp.inf, scores.log_TE)
    top_T1 = jnp.max(log_TE, axis=-1, keepdims=True)
    log_TE = jnp.where(steer["force_E"][None], top_T1 + EPSILON, log_TE)
    return Scores.of(log_TE, score)


def allowed(choice_TE, steer):
    """The values that select experts, without those of banned ones."""
    if not chooses(steer):
        return choice_TE
    return jnp.where(steer["ban_E"][None], -jnp.inf, choice_TE)


def forced_first(choice_TE, steer):
    """The values that select experts; those of forced ones are the highest."""
    if not chooses(steer):
        return choice_TE
    top_T1 = jnp.max(choice_TE, axis=-1, keepdims=True)
    return jnp.where(steer["force_E"][None], top_T1 + 1, choice_TE)


def kept(keep_TK, expert_TK, steer):
    """The slots to keep: those of forced experts, and none of banned ones."""
    if not chooses(steer):
        return keep_TK
    keep_TK = keep_TK | steer["force_E"][expert_TK]
    return keep_TK & ~steer["ban_E"][expert_TK]
