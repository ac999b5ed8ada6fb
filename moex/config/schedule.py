"""Numbers that may change during training: a float, or a `Schedule` of the step."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from moex.config.base import Config, caution, require


@dataclasses.dataclass(kw_only=True, slots=True)
class Schedule(Config):
    """Straight lines between points, constant outside of them.

    `Schedule(points=((0, 0.01), (1000, 0.0)))` falls to 0 over 1000 optimizer steps;
    two points one step apart make a jump.
    """

    points: tuple[tuple[float, float], ...]  # (optimizer step, value), steps rising

    def validate(self, path):
        where, points = f"{path}.points", self.points
        require(len(points) >= 1, where, points, "not empty")
        rising = all(a < b for (a, _), (b, _) in itertools.pairwise(points))
        require(rising, where, points, "(step, value) pairs with rising steps")

    def check_reached(self, steps, path):
        """Warn of a last point that a run of this many steps does not reach."""
        at, values = zip(*self.points, strict=True)
        reached = float(np.interp(steps - 1, at, values))
        late = [value for step, value in self.points if step > steps - 1]
        if any(value != reached for value in late):
            step, value = self.points[-1]
            caution(
                f"{path}.points: the last one, {value} at step {step}, is not reached: "
                f"the last of {steps} steps is number {steps - 1}, with {reached:.4g}."
            )


def value_at(value, step):
    """The number that `value` stands for at an optimizer step.

    Args:
      value: a float, a `Schedule`, or the points of one.
      step: int or int32 scalar, from 0; it may be traced.
    """
    points = points_of(value)
    if points is None:
        return value
    steps, values = zip(*points, strict=True)
    at = jnp.asarray(step, jnp.float32)
    return jnp.interp(at, jnp.array(steps, jnp.float32), jnp.array(values, jnp.float32))


def static_value(value) -> Any:
    """The value in a form that can be hashed: a float, or a schedule's points."""
    return value if points_of(value) is None else points_of(value)


def points_of(value) -> tuple | None:
    """The points of a `Schedule` (or points themselves); None for a plain number."""
    points = value.points if isinstance(value, Schedule) else value
    if not isinstance(points, (tuple, list)):
        return None
    return tuple((float(step), float(v)) for step, v in points)


def values_of(value) -> list[float]:
    """All values that a number or the corners of a schedule take."""
    points = points_of(value)
    return [float(value)] if points is None else [v for _, v in points]


def is_always_zero(value) -> bool:
    """Whether the value is 0 at every step."""
    return all(v == 0 for v in values_of(value))


def require_values(ok, path, value, allowed) -> None:
    """Call `require` for each value that a number or a schedule takes."""
    for v in values_of(value):
        require(ok(v), path, v, allowed)
