"""The weights of merged gated experts: hidden units in one order, then a mean.

Pure functions of numpy arrays: `weights` are those of all experts of one `Glu` layer,
by name. The order of hidden units does not change what an expert computes, so before
the mean each expert gets the order in which it is most like another.

Source: Li et al. 2024, arXiv:2310.01334, and its code (permutation.py, for experts of
two matrices; the sum over gate, up and down is ours).

E experts · G groups · D model width · F expert width
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moex.convert.plans import Merge

# The dim of the hidden units in the parameters of one expert.
HIDDEN = {"w_in_ED2F": 2, "w_out_EFD": 0, "bias_in_E2F": 1}


def one_expert(weights: dict, e: int) -> dict:
    """The parameters of one expert, float32."""
    return {name: np.asarray(value[e], np.float32) for name, value in weights.items()}


def matching(like: dict, expert: dict) -> np.ndarray:
    """The order of hidden units that makes an expert most like another, int[F].

    It maximises the sum of the products of all weights of matched units.

    Args:
      like, expert: from `one_expert`.
    """
    score_FF = 0.0
    for name, dim in HIDDEN.items():
        if name in like:
            rows = [
                np.moveaxis(w[name], dim, 0).reshape(w[name].shape[dim], -1)
                for w in (like, expert)
            ]
            score_FF = score_FF + rows[0] @ rows[1].T
    return linear_sum_assignment(score_FF, maximize=True)[1]


def reordered(expert: dict, order_F) -> dict:
    """The same expert with its hidden units in another order."""
    return {
        name: np.take(value, order_F, axis=HIDDEN[name]) if name in HIDDEN else value
        for name, value in expert.items()
    }


def merged(weights: dict, plan: Merge, align: str) -> dict:
    """The parameters of the G experts of a plan, in the order of its groups, float32.

    An expert alone in its group stays as it is, bit for bit.

    Args:
      weights: {name: [E, ...]}.
      align: "dominant", each expert to the dominant one of its group; "first", all to
        expert 0 of the layer, as the authors' code does; or "none".
    """
    groups = []
    for members, dominant in zip(plan.groups, plan.dominant, strict=True):
        if len(members) == 1:
            groups.append(one_expert(weights, members[0]))
            continue
        to = {"dominant": dominant, "first": 0}.get(align)
        experts = []
        for e in members:
            expert = one_expert(weights, e)
            if to is not None and e != to:
                expert = reordered(expert, matching(one_expert(weights, to), expert))
            experts.append(expert)
        groups.append(mean(experts, [plan.weights[e] for e in members]))
    return {name: np.stack([own[name] for own in groups]) for name in weights}


def mean(experts: list[dict], weights) -> dict:
    """The weighted mean of experts; the plain one if all weights are 0, never zeros."""
    share = np.asarray(weights, np.float64)
    most = share.max()
    share = share / most if most > 0 else np.ones(len(share))  # no sum overflows
    share = share / share.sum()
    return {
        name: sum(
            s * np.float64(own[name]) for s, own in zip(share, experts, strict=True)
        ).astype(np.float32)
        for name in experts[0]
    }
