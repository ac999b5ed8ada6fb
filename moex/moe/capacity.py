"""Expert capacity: which slots are dropped. Without it the layer is dropless.

`kernels_pallas` sorts the rows by expert, and moves them there and back.

T tokens · K slots per token · E experts
"""

import math

import jax.numpy as jnp

from kernels_pallas import make_plan
from moex.moe.routing import Routing
from moex.numbers import exact


def expert_capacity(capacity_factor, num_slots, num_experts) -> int:
    """Rows an expert accepts: ceil(factor * slots / experts), without rounding.

    Source: Fedus et al. 2021, arXiv:2101.03961, equation 3.
    """
    return math.ceil(exact(capacity_factor) * num_slots / num_experts)


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
