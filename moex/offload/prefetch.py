"""Loading experts before a layer asks for them, while earlier layers compute.

A forecast says which experts later layers will probably need: their own routers, asked
about the present residual stream (HybriMoE, arXiv:2504.05897), or a predictor that
reads the text and names those of all layers before the first one (ExpertFlow,
arXiv:2410.17954). A wrong one costs time and never a result: a layer tells what it
misses, and that is loaded then.

B batch · L length of one call · E experts · N tokens · H inputs of a predictor
"""

import abc
import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moex.model.layers import layers, routers
from moex.offload.block import ROWS, Routed, run_forecast
from moex.offload.costs import Costs
from moex.offload.executor import Executor
from moex.offload.predictor import Predictor, windows_of
from moex.offload.schedule import all_device, by_impact, hss


class Wanted(NamedTuple):
    """The forecast of a layer."""

    own: Routed
    count_E: np.ndarray  # tokens that will probably have each expert

    def experts(self) -> list[int]:
        """The experts that some token will have, those of most tokens first."""
        order = np.argsort(-self.count_E, kind="stable")
        return [int(e) for e in order if self.count_E[e] > 0]


class Prefetch(abc.ABC):
    """Says what is loaded when; an executor calls it in the order of these methods."""

    def __init__(self, executor: Executor):
        self._executor = executor
        pairs = [(s.routed, s) for s in executor.steps if s.routed is not None]
        self._routed = [routed for routed, _ in pairs]
        self._steps = [step for _, step in pairs]

    @abc.abstractmethod
    def begin(self, ctx) -> None:
        """Note that a pass through all layers begins."""

    @abc.abstractmethod
    def ask(self, own: Routed, x_BLD, ctx, steer) -> None:
        """Note that a layer runs next, on the residual stream `x_BLD`."""

    @abc.abstractmethod
    def load(self, own: Routed) -> None:
        """Load experts of later layers while this one computes."""

    def later(self, own: Routed) -> list[Routed]:
        """The layers with experts that follow on one of them."""
        return self._routed[own.layer.routed + 1 :]

    def foretold(self, asking: int, wanted: Iterable[Wanted]) -> None:
        """Tell the policies, and the record of the pass if there is one.

        Args:
          asking: number of the layer before which the forecast is used.
          wanted: the forecasts.
        """
        for one in wanted:
            one.own.slots.cache.predicted(one.own.place, one.experts())
            if self._executor.passes is not None:
                told = asking, one.own.layer.routed, one.count_E
                self._executor.passes[-1].forecasts.append(told)


@contextlib.contextmanager
def kept(own: Routed):
    """Keep the residents of a layer that computes."""
    cache = own.slots.cache
    here = np.flatnonzero(own.slots.slot_E(own.place) >= 0)
    computing = [(own.place, int(e)) for e in here]
    cache.pin(computing)
    try:
        yield
    finally:
        cache.unpin(computing)


