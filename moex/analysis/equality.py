"""Are two runs the same run? What both logged, line by line, times apart."""

import math
import pathlib
from collections.abc import Sequence

from moex.analysis.reading import KINDS, Run, read_runs
from moex.config import ConfigError

MEASURED = "perf/"  # of the machine, not of the training: free to differ
PLACE = ("kind", "step")


class RunsDiffer(RuntimeError):
    """Two runs that were to be equal are not; the message says where first."""


def assert_equal(paths: Sequence[pathlib.Path], tolerance: float) -> str:
    """One line that says how much is equal in two runs.

    Args:
      paths: two run directories.
      tolerance: of numbers, over the larger of the two; 0: the same number.

    Raises:
      ConfigError: for another number of runs, or what `read_runs` refuses.
      RunsDiffer: with the first step and quantity that differs.
    """
    if len(paths) != 2:
        raise ConfigError(f"--assert-equal: compares two runs; got {len(paths)}.")
    a, b = read_runs(paths)
    steps, names = set[int](), set[str]()
    places = {
        (step, order)
        for run in (a, b)
        for order, kind in enumerate(KINDS)
        for step in run.lines[kind]
    }
    for step, order in sorted(places):
        kind = KINDS[order]
        names |= _equal_lines(a, b, step, kind, tolerance)
        steps.add(step)
    within = f"within {tolerance:g}" if tolerance else "exactly"
    return (
        f"{a.path} and {b.path} are {within} equal: {len(names)} quantities compared "
        f"at {len(steps)} steps"
    )


def _equal_lines(a: Run, b: Run, step: int, kind: str, tolerance: float) -> set[str]:
    """Check one line of both runs; returns the names of what was compared.

    Raises:
      RunsDiffer: if it differs.
    """
    for run in (a, b):
        if step not in run.lines[kind]:
            raise RunsDiffer(f"step {step}: {run.path} has no {kind} line.")
    one, other = a.lines[kind][step], b.lines[kind][step]
    names = [n for n in one | other if n not in PLACE and not n.startswith(MEASURED)]
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


def same(x, y, tolerance: float) -> bool:
    """Whether two values are equal; numbers may be `tolerance` apart, relatively."""
    if not (_is_number(x) and _is_number(y)):
        return x == y
    if math.isnan(x) or math.isnan(y):
        return math.isnan(x) and math.isnan(y)
    # Nothing is close to infinity, and an exact comparison rounds nothing.
    return x == y or (tolerance > 0 and math.isclose(x, y, rel_tol=tolerance))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _apart(x, y) -> str:
    return f"; difference {y - x:.6g}" if _is_number(x) and _is_number(y) else ""
