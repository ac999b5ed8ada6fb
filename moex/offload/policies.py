"""Which expert leaves a cache of experts when another one needs its place.

One contract for the simulator and for real decoding: the cache (`cache.py`) tells a
policy what happens, and asks for a victim. A key is (layer, expert); layers are those
with routers, numbered from 0, and rounds of a chain share one layer.

Sources: minus recent score, arXiv:2504.05897 (with the scores on the right experts);
eviction of experts that are not predicted, arXiv:2410.17954; Belady 1966.

L layers · E experts, the most of a layer
"""

from collections.abc import Iterable, Sequence

import numpy as np

from moex.config.base import ConfigError, require

Key = tuple[int, int]


class Policy:
    """The state of a policy, and its choice.

    The victim is the allowed expert of the smallest worth; of equal ones that which was
    used longest ago, and then the first: the same events give the same victims.
    """

    def __init__(self, num_layers: int, num_experts: int):
        self.shape = num_layers, num_experts
        self._time = 0
        self._last_LE = np.full(self.shape, -1, np.int64)  # -1: not used yet

    def used(self, key: Key) -> None:
        """Note that an expert computes now, whether it was resident or is loaded."""
        self._last_LE[key] = self._time
        self._time += 1

    def routed(self, layer: int, score_E) -> None:
        """Note the scores of a layer's router: means over the present tokens, >= 0."""

    def predicted(self, layer: int, experts: Iterable[int]) -> None:
        """Note the experts that the next pass through a layer probably needs."""

    def victim(self, allowed_LE: np.ndarray) -> Key:
        """The expert that leaves, among the allowed ones; one or more are."""
        worth_LE = np.where(allowed_LE, self.worth_LE(), np.inf)
        least_LE = allowed_LE & (worth_LE == worth_LE.min())
        last_LE = np.where(least_LE, self._last_LE, np.iinfo(np.int64).max)
        layer, expert = divmod(int(last_LE.argmin()), self.shape[1])
        return layer, expert

    def worth_LE(self) -> np.ndarray:
        """The worth of keeping each expert, float[L, E], finite."""
        raise NotImplementedError


class Lru(Policy):
    """The expert that was used longest ago leaves."""

    def worth_LE(self):
        return self._last_LE


class Lfu(Policy):
    """The expert that was used least often leaves."""

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__(num_layers, num_experts)
        self._count_LE = np.zeros(self.shape, np.int64)

    def used(self, key):
        super().used(key)
        self._count_LE[key] += 1

    def worth_LE(self):
        return self._count_LE


class Random(Policy):
    """A random expert leaves."""

    def __init__(self, num_layers: int, num_experts: int, seed: int = 0):
        super().__init__(num_layers, num_experts)
        self._rng = np.random.default_rng(seed)

    def worth_LE(self):
        return self._rng.random(self.shape)


class Static(Policy):
    """The expert of the least fixed score leaves: the hottest ones stay.

    A needed expert must get a slot, so that some slots of a layer change.

    Args:
      score_LE: such as how often a trace has each expert.
    """

    def __init__(self, score_LE):
        score_LE = np.asarray(score_LE, np.float64)
        super().__init__(*score_LE.shape)
        if not np.isfinite(score_LE).all():
            raise ConfigError("scores of a static policy: must be finite.")
        self._score_LE = score_LE

    def worth_LE(self):
        return self._score_LE


class Mrs(Policy):
    """The expert of the smallest running score leaves ("minus recent score").

    After each routing of a layer, S = alpha * top(scores) + (1 - alpha) * S, where
    top keeps the largest scores and makes the others 0.

    Args:
      top: scores to keep, 2K for K experts a token; at most E are there.
      alpha: the weight of the newest scores, in (0, 1].
    """

    def __init__(self, num_layers: int, num_experts: int, top: int, alpha: float = 0.5):
        super().__init__(num_layers, num_experts)
        require(0 < alpha <= 1, "alpha", alpha, "in (0, 1]")
        require(top >= 1, "top", top, "1 or more")
        self._top, self._alpha = min(top, num_experts), alpha
        self._sum_LE = np.zeros(self.shape)

    def routed(self, layer, score_E):
        score_E = np.asarray(score_E, np.float64)
        if not (np.isfinite(score_E).all() and (score_E >= 0).all()):
            raise ConfigError(
                f"scores of MoE layer {layer}: must be finite and 0 or more."
            )
        self._sum_LE[layer] *= 1 - self._alpha
        total = score_E.sum()
        if total > 0:  # 0: no token was routed
            # A stable sort keeps the first of equal scores.
            best = np.argsort(-score_E, kind="stable")[: self._top]
            # Sigmoid scores do not sum to 1.
            self._sum_LE[layer, best] += self._alpha * score_E[best] / total

    def worth_LE(self):
        return self._sum_LE


class Predicted(Policy):
    """An expert that is not predicted for the next pass through its layer leaves.

    A prediction is spent once its layer was routed.
    """

    def __init__(self, num_layers: int, num_experts: int):
        super().__init__(num_layers, num_experts)
        self._wanted_LE = np.zeros(self.shape, bool)

    def routed(self, layer, score_E):
        self._wanted_LE[layer] = False

    def predicted(self, layer, experts):
        self._wanted_LE[layer] = False
        self._wanted_LE[layer, list(experts)] = True

    def worth_LE(self):
        return self._wanted_LE.astype(np.float64)


class Belady(Policy):
    """The expert that is needed again last leaves: it knows the future.

    No policy that loads only what is needed has fewer misses, if every layer's needed
    experts fit into its slots together.

    Args:
      needs: the layer and the experts of every pass to come, in their order.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        needs: Sequence[tuple[int, Iterable[int]]],
    ):
        super().__init__(num_layers, num_experts)
        self._never = len(needs)
        self._later: dict[Key, list[int]] = {}
        for time in range(len(needs) - 1, -1, -1):
            layer, experts = needs[time]
            for expert in experts:
                self._later.setdefault((layer, int(expert)), []).append(time)
        self._next_LE = np.full(self.shape, self._never, np.int64)
        for key, times in self._later.items():
            self._next_LE[key] = times[-1]

    def used(self, key):
        super().used(key)
        times = self._later.get(key)
        if not times:
            raise ValueError(f"expert {key} is used more often than was foretold")
        times.pop()
        self._next_LE[key] = times[-1] if times else self._never

    def worth_LE(self):
        return -self._next_LE