class ByRouters(Prefetch):
    """The routers of the next layers name experts; nearest layers are loaded first."""

    def __init__(self, executor: Executor, ahead: int = 1):
        """Look so many layers ahead."""
        super().__init__(executor)
        self._ahead = ahead
        self._asked: list[tuple[Routed, object]] = []

    def begin(self, ctx):
        self._asked = []

    def ask(self, own, x_BLD, ctx, steer):
        self._asked = []
        for other in self.later(own)[: self._ahead]:
            step = self._steps[other.layer.routed]
            nobody = self._executor.first_pass(other, x_BLD)
            rest = (x_BLD, ctx, step.place_2, step.steer(steer), nobody)
            how = {"graphdef": step.graphdef, "module": other.module}
            flags = run_forecast(step.arrays, other.slots.by_item(), *rest, **how)
            self._asked.append((other, flags))

    def load(self, own):
        wanted = [Wanted(o, np.asarray(flags)[ROWS]) for o, flags in self._asked]
        self.foretold(own.layer.routed, wanted)
        with kept(own):
            self.fill(wanted)

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Load them, as far as there are slots."""
        for one in wanted:
            cache, place = one.own.slots.cache, one.own.place
            loads = cache.prefetch(place, one.experts()).loads
            one.own.slots.fill(place, loads, wait=False)


class ByImpact(ByRouters):
    """The routers of the next layers name experts; what saves most time comes first.

    Nothing is loaded that saves none, and no more than the link can move while a layer
    computes, but one expert.
    """

    def fill(self, wanted):
        costs = self._executor.costs
        assert costs is not None
        loads: dict[int, list[tuple[int, int]]] = {}
        most = self._most(wanted[0].own, costs) if wanted else 0
        for at, expert in self._best(wanted, costs, most):
            own = wanted[at].own
            cache, named = own.slots.cache, wanted[at].experts()
            here = [e for e in named if cache.slot_of_LE[own.place, e] >= 0]
            found = cache.prefetch(own.place, [*here, expert], budget=1)
            loads.setdefault(at, []).extend(found.loads)
        for at, pairs in loads.items():
            wanted[at].own.slots.fill(wanted[at].own.place, pairs, wait=False)

    def _most(self, own: Routed, costs: Costs) -> int | None:
        if not costs.move:
            return None
        computing = costs.layer + own.layer.most_slots() * costs.device
        return max(1, int(computing / costs.move))

    def _best(self, wanted, costs: Costs, most: int | None) -> list[tuple[int, int]]:
        """Pairs (number in `wanted`, expert), those that save most first."""
        scheduler = all_device if self._executor.host is None else hss
        found = []
        for at, one in enumerate(wanted):
            slot_E = one.own.slots.cache.slot_of_LE[one.own.place]
            here = np.flatnonzero(slot_E >= 0).tolist()
            named = one.experts()
            load = {e: max(1, round(float(one.count_E[e]))) for e in named}
            saving = by_impact(here, named, load, costs, scheduler, most)
            found += [(-saved, at, expert) for expert, saved in saving]
        found.sort(key=lambda own: own[0])
        return [(at, expert) for _, at, expert in found[:most]]


class ByText(Prefetch):
    """A predictor names the experts of all layers before the first of them runs.

    Before and while a layer runs, what is still absent is loaded, nearest layers first:
    slots that a layer needs no more go to later ones. Once a layer was routed, its own
    choice takes the place of what was predicted for it.
    """

    def __init__(
        self, executor: Executor, predictor: Predictor, layer_R: Sequence[int], ahead
    ):
        """Use a predictor.

        Args:
          executor: of the model.
          predictor: of its routers.
          layer_R: number of the layer of each router, among those with routers.
          ahead: so many layers are loaded while one computes; None: all.
        """
        super().__init__(executor)
        self._predictor, self._layer_R, self._ahead = predictor, layer_R, ahead
        self._texts: list[list[int]] = []  # of each row
        self._wanted: dict[int, Wanted] = {}  # by number of the layer

    def begin(self, ctx):
        token_NH, valid_N = self._read(ctx)
        ids_NRK = self._predictor.experts(token_NH)[valid_N]
        self._wanted = {}
        for own in self._routed:
            rounds = [r for r, at in enumerate(self._layer_R) if at == own.layer.routed]
            ids = ids_NRK[:, rounds]
            count_E = np.bincount(ids[ids >= 0], minlength=own.layer.experts)
            self._wanted[own.layer.routed] = Wanted(own, count_E)
        self.foretold(-1, self._wanted.values())

    def _read(self, ctx) -> tuple[np.ndarray, np.ndarray]:
        """The predictor's inputs, int32[N, H], and which of them count, bool[N]."""
        token_BL, segment_BL = np.asarray(ctx.token_BL), np.asarray(ctx.segment_BL)
        valid_BL = segment_BL > 0
        if ctx.mode == "decode" and token_BL.shape[1] == 1:
            for text, token, here in zip(
                self._texts, token_BL[:, 0], valid_BL[:, 0], strict=True
            ):
                text += [int(token)] * bool(here)
            return self._predictor.window(self._texts), valid_BL[:, 0]
        rows = zip(token_BL, valid_BL, strict=True)
        self._texts = [row[here].tolist() for row, here in rows]
        first_B1 = np.arange(len(token_BL))[:, None] * (segment_BL.max() + 1)
        document_N = (first_B1 + segment_BL).reshape(-1)
        about = self._predictor.about
        return windows_of(token_BL.reshape(-1), document_N, about), valid_BL.reshape(-1)

    def ask(self, own, x_BLD, ctx, steer):
        self._fill([own])
        self._wanted.pop(own.layer.routed, None)

    def load(self, own):
        with kept(own):
            self._fill(self.later(own)[: self._ahead])

    def _fill(self, several: Sequence[Routed]) -> None:
        for own in several:
            if (wanted := self._wanted.get(own.layer.routed)) is None:
                continue
            found = own.slots.cache.prefetch(own.place, wanted.experts())
            own.slots.fill(own.place, found.loads, wait=False)


def layers_of_routers(model) -> list[int]:
    """The number of each router's layer, among the layers with routers."""
    numbers = [s.numbers[copy] for s, copy in layers(model) if s.sparse is not None]
    return [numbers.index(routed.layer) for routed in routers(model)]
