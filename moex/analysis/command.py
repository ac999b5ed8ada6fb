"""`moex compare`: a table of runs, a plot of them, or whether two are equal."""

import json
import pathlib
from collections.abc import Sequence

from moex.analysis.compare import make_groups, table
from moex.analysis.equality import assert_equal
from moex.analysis.plotting import check_ending, plot
from moex.analysis.reading import read_runs
from moex.config import ConfigError


def run(
    paths: Sequence[pathlib.Path],
    *,
    as_json: bool = False,
    plot_file: pathlib.Path | None = None,
    tolerance: float | None = None,
) -> str:
    """What `moex compare` prints.

    Args:
      paths: run directories.
      as_json: JSON instead of a table.
      plot_file: where to draw the curves.
      tolerance: check that two runs are equal instead; see `assert_equal`.

    Raises:
      ConfigError: for what cannot be compared, or drawn.
      RunsDiffer: if two runs differ that were to be equal.
    """
    if tolerance is not None:
        if as_json or plot_file is not None:
            given = "--json" if as_json else "--plot"
            raise ConfigError(f"{given}: --assert-equal says one line; leave it out.")
        return assert_equal(paths, tolerance)
    if plot_file is not None:
        check_ending(plot_file)  # before anything is read
    groups = make_groups(read_runs(paths))
    if plot_file is not None:
        plot(groups, plot_file)
    if as_json:
        return json.dumps({"groups": [group.to_dict() for group in groups]})
    drawn = [] if plot_file is None else [f"plot: {plot_file}"]
    return "\n".join([table(groups), *drawn])
