"""Which experts of a model are resident in a limited number of slots.

It holds numbers, not arrays: real decoding copies an expert to the slot that the cache
names, and the simulator counts what that would cost.

L layers with routers · E experts, the most of a layer
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from moex.config.base import require
from moex.offload.policies import Key, Policy


@dataclasses.dataclass(frozen=True)
class Loads:
    """The experts of a pass through a layer: resident or loaded, in ascending order."""

    hits: tuple[int, ...]  # experts that were resident
    loads: tuple[tuple[int, int], ...]  # (expert, its new slot)
    evicted: tuple[Key, ...]  # those whose slots were taken
    left: tuple[int, ...]  # no slot is free for these: ask again after computing


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of each layer, int64[L]."""

    hits_L: np.ndarray  # experts that were needed and resident
    misses_L: np.ndarray  # experts that were needed and absent
    hosted_L: np.ndarray  # misses that the host computed, so that nothing was loaded
    prefetched_L: np.ndarray  # experts that were loaded before they were needed
    useful_L: np.ndarray  # hits that a prefetch made
    evictions_L: np.ndarray  # experts that lost their slot
    bytes_L: np.ndarray  # moved into slots

    @classmethod
    def zeros(cls, num_layers: int) -> "Statistics":
        """Counts before anything has happened."""
        fields = dataclasses.fields(cls)
        return cls(*(np.zeros(num_layers, np.int64) for _ in fields))

    @property
    def hit_rate(self) -> float:
        """The share of needed experts that were resident; 1 if none was needed."""
        hits, misses = int(self.hits_L.sum()), int(self.misses_L.sum())
        return hits / (hits + misses) if hits + misses else 1.0

    @property
    def loads(self) -> int:
        """Experts that were moved into slots."""
        return int((self.misses_L - self.hosted_L + self.prefetched_L).sum())


