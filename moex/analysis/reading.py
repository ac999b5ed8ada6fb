"""Reading run directories: configs, the lines of metrics.jsonl, curves of them.

S logged steps of one kind, ascending
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moex.config.base import ConfigError, nearest
from moex.runs.directory import RunDir
from moex.runs.lines import KINDS, read_metrics
from moex.runs.sweep import FILE as SWEEP

FLOPS = "perf/train_flops_per_token"
# A training line of moex has all of these, and the figures of its task.
NEEDED = ("tokens_seen", "perf/step_s")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as it was when it was read."""

    path: pathlib.Path  # as it was given
    cfg: Any  # the resolved run config
    # Lines of metrics.jsonl by kind (`KINDS`) and by step, ascending.
    lines: dict[str, dict[int, dict]]

    @property
    def has_flops(self) -> bool:
        """Whether all training lines say what a token cost."""
        return all(FLOPS in line for line in self.lines["train"].values())


@dataclasses.dataclass(frozen=True)
class Curve:
    """A loss at some steps, and what the training had spent by then."""

    step_S: np.ndarray  # optimizer steps done
    # tokens_S, flops_S, seconds_S: tokens, training FLOPs, wall time of training.
    tokens_S: np.ndarray
    flops_S: np.ndarray
    seconds_S: np.ndarray
    loss_S: np.ndarray  # the figure that the task trains on

    def at(self, step_S: np.ndarray) -> "Curve":
        """The curve at some of its steps."""
        kept = np.isin(self.step_S, step_S)
        return Curve(*(getattr(self, f.name)[kept] for f in dataclasses.fields(self)))


def read_runs(paths: Sequence[pathlib.Path]) -> list[Run]:
    """Read the runs of two or more directories; the folder of a sweep has its runs.

    Raises:
      ConfigError: for fewer, for one that is given twice or cannot be compared.
    """
    paths = [run for path in paths for run in runs_of(path)]
    if len(paths) < 2:
        raise ConfigError(f"compare: needs two runs or more; got {len(paths)}.")
    seen: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        other = seen.get(path.resolve())
        if other is not None:
            raise ConfigError(f"{path}: is the same run as {other}; give it once.")
        seen[path.resolve()] = path
    return [read_run(path) for path in paths]


def runs_of(path: pathlib.Path) -> list[pathlib.Path]:
    """A run directory itself; of the folder of a sweep, its runs."""
    if RunDir(path).is_run() or not (path / SWEEP).is_file():
        return [path]
    return sorted(run for run in path.iterdir() if RunDir(run).is_run())


def read_run(path: pathlib.Path) -> Run:
    """Read one run directory.

    Raises:
      ConfigError: if it is none, or no step of it was logged.
    """
    run = RunDir(path)
    if not run.is_run():
        beside = [p for p in path.parent.glob("*") if RunDir(p).is_run()]
        raise ConfigError(
            f"{path}: not a run directory (there is no {run.config_file})."
            f"{nearest(path.name, [p.name for p in beside])}"
        )
    found = read_metrics(run.metrics)
    lines = {kind: found.get(kind, {}) for kind in KINDS}
    if not lines["train"]:
        raise ConfigError(f"{path}: no training step is logged in {run.metrics} yet.")
    cfg = run.config()
    figures = tuple(figure.name for figure in cfg.task.FIGURES)
    needed = {"train": (*figures[:1], *NEEDED), "eval": figures}
    for kind, own in lines.items():
        for step, line in own.items():
            for name in needed[kind]:
                if name not in line:
                    where = f"{run.metrics}: the {kind} line of step {step}"
                    raise ConfigError(f"{where} has no {name}.")
    return Run(path, cfg, lines)


def curves(run: Run, expected_flops: float) -> dict[str, Curve]:
    """The curve of each kind of `KINDS`; that of a run without any lines is empty.

    Between training lines all that is spent grows evenly with the steps.

    Args:
      run: with one training line or more.
      expected_flops: per trained token, for lines that do not say what was measured.
    """
    train = run.lines["train"].values()
    step_S = np.array([0, *run.lines["train"]])
    tokens_S = np.array([0, *(line["tokens_seen"] for line in train)])
    seconds_S = np.array([0.0, *(line["perf/step_s"] for line in train)])
    rate_S = np.array([line.get(FLOPS, expected_flops) for line in train])
    spent = {
        "tokens_S": tokens_S,
        "flops_S": flops_spent(tokens_S, np.concatenate([rate_S[:1], rate_S])),
        "seconds_S": np.cumsum(seconds_S * np.diff(step_S, prepend=0)),
    }
    found, score = {}, run.cfg.task.score
    for kind, lines in run.lines.items():
        at_S = np.array(list(lines), dtype=int)
        loss_S = np.array([line[score] for line in lines.values()], dtype=float)
        by_then = {name: np.interp(at_S, step_S, y_S) for name, y_S in spent.items()}
        found[kind] = Curve(step_S=at_S, loss_S=loss_S, **by_then)
    return found


def flops_spent(tokens_S: np.ndarray, rate_S: np.ndarray) -> np.ndarray:
    """FLOPs up to each line: the trapezoid rule over tokens.

    Args:
      tokens_S: seen up to each line, ascending; the first is where the sum is 0.
      rate_S: FLOPs per token at each line.
    """
    parts_S = np.diff(tokens_S) * (rate_S[1:] + rate_S[:-1]) / 2
    return np.concatenate([[0.0], np.cumsum(parts_S)])
