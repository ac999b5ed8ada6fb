"""The slots on the device that experts of a pool take turns in.

C slots · E experts of a layer
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moex.offload.bank import Bank
from moex.offload.cache import ExpertCache
from moex.offload.policies import Policy

MOST_ROWS = 8  # of one call that fills slots
TRACED: Counter[str] = Counter()  # how often each function was compiled, by its name


@functools.partial(jax.jit, donate_argnames="slots")
def _fill(slots: dict, rows: list[dict], place_N) -> dict:
    """Put rows into the slots of these numbers."""
    TRACED["fill"] += 1
    put = jax.lax.dynamic_update_index_in_dim
    types = {name: array.dtype for name, array in slots.items()}
    # As bfloat16, a CPU would turn all slots into float32 and back.
    slots, *rows = ({n: _bits(a) for n, a in own.items()} for own in (slots, *rows))
    for i, row in enumerate(rows):
        slots = {name: put(a, row[name], place_N[i], 0) for name, a in slots.items()}
    view = jax.lax.bitcast_convert_type
    return {name: view(a, types[name]) for name, a in slots.items()}


def _bits(array):
    """An array of bfloat16 as integers of its bits; others as they are."""
    if array.dtype != jnp.bfloat16:
        return array
    return jax.lax.bitcast_convert_type(array, jnp.uint16)


class Slots:
    """The slots of a pool on the device, and who is in them.

    Attributes:
      pool: `Pool`.
      bank: the rows of the pool.
      cache: `ExpertCache`; its layers are those of the pool.
      arrays: the slots, by the names of the parts of a row: [C, ...].
      seconds: that were spent on filling them.
      moved: experts that were put into them.
    """

    def __init__(
        self,
        bank: Bank,
        slots: int,
        make_policy: Callable[[], Policy],
        place,
        per_layer: Sequence[int] | None = None,
    ):
        """Make empty slots.

        Args:
          bank: the rows.
          slots: how many.
          make_policy: makes the policy that says who leaves.
          place: the sharding of the arrays.
          per_layer: slots of each layer; None: all layers share them.
        """
        self.pool, self.bank, self._place = bank.pool, bank, place
        self._count, self._make_policy, self._per_layer = slots, make_policy, per_layer
        pool = bank.pool
        made = jax.jit(
            lambda: {p.name: jnp.zeros((slots, *p.shape), p.dtype) for p in pool.parts},
            out_shardings=place,
        )
        self.arrays = made()
        self.forget()

    def forget(self) -> None:
        """Begin anew: all slots are empty, and nothing was counted."""
        policy, self.seconds, self.moved = self._make_policy(), 0.0, 0
        self.cache = ExpertCache(
            *policy.shape,
            self._count,
            policy,
            per_layer=self._per_layer,
            expert_bytes=self.pool.row_bytes,
        )

    def slot_E(self, index: int) -> np.ndarray:
        """The slots of the experts of a layer; -1: absent."""
        experts = self.pool.layers[index].experts
        return self.cache.slot_of_LE[index, :experts].copy()

    def fill(
        self, index: int, loads: Sequence[tuple[int, int]], wait: bool = True
    ) -> None:
        """Put the experts of a layer into the slots that the cache gave them.

        Args:
          index: of the layer in the pool.
          loads: pairs (expert, slot) from the cache.
          wait: until they are there; False: something else computes meanwhile.
        """
        if not loads:
            return
        begin = time.perf_counter()
        first = self.pool.layers[index].first
        pairs = [(first + expert, slot) for expert, slot in loads]
        for i in range(0, len(pairs), MOST_ROWS):
            some = pairs[i : i + MOST_ROWS]
            # A power of two, so that few programs are compiled: the last one repeats.
            some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
            rows = [self.bank.row(number) for number, _ in some]
            rows = jax.device_put(rows, self._place)
            places = np.array([slot for _, slot in some], np.int32)
            self.arrays = _fill(self.arrays, rows, places)
        if wait:
            jax.block_until_ready(self.arrays)
        self.seconds += time.perf_counter() - begin
        self.moved += len(pairs)

    def by_item(self) -> dict[str, dict]:
        """The arrays by the item of their parts, "params" or "state", and name."""
        return dict(zip(("params", "state"), self.split(self.arrays), strict=True))

    def split(self, arrays: dict) -> tuple[dict, dict]:
        """Arrays by the names of parts, as those of "params" and those of "state"."""
        params, state = (
            {part.name: arrays[part.name] for part in self.pool.parts if part.item == i}
            for i in ("params", "state")
        )
        return params, state
