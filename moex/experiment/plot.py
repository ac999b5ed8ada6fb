"""The picture of an experiment: the first column of each table, with all seeds."""

import pathlib
from typing import Any

import numpy as np

from moex.experiment.contract import Column, Experiment, Table
from moex.experiment.page import written
from moex.experiment.results import NotDone, Results

ROW, MARGIN = 0.3, 1.1  # inches of an arm, and of what is around them


def draw(experiment: Experiment, results: Results, file: pathlib.Path) -> None:
    """Write a PNG: a row for each arm, a point for each seed, the mean and interval."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tables = [t for t in experiment.tables if _known(results, t)]
    if not tables:
        return
    heights = [MARGIN + ROW * len(_known(results, t)) for t in tables]
    figure, axes = pyplot.subplots(
        len(tables),
        figsize=(7.5, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for ax, table in zip(axes[:, 0], tables, strict=True):
        _draw_table(ax, results, table)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _known(results: Results, table: Table) -> list[str]:
    """The arms of a table whose first figure is known."""
    return [arm for arm in table.arms if _values(results, arm, table.columns[0])]


def _values(results: Results, arm: str, column: Column) -> list[float]:
    try:
        return [column.scale * v for v in results.values(arm, column.figure).values()]
    except NotDone:
        return []


def _draw_table(ax: Any, results: Results, table: Table) -> None:
    column, arms = table.columns[0], _known(results, table)
    for y, arm in enumerate(arms):
        values = _values(results, arm, column)
        found = results.mean(arm, column.figure)
        colour = "tab:gray" if arm == table.against else "tab:blue"
        ax.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.35, ms=5)
        mean, half = column.scale * found.mean, found.half_width
        half = None if half is None else column.scale * half
        ax.errorbar(mean, y, xerr=half, fmt="D", color=colour, ms=5, capsize=3)
        text = written(found, column.form, column.scale)
        ax.annotate(
            text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
        if arm == table.against:
            ax.axvline(mean, color=colour, lw=0.8, ls="--")
    ax.set_yticks(range(len(arms)), arms)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xlabel(column.head)
    ax.set_title(table.title, fontsize=10, loc="left")
    ax.grid(axis="x", alpha=0.3)
