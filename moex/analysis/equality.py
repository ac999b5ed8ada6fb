"""Check that two runs are equal: all that they logged, line by line, but for times."""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from moex.analysis.reading import Run, read_runs
from moex.config.base import ConfigError, RunError
from moex.runs.lines import KINDS, WHICH

# Figures that depend on the machine or on the mesh: they may differ.
APART = ("perf/", "moe/device_")
PLACE = ("kind", "step")


class Tolerance(NamedTuple):
    """How far numbers may be apart: |x - y| <= max(relative * max(|x|, |y|), absolute).

    Both 0: they must be the same number.
    """

    relative: float = 0.0
    absolute: float = 0.0

    def __str__(self) -> str:
        absolute = f" or {self.absolute:g}" if self.absolute else ""
        return f"within {self.relative:g} of the larger{absolute}"


class RunsDiffer(RunError):
    """Two runs differ that were to be equal; the message names the first difference."""


def assert_equal(paths: Sequence[pathlib.Path], tolerance: Tolerance) -> str:
    """Check that two runs are equal; returns a line that says how much was compared.

    Args:
      tolerance: for numbers; all else must be the same, and NaN is equal to NaN.

    Raises:
      ConfigError: for another number of runs, or what `read_runs` refuses.
      RunsDiffer: with the first step and quantity that differs.
    """
    if len(paths) != 2:
        raise ConfigError(f"--assert-equal: compares two runs; got {len(paths)}.")
    a, b = read_runs(paths)
    steps = {step for run in (a, b) for kind in KINDS for step in run.lines[kind]}
    names = set[str]()
    for step in sorted(steps):
        for kind in KINDS:
            if step in a.lines[kind] or step in b.lines[kind]:
                names |= _equal_lines(a, b, step, kind, tolerance)
    how = f", numbers {tolerance}" if any(tolerance) else " exactly"
    return (
        f"{a.path} and {b.path} are equal{how}: {len(names)} quantities compared at "
        f"{len(steps)} steps"
    )


def _equal_lines(
    a: Run, b: Run, step: int, kind: str, tolerance: Tolerance
) -> set[str]:
    """Check one line of both runs; returns the names of what was compared."""
    for run in (a, b):
        if step not in run.lines[kind]:
            raise RunsDiffer(f"step {step}: {run.path} has no {kind} line.")
    one, other = a.lines[kind][step], b.lines[kind][step]
    names = [n for n in one | other if n not in PLACE and not n.startswith(APART)]
    if any(tolerance):
        names = [name for name in names if not name.endswith(WHICH)]
    for name in names:
        where = f"step {step}, {kind} {name}"
        for run in (a, b):
            if name not in run.lines[kind][step]:
                raise RunsDiffer(f"{where}: {run.path} does not have it.")
        x, y = one[name], other[name]
        if not same(x, y, tolerance):
            raise RunsDiffer(
                f"{where}: {x!r} in {a.path}, {y!r} in {b.path}{_apart(x, y)}."
            )
    return {f"{kind} {name}" for name in names}


def same(x, y, tolerance: Tolerance) -> bool:
    """Whether two values are equal within a `Tolerance`."""
    if not (_is_number(x) and _is_number(y)):
        return x == y
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    if x == y or not any(tolerance):  # exactly: floats round large integers
        return x == y
    # `isclose(inf, x)` is False unless x is inf, as it has to be.
    return math.isclose(x, y, rel_tol=tolerance.relative, abs_tol=tolerance.absolute)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _apart(x, y) -> str:
    return f"; difference {y - x:.6g}" if _is_number(x) and _is_number(y) else ""
