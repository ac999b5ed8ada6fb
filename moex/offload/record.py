"""A record of a pass through a model: what each layer used, and how long it took.

L layers with routers · E experts, the most of a layer
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from moex.offload.slots import Slots


class Turn(NamedTuple):
    """One time that a layer with experts ran."""

    layer: int  # number among those with routers
    first: bool  # no repetition after something was loaded
    experts: int  # that it computed, or the host meanwhile
    moves: int  # experts that were loaded afterwards
    seconds: float  # of everything but these moves
    moving: float  # seconds of the moves


@dataclasses.dataclass
class Pass:
    """One call of `Executor.run`.

    Attributes:
      rows_LE: int32, tokens that used each expert.
      score_LE: float32, mean scores of the router; those of the last round of a chain.
      turns: in order.
      forecasts: what was prefetched by, in order: (the layer that computed meanwhile,
        or -1 before the first one; a later layer; tokens of each of its experts).
      seconds: of all layers.
    """

    rows_LE: np.ndarray
    score_LE: np.ndarray
    turns: list[Turn] = dataclasses.field(default_factory=list)
    forecasts: list[tuple[int, int, np.ndarray]] = dataclasses.field(
        default_factory=list
    )
    seconds: float = 0.0

    @classmethod
    def empty(cls, slots: Sequence[Slots]) -> Self:
        """Make one for the layers of all pools, in which nothing is written."""
        most = max(own.pool.most_experts for own in slots)
        shape = sum(len(own.pool.layers) for own in slots), most
        return cls(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
