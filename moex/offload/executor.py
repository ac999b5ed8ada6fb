"""A model that computes layer by layer with experts that wait in a bank.

There is one program for each kind of block: it gets the other parameters of a layer,
and the slots of all layers with such experts. After a layer the host looks what it
missed, loads that into slots, and runs the layer again (`moe/offload.py`). So what is
resident never changes a result, only the time.

B batch · L length · T tokens · D model width · E experts · R rounds · C slots
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moex.model.layers import Site, layers
from moex.model.paths import flat_paths, nested
from moex.model.spec import merged
from moex.moe.offload import first_pass
from moex.nn.param import split_params
from moex.nn.stack import peak_of
from moex.offload.layout import Layer, inside, is_row_part, module_of
from moex.offload.slots import TRACED, Slots

NEEDED, MISSING, SCORE = range(3)  # rows of what a layer tells of its experts


@functools.partial(
    jax.jit, static_argnames=("graphdef", "module"), donate_argnames="cache"
)
def run_block(
    arrays, slots, x_BLD, ctx, place_2, steer, cache, offload, *, graphdef, module
):
    """Run one block with the experts that are resident.

    Args:
      arrays: (params, state) of the block, without rows of experts.
      slots: arrays of `Slots` by the item of their part; {} for a dense block.
      x_BLD: residual stream.
      ctx: `Context` of the batch.
      place_2: int32, which copy of its segment the block is, and its number.
      steer: the block's part of `Context.steer`, or None.
      cache: of the attention; None outside of decoding.
      offload: `Context.offload`; None for a dense block.
      graphdef: of the block.
      module: path of the experts in the block; "" in a dense one.

    Returns:
      (x_BLD, aux, cache, told): told has, for each round, "flags_R3E" (`NEEDED`,
      `MISSING`, `SCORE`), "next", which goes on in `Context.offload`, and "slots",
      which says what experts elsewhere would compute; None in a dense block.
    """
    TRACED["block"] += 1
    trees = []
    for item, tree in zip(("params", "state"), arrays, strict=True):
        own = {f"{module}/{name}": a for name, a in slots.get(item, {}).items()}
        trees.append(nested(flat_paths(tree) | own))
    block = merged(graphdef, *trees)
    ctx = dataclasses.replace(
        ctx, layer=place_2[0], depth=place_2[1], steer=steer, offload=offload
    )
    peak = None if steer is None else peak_of(x_BLD, ctx.valid_BL)
    x_BLD, aux, cache = block(x_BLD, ctx, cache)
    if not module:
        return x_BLD, (aux, peak), cache, None
    own = aux
    for name in module.split("/")[:-1]:
        own = own[name]
    told = own.pop("offload")
    rounds = [told[str(t)] for t in range(len(told))] if "0" in told else [told]
    flags = [[r["needed_E"], r["missing_E"], r["score_E"]] for r in rounds]
    parts = ("x_TD", "expert_TK", "gate_TK", "keep_TK")
    told = {
        "flags_R3E": jnp.array(flags, jnp.float32),
        "next": {
            "done_RE": jnp.stack([r["done_E"] for r in rounds]),
            "sum_RTD": jnp.stack([r["sum_TD"] for r in rounds]),
        },
        "slots": [{name: r[name] for name in parts} for r in rounds],
    }
    return x_BLD, (aux, peak), cache, told


def num_programs() -> int:
    """The programs that were compiled for blocks and slots, in this process."""
    return TRACED.total()


class Routed(NamedTuple):
    """The experts of a block."""

    module: str  # their path in the block
    layer: Layer
    place: int  # number of the layer in its pool
    slots: Slots

    def sizes(self, x_BLD) -> tuple[int, int, int]:
        """The rounds, the tokens and their width."""
        sparse = self.layer.site.sparse
        assert sparse is not None
        tokens = x_BLD.shape[0] * x_BLD.shape[1]
        return len(sparse.routers), tokens, sparse.width


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One block of the model as the executor runs it."""

    site: Site
    copy: int
    graphdef: Any
    arrays: tuple[dict, ...]  # params and state, without rows of experts
    place_2: jax.Array
    routed: Routed | None  # None: it is dense

    def steer(self, tree: dict | None) -> dict | None:
        """The block's part of `Context.steer`."""
        for name in self.site.path.split("/"):
            tree = None if tree is None else tree.get(name)
        return jax.tree.map(lambda a: a[self.copy], tree)


