"""From a routing decision to rows sorted by expert, and back.

Dropless unless a capacity is given. Pure functions; the sort itself is
`kernels_pallas.make_plan`.

T tokens · K slots per token · N = T * K routed rows · E experts · D model width
"""

import math

import jax.numpy as jnp

from kernels_pallas import Plan, make_plan
from moex.moe.routing import Routing


def expert_capacity(capacity_factor, num_slots, num_experts) -> int:
    """Rows an expert accepts: ceil(factor * slots / experts).

    Source: Fedus et al. 2021, arXiv:2101.03961, equation 3.
    """
    return math.ceil(capacity_factor * num_slots / num_experts)


def drop_over_capacity(routing: Routing, num_experts, capacity) -> Routing:
    """Keep at most `capacity` slots per expert.

    First choices are served before second ones, and earlier tokens before later ones
    (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1). Gates are not renormalised.
    Zero-computation experts, with ids from `num_experts` on, take any number.
    """
    T, K = routing.expert_TK.shape
    by_choice = make_plan(routing.expert_TK.T, routing.keep_TK.T, num_experts)
    first_E = jnp.cumsum(by_choice.group_sizes_E) - by_choice.group_sizes_E
    first_TK = first_E.at[routing.expert_TK].get(mode="clip")
    rank_TK = by_choice.row_TK.reshape(K, T).T - first_TK
    return routing.keep_only((rank_TK < capacity) | (routing.expert_TK >= num_experts))


def dispatch(x_TD, plan: Plan):
    """Rows of x in plan order: `x_ND[i]` is the token of slot `order_N[i]`."""
    K = plan.row_TK.shape[1]
    return x_TD.at[plan.order_N // K].get(mode="clip")


def combine(y_ND, gate_TK, plan: Plan):
    """Sum over the slots of each token of gate * row; y_TD in the dtype of y."""
    y_TKD = y_ND.at[plan.row_TK].get(mode="clip")
    return jnp.einsum("tkd,tk->td", y_TKD, gate_TK.astype(y_ND.dtype))
