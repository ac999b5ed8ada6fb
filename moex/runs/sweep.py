"""`moex train --sweep`: a grid of runs over fields of one config, one after another.

Each point of the grid has a run directory of its own under --workdir and is trained by
a process of its own, so that the memory of one run is free again before the next.
`sweep.json` next to them holds the base config and the grid.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moex import json_files
from moex.config.base import ConfigError, flat, require, to_dict
from moex.config.flags import bracketed
from moex.config.reopen import check_reopens
from moex.data.files import atomic_write, locked
from moex.process import fail, use_cpu
from moex.runs.directory import RunDir, given_config
from moex.runs.keys import check_run

FILE = "sweep.json"
MOST_POINTS = 10_000
LONGEST = 200  # the most bytes of a folder name; file systems allow 255
BRACKETS = {"(": ")", "[": "]", "{": "}"}
RECIPE = "launch/slurm.sbatch"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # the name of its folder
    overrides: tuple[str, ...]  # `--config.a.b=value` of the fields that are swept
    steps: int  # how many steps it trains


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    base: Any  # the config without the swept values, as plain data
    grid: dict[str, tuple[str, ...]]  # the values as text, by field
    # The points in order; the last field of the grid changes fastest.
    points: tuple[Point, ...]


def make_sweep(texts: Sequence[str], config_args: list[str]) -> Sweep:
    """Read the arguments of a sweep and check the config of every point.

    Raises:
      ConfigError: for a mistake in the grid, or in the config of any point.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        field, values = parse_axis(text)
        if field in grid:
            raise ConfigError(f"--sweep {field}: is given twice; give all values once.")
        grid[field] = values
    count = math.prod(map(len, grid.values()))
    require(count <= MOST_POINTS, "--sweep", count, f"at most {MOST_POINTS:,} runs")
    base = to_dict(given_config(config_args))
    points, seen = [], dict[str, str]()
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        overrides = tuple(f"--config.{field}={v}" for field, v in chosen.items())
        name = point_name(chosen)
        try:
            cfg = given_config([*config_args, *overrides])
            check_run(cfg)
            check_reopens(cfg)
        except ConfigError as e:
            raise ConfigError(f"--sweep, {name}: {e}") from None
        for same in (name, json.dumps(to_dict(cfg), sort_keys=True)):
            if same in seen:
                raise ConfigError(f"--sweep: {seen[same]} and {name} would be one run.")
            seen[same] = name
        points.append(Point(name, overrides, cfg.steps))
    return Sweep(base, grid, tuple(points))


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """Read `(field, values)` from `FIELD=V1,V2`.

    Raises:
      ConfigError: if there is no field or no value, or one is empty or comes twice.
    """
    field, equals, rest = text.partition("=")
    field = bracketed(field.strip().removeprefix("config."))
    if not field or not equals:
        raise ConfigError(f"--sweep {text}: must be FIELD=V1,V2, as in seed=0,1.")
    values = tuple(value.strip() for value in split_top(rest))
    if "" in values:
        raise ConfigError(f"--sweep {text}: a value is missing.")
    value, times = collections.Counter(values).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"--sweep {text}: {value} is given twice.")
    return field, values


def split_top(text: str) -> list[str]:
    """Split `text` at its commas outside of brackets and quotes.

    Raises:
      ConfigError: if a bracket or a quote is not closed.
    """
    parts, start, closing, quote = [], 0, list[str](), ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            parts.append(text[start:i])
            start = i + 1
    if quote or closing:
        raise ConfigError(f"--sweep ...={text}: {quote or closing[-1]} is missing.")
    return [*parts, text[start:]]


def point_name(chosen: dict[str, str]) -> str:
    """The folder name of a point, such as `optim.lr=0.01,seed=1`."""
    parts = (f"{field}={value}" for field, value in sorted(chosen.items()))
    text = re.sub(r"\[(\d+)\]", r".\1", ",".join(parts))
    text = re.sub(r"[\s'\"()\[\]{}]+", "", text)
    name = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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
    old, new = flat(theirs["config"]), flat(mine["config"])
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
    return shlex.join(["sbatch", f"--array=0-{last}", RECIPE, *train_args])


def compare_line(sweep: Sweep, workdir: pathlib.Path) -> str:
    """The command that compares the finished points; empty for fewer than two."""
    runs = [(workdir / point.name, point.steps) for point in sweep.points]
    folders = [str(run) for run, steps in runs if is_finished(run, steps)]
    return shlex.join(["moex", "compare", *folders]) if len(folders) > 1 else ""


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


def run(texts, config_args: list[str], workdir, *, index, dry_run, flags, say) -> None:
    """Train the points of a sweep, or with `dry_run` list them.

    Args:
      texts: FIELD=V1,V2 each.
      config_args: `--config...` arguments that all points share.
      workdir: the folder of the sweep.
      index: the index of the one point to train; None: train all.

    Raises:
      ConfigError: for a user's mistake.
      KeyboardInterrupt: after Ctrl-C.
    """
    use_cpu()  # the processes of the points need the accelerators
    made = make_sweep(texts, config_args)
    points = choose(made, index)
    if dry_run:
        say("\n".join(list_lines(made, workdir)))
        return
    claim(made, workdir)
    shared = [*config_args, *flags]
    if index is None:
        own = [f"--workdir={workdir}", *(f"--sweep={text}" for text in texts)]
        say(f"as a Slurm array job: {array_line(made, [*shared, *own])}")
    runner = Runner(workdir, say)
    failed = runner.run(points, shared)
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
        self.workdir, self.say = workdir, say
        self.child: Any = None
        self.asked: int | None = None  # the first signal that was received

    def run(self, points: Sequence[Point], train_args: list[str]) -> dict[str, int]:
        """Train points that are not finished, until all are or a signal comes.

        Returns:
          `{name: exit code}` of those that failed.
        """
        failed = {}
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            for i, point in enumerate(points, 1):
                if self.asked is not None:
                    break
                code = self._train(point, f"sweep: {i}/{len(points)} ", train_args)
                if code != 0:
                    failed[point.name] = code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return failed

    def _train(self, point: Point, head: str, train_args: list[str]) -> int:
        run = self.workdir / point.name
        if is_finished(run, point.steps):
            self.say(f"{head}{point.name} is finished")
            return 0
        self.say(f"{head}{point.name}")
        command = [sys.executable, "-m", "moex.cli", "train", *train_args]
        command += [*point.overrides, f"--workdir={run}"]
        # It gets a session of its own: only we receive Ctrl-C, and ask it to save.
        self.child = subprocess.Popen(command, start_new_session=True)
        if self.asked is not None:
            self.child.terminate()
        code = self.child.wait()
        if self.asked is not None and code in (0, -signal.SIGTERM):
            return 0
        if code == 0 and not is_finished(run, point.steps):
            code = 1  # a signal that we did not send stopped it
        if code != 0:
            self.say(f"{head}{point.name} failed with exit code {_shell_code(code)}")
        return _shell_code(code)

    def _pass_on(self, number, frame):
        """Ask the child to save at the first signal; pass later ones on unchanged."""
        wanted = signal.SIGTERM if self.asked is None else number
        self.asked = self.asked or number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(wanted)


def _shell_code(code: int) -> int:
    """The exit code as shells give it: 128 + signal if a signal ended the process."""
    return code if code >= 0 else 128 - code
