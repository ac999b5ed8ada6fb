"""Who computes the experts of one layer: the host, or the device after moving some.

Experts on the device are resident or are moved there, one after another, while others
compute. Under the cost model of `costs.py` the time of the device depends only on how
many of each there are, so that the best division is found by trying all counts
(`best`); the two greedy forms are those of HybriMoE, arXiv:2504.05897.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moex.config.base import require
from moex.offload.costs import Costs

Load = Mapping[int, int] | Sequence[int] | np.ndarray  # rows of each expert


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The experts of each resource, in the order in which they compute.

    Attributes:
      cpu: experts that the host computes.
      device: experts that the device computes.
      moves: those of `device` that are moved, in the order of the link.
      cpu_time, device_time: from the moment at which the experts are known.
    """

    cpu: tuple[int, ...]
    device: tuple[int, ...]
    moves: tuple[int, ...]
    cpu_time: float
    device_time: float

    @property
    def time(self) -> float:
        """The time until both are done."""
        return max(self.cpu_time, self.device_time)


Scheduler = Callable[..., Schedule]  # (cached, uncached, load, costs, room=None)


def device_end(arrivals: Iterable[float], costs: Costs, start: float = 0.0) -> float:
    """When the device has computed experts that arrive at these times."""
    for arrival in sorted(arrivals):
        start = max(start, arrival) + costs.device
    return start


def _device_time(kept: int, moves: int, costs: Costs) -> float:
    """`device_end` of so many resident and moved experts, without a loop."""
    if not moves:
        return kept * costs.device if kept else 0.0
    # The device, the first move or the last one holds everything up.
    first, last = costs.move + moves * costs.device, moves * costs.move + costs.device
    return max((kept + moves) * costs.device, first, last)


def divided(cpu, device, uncached, load: Load, costs: Costs) -> Schedule:
    """The schedule of a division; resident experts compute before moved ones."""
    absent = set(uncached)
    moves = tuple(e for e in device if e in absent)
    ready = tuple(e for e in device if e not in absent)
    arrivals = [0.0] * len(ready) + [costs.move * (i + 1) for i in range(len(moves))]
    return Schedule(
        cpu=tuple(cpu),
        device=ready + moves,
        moves=moves,
        cpu_time=costs.cpu(sum(int(load[e]) for e in cpu)),
        device_time=device_end(arrivals, costs),
    )


def _by_load(experts: Iterable[int], load: Load) -> list[int]:
    """Experts that have rows, the heaviest first; equal ones keep their order."""
    found = [int(e) for e in experts]
    for e in found:
        require(load[e] >= 0, f"rows of expert {e}", load[e], "0 or more")
    return sorted((e for e in found if load[e] > 0), key=lambda e: -load[e])


def hss(cached, uncached, load: Load, costs: Costs, room: int | None = None):
    """The greedy division of HybriMoE's code.

    One queue, resident experts first and the heaviest first within each kind. The
    device takes from its front and the host from its end, whichever is done sooner.

    Args:
      cached: experts that are resident.
      uncached: experts that are not.
      load: rows of each expert; those without rows are left out.
      costs: `Costs`.
      room: the most experts that may be moved; None: no limit.
    """
    cached, uncached = _by_load(cached, load), _by_load(uncached, load)
    queue, absent, room = cached + uncached, set(uncached), _room(room)
    cpu: list[int] = []
    device: list[int] = []
    g = m = 0.0
    rows = moved = 0
    while queue:
        front, back = queue[0], queue[-1]
        ready = m + costs.move if front in absent else 0.0
        end = max(g, ready) + costs.device
        if front in absent and moved == room:
            end = math.inf
        if end <= costs.cpu(rows + load[back]) and end < math.inf:
            device.append(queue.pop(0))
            g = end
            if front in absent:
                m, moved = ready, moved + 1
        else:
            cpu.append(queue.pop())
            rows += int(load[back])
    return divided(cpu, device, uncached, load, costs)


