"""The points of the curves as CSV, one run and step a line, for other programs."""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

from moex.analysis.compare import Group

COLUMNS = ("group", "run", "seed", "kind")
NUMBERS = ("step", "tokens", "train_flops", "train_s")  # in the order of `Curve`


def write_points(groups: Sequence[Group], file: pathlib.Path) -> None:
    """Write every point of every run's curves; nothing is averaged over seeds."""
    escape = "backslashreplace"  # a name of a file may hold what UTF-8 cannot
    with file.open("w", newline="", encoding="utf-8", errors=escape) as out:
        lines = csv.writer(out)
        lines.writerow((*COLUMNS, *NUMBERS, groups[0].task.score))
        for group in groups:
            for run, curves in zip(group.runs, group.curves, strict=True):
                for kind, curve in curves.items():
                    about = (group.label, run.path, run.cfg.seed, kind)
                    fields = dataclasses.astuple(curve)
                    for point in zip(*(f.tolist() for f in fields), strict=True):
                        lines.writerow(about + point)
