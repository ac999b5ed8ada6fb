"""Runs of an idea judged by a ladder: what is read, and what `moex compare` prints."""

import pathlib
from collections.abc import Sequence
from typing import Any

from moex import json_files
from moex.analysis.compare import Group, make_groups
from moex.analysis.ladder import Judgement, Law, Rung, decision, judge
from moex.analysis.reading import read_run, runs_of
from moex.config.base import ConfigError
from moex.runs.directory import RunDir
from moex.terminal import aligned

LAST = "last_eval_"  # begins the names of final held-out figures


def judged(paths: Sequence[pathlib.Path], ladder: pathlib.Path, as_json: bool) -> str:
    """Judge runs by a ladder; those that differ in their seed alone are one size.

    Args:
      paths: run directories, and folders of sweeps.
      ladder: as for `read_rungs`.
      as_json: give JSON and not a table.

    Raises:
      ConfigError: for runs or a ladder that cannot be used.
    """
    rungs = read_rungs(ladder)
    runs = [read_run(run) for path in paths for run in runs_of(path)]
    ideas = sorted(map(rung, make_groups(runs)), key=lambda idea: idea.spent("flops"))
    found = judge(rungs, ideas)
    return json_files.dump_json(to_dict(*found)) if as_json else text(*found)


def rung(group: Group) -> Rung:
    """The runs of a group of `moex compare`.

    Raises:
      ConfigError: if one was not evaluated.
    """
    score = group.task.FIGURES[0].name
    names = ("train_flops", "train_s", f"last_eval_{score}")
    flops, seconds, losses = (tuple(group.values(name)) for name in names)
    if None in losses:
        raise ConfigError(f"{group.label}: has no held-out loss; evaluate at the end.")
    return Rung(group.label, flops, seconds, losses)


def read_rungs(path: pathlib.Path) -> list[Rung]:
    """The sizes of a ladder: of the runs in a folder, at any depth, or of a JSON file.

    The file is that of `moex compare RUN RUN ... --out=ladder.json`.

    Raises:
      ConfigError: if there are no such runs, or moex cannot have written the file.
    """
    if path.is_file():
        return _rungs_of_file(path)
    files = sorted(path.rglob("config.json")) if path.is_dir() else []
    runs = [file.parent for file in files if RunDir(file.parent).is_run()]
    if not runs:
        raise ConfigError(
            f"--ladder={path}: must be a folder with runs, or a file of "
            "`moex compare --out=ladder.json`."
        )
    return [rung(group) for group in make_groups([read_run(run) for run in runs])]


def _rungs_of_file(path: pathlib.Path) -> list[Rung]:
    data, found = json_files.read_object(path), []
    groups = json_files.field(data, "groups", list[dict[str, Any]], str(path))
    for i, group in enumerate(groups):
        where = f"{path}, group {i}"
        runs = json_files.field(group, "runs", list[dict[str, Any]], where)
        label = json_files.field(group, "label", str, where)
        scores = [name for run in runs for name in run if name.startswith(LAST)]
        if not scores:
            raise ConfigError(f"{where}: has no held-out loss.")
        flops, seconds, losses = (
            tuple(json_files.field(run, name, float, where) for run in runs)
            for name in ("train_flops", "train_s", scores[0])
        )
        found.append(Rung(label, flops, seconds, losses))
    return found


def text(compute: Law, time: Law, found: Sequence[Judgement]) -> str:
    """The judgement for people: a row for each size, the law, the rule."""
    rows = [("idea", "held-out loss", "speed-up in compute", "in time", "")]
    for each in found:
        mark = "extrapolated" if each.extrapolated else ""
        speedups = str(each.compute), str(each.time)
        rows.append((each.name, f"{each.loss:.4f}", *speedups, mark))
    floor, alpha = compute.interval("floor"), compute.interval("alpha")
    lines = [
        aligned(rows, left=(0, 4)),
        f"The ladder: loss = {floor} + A * FLOPs^-a, a = {alpha}; it misses the means "
        f"of sizes by {compute.residual:.4f}, and seeds differ by "
        f"{compute.deviation:.4f}.",
        "Times are those of the machines that trained the runs.",
        decision(found),
    ]
    return "\n".join(lines)


def to_dict(compute: Law, time: Law, found: Sequence[Judgement]) -> dict:
    """The same as plain data."""
    laws: dict[str, dict[str, Any]] = {}
    for each in (compute, time):
        names = ("floor", "scale", "alpha")
        own: dict[str, Any] = {n: each.interval(n)._asdict() for n in names}
        seeds = {"residual": each.residual, "deviation": each.deviation}
        laws[each.axis] = own | {"unit": each.unit} | seeds
    ideas = []
    for one in found:
        speedups = {"compute": one.compute._asdict(), "time": one.time._asdict()}
        ideas.append(one._asdict() | speedups)
    return {"laws": laws, "ideas": ideas, "decision": decision(found)}
