"""Placement by coordinate descent: one layer after the other, with the others fixed.

For a layer between others the best placement is a linear sum assignment of units to
the places of devices. Where pairs of units of the same layer count too (the rounds of a
chain, co-activation), or the load is limited, swaps of two units follow. No step makes
a placement worse; the best of several starts is taken, the contiguous one among them.

U units of a layer · P devices
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moex.placement.problem import (
    Devices,
    NoPlacement,
    Problem,
    Solution,
    canonical,
    evened,
    packed,
)

RESTARTS = 20
MOST_SWEEPS = 200


def solve(problem: Problem, *, restarts: int = RESTARTS, seed: int = 0) -> Solution:
    """The best placement of several starts.

    Args:
      restarts: random starts, besides the contiguous one.
      seed: of the starts; equal arguments give equal placements.

    Raises:
      NoPlacement: if no start keeps to the limits of load.
    """
    around = [_Neighbours(problem, v) for v in range(len(problem.sizes))]
    best: Solution | None = None
    for start in range(restarts + 1):
        device = _start(problem, start, np.random.default_rng((seed, start)))
        if device is None:
            continue
        cost = _descend(problem, device, around)
        if best is None or cost < best.cost:
            best = Solution([own.copy() for own in device], cost)
    if best is None:
        raise NoPlacement(_least_load(problem))
    return Solution(canonical(best.device, problem.devices), best.cost)


def _least_load(problem: Problem) -> str:
    assert problem.load is not None
    ratios = []
    for layer, load_U in enumerate(problem.load):
        device_U = evened(load_U, packed(load_U, problem.devices), problem.devices)
        if not problem.carries(layer, device_U):
            load_P = np.bincount(device_U, load_U)
            ratios.append(float(load_P.max()) / problem.most[layer])
    return f"the most even that was found has {max(ratios):.3f} times what is allowed"


def _start(problem: Problem, number: int, rng) -> Devices | None:
    """The contiguous start, or a random one; None: it has too much load somewhere."""
    device = problem.contiguous()
    if number:
        device = [rng.permutation(device_U) for device_U in device]
    for layer, device_U in enumerate(device):
        if problem.load is None or problem.carries(layer, device_U):
            continue
        load_U = problem.load[layer]
        noisy_U = load_U * rng.uniform(1, 1.2, len(load_U))
        for weight_U in (noisy_U, load_U):
            device[layer] = packed(weight_U, problem.devices)
            if not problem.carries(layer, device[layer]):
                device[layer] = evened(load_U, device[layer], problem.devices)
            if problem.carries(layer, device[layer]):
                break
        else:
            return None
    return device


class _Neighbours:
    """The terms of one layer, seen from it."""

    def __init__(self, problem: Problem, layer: int):
        U = problem.sizes[layer]
        self.others = [
            (b, n) if a == layer else (a, n.T)
            for a, b, n in problem.terms
            if a != b and layer in (a, b)
        ]
        own_UU = np.zeros((U, U), np.int64)  # tokens of two units of this layer
        for a, b, n in problem.terms:
            if a == b == layer:
                own_UU += n + n.T
        np.fill_diagonal(own_UU, 0)
        self.own_UU = own_UU if own_UU.any() else None

    def pulls(self, layer: int, device: Devices, P: int) -> np.ndarray:
        """int64[U, P]: tokens of each unit that are on each device before or after."""
        pull_UP = np.zeros((len(device[layer]), P), np.int64)
        terms = self.others
        if self.own_UU is not None:
            terms = [*terms, (layer, self.own_UU)]
        for other, count_UB in terms:
            pull_UP += count_UB @ np.eye(P, dtype=np.int64)[device[other]]
        return pull_UP


def _descend(problem: Problem, device: Devices, around: list[_Neighbours]) -> int:
    """Improve a placement in place as far as steps in one layer do; its cost."""
    cost, layers = problem.cost(device), range(len(device))
    for _ in range(MOST_SWEEPS):
        before = cost
        for layer in (*layers, *reversed(layers)):
            cost = _improved(problem, device, layer, around[layer], cost)
        if cost == before:
            break
    return cost


def _improved(problem, device, layer, near: _Neighbours, cost: int) -> int:
    P, U = problem.devices, problem.sizes[layer]
    row_U, old_U = np.arange(U), device[layer]
    place_U = np.repeat(np.arange(P), U // P)
    pull_UP = near.pulls(layer, device, P)
    _, column_U = linear_sum_assignment(pull_UP[:, place_U], maximize=True)
    device[layer] = new_U = place_U[column_U]
    if near.own_UU is None:
        new = cost - int((pull_UP[row_U, new_U] - pull_UP[row_U, old_U]).sum())
    else:  # units of the layer pull at where others of it were
        new = problem.cost(device)
    if new >= cost or not problem.carries(layer, new_U):
        device[layer] = old_U
    else:
        cost = new
    if near.own_UU is not None or problem.load is not None:
        cost -= _swap(problem, device, layer, near)
    return cost


def _swap(problem, device, layer, near: _Neighbours) -> int:
    """Swap the best two units until no swap is better; how much the cost fell."""
    gained, P, U = 0, problem.devices, problem.sizes[layer]
    device[layer] = device[layer].copy()
    device_U = device[layer]
    row_U = np.arange(U)
    while True:
        pull_UP = near.pulls(layer, device, P)
        here_U = pull_UP[row_U, device_U]
        there_UU = pull_UP[:, device_U]  # of each unit on the device of another
        gain_UU = there_UU + there_UU.T - here_U[:, None] - here_U[None]
        if near.own_UU is not None:  # two units that swap do not meet
            gain_UU = gain_UU - 2 * near.own_UU
        apart_UU = device_U[:, None] != device_U[None]
        gain_UU = np.where(apart_UU & _carried(problem, layer, device_U), gain_UU, 0)
        u, v = np.unravel_index(int(np.argmax(gain_UU)), gain_UU.shape)
        if gain_UU[u, v] <= 0:
            return gained
        gained += int(gain_UU[u, v])
        device_U[[u, v]] = device_U[[v, u]]


def _carried(problem: Problem, layer: int, device_U) -> np.ndarray | bool:
    """bool[U, U]: whether the load allows to swap two units."""
    if problem.load is None:
        return True
    load_U = problem.load[layer]
    load_P = np.bincount(device_U, load_U, minlength=problem.devices)
    more_UU = load_U[None] - load_U[:, None]  # of the device of the first
    after_UU = load_P[device_U][:, None] + more_UU
    most = problem.most[layer] * (1 + 1e-12)
    fits_UU = after_UU <= most
    return fits_UU & fits_UU.T
