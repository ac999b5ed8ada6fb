"""Steps in flight: the device has them, but nobody looked at their metrics yet."""

import collections
from collections.abc import Callable
from typing import Any

import jax

# The host is at most this many steps ahead of the device. That hides the host's work
# between two steps; each of them holds a batch and its metrics on the device.
AHEAD = 4


class Flight:
    """Looks at the metrics of steps in order, late enough that nobody waits for them.

    A step that is due (to be logged) has its metrics copied to the host from the moment
    it is dispatched; they are looked at after the next dispatch. Other steps are only
    looked at (for the guard) when they are `AHEAD` steps old, or with a step that is
    due. So the host never waits for a step that it has just dispatched. The order of
    looks depends on step numbers alone, so it is the same in all processes of a job.

    Args:
      look: called as `look(step, metrics, due)`, in the order of the steps; may block.
      due: called as `due(step)`; says whether a step is to be logged.
    """

    def __init__(self, look: Callable[[int, Any, bool], None], due):
        self._look, self._due = look, due
        self._steps: collections.deque[tuple[int, Any]] = collections.deque()

    def add(self, step: int, metrics) -> None:
        """Add a step that was just dispatched; look at earlier steps if it is time."""
        if self._due(step):
            for leaf in jax.tree.leaves(metrics):
                leaf.copy_to_host_async()
        if self._steps and self._due(self._steps[-1][0]):
            self.land()
        elif len(self._steps) == AHEAD:
            self._look_at_next()
        self._steps.append((step, metrics))

    def land(self) -> None:
        """Look at all steps; wait for the device if necessary."""
        while self._steps:
            self._look_at_next()

    def _look_at_next(self) -> None:
        step, metrics = self._steps.popleft()
        self._look(step, metrics, self._due(step))
