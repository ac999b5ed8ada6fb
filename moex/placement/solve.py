"""Placement of a model: nodes first, then devices, and groups of experts stay whole.

Every stage splits each part of the devices into equal parts, and is a `Problem` of its
own for each part. Without nodes and groups there is one stage.

E experts of a layer · P devices
"""

import dataclasses
import itertools

import numpy as np

from moex.config.base import ConfigError, require, require_choice
from moex.placement import lsa, milp
from moex.placement.affinity import Affinity, Layer, Term
from moex.placement.problem import NoPlacement, Problem, Solution

METHODS = ("lsa", "milp")
MOST_DEVICES = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """Choices of a placement."""

    devices: int  # P, of all nodes together
    nodes: int = 1  # neighbouring devices are one; divides P
    method: str = "lsa"  # one of `METHODS`
    # The load of a device over the mean of its layer, less 1, at most; None: any.
    slack: float | None = None
    restarts: int = lsa.RESTARTS  # random starts of lsa
    seed: int = 0  # of these starts
    time_limit: float = milp.TIME_LIMIT  # seconds of each problem of milp

    def check(self, layers: tuple[Layer, ...]) -> None:
        """Check that layers can be placed like this.

        Raises:
          ConfigError: naming the flag and the layer.
        """
        P = self.devices
        require_choice("--method", self.method, METHODS)
        allowed = f"from 2 to {MOST_DEVICES:,}; with one nothing changes devices"
        require(2 <= P <= MOST_DEVICES, "--devices", P, allowed)
        fits = 1 <= self.nodes <= P and P % self.nodes == 0
        require(fits, "--nodes", self.nodes, f"a divisor of --devices = {P}")
        ok = self.slack is None or 0 <= self.slack < np.inf
        require(ok, "--slack", self.slack, "at least 0")
        require(self.restarts >= 0, "--restarts", self.restarts, "at least 0")
        require(self.seed >= 0, "--seed", self.seed, "at least 0")
        require(self.time_limit > 0, "--time-limit", self.time_limit, "above 0")
        for own in layers:
            if own.experts % P:
                divisors = [
                    d for d in range(2, own.experts + 1) if own.experts % d == 0
                ]
                raise ConfigError(
                    f"--devices = {P}: must divide the {own.experts} experts of layer "
                    f"{own.number}: {', '.join(map(str, divisors)) or 'none does'}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The experts of each device, in every layer."""

    layers: tuple[Layer, ...]
    device: tuple[np.ndarray, ...]  # int64[E] of each layer
    devices: int
    nodes: int = 1
    # (cost - bound) / cost, summed over the problems of all stages; None: not known.
    gap: float | None = None
    notes: tuple[str, ...] = ()  # lines for people

    def experts(self, layer: int) -> list[list[int]]:
        """The experts of each device, rising, in the layer of this index."""
        device_E = self.device[layer]
        return [np.flatnonzero(device_E == p).tolist() for p in range(self.devices)]

    def crossings(self, affinity: Affinity) -> "Crossings":
        """The tokens of a text that change devices."""
        total, between, within = affinity.total, 0, 0
        per_node = self.devices // self.nodes
        for a, b, count_AB in affinity.terms:
            one_AB = self.device[a][:, None] != self.device[b][None]
            node_AB = self.device[a][:, None] // per_node
            node_AB = node_AB != self.device[b][None] // per_node
            between += int(count_AB[node_AB].sum())
            within += int(count_AB[one_AB & ~node_AB].sum())
        return Crossings(between / max(total, 1), within / max(total, 1))

    def imbalance(self, affinity: Affinity) -> float:
        """The greatest load of a device over the mean of its layer, of all layers."""
        found = [1.0]
        for load_E, device_E in zip(affinity.load, self.device, strict=True):
            load_P = np.bincount(device_E, load_E, minlength=self.devices)
            if load_P.sum():
                found.append(float(load_P.max() / load_P.mean()))
        return max(found)


@dataclasses.dataclass(frozen=True)
class Crossings:
    """Shares of the counted pairs that are on two devices."""

    between: float  # in two nodes
    within: float  # in one node

    @property
    def all(self) -> float:
        """On two devices, wherever they are."""
        return self.between + self.within


def contiguous(layers: tuple[Layer, ...], devices: int, nodes: int = 1) -> Placement:
    """The placement of a model as it is: neighbours are on one device."""
    device = tuple(np.arange(own.experts) * devices // own.experts for own in layers)
    return Placement(layers=layers, device=device, devices=devices, nodes=nodes)


def place(affinity: Affinity, how: How) -> Placement:
    """The placement by which few tokens change devices.

    Raises:
      ConfigError: if layers cannot be placed like this.
    """
    how.check(affinity.layers)
    layers, P = affinity.layers, how.devices
    parts = [_Part([np.arange(own.experts) for own in layers], P)]
    cost, bound, known, notes = 0, 0.0, True, []
    for size in _stages(layers, how)[1:]:
        children = []
        for part in parts:
            solution, made = _split(affinity, part, size, how)
            children += made
            cost += solution.cost
            known &= solution.bound is not None
            bound += solution.bound or 0.0
            notes += solution.notes
        parts = children
    device = [np.zeros(own.experts, np.int64) for own in layers]
    for p, part in enumerate(parts):
        for device_E, ids in zip(device, part.experts, strict=True):
            device_E[ids] = p
    gap = (cost - bound) / max(cost, 1) if known else None
    return Placement(
        layers=layers,
        device=tuple(device),
        devices=P,
        nodes=how.nodes,
        gap=gap,
        notes=tuple(dict.fromkeys(notes)),
    )


def _stages(layers, how: How) -> list[int]:
    """Devices of a part in each stage: P, ..., 1; each divides the one before.

    Raises:
      ConfigError: if groups that stay whole do not fit nodes or devices.
    """
    P = how.devices
    sizes = {P, P // how.nodes, 1}
    for own in layers:
        room = own.experts // P
        for block in own.blocks:
            if block % room == 0:
                sizes.add(min(block // room, P))
            elif room % block:
                raise ConfigError(
                    f"--devices = {P}: a device has {room} experts of layer "
                    f"{own.number}, and groups of {block} that stay together do not "
                    "fit."
                )
    found = sorted(sizes, reverse=True)
    for more, less in itertools.pairwise(found):
        if more % less:
            raise ConfigError(
                f"--nodes = {how.nodes}: parts of {more} and of {less} devices, which "
                "nodes and groups of experts that stay together need, do not fit into "
                "each other."
            )
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """Neighbouring devices, and their experts in every layer, rising."""

    experts: list[np.ndarray]
    devices: int


def _split(affinity: Affinity, part: _Part, size: int, how: How):
    """Split a part into parts of `size` devices: (the `Solution`, the parts)."""
    n = part.devices // size
    if n == 1:
        return Solution([], 0, 0.0), [part]
    units = []  # experts of a unit, in every layer
    for own, ids in zip(affinity.layers, part.experts, strict=True):
        fit = [b for b in own.blocks if len(ids) // n % b == 0]
        units.append(max(fit, default=1))

    def summed(a, b, count_AB):
        count_AB = count_AB[np.ix_(part.experts[a], part.experts[b])]
        rows, columns = (len(part.experts[i]) // units[i] for i in (a, b))
        return count_AB.reshape(rows, units[a], columns, units[b]).sum(axis=(1, 3))

    load: tuple[np.ndarray, ...] | None = None
    most: tuple[float, ...] = ()
    if how.slack is not None:
        load = tuple(
            own[ids].reshape(-1, unit).sum(axis=1).astype(float)
            for own, ids, unit in zip(affinity.load, part.experts, units, strict=True)
        )
        share = (1 + how.slack) * size / how.devices
        most = tuple(float(own.sum()) * share for own in affinity.load)
    problem = Problem(
        sizes=tuple(len(e) // u for e, u in zip(part.experts, units, strict=True)),
        terms=tuple(Term(a, b, summed(a, b, m)) for a, b, m in affinity.terms),
        devices=n,
        load=load,
        most=most,
    )
    starts = {"restarts": how.restarts, "seed": how.seed}
    try:
        if how.method == "milp":
            solution = milp.solve(problem, time_limit=how.time_limit, **starts)
        else:
            solution = lsa.solve(problem, **starts)
    except NoPlacement as e:
        raise ConfigError(
            f"--slack = {how.slack:g}: {e}; allow more load on a device."
        ) from None
    children = []
    for p in range(n):
        mine = [
            ids[np.repeat(device_U == p, unit)]
            for ids, device_U, unit in zip(
                part.experts, solution.device, units, strict=True
            )
        ]
        children.append(_Part(mine, size))
    return solution, children
