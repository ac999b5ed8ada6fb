"""A model that computes layer by layer with experts that wait in a bank.

After a layer the host looks what it missed, loads that into slots, and runs the layer
again (`moe/offload.py`). So what is resident never changes a result, only the time.

B batch · L length · T tokens · D model width · E experts · R rounds
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moex.model.layers import Site, layers
from moex.model.paths import flat_paths, nested
from moex.moe.offload import first_pass
from moex.nn.param import split_params
from moex.offload.block import MISSING, ROWS, SCORE, Routed, Step, run_block
from moex.offload.costs import Costs
from moex.offload.layout import inside, is_row_part, module_of
from moex.offload.record import Pass, Turn
from moex.offload.schedule import hss
from moex.offload.slots import TRACED, Slots


def num_programs() -> int:
    """The programs that were compiled for blocks and slots, in this process."""
    return TRACED.total()


class Host(Protocol):
    """The cores of the host as a device for experts: `host.HostExperts`."""

    count: int  # experts that were computed

    def forget(self) -> None:
        """Set the count to 0."""

    def begin(self, own: Routed, told: dict, number: int, experts: set[int]) -> Future:
        """Begin to compute experts of a round, from what `run_block` told."""

    def added(
        self, going: dict, number: int, experts: set[int], answer: Future
    ) -> dict:
        """The parts of `Context.offload` with the answer added, for which it waits."""


class Ahead(Protocol):
    """Loads experts before they are needed: `prefetch.Prefetch`."""

    def begin(self, ctx) -> None:
        """Note that a pass through all layers begins."""

    def ask(self, own: Routed, x_BLD, ctx, steer) -> None:
        """Note that a layer runs next, on the residual stream `x_BLD`."""

    def load(self, own: Routed) -> None:
        """Load experts of later layers while this one computes."""


class Executor:
    """The layers of a model, one after the other.

    Attributes:
      steps: `Step` of each layer, in order.
      slots: `Slots` of each pool.
      outer: (graph definition, params, state) of the model without its segments.
      place: where arrays are.
      settings: how, as far as it concerns the loop.
      host: computes experts on the cores of the host; None: nobody does.
      ahead: loads experts before they are needed; None: nobody does.
      costs: of this machine, which divide work and order loads; None: not measured.
      seconds: that passed in `run`, without passes that compiled something.
      passes: of all calls of `run`; None: they are not recorded.
    """

    def __init__(
        self, model, module, params, state, slots: Sequence[Slots], mesh: Mesh, settings
    ):
        """Take the arrays of a model apart.

        Args:
          model: `Model` config.
          module: from `layout.abstract`; its segments are taken out.
          params, state: nested dicts, without rows of experts; those of layers are
            [repeat, ...].
          slots: of all pools.
          mesh: of one device.
          settings: `Settings`.
        """
        self.slots, self.settings = list(slots), settings
        self.host: Host | None = None
        self.ahead: Ahead | None = None
        self.costs: Costs | None = None
        self.passes: list[Pass] | None = None
        self.forget()
        self.place = NamedSharding(mesh, PartitionSpec())
        self._fresh: dict[tuple, dict] = {}
        own = {
            (a.site.path, a.copy): Routed(
                module_of(a).removeprefix(f"{a.site.path}/"), a, index, pool
            )
            for pool in slots
            for index, a in enumerate(pool.pool.layers)
        }
        flat = flat_paths(params), flat_paths(state)
        self.steps = []
        for site, copy in layers(model):
            graphdef, *_ = split_params(inside(module, site.path))
            arrays = tuple(self._of_block(tree, site, copy) for tree in flat)
            place = jnp.array([copy, site.numbers[copy]], jnp.int32)
            place = jax.device_put(place, self.place)
            routed = own.get((site.path, copy))
            self.steps.append(Step(site, copy, graphdef, arrays, place, routed))
        module.segments = type(module.segments)([])
        graphdef, *_ = split_params(module)
        rest = [
            {path: a for path, a in tree.items() if not path.startswith("segments/")}
            for tree in flat
        ]
        self.outer = graphdef, *(nested(self._placed(tree)) for tree in rest)

    def forget(self) -> None:
        """Begin anew: all slots are empty, and nothing was counted."""
        self.seconds = 0.0
        if self.passes is not None:
            self.passes = []
        if self.host is not None:
            self.host.forget()
        for slots in self.slots:
            slots.forget()

    def _of_block(self, flat: dict, site: Site, copy: int) -> dict:
        path = f"{site.path}/"
        own = {
            name.removeprefix(path): array[copy]
            for name, array in flat.items()
            if name.startswith(path)
        }
        return nested(self._placed(own))

    def _placed(self, flat: dict) -> dict:
        return {name: jax.device_put(a, self.place) for name, a in flat.items()}

    def caches(self, batch: int, length: int, dtype, width: int) -> list:
        """The caches of the attentions, one for each layer."""
        return [
            step.site.attention.init_cache(width, batch, length, dtype)
            for step in self.steps
        ]

    def run(self, x_BLD, ctx, caches, steer=None):
        """Run all layers.

        Args:
          x_BLD: embedded tokens, in the type of computing.
          ctx: `Context`.
          caches: from `caches`, which are used up; None outside of decoding.
          steer: `Context.steer`, or None.

        Returns:
          (x_BLD, (aux, greatest number in the residual stream) of each layer, caches).
        """
        if self.passes is not None:
            self.passes.append(Pass.empty(self.slots))
        waited = [slots.seconds for slots in self.slots]
        begin, compiled, told, new = time.perf_counter(), num_programs(), [], []
        if self.ahead is not None:
            self.ahead.begin(ctx)
        for i in range(len(self.steps)):
            cache = None if caches is None else caches[i]
            x_BLD, aux, cache = self._run_step(i, x_BLD, ctx, cache, steer)
            told.append(aux)
            new.append(cache)
        if compiled == num_programs():
            self.seconds += time.perf_counter() - begin
        else:
            for slots, before in zip(self.slots, waited, strict=True):
                slots.seconds = before
        if self.passes is not None:
            jax.block_until_ready(x_BLD)
            self.passes[-1].seconds = time.perf_counter() - begin
        return x_BLD, told, None if caches is None else new

    def report(self) -> str:
        """One line about what was resident, loaded, and waited for."""
        counts = [slots.cache.statistics for slots in self.slots]
        hits = sum(int(own.hits_L.sum()) for own in counts)
        misses = sum(int(own.misses_L.sum()) for own in counts)
        moved = sum(int(own.bytes_L.sum()) for own in counts)
        waited = sum(slots.seconds for slots in self.slots)
        slots = sum(own.cache.slots for own in self.slots)
        rows = sum(own.pool.num_rows for own in self.slots)
        size = sum(own.cache.slots * own.pool.row_bytes for own in self.slots)
        share = hits / (hits + misses) if hits + misses else 1.0
        ahead = sum(int(own.prefetched_L.sum()) for own in counts)
        more = f", {ahead:,} loaded ahead" if self.ahead is not None else ""
        if self.host is not None:
            more += f", {self.host.count:,} computed by the host"
        told, total = f"{moved / 1e6:,.1f} MB moved", self.seconds
        return (
            f"offload: slots for {slots:,} of {rows:,} experts ({size / 1e6:,.1f} MB), "
            f"{hits:,} hits and {misses:,} misses ({share:.1%} hits)"
            f"{more}, {told}, {waited:.2f} s of {total:.2f} s waited for them"
        )

    def _run_step(self, i: int, x_BLD, ctx, cache, steer):
        step, begin = self.steps[i], time.perf_counter()
        rest = (x_BLD, ctx, step.place_2, step.steer(steer))
        if (own := step.routed) is None:
            y_BLD, aux, cache, _ = run_block(
                *(step.arrays, {}, *rest, cache, None),
                graphdef=step.graphdef,
                module="",
            )
            return y_BLD, aux, cache
        if self.ahead is not None:
            self.ahead.ask(own, x_BLD, ctx, steer)
        going, asked, first = self.first_pass(own, x_BLD), 0, True
        while True:
            going["slot_E"] = own.slots.slot_E(own.place)
            y_BLD, aux, cache, told = run_block(
                *(step.arrays, own.slots.by_item(), *rest, cache, going),
                graphdef=step.graphdef,
                module=own.module,
            )
            if self.ahead is not None and first:
                self.ahead.load(own)
            before = own.slots.seconds, own.slots.moved
            asked, complete = self._load(own, told, asked)
            if self.passes is not None:
                seconds = time.perf_counter() - begin
                turn = _turn(own, going, told, first, seconds, before)
                self.passes[-1].turns.append(turn)
                begin = time.perf_counter()
            if complete:
                return y_BLD, aux, cache
            going, first = told["next"], False

    def first_pass(self, own: Routed, x_BLD) -> dict:
        """Make `Context.offload` of a layer of which nothing is resident or done."""
        key = (own.layer.experts, *own.sizes(x_BLD))
        if key not in self._fresh:
            made = first_pass(np.full(key[0], -1, np.int32), *key[1:])
            self._fresh[key] = jax.device_put(made, self.place)
        return dict(self._fresh[key])

    def _load(self, own: Routed, told: dict, asked: int) -> tuple[int, bool]:
        """Load what the first round with something missing needs, or compute it here.

        Args:
          told: from `run_block`; what is computed here is added to it.
          asked: the rounds whose needs are counted already.

        Returns:
          (rounds whose needs are counted now, whether nothing was missing).
        """
        cache, place = own.slots.cache, own.place
        for t, flags_3E in enumerate(np.asarray(told["flags_R3E"])):
            rows_E = flags_3E[ROWS].astype(np.int32)
            missing = np.flatnonzero(flags_3E[MISSING]).tolist()
            hosted = self._for_host(missing, rows_E)
            wanted = missing
            if t >= asked:
                asked = t + 1
                cache.routed(place, _padded(flags_3E[SCORE], own.slots))
                wanted = np.flatnonzero(rows_E).tolist()
                if self.passes is not None:
                    now, at = self.passes[-1], (own.layer.routed, slice(len(rows_E)))
                    now.rows_LE[at] += rows_E
                    now.score_LE[at] = flags_3E[SCORE]
            loads = cache.need(place, [e for e in wanted if e not in hosted])
            rest = [e for e in missing if e not in hosted]
            if rest and not loads.loads:
                loads = cache.need(place, rest)
            if not missing:
                continue
            if self.host is None or not hosted:
                own.slots.fill(place, loads.loads)
            else:
                answer = self.host.begin(own, told, t, hosted)
                own.slots.fill(place, loads.loads)
                told["next"] = self.host.added(told["next"], t, hosted, answer)
            return asked, False
        return asked, True

    def _for_host(self, missing: list[int], rows_E) -> set[int]:
        """The experts that the cores of the host compute, instead of being moved."""
        if self.host is None or self.costs is None or not missing:
            return set()
        return set(hss([], missing, rows_E, self.costs).cpu)


def _turn(own: Routed, going: dict, told: dict, first: bool, seconds, before) -> Turn:
    """The record of a layer that ran.

    Args:
      own: of the layer.
      going: what it was given.
      told: from `run_block`.
      first: as in `Turn`.
      seconds: of everything.
      before: seconds and moves of its slots before it loaded something.
    """
    done, now = (int(np.asarray(a["done_RE"]).sum()) for a in (going, told["next"]))
    moving = own.slots.seconds - before[0]
    return Turn(
        layer=own.layer.routed,
        first=first,
        experts=now - done,
        moves=own.slots.moved - before[1],
        seconds=seconds - moving,
        moving=moving,
    )


def _padded(score_E, slots: Slots) -> np.ndarray:
    most = slots.pool.most_experts
    return np.pad(score_E, (0, most - len(score_E)))


def in_bank(path: str) -> bool:
    """Tell whether the array of this path in a model is kept in a bank."""
    return "/experts/" in path and is_row_part(path)
