"""Replicas of experts by load: which experts get copies, and on which devices.

Source: EPLB (DeepSeek, github.com/deepseek-ai/EPLB), whose results these are, in numpy.

E experts · X replicas in all · P devices
"""

import dataclasses

import numpy as np

from moex.config.base import require
from moex.placement.problem import packed


@dataclasses.dataclass(frozen=True)
class Replicas:
    """The replicas of a layer, in the order of devices: as many on each."""

    expert_X: np.ndarray  # int64, the expert that each is a copy of
    load_P: np.ndarray  # float64, load of each device if copies share it evenly

    @property
    def imbalance(self) -> float:
        """The load of the fullest device over the mean."""
        return float(self.load_P.max() / max(self.load_P.mean(), 1e-300))


def check(experts: int, replicas: int, devices: int, nodes: int, groups: int) -> None:
    """Raise `ConfigError` if a layer cannot be replicated like this."""
    fits = experts <= replicas <= experts * devices and replicas % devices == 0
    allowed = (
        f"a multiple of --devices, from the {experts} experts of a layer to all of "
        f"them on every device, {experts * devices:,}"
    )
    require(fits, "--replicas", replicas, allowed)
    fits = devices % nodes == 0 and replicas % nodes == 0
    require(fits, "--nodes", nodes, f"a divisor of --devices = {devices}")
    require(experts % groups == 0, "groups", groups, f"a divisor of {experts} experts")


def replicate(
    load_E, replicas: int, devices: int, nodes: int = 1, groups: int = 1
) -> Replicas:
    """The replicas of a layer.

    Groups of experts are packed onto nodes first, where they divide; then the experts
    of most load per copy get copies, inside of each node; then copies are packed onto
    the devices of the node.

    Args:
      load_E: tokens of each expert.
      replicas: X, a multiple of `devices`.
      devices: P, of all nodes together.
      nodes: nodes; divides `devices`.
      groups: groups of neighbours that should stay on a node; divides E.
    """
    load_E = np.asarray(load_E, np.float64)
    check(len(load_E), replicas, devices, nodes, groups)
    if groups % nodes:
        nodes = groups = 1
    load_GS = load_E.reshape(groups, -1)
    node_G = packed(load_GS.sum(axis=1), nodes)
    expert_GS = np.arange(len(load_E)).reshape(groups, -1)
    found, load_P = [], []
    for node in range(nodes):
        own = expert_GS[_packing_order(load_GS.sum(axis=1), node_G, node)].reshape(-1)
        copy_X, count_E = _copies(load_E[own], replicas // nodes)
        load_X = (load_E[own] / count_E)[copy_X]
        device_X = packed(load_X, devices // nodes)
        for device in range(devices // nodes):
            here_X = _packing_order(load_X, device_X, device)
            found.append(own[copy_X[here_X]])
            load_P.append(load_X[here_X].sum())
    return Replicas(np.concatenate(found), np.array(load_P))


def _packing_order(load_U, device_U, device: int) -> np.ndarray:
    """The units of a device from the heaviest to the lightest, as they were packed."""
    order_U = np.argsort(-load_U, kind="stable")
    if len(np.unique(device_U)) == len(device_U):  # one on each: in their own order
        order_U = np.arange(len(device_U))
    return order_U[device_U[order_U] == device]


def _copies(load_E, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64[X] experts of the replicas, int64[E] replicas of each expert)."""
    count_E = np.ones(len(load_E), np.int64)
    expert_X = list(range(len(load_E)))
    for _ in range(replicas - len(load_E)):
        e = int(np.argmax(load_E / count_E))
        expert_X.append(e)
        count_E[e] += 1
    return np.array(expert_X), count_E
