"""Steps in flight: dispatched to the device, their metrics not looked at yet."""

import collections
from collections.abc import Callable
from typing import Any

import jax

# Most steps that the host is ahead of the device. Enough to hide what the host does
# between two steps; each holds a batch and its metrics on the device.
AHEAD = 4


class Flight:
    """Looks at the metrics of steps in order, late enough that nobody waits for them.

    A step that is due (to be logged) has its metrics copied to the host from the moment
    it is dispatched; they are looked at after the next dispatch. Other steps are only
    looked at (for the guard) when they are `AHEAD` steps old, or with a step that is
    due. So the host stops for no step that the device has just been given, and what is
    looked at when depends on step numbers alone: the same in all processes of a job.

    Args:
      look: called as `look(step, metrics, due)`, in the order of the steps; may block.
      due: whether a step is to be logged.
    """

    def __init__(self, look: Callable[[int, Any, bool], None], due):
        self._look, self._due = look, due
        self._steps: collections.deque[tuple[int, Any]] = collections.deque()

    def add(self, step: int, metrics) -> None:
        """Step number `step` was dispatched; look at what is behind it."""
        if self._due(step):
            for leaf in jax.tree.leaves(metrics):
                leaf.copy_to_host_async()
        if self._steps and self._due(self._steps[-1][0]):
            self.land()
        elif len(self._steps) == AHEAD:
            self._look_at_next()
        self._steps.append((step, metrics))

    def land(self) -> None:
        """Look at all steps, waiting for the device where need be."""
        while self._steps:
            self._look_at_next()

    def _look_at_next(self) -> None:
        step, metrics = self._steps.popleft()
        self._look(step, metrics, self._due(step))
