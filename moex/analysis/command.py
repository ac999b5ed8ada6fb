"""`moex compare`: a table of runs, a file of them, or whether two are equal."""

import pathlib
from collections.abc import Sequence

from moex.analysis.compare import Group, make_groups, table
from moex.analysis.equality import Tolerance, assert_equal
from moex.analysis.plotting import page, picture, plot_lines
from moex.analysis.points import write_points
from moex.analysis.reading import read_runs
from moex.config.base import ConfigError, require
from moex.data.files import naming
from moex.json_files import dump_json

ENDINGS = (".html", ".png", ".csv", ".json")


def run(
    paths: Sequence[pathlib.Path],
    *,
    as_json: bool = False,
    out: pathlib.Path | None = None,
    tolerance: tuple[float, float] | None = None,
) -> str:
    """What `moex compare` prints.

    Args:
      paths: run directories.
      as_json: JSON instead of a table.
      out: a file to write; its ending, one of `ENDINGS`, says what.
      tolerance: check that two runs are equal instead; see `Tolerance`.

    Raises:
      ConfigError: for what cannot be compared, or written.
      RunsDiffer: if two runs differ that were to be equal.
    """
    if tolerance is not None:
        if as_json or out is not None:
            given = "--json" if as_json else "--out"
            raise ConfigError(f"{given}: --assert-equal says one line; leave it out.")
        return assert_equal(paths, Tolerance(*tolerance))
    if out is not None:  # before anything is read
        allowed = f"a name that ends in {', '.join(ENDINGS)}"
        require(out.suffix in ENDINGS, "--out", str(out), allowed)
        require(out.parent.is_dir(), "--out", str(out), "in a folder that exists")
    groups = make_groups(read_runs(paths))
    if out is not None:
        with naming(out):
            _write(groups, out)
    if as_json:
        return _json(groups)
    return "\n".join([table(groups), *([] if out is None else [f"written: {out}"])])


def _write(groups: Sequence[Group], out: pathlib.Path) -> None:
    if out.suffix == ".json":
        out.write_text(_json(groups) + "\n", encoding="utf-8")
    elif out.suffix == ".csv":
        write_points(groups, out)
    else:
        draw = page if out.suffix == ".html" else picture
        draw(plot_lines(groups), out)


def _json(groups: Sequence[Group]) -> str:
    return dump_json({"groups": [group.to_dict() for group in groups]})
