"""One problem of placement: equally many units of every layer on each device.

A unit is an expert, or a group of experts that stays whole. Devices are alike here:
nodes of devices are placed one after the other in `solve.py`.

U units of a layer · P devices
"""

import dataclasses

import numpy as np

from moex.config.base import ConfigError
from moex.placement.affinity import Term

Devices = list[np.ndarray]  # int64[U] of each layer: the device of each unit


class NoPlacement(ConfigError):
    """No placement is as even as was asked for."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The least number of tokens that change devices."""

    sizes: tuple[int, ...]  # U of each layer, multiples of P
    terms: tuple[Term, ...]
    devices: int  # P
    # float64[U] of each layer, and the most of it on a device; None: no limit.
    load: tuple[np.ndarray, ...] | None = None
    most: tuple[float, ...] = ()

    def cost(self, device: Devices) -> int:
        """Tokens that change devices."""
        return sum(
            int(count_AB[device[a][:, None] != device[b][None]].sum())
            for a, b, count_AB in self.terms
        )

    def carries(self, layer: int, device_U) -> bool:
        """Tell whether no device has more load of a layer than is allowed."""
        if self.load is None:
            return True
        load_P = np.bincount(device_U, self.load[layer], minlength=self.devices)
        return bool(load_P.max() <= self.most[layer] * (1 + 1e-12))

    def contiguous(self) -> Devices:
        """The placement of the model as it is."""
        P = self.devices
        return [np.arange(size) // (size // P) for size in self.sizes]


@dataclasses.dataclass(frozen=True)
class Solution:
    """A placement of a problem."""

    device: Devices
    cost: int
    # No placement costs less; None: not known. Equal to the cost where it is proven.
    bound: float | None = None
    notes: tuple[str, ...] = ()  # lines for people


def canonical(device: Devices, devices: int) -> Devices:
    """The same placement with devices in the order of their first unit of layer 0."""
    _, first = np.unique(device[0], return_index=True)
    name_P = np.empty(devices, np.int64)
    name_P[device[0][np.sort(first)]] = np.arange(devices)
    return [name_P[device_U] for device_U in device]


def packed(load_U, devices: int) -> np.ndarray:
    """int64[U]: equally many units on each device, of about equal load.

    The units go, from the heaviest to the lightest, to the device of least load that
    has room; the lowest unit and device of equals first. Where there is one unit for
    each device, they stay in their order.

    Source: `balanced_packing` of EPLB (DeepSeek, github.com/deepseek-ai/EPLB).
    """
    load_U = np.asarray(load_U)
    if len(load_U) == devices:
        return np.arange(devices)
    room_P = np.full(devices, len(load_U) // devices)
    load_P, device_U = np.zeros(devices), np.zeros(len(load_U), np.int64)
    for u in np.argsort(-load_U, kind="stable"):
        p = int(np.argmin(np.where(room_P > 0, load_P, np.inf)))
        device_U[u] = p
        load_P[p] += load_U[u]
        room_P[p] -= 1
    return device_U


def evened(load_U, device_U, devices: int) -> np.ndarray:
    """The placement of a layer after swaps that lower its fullest device, if any do."""
    device_U = device_U.copy()
    while True:
        load_P = np.bincount(device_U, load_U, minlength=devices)
        full = int(np.argmax(load_P))
        here, there = np.flatnonzero(device_U == full), np.flatnonzero(device_U != full)
        less = load_U[here][:, None] - load_U[there][None]
        after = np.maximum(load_P[full] - less, load_P[device_U[there]][None] + less)
        u, v = np.unravel_index(int(np.argmin(after)), after.shape)
        if after[u, v] >= load_P[full] * (1 - 1e-12):
            return device_U
        device_U[[here[u], there[v]]] = device_U[[there[v], here[u]]]
