"""Doing the arms of an experiment: what is left, each seed in a process of its own.

The memory of one is free before the next begins, and an arm that crashes leaves the
others alone. Results are written as they come, so that a cut experiment goes on later,
here or on another machine, from results.json.
"""

import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moex import progress
from moex.config.base import ConfigError, require_choice
from moex.data.files import atomic_write
from moex.experiment.contract import Experiment, Figures
from moex.experiment.find import Found
from moex.json_files import digest, dump_json
from moex.project import flags
from moex.runs.children import Children, shell_code
from moex.runs.directory import RunDir
from moex.terminal import clock

POLL_S = 0.2
DONE = "done.json"  # in the folder of an arm and seed whose work is finished


class Unit(NamedTuple):
    """One seed of one arm."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


class Place:
    """Where the arms of an experiment at one size work.

    A folder has the digest of its arm in its name, so that an arm which is changed
    begins anew.
    """

    def __init__(self, experiment: Experiment, workdir: pathlib.Path):
        self.experiment, self.workdir = experiment, workdir

    def folder(self, unit: Unit) -> RunDir:
        """The folder of a unit."""
        identity = digest(self.experiment.arms[unit.arm].identity())
        return RunDir(self.workdir / f"{unit.arm}-{identity[:8]}" / f"seed{unit.seed}")

    def log(self, unit: Unit) -> pathlib.Path:
        """The file that has the output of the process of a unit."""
        folder = self.folder(unit).path
        return folder.with_name(f"{folder.name}.log")

    def is_done(self, unit: Unit) -> bool:
        """Tell whether the work in the folder of a unit is finished."""
        return (self.folder(unit).path / DONE).is_file()


def choose(
    experiment: Experiment, arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Unit]:
    """The units of some arms and seeds, or of all: first one seed of every arm.

    Raises:
      ConfigError: if there is no such arm.
    """
    for arm in arms or ():
        require_choice("--arms", arm, experiment.arms)
    chosen = [name for name in experiment.order() if arms is None or name in arms]
    units = [
        Unit(arm, seed)
        for arm in chosen
        for seed in (experiment.seeds_of(arm) if seeds is None else seeds)
    ]
    return sorted(units, key=lambda unit: unit.seed)


def left(found: Found, size: str, place: Place, units: Sequence[Unit]) -> list[Unit]:
    """The units without results, behind others whose folders they need here."""
    known = found.file.of(place.experiment, size).arms
    wanted: dict[Unit, None] = {}

    def want(unit: Unit) -> None:
        for name in place.experiment.arms[unit.arm].needs:
            other = Unit(name, unit.seed)
            if not place.is_done(other):
                want(other)
        wanted[unit] = None

    for unit in units:
        if unit.seed not in known.get(unit.arm, {}):
            want(unit)
    return list(wanted)


def minutes_of(experiment: Experiment, results, arm: str) -> float:
    """The time of one seed of an arm: as measured, or else as its config says."""
    seeds = results.arms.get(arm, {}).values()
    known = [own["minutes"] for own in seeds if "minutes" in own]
    return statistics.mean(known) if known else experiment.arms[arm].minutes


def do(found: Found, size: str, place: Place, unit: Unit) -> Figures:
    """Do a unit in this process, and write its figures to results.json."""
    import jax

    experiment = place.experiment
    arm, folder = experiment.arms[unit.arm], place.folder(unit)
    folder.path.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    others = {name: place.folder(Unit(name, unit.seed)) for name in arm.needs}
    figures = plain(arm.run(unit.seed, folder, others), unit.arm)
    about = {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "machine": _machine(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    found.file.add(experiment, size, unit.arm, unit.seed, figures | about)
    atomic_write(folder.path / DONE, dump_json(about) + "\n")
    return figures


def plain(figures: Any, arm: str) -> Figures:
    """Figures as plain data; scalars and arrays of NumPy and JAX become Python's.

    Raises:
      ConfigError: that names the arm and the figure, for anything else.
    """
    if not isinstance(figures, dict):
        kind = type(figures).__name__
        raise ConfigError(f"arm {arm}: must return a dict of figures, not {kind}.")
    found = {}
    for name, value in figures.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise ConfigError(
                f"arm {arm}: figure {name!r} is of type {kind}; it must be a number, a "
                "text, or lists of these."
            ) from None
        found[name] = value
    return found


def _machine(device: str) -> str:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cores = count or os.cpu_count()
    name = platform.machine() if device == "cpu" else device
    return f"{name}, {cores} core{'' if cores == 1 else 's'}"


class Runner:
    """Does units, each in a process, `jobs` at a time.

    Attributes:
      children: their processes; after a signal no unit is begun.
      failed: exit codes of units that failed.
    """

    def __init__(
        self,
        found: Found,
        size: str,
        place: Place,
        jobs: int,
        say: Callable[[str], None],
    ):
        self.found, self.size, self.place, self.say = found, size, place, say
        self.children = Children()
        self.failed: dict[Unit, int] = {}
        self._cores = _shares(jobs)
        results = found.file.of(place.experiment, size)
        self._minutes = {
            arm: minutes_of(place.experiment, results, arm)
            for arm in place.experiment.arms
        }
        self._running: dict[Unit, tuple[subprocess.Popen, int]] = {}

    def run(self, units: Sequence[Unit]) -> None:
        """Do units; those that need one that failed are left out."""
        waiting = list(units)
        count = len(units)
        with self.children.heard(), progress.phase(self.found.name) as phase:
            while self._running or (waiting and self.children.asked is None):
                free = set(range(len(self._cores)))
                free -= {share for _, share in self._running.values()}
                unit = self._next(waiting) if self.children.asked is None else None
                if free and unit is not None:
                    waiting.remove(unit)
                    self._begin(unit, min(free))
                    continue
                if not self._running:
                    break  # the others need units that failed
                ended = self._ended()
                done = count - len(waiting) - len(self._running)
                left = self._left(waiting)
                phase.doing = f"{self.found.name}: {done} of {count} done, {left}"
                if ended is not None:
                    self._say_end(*ended, f"{done}/{count}", left)
                time.sleep(POLL_S)

    def _next(self, waiting: Sequence[Unit]) -> Unit | None:
        """The first unit whose needs are met."""
        for unit in waiting:
            needs = self.place.experiment.arms[unit.arm].needs
            if all(self.place.is_done(Unit(name, unit.seed)) for name in needs):
                return unit
        return None

    def _begin(self, unit: Unit, share: int) -> None:
        log = self.place.log(unit)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "moex.cli", "experiment", "run"]
        command += [self.found.name, f"--size={self.size}", f"--arms={unit.arm}"]
        command += [f"--seeds={unit.seed}", "--in-process", *flags()]
        command += [f"--workdir={self.place.workdir}"]
        cores = self._cores[share]
        pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
        with log.open("ab") as out:
            how = {"stdout": out, "stderr": subprocess.STDOUT, "preexec_fn": pin}
            child = self.children.start(command, **how)
        self._running[unit] = child, share

    def _ended(self) -> tuple[Unit, int] | None:
        for unit, (child, _) in self._running.items():
            code = child.poll()
            if code is not None:
                del self._running[unit]
                return unit, code
        return None

    def _say_end(self, unit: Unit, code: int, count: str, left: str) -> None:
        if code == 0:
            results = self.found.file.of(self.place.experiment, self.size)
            self._minutes[unit.arm] = minutes_of(
                self.place.experiment, results, unit.arm
            )
            self.say(f"{count} {unit} done; {left}")
        elif self.children.asked is None:
            self.failed[unit] = shell_code(code)
            log = self.place.log(unit)
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            last = text.splitlines()[-1] if text else f"exit code {code}"
            self.say(f"{count} {unit} failed: {last} (all of it: {log})")

    def _left(self, waiting: Sequence[Unit]) -> str:
        own = [self._minutes[unit.arm] for unit in [*waiting, *self._running]]
        return f"about {clock(60 * sum(own) / len(self._cores))} left"


def _shares(jobs: int) -> list[set[int]]:
    """The cores of each of several jobs; an empty set: the system decides.

    Raises:
      ConfigError: for more jobs than cores.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    most = len(cores) or os.cpu_count() or 1
    if not 1 <= jobs <= most:
        raise ConfigError(
            f"--jobs = {jobs}: must be in 1 to {most}, the cores of this machine."
        )
    return [set(cores[i::jobs]) if jobs > 1 else set() for i in range(jobs)]


def clear(place: Place, units: Sequence[Unit]) -> None:
    """Remove the folders of units, so that they are done again from the beginning."""
    for unit in units:
        shutil.rmtree(place.folder(unit).path, ignore_errors=True)