def hss_paper(cached, uncached, load: Load, costs: Costs, room: int | None = None):
    """The greedy division of HybriMoE's paper; see `hss` for the arguments.

    Three timelines, of which the one that ends first advances: the device takes the
    heaviest resident expert, or else one that was moved; the host the lightest absent
    one, or else the lightest resident one; the link the heaviest absent one, whose end
    counts with its computation.
    """
    ready, absent = _by_load(cached, load), _by_load(uncached, load)
    all_absent, room = list(absent), _room(room)
    cpu: list[int] = []
    device: list[int] = []
    moved: list[tuple[float, int]] = []  # (arrival, expert), not computed yet
    g = m = 0.0
    rows = moves = 0
    while ready or absent or moved:
        ends = {"device": math.inf, "cpu": math.inf, "link": math.inf}
        if ready or moved:
            arrival = 0.0 if ready else moved[0][0]
            ends["device"] = max(g, arrival) + costs.device
        if ready or absent:
            lightest = (absent or ready)[-1]
            ends["cpu"] = costs.cpu(rows + load[lightest])
        if absent and moves < room:
            waiting = device_end([a for a, _ in moved] + [0.0] * len(ready), costs, g)
            ends["link"] = max(waiting, m + costs.move) + costs.device
        first = min(ends, key=lambda name: ends[name])
        if first == "device":
            device.append(ready.pop(0) if ready else moved.pop(0)[1])
            g = ends["device"]
        elif first == "cpu":
            rows += int(load[lightest])
            cpu.append((absent or ready).pop())
        else:
            m, moves = m + costs.move, moves + 1
            moved.append((m, absent.pop(0)))
    return divided(cpu, device, all_absent, load, costs)


def best(cached, uncached, load: Load, costs: Costs, room: int | None = None):
    """The division that is done first; see `hss` for the arguments.

    The host gets the lightest experts of each kind, since a place on the device costs
    the same for all of a kind. Of equal divisions it is that with the fewest moves.
    """
    cached, uncached = _by_load(cached, load), _by_load(uncached, load)
    most = min(len(uncached), _room(room))
    # Rows of the host if the device has the first n of a list.
    rows_c = np.cumsum([0, *(load[e] for e in reversed(cached))])[::-1]
    rows_u = np.cumsum([0, *(load[e] for e in reversed(uncached))])[::-1]
    found = (math.inf, 0, 0, 0)
    for moves in range(most + 1):
        for kept in range(len(cached), -1, -1):
            device = _device_time(kept, moves, costs)
            cpu = costs.cpu(int(rows_c[kept] + rows_u[moves]))
            found = min(found, (max(cpu, device), moves, -kept, kept))
    _, moves, _, kept = found
    cpu = uncached[moves:][::-1] + cached[kept:][::-1]
    return divided(cpu, cached[:kept] + uncached[:moves], uncached, load, costs)


def all_device(cached, uncached, load: Load, costs: Costs, room: int | None = None):
    """All experts on the device, as without the host; see `hss` for the arguments."""
    cached, uncached = _by_load(cached, load), _by_load(uncached, load)
    most = min(len(uncached), _room(room))
    return divided(uncached[most:], cached + uncached[:most], uncached, load, costs)


def static(cached, uncached, load: Load, costs: Costs, room: int | None = None):
    """Residents on the device and the others on the host: nothing moves."""
    cached, uncached = _by_load(cached, load), _by_load(uncached, load)
    return divided(uncached, cached, uncached, load, costs)


def _room(room: int | None) -> int:
    return 2**31 if room is None else room


SCHEDULERS: dict[str, Scheduler] = {
    "device": all_device,
    "static": static,
    "hss": hss,
    "hss_paper": hss_paper,
    "best": best,
}


def by_impact(
    cached,
    wanted,
    load: Load,
    costs: Costs,
    scheduler: Scheduler = best,
    most: int | None = None,
) -> list[tuple[int, float]]:
    """Absent experts in the order of what prefetching them saves; others are left out.

    Greedy: each next one is that which makes the layer's schedule shortest, given those
    before it. It ends where none saves time.

    Args:
      cached: residents of the layer.
      wanted: experts that the layer will probably need.
      load: rows that each will probably have.
      costs: `Costs`.
      scheduler: of the layer.
      most: the most experts; None: no limit.

    Returns:
      Pairs of an expert and the time that it saves.
    """
    here = set(cached)
    ready = [e for e in wanted if e in here]
    absent = _by_load((e for e in wanted if e not in here), load)
    chosen: list[tuple[int, float]] = []
    time = scheduler(ready, absent, load, costs).time
    while absent and (most is None or len(chosen) < most):
        # Experts of equal load save the same, and lie together.
        first = [
            i for i, e in enumerate(absent) if not i or load[e] != load[absent[i - 1]]
        ]
        times = [
            scheduler(
                [*ready, absent[i]], absent[:i] + absent[i + 1 :], load, costs
            ).time
            for i in first
        ]
        at = int(np.argmin(times))
        if not times[at] < time:
            break
        expert = absent.pop(first[at])
        ready.append(expert)
        chosen.append((expert, time - times[at]))
        time = times[at]
    return chosen
