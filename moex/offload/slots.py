"""The slots on the device that experts of a pool take turns in.

C slots · E experts of a layer
"""

import functools
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from moex.offload.bank import Bank
from moex.offload.cache import ExpertCache, Loads
from moex.offload.layout import Pool
from moex.offload.policies import Policy

MOST_ROWS = 8  # of one call that fills slots
TRACED: Counter[str] = Counter()  # how often each function was compiled, by its name


@functools.partial(jax.jit, donate_argnames="slots")
def _fill(slots: dict, rows: list[dict], place_N) -> dict:
    """Put rows into the slots of these numbers."""
    TRACED["fill"] += 1
    put = jax.lax.dynamic_update_index_in_dim
    for i, row in enumerate(rows):
        slots = {name: put(a, row[name], place_N[i], 0) for name, a in slots.items()}
    return slots


class Slots:
    """The slots of a pool on the device, and who is in them.

    Attributes:
      pool: `Pool`.
      bank: the rows of the pool.
      cache: `ExpertCache`; its layers are those of the pool.
      arrays: the slots, by the names of the parts of a row: [C, ...].
      seconds: that were spent on filling them, without those of compiling.
    """

    def __init__(self, pool: Pool, bank: Bank, slots: int, policy: Policy, place):
        self.pool, self.bank, self._place = pool, bank, place
        sizes = policy.shape
        self.cache = ExpertCache(*sizes, slots, policy, expert_bytes=pool.row_bytes)
        made = jax.jit(
            lambda: {p.name: jnp.zeros((slots, *p.shape), p.dtype) for p in pool.parts},
            out_shardings=place,
        )
        self.arrays = made()
        self.seconds = 0.0

    def slot_E(self, index: int) -> np.ndarray:
        """The slots of the experts of a layer; -1: absent."""
        experts = self.pool.layers[index].experts
        return self.cache.slot_of_LE[index, :experts].copy()

    def fill(self, index: int, loads: Loads) -> None:
        """Put the experts of a layer into the slots that the cache gave them."""
        begin, compiled = time.perf_counter(), TRACED["fill"]
        first = self.pool.layers[index].first
        pairs = [(first + expert, slot) for expert, slot in loads.loads]
        for i in range(0, len(pairs), MOST_ROWS):
            some = pairs[i : i + MOST_ROWS]
            # A power of two, so that few programs are compiled: the last one repeats.
            some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
            rows = [self.bank.row(number) for number, _ in some]
            rows = jax.device_put(rows, self._place)
            places = np.array([slot for _, slot in some], np.int32)
            self.arrays = _fill(self.arrays, rows, places)
        jax.block_until_ready(self.arrays)
        if compiled == TRACED["fill"]:
            self.seconds += time.perf_counter() - begin

    def by_item(self) -> dict[str, dict]:
        """The arrays by the item of their parts, "params" or "state", and name."""
        found: dict[str, dict] = {}
        for part in self.pool.parts:
            found.setdefault(part.item, {})[part.name] = self.arrays[part.name]
        return found