class ExpertCache:
    """The slots, who is in them, and who leaves.

    An expert that the last `need` named keeps its slot until the next one; a pinned one
    keeps it until it is unpinned; a prefetched one keeps it until its layer was passed,
    against other prefetches, and as far as other layers find slots without it.

    Attributes:
      slot_of_LE: the slot of each expert, int32; -1: absent. Slots count from 0 through
        all layers.
      statistics: `Statistics`.

    Args:
      num_layers: L.
      num_experts: E.
      slots: of the whole cache.
      policy: says who leaves.
      per_layer: slots of each layer, which sum to `slots`; None: all layers share all.
      expert_bytes: of one expert of each layer, or one number for all.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        slots: int,
        policy: Policy,
        *,
        per_layer: Sequence[int] | None = None,
        expert_bytes: int | Sequence[int] = 0,
    ):
        shape = num_layers, num_experts
        require(slots >= 1, "slots", slots, "1 or more")
        if policy.shape != shape:
            raise ValueError(f"a policy for {policy.shape}, a cache for {shape}")
        if per_layer is not None:
            told = list(per_layer)
            allowed = f"{num_layers} numbers of 1 or more that sum to {slots}"
            ok = len(told) == num_layers and min(told) >= 1 and sum(told) == slots
            require(ok, "per_layer", told, allowed)
        self.policy, self.slots = policy, slots
        self.slot_of_LE = np.full(shape, -1, np.int32)
        self.statistics = Statistics.zeros(num_layers)
        self._bytes_L = np.broadcast_to(np.asarray(expert_bytes, np.int64), num_layers)
        # The pools of slots: one of each layer, or one of all.
        sizes = [slots] if per_layer is None else list(per_layer)
        self._sizes = sizes
        ends = np.cumsum([0, *sizes]).tolist()
        self._free = [
            list(range(end - 1, first - 1, -1))
            for first, end in zip(ends, ends[1:], strict=False)
        ]
        self._pool_L = [0 if per_layer is None else i for i in range(num_layers)]
        self._pins: Counter[Key] = Counter()
        self._held_LE = np.zeros(shape, bool)  # named by the last `need`, or pinned
        self._now: tuple[Key, ...] = ()
        self._ahead_LE = np.zeros(shape, bool)  # prefetched, and not needed yet

    def pin(self, keys: Iterable[Key]) -> None:
        """Keep resident experts in their slots; pins of one expert add up."""
        for key in keys:
            if self.slot_of_LE[key] < 0:
                raise ValueError(f"expert {key} is not resident; it cannot be pinned")
            self._pins[key] += 1
            self._held_LE[key] = True

    def unpin(self, keys: Iterable[Key]) -> None:
        """Take back one pin of each of these experts."""
        for key in keys:
            if not self._pins[key]:
                raise ValueError(f"expert {key} is not pinned")
            self._pins[key] -= 1
        self._hold(self._now)

    def routed(self, layer: int, score_E) -> None:
        """Tell the policy the scores of a layer's router, before `need`."""
        self.policy.routed(layer, score_E)

    def predicted(self, layer: int, experts: Iterable[int]) -> None:
        """Tell the policy which experts a layer will need."""
        self.policy.predicted(layer, experts)

    def slots_for(self, layer: int) -> int:
        """How many slots the experts of a layer may have."""
        return self._sizes[self._pool_L[layer]]

    def need(
        self, layer: int, experts: Iterable[int], hosted: Iterable[int] = ()
    ) -> Loads:
        """Make experts resident that a layer computes now.

        Where they do not all fit, those that do come first; the caller computes them
        and asks again for `left`.

        Args:
          layer: its number among those with routers.
          experts: those that the device computes.
          hosted: those that the host computes; they are counted, and get no slot.
        """
        wanted = sorted({int(e) for e in experts})
        slot_E, count = self.slot_of_LE[layer], self.statistics
        others = sorted({int(e) for e in hosted})
        here = [e for e in others if slot_E[e] >= 0]
        count.hits_L[layer] += len(here)
        count.misses_L[layer] += len(others) - len(here)
        count.hosted_L[layer] += len(others) - len(here)
        for e in others:
            self.policy.used((layer, e))
        hits = [e for e in wanted if slot_E[e] >= 0]
        absent = [e for e in wanted if slot_E[e] < 0]
        self._hold((layer, e) for e in hits)
        count.useful_L[layer] += int(self._ahead_LE[layer, [*hits, *here]].sum())
        self._ahead_LE[layer] = False
        # Experts that were prefetched for other layers leave last.
        loads, evicted = self._load(layer, absent, self._held_LE | self._ahead_LE)
        if len(loads) < len(absent):
            keep_LE = self._held_LE.copy()
            keep_LE[layer, [e for e, _ in loads]] = True
            more, others = self._load(layer, absent[len(loads) :], keep_LE)
            loads, evicted = loads + more, evicted + others
        loaded = [e for e, _ in loads]
        self._hold((layer, e) for e in [*hits, *loaded])
        if wanted and not hits and not loads:
            raise ValueError(f"all slots that layer {layer} may use are pinned")
        for e in sorted([*hits, *loaded]):
            self.policy.used((layer, e))
        count.hits_L[layer] += len(hits)
        count.misses_L[layer] += len(loads)
        return Loads(tuple(hits), loads, evicted, tuple(absent[len(loads) :]))

    def prefetch(
        self, layer: int, experts: Iterable[int], budget: int | None = None
    ) -> Loads:
        """Load experts before a layer asks for them; they are no misses and no hits.

        Args:
          layer: which will need them.
          experts: those most likely to be needed first.
          budget: the most to load; None: no limit.
        """
        wanted = list(dict.fromkeys(int(e) for e in experts))
        hits = [e for e in wanted if self.slot_of_LE[layer, e] >= 0]
        absent = [e for e in wanted if self.slot_of_LE[layer, e] < 0]
        keep_LE = self._held_LE | self._ahead_LE
        keep_LE[layer, wanted] = True
        loads, evicted = self._load(layer, absent[:budget], keep_LE)
        self._ahead_LE[layer, [e for e, _ in loads]] = True
        self.statistics.prefetched_L[layer] += len(loads)
        return Loads(tuple(hits), loads, evicted, tuple(absent[len(loads) :]))

    def _hold(self, now: Iterable[Key]) -> None:
        """Hold the pinned experts and those that compute now, and no others."""
        self._now = tuple(now)
        self._held_LE[:] = False
        for key in (*self._now, *(+self._pins)):
            self._held_LE[key] = True

    def _load(self, layer: int, absent: Sequence[int], keep_LE: np.ndarray):
        """Give slots to experts; returns (expert, slot) and the keys that left."""
        free, shared = self._free[self._pool_L[layer]], len(self._free) == 1
        allowed_LE = (self.slot_of_LE >= 0) & ~keep_LE
        if not shared:
            own = allowed_LE[layer].copy()
            allowed_LE[:] = False
            allowed_LE[layer] = own
        loads, evicted, count = [], [], self.statistics
        for expert in absent:
            if free:
                slot = free.pop()
            elif allowed_LE.any():
                key = self.policy.victim(allowed_LE)
                slot = int(self.slot_of_LE[key])
                self.slot_of_LE[key] = -1
                allowed_LE[key] = self._ahead_LE[key] = False
                count.evictions_L[key[0]] += 1
                evicted.append(key)
            else:
                break
            self.slot_of_LE[layer, expert] = slot
            count.bytes_L[layer] += self._bytes_L[layer]
            loads.append((expert, slot))
        return tuple(loads), tuple(evicted)


def allocate(demand_L, slots: int, num_experts: int | Sequence[int]) -> list[int]:
    """Divide slots between layers in proportion to what each is predicted to need.

    Every layer gets one or more, and at most E. With more slots no layer gets fewer
    (the divisors of Sainte-Laguë).

    Args:
      demand_L: 0 or more each, such as the distinct experts that a layer's tokens have.
      slots: of all layers together.
      num_experts: of each layer, or one number for all.

    Returns:
      The slots of each layer; their sum is `slots`, or that of the experts if it is
      less.
    """
    demand_L = np.asarray(demand_L, np.float64)
    ok = demand_L.ndim == 1 and np.isfinite(demand_L).all() and (demand_L >= 0).all()
    require(ok, "demand", demand_L.tolist(), "finite numbers of 0 or more")
    num_layers = len(demand_L)
    require(slots >= num_layers, "slots", slots, f"{num_layers} or more, one a layer")
    given_L = np.ones(num_layers, np.int64)
    most_L = np.broadcast_to(np.asarray(num_experts), num_layers)
    for _ in range(min(slots, int(most_L.sum())) - num_layers):
        # The largest quotient first; of equal ones the layer with the fewest slots.
        quotient_L = np.where(given_L < most_L, demand_L / (2 * given_L + 1), -1.0)
        given_L[np.lexsort((given_L, -quotient_L))[0]] += 1
    return given_L.tolist()
