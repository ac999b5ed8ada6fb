"""`moex train --sweep`: a grid of runs over fields, or configs, one after another.

Each point of the grid has a run directory of its own under --workdir and is trained by
a process of its own, so that the memory of one run is free again before the next.
`sweep.json` next to them holds the base config and the grid.
"""

import json
import pathlib
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moex import hints, json_files
from moex.config.base import ConfigError, flat, require
from moex.data.files import atomic_write, locked
from moex.process import fail, use_cpu
from moex.runs.children import Children, shell_code
from moex.runs.directory import RunDir, given_config
from moex.runs.grid import CONFIG, Point, Sweep, make_sweep

FILE = "sweep.json"
RECIPE = pathlib.Path(__file__).parents[2] / "launch" / "slurm.sbatch"


def claim(sweep: Sweep, workdir: pathlib.Path) -> None:
    """Write the grid to `workdir`, or check that it agrees with the grid there.

    Raises:
      ConfigError: if the sweep there has another config, other fields, or values that
        this one lacks.
    """
    file, flag = workdir / FILE, f"--workdir={workdir}"
    mine = {"config": sweep.base, "grid": {k: list(v) for k, v in sweep.grid.items()}}
    mine = json.loads(json.dumps(mine))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{flag}: cannot be written ({e.strerror}).") from None
    if RunDir(workdir).is_run():
        raise ConfigError(f"{flag}: is a run; a sweep needs a folder of its own.")
    with locked(workdir / ".sweep.lock"):  # jobs of a Slurm array start together
        if file.is_file():
            theirs = _read(file)
            _check_grows(theirs, mine, flag)
            if theirs == mine:
                return
        atomic_write(file, json.dumps(mine, indent=1) + "\n")


def _read(file: pathlib.Path) -> dict:
    """The sweep that a folder holds, as `claim` wrote it."""
    data = json_files.read_object(file)
    json_files.field(data, "config", dict[str, Any], str(file))
    json_files.field(data, "grid", dict[str, list[str]], str(file))
    return data


def _check_grows(theirs: dict, mine: dict, flag: str) -> None:
    if theirs["grid"].keys() != mine["grid"].keys():
        there, here = (", ".join(sorted(data["grid"])) for data in (theirs, mine))
        raise ConfigError(f"{flag}: holds a sweep of {there}, not of {here}.")
    for field, values in theirs["grid"].items():
        gone = [value for value in values if value not in mine["grid"][field]]
        if gone:
            raise ConfigError(
                f"{flag}: holds a sweep with {field} = {', '.join(gone)} too; a sweep "
                "may only grow: give those values again, or another --workdir."
            )
    config = mine["config"]
    if CONFIG in mine["grid"]:  # those of values that are new have nothing to agree to
        config = {value: config[value] for value in theirs["grid"][CONFIG]}
    old, new = flat(theirs["config"]), flat(config)
    for path in [*new, *old]:
        if path not in mine["grid"] and old.get(path) != new.get(path):
            raise ConfigError(
                f"{flag}: holds a sweep with config.{path} = {old.get(path)!r}, not "
                f"{new.get(path)!r}; use another --workdir."
            )


def is_finished(run: pathlib.Path, steps: int) -> bool:
    """Whether a run has saved its last step; looks at names of folders only."""
    return max(RunDir(run).saved_steps(), default=-1) >= steps


def list_lines(sweep: Sweep, workdir: pathlib.Path | None) -> list[str]:
    """List the points for people, one a line, by the index of `--sweep-index`."""
    lines = []
    for i, point in enumerate(sweep.points):
        done = workdir is not None and is_finished(workdir / point.name, point.steps)
        lines.append(f"{i:>4}  {point.name}{'  (finished)' if done else ''}")
    return lines


def array_line(sweep: Sweep, train_args: Sequence[str]) -> str:
    """The command that trains all points as one Slurm array job.

    The recipe adds --sweep-index=$SLURM_ARRAY_TASK_ID: in this line, the user's shell
    would replace it before there is a job.
    """
    last = len(sweep.points) - 1
    recipe, here = RECIPE, pathlib.Path.cwd()
    recipe = recipe.relative_to(here) if recipe.is_relative_to(here) else recipe
    return shlex.join(["sbatch", f"--array=0-{last}", str(recipe), *train_args])


