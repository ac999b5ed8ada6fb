"""Decoding with few resident experts, replayed from a trace under a cost model.

Time is that of one device, one host and one link. In a layer the device computes
resident experts while the link moves the missing ones; the host computes those that a
schedule gives to it; the layer ends when both are done. Between these moves the link
prefetches; a move that has begun is not broken off, and experts that arrive late are
waited for. The same arguments give the same result.

N tokens · R routers · E experts · T rows of a step
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from moex.config.base import ConfigError
from moex.offload.cache import ExpertCache, Statistics
from moex.offload.costs import Costs
from moex.offload.forecasts import Forecast
from moex.offload.policies import Key
from moex.offload.routes import Routes
from moex.offload.schedule import Scheduler, all_device, by_impact, device_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a replay; times are in the unit of the costs."""

    tokens: int
    steps: int
    time: float  # of everything
    stall: float  # of the device, waiting for moves or for the host
    statistics: Statistics

    @property
    def hit_rate(self) -> float:
        """The share of needed experts that were resident."""
        return self.statistics.hit_rate

    @property
    def moves_per_token(self) -> float:
        """Experts that the link moved, for each token."""
        return self.statistics.loads / self.tokens


def needs_of(routes: Routes, steps: Sequence[np.ndarray]):
    """The layer and the experts of every pass, in order, for `Belady`."""
    return [
        (layer, routes.experts_of(rows, router)[0].tolist())
        for rows in steps
        for router, layer in enumerate(routes.layer_R)
    ]


class _Link:
    """Moves between layers: what waits for the link, and when experts arrive."""

    def __init__(self, routes: Routes, cache: ExpertCache, move: float):
        self._layer_R, self._cache, self._move = routes.layer_R, cache, move
        self.free = 0.0  # when it can begin another move
        self._waiting: dict[int, list[int]] = {}  # wanted experts by router
        self._arrival: dict[Key, float] = {}

    def want(self, router: int, experts: list[int], now: float) -> None:
        """Ask for experts of a router; this replaces what it was asked for before."""
        if not self._waiting:
            self.free = max(self.free, now)
        self._waiting[router] = experts

    def run(self, until: float) -> None:
        """Begin the moves that begin before a time; the nearest layers come first.

        Those that find no slot wait until another layer needs its own no more.
        """
        blocked = False
        for router in sorted(self._waiting):
            while self.free < until:
                layer, wanted = self._layer_R[router], self._waiting[router]
                found = self._cache.prefetch(layer, wanted, budget=1)
                if not found.loads:
                    blocked = blocked or bool(found.left)
                    if not found.left:
                        del self._waiting[router]
                    break
                self.free += self._move
                self._arrival[layer, found.loads[0][0]] = self.free
        if blocked:
            self.free = max(self.free, until)

    def forget(self, router: int) -> None:
        """Drop what was wanted for a router: its experts are known now."""
        self._waiting.pop(router, None)

    def arrival(self, key: Key) -> float:
        """When a resident expert is there, of which some are still on their way."""
        return self._arrival.pop(key, 0.0)

    def demand(self, key: Key, now: float) -> float:
        """Move an expert that is needed now; returns when it arrives."""
        self.free = max(self.free, now) + self._move
        self._arrival.pop(key, None)
        return self.free


def simulate(
    routes: Routes,
    steps: Sequence[np.ndarray],
    cache: ExpertCache,
    costs: Costs,
    *,
    scheduler: Scheduler = all_device,
    forecast: Forecast | None = None,
    impact: bool = False,
) -> Result:
    """Replay decoding steps.

    Args:
      routes: from `read_routes`.
      steps: rows of each step, from `in_step`.
      cache: empty, or as an earlier replay left it; it is changed.
      costs: `Costs`.
      scheduler: who computes the experts of a layer; one of `schedule.SCHEDULERS`.
      forecast: says which experts later layers will need, to prefetch them; None:
        nothing is prefetched.
      impact: prefetch in the order of the time that it saves, and only where it saves
        any; False: the experts of most tokens first.

    Raises:
      ConfigError: if a layer can be computed by nobody.
    """
    link, now, stall, tokens = _Link(routes, cache, costs.move), 0.0, 0.0, 0
    chosen = scheduler if impact else None
    if forecast is not None and not math.isfinite(costs.move):
        forecast = None
    for rows in steps:
        tokens += len(rows)
        if forecast is not None:
            _ask(forecast(rows, -1), routes, link, cache, costs, chosen, now)
        for router, layer in enumerate(routes.layer_R):
            now += costs.layer
            link.run(now)
            link.forget(router)
            experts, loads = routes.experts_of(rows, router)
            cache.routed(layer, routes.scores_of(rows, router))
            load = dict(zip(experts.tolist(), loads.tolist(), strict=True))
            end, busy = _layer(layer, load, link, cache, costs, scheduler, now)
            stall += end - now - busy
            if forecast is not None:
                _ask(forecast(rows, router), routes, link, cache, costs, chosen, now)
            now = end
    if not math.isfinite(now):
        raise ConfigError("costs: no resource can compute the experts of a layer.")
    return Result(
        tokens=tokens,
        steps=len(steps),
        time=now,
        stall=stall,
        statistics=cache.statistics,
    )


def _layer(layer, load, link, cache, costs, scheduler, now) -> tuple[float, float]:
    """Compute a layer's experts; returns its end, and how long the device computes."""
    slot_E = cache.slot_of_LE[layer]
    cached = [e for e in load if slot_E[e] >= 0]
    uncached = [e for e in load if slot_E[e] < 0]
    # Without the host a layer goes on in parts where the slots are too few.
    room = None
    if scheduler is not all_device and math.isfinite(costs.cpu_row):
        room = max(0, cache.slots_for(layer) - len(cached))
    plan = scheduler(cached, uncached, load, costs, room)
    left, hosted, begin = plan.device, plan.cpu, now
    while left or hosted:
        found = cache.need(layer, left, hosted)
        there = [link.arrival((layer, e)) for e in found.hits]
        if costs.again:  # the layer runs, waits for all that it missed, and runs again
            begin = max([begin, *there]) + len(there) * costs.device
            there = [link.demand((layer, e), begin) for e, _ in found.loads]
            if there:
                begin = max(there) + costs.again + len(there) * costs.device
        else:
            there += [link.demand((layer, e), begin) for e, _ in found.loads]
            begin = device_end(there, costs, begin)
        left, hosted = found.left, ()
    end = max(begin, now + costs.cpu(sum(load[e] for e in plan.cpu)))
    return end, len(plan.device) * costs.device if plan.device else 0.0


def _ask(forecasts, routes, link, cache, costs, scheduler: Scheduler | None, now):
    """Queue the prefetches of a forecast."""
    for router, count_E in forecasts:
        layer = routes.layer_R[router]
        wanted = np.flatnonzero(count_E > 0)
        cache.predicted(layer, wanted)
        order = wanted[np.argsort(-count_E[wanted], kind="stable")].tolist()
        if scheduler is not None:
            here = np.flatnonzero(cache.slot_of_LE[layer] >= 0).tolist()
            load = {e: max(1, round(float(count_E[e]))) for e in order}
            resident = [e for e in order if e in set(here)]
            saving = by_impact(here, order, load, costs, scheduler)
            order = resident + [e for e, _ in saving]
        link.want(router, order, now)
