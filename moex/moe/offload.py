"""An MoE layer of whose experts only some are on the device: the part that is traced.

The experts of the module are a pool of slots then, in the place of its own ones, and
`Context.offload` says what is in them. It holds arrays, so that residency, which
changes with every token, needs no other program; R is the rounds of a chain, else 1:

  slot_E: int32, the slot of each stored expert of the layer; -1: it is absent.
  done_RE: bool, the experts whose part of a round is in the sum already.
  sum_RTD: float32, these parts.

A layer computes what is resident and not done, adds it to the sum, and tells in
aux["offload"] what was done by then, and what is needed and absent. The caller loads
that and runs the layer again, until nothing is missing: only then its output is used.
A round of a chain after one that misses something has no meaning, and does nothing.

T tokens · D model width · E stored experts · K slots per token · R rounds · C slots
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from moex.moe.parallel import run_experts


def first_pass(slot_E, rounds: int, num_tokens: int, width: int) -> dict:
    """Make `Context.offload` for a layer of which nothing is done yet."""
    return {
        "slot_E": slot_E,
        "done_RE": jnp.zeros((rounds, len(slot_E)), bool),
        "sum_RTD": jnp.zeros((rounds, num_tokens, width)),
    }


def in_round(ctx, number: int, before: list[dict]):
    """The context of a round, with its own part of `Context.offload`.

    Args:
      ctx: `Context`.
      number: of the round, from 0.
      before: aux of the rounds before it.
    """
    if ctx.offload is None:
        return ctx
    ready = jnp.array(True)
    for aux in before:
        ready &= ~jnp.any(aux["offload"]["missing_E"])
    own = {
        "slot_E": ctx.offload["slot_E"],
        "done_E": ctx.offload["done_RE"][number],
        "sum_TD": ctx.offload["sum_RTD"][number],
        "ready": ready,
    }
    return dataclasses.replace(ctx, offload=own)


def run_resident(experts, x_TD, routing, num_experts, ctx, *, rows):
    """The same as `run_experts`, by the experts that are resident and not done.

    Returns:
      (gated sums in x's dtype, of all that is done; rows that found no room; the part
      of aux).
    """
    own = ctx.offload
    expert_TK = routing.expert_TK
    wanted_TK = routing.keep_TK & (expert_TK < num_experts) & own["ready"]
    slot_TK = own["slot_E"].at[expert_TK].get(mode="clip")
    done_TK = own["done_E"].at[expert_TK].get(mode="clip")
    here = dataclasses.replace(routing, expert_TK=slot_TK)
    here = here.keep_only(wanted_TK & (slot_TK >= 0) & ~done_TK)
    y_TD, lost = run_experts(experts, x_TD, here, num_slots(experts), ctx, rows=rows)
    wanted_TKE = expert_TK[:, :, None] == jnp.arange(num_experts)[None, None]
    wanted_TKE &= wanted_TK[:, :, None]
    rows_E = jnp.sum(wanted_TKE, axis=(0, 1), dtype=jnp.int32)
    needed_E = rows_E > 0
    resident_E = own["slot_E"] >= 0
    sum_TD = own["sum_TD"] + y_TD.astype(jnp.float32)
    told = {
        "rows_E": rows_E,
        "missing_E": needed_E & ~own["done_E"] & ~resident_E,
        "done_E": own["done_E"] | (needed_E & resident_E),
        "sum_TD": sum_TD,
        "x_TD": x_TD,
        "expert_TK": expert_TK,
        "gate_TK": jnp.where(wanted_TK, routing.gate_TK, 0.0),
        "keep_TK": wanted_TK,
    }
    return sum_TD.astype(y_TD.dtype), lost, told


def num_slots(experts) -> int:
    """The number of slots C of a pool in the place of a module's experts."""
    for _, variable in nnx.to_flat_state(nnx.state(experts, graph=False)):
        axes = variable.get_metadata()["axes"]
        if "expert" in axes:
            return variable.shape[axes.index("expert")]
    raise ValueError(f"{type(experts).__name__} has no parameter of single experts.")


def expert_of_slots(ctx, num_slots: int):
    """The experts of this layer that are in the slots, int32[C]; 0 for all others."""
    slot_E = ctx.offload["slot_E"]
    place_E = jnp.where(slot_E >= 0, slot_E, num_slots)
    expert_E = jnp.arange(len(slot_E), dtype=jnp.int32)
    return jnp.zeros(num_slots, jnp.int32).at[place_E].set(expert_E, mode="drop")


def mean_scores(routing, num_experts: int, stored_E=None):
    """The mean of the router's scores over the tokens that it routed, float32[E].

    Args:
      routing: of all choices.
      num_experts: E, of which the first choices are.
      stored_E: the set of weights of each choice, where choices share them.
    """
    real_T1 = jnp.any(routing.keep_TK, axis=1, keepdims=True)
    sum_E = jnp.sum(jnp.where(real_T1, routing.probs_TE, 0.0), axis=0)
    mean_E = sum_E / jnp.maximum(jnp.sum(real_T1), 1)
    if stored_E is None:
        return mean_E[:num_experts]
    own_E = mean_E[: len(stored_E)]
    return jnp.zeros(num_experts).at[stored_E].add(own_E)