def compare_line(sweep: Sweep, workdir: pathlib.Path) -> str:
    """The command that compares the finished points; empty for fewer than two."""
    runs = [(workdir / point.name, point.steps) for point in sweep.points]
    folders = [str(run) for run, steps in runs if is_finished(run, steps)]
    if len(folders) == len(runs) > 1:
        return hints.command("moex", "compare", workdir)
    return hints.command("moex", "compare", *folders) if len(folders) > 1 else ""


def choose(sweep: Sweep, index: int | None) -> tuple[Point, ...]:
    """The point of an index, or all points.

    Raises:
      ConfigError: if there is no such point.
    """
    if index is None:
        return sweep.points
    last = len(sweep.points) - 1
    require(0 <= index <= last, "--sweep-index", index, f"in 0 to {last}")
    return (sweep.points[index],)


def run(
    texts,
    config_args: list[str],
    workdir,
    *,
    index,
    dry_run,
    flags,
    say,
    load=given_config,
) -> None:
    """Train the points of a sweep, or with `dry_run` list them.

    Args:
      texts: FIELD=V1,V2 each.
      config_args: `--config...` arguments that all points share.
      workdir: the folder of the sweep.
      index: the index of the one point to train; None: train all.
      load: as for `make_sweep`; `flags` repeat what it adds to a config.

    Raises:
      ConfigError: for a user's mistake.
      KeyboardInterrupt: after Ctrl-C.
    """
    use_cpu()  # the processes of the points need the accelerators
    made = make_sweep(texts, config_args, load)
    points = choose(made, index)
    if dry_run:
        say("\n".join(list_lines(made, workdir)))
        return
    claim(made, workdir)
    # A wheel has no recipes.
    if index is None and shutil.which("sbatch") and RECIPE.is_file():
        own = [f"--workdir={workdir}", *(f"--sweep={text}" for text in texts)]
        line = array_line(made, [*config_args, *flags, *own])
        say(f"as a Slurm array job: {line}")
    runner = Runner(workdir, say)
    failed = runner.run(points, flags)
    if runner.asked == signal.SIGINT:
        raise KeyboardInterrupt("interrupted; the same command goes on from here")
    if runner.asked is not None:
        say("sweep: stopped; the same command goes on from here")
    elif index is None and (line := compare_line(made, workdir)):
        say(f"compare: {line}")
    if failed:
        names = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        code = 1 if index is None else next(iter(failed.values()))
        fail(f"{len(failed)} of {len(points)} runs of the sweep failed: {names}", code)


class Runner:
    """Trains points one after another, each in a process."""

    def __init__(self, workdir: pathlib.Path, say: Callable[[str], None]):
        self.workdir, self.say, self.children = workdir, say, Children()

    @property
    def asked(self) -> int | None:
        """The first signal that was received."""
        return self.children.asked

    def run(self, points: Sequence[Point], flags: list[str]) -> dict[str, int]:
        """Train points that are not finished, until all are or a signal comes.

        Returns:
          `{name: exit code}` of those that failed.
        """
        failed = {}
        with self.children.heard():
            for i, point in enumerate(points, 1):
                if self.asked is not None:
                    break
                code = self._train(point, f"sweep: {i}/{len(points)} ", flags)
                if code != 0:
                    failed[point.name] = code
        return failed

    def _train(self, point: Point, head: str, flags: list[str]) -> int:
        run = self.workdir / point.name
        if is_finished(run, point.steps):
            self.say(f"{head}{point.name} is finished")
            return 0
        self.say(f"{head}{point.name}")
        command = [sys.executable, "-m", "moex.cli", "train", *flags]
        command += [*point.config_args, f"--workdir={run}"]
        code = self.children.start(command).wait()
        if self.asked is not None and code in (0, -signal.SIGTERM):
            return 0
        if code == 0 and not is_finished(run, point.steps):
            code = 1  # a signal that we did not send stopped it
        if code != 0:
            self.say(f"{head}{point.name} failed with exit code {shell_code(code)}")
        return shell_code(code)
