"""The time of training steps and of their parts."""

import contextlib
import time


class Stopwatch:
    """Measures the training steps alone: stop it around evaluation and saving."""

    PARTS = ("data", "dispatch", "wait")

    def __init__(self):
        self.total, self.mark = 0.0, time.perf_counter()
        self.last, self.parts = 0.0, dict.fromkeys(self.PARTS, 0.0)

    def stop(self) -> None:
        """Count the time since `start`."""
        self.total += time.perf_counter() - self.mark

    def start(self) -> None:
        """Go on counting."""
        self.mark = time.perf_counter()

    def read(self) -> float:
        """The seconds counted so far, those since `start` included."""
        return self.total + time.perf_counter() - self.mark

    @contextlib.contextmanager
    def part(self, name: str):
        """Count the time of the block as one of `PARTS`; the watch must be running."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap: "step", its parts, and "other", the rest."""
        now = self.read()
        parts, self.parts = self.parts, dict.fromkeys(self.PARTS, 0.0)
        step, self.last = now - self.last, now
        return {"step": step, **parts, "other": step - sum(parts.values())}