class Executor:
    """The layers of a model, one after the other.

    Attributes:
      steps: `Step` of each layer, in order.
      slots: `Slots` of each pool.
      outer: (graph definition, params, state) of the model without its segments.
      place: where arrays are.
      seconds: that passed in `run`, without passes that compiled something.
    """

    def __init__(
        self, model, module, params, state, slots: Sequence[Slots], mesh: Mesh
    ):
        """Take the arrays of a model apart.

        Args:
          model: `Model` config.
          module: from `layout.abstract`; its segments are taken out.
          params, state: nested dicts, without rows of experts; those of layers are
            [repeat, ...].
          slots: of all pools.
          mesh: of one device.
        """
        self.slots, self.seconds = list(slots), 0.0
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
        begin, compiled, told, new = time.perf_counter(), num_programs(), [], []
        for i, step in enumerate(self.steps):
            cache = None if caches is None else caches[i]
            x_BLD, aux, cache = self._run_step(step, x_BLD, ctx, cache, steer)
            told.append(aux)
            new.append(cache)
        if compiled == num_programs():
            self.seconds += time.perf_counter() - begin
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
        return (
            f"offload: slots for {slots:,} of {rows:,} experts ({size / 1e6:,.1f} MB), "
            f"{hits:,} hits and {misses:,} misses ({share:.1%} hits), "
            f"{moved / 1e6:,.1f} MB moved, {waited:.2f} s of {self.seconds:.2f} s "
            "waited for them"
        )

    def _run_step(self, step: Step, x_BLD, ctx, cache, steer):
        rest = (x_BLD, ctx, step.place_2, step.steer(steer))
        if (own := step.routed) is None:
            y_BLD, aux, cache, _ = run_block(
                *(step.arrays, {}, *rest, cache, None),
                graphdef=step.graphdef,
                module="",
            )
            return y_BLD, aux, cache
        going, asked = self._first_pass(own, x_BLD), 0
        while True:
            going["slot_E"] = own.slots.slot_E(own.place)
            y_BLD, aux, cache, told = run_block(
                *(step.arrays, own.slots.by_item(), *rest, cache, going),
                graphdef=step.graphdef,
                module=own.module,
            )
            asked, complete = _load(own, np.asarray(told["flags_R3E"]), asked)
            if complete:
                return y_BLD, aux, cache
            going = told["next"]

    def _first_pass(self, own: Routed, x_BLD) -> dict:
        key = (own.layer.experts, *own.sizes(x_BLD))
        if key not in self._fresh:
            made = first_pass(np.zeros(key[0], np.int32), *key[1:])
            self._fresh[key] = jax.device_put(made, self.place)
        return dict(self._fresh[key])


def _load(own: Routed, flags_R3E, asked: int) -> tuple[int, bool]:
    """Load what the first round with something missing needs.

    Args:
      flags_R3E: what the layer told.
      asked: the rounds whose needs are counted already.

    Returns:
      (rounds whose needs are counted now, whether nothing was missing).
    """
    slots, index = own.slots, own.place
    for t, flags_3E in enumerate(flags_R3E):
        missing = np.flatnonzero(flags_3E[MISSING]).tolist()
        loads = None
        if t >= asked:
            asked = t + 1
            slots.cache.routed(index, _padded(flags_3E[SCORE], slots))
            needed = np.flatnonzero(flags_3E[NEEDED]).tolist()
            loads = slots.cache.need(index, needed)
        if missing:
            if loads is None or not loads.loads:
                loads = slots.cache.need(index, missing)
            slots.fill(index, loads)
            return asked, False
    return asked, True


def _padded(score_E, slots: Slots) -> np.ndarray:
    most = slots.pool.most_experts
    return np.pad(score_E, (0, most - len(score_E)))


def outside(flat: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a model by path, without those that have a row for each expert."""
    return {path: a for path, a in flat.items() if not in_bank(path)}


def in_bank(path: str) -> bool:
    """Whether the array of this path in a model is kept in a bank."""
    return "/experts/" in path and is_row_part(path)
