"""What is read of run directories: configs, the lines of metrics.jsonl, curves of them.

S logged steps of one kind, ascending
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moex.config.base import LARGEST, ConfigError, nearest, require
from moex.json_files import field, read_json_lines
from moex.train.job import load_config

KINDS = ("train", "eval")  # of the lines that are compared, in their order in a step
# Ends the names of values that are a layer, the one with the worst figure: of two that
# are nearly the same, either may be.
WHICH = "_worst_layer"
FLOPS = "perf/train_flops_per_token"
# Without these a line is none of moex.
NEEDED = {
    "train": ("nll", "tokens_seen", "perf/step_s"),
    "eval": ("nll", "bits_per_byte"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory as it was when it was read.

    Attributes:
      path: as it was given.
      cfg: the resolved run config.
      lines: by kind of `KINDS` and by step, ascending.
    """

    path: pathlib.Path
    cfg: Any
    lines: dict[str, dict[int, dict]]

    @property
    def has_flops(self) -> bool:
        """Whether all training lines say what a token cost."""
        return all(FLOPS in line for line in self.lines["train"].values())


@dataclasses.dataclass(frozen=True)
class Curve:
    """A loss at some steps, and what the training had spent by then.

    Attributes:
      step_S: optimizer steps done.
      tokens_S, flops_S, seconds_S: tokens, training FLOPs, wall time of training.
      nll_S: nats per token.
    """

    step_S: np.ndarray
    tokens_S: np.ndarray
    flops_S: np.ndarray
    seconds_S: np.ndarray
    nll_S: np.ndarray

    def at(self, step_S: np.ndarray) -> "Curve":
        """The curve at some of its steps."""
        kept = np.isin(self.step_S, step_S)
        return Curve(*(getattr(self, f.name)[kept] for f in dataclasses.fields(self)))


def read_runs(paths: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of two or more directories.

    Raises:
      ConfigError: for fewer, for one that is given twice or cannot be compared.
    """
    if len(paths) < 2:
        raise ConfigError(f"compare: needs two runs or more; got {len(paths)}.")
    seen: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        other = seen.get(path.resolve())
        if other is not None:
            raise ConfigError(f"{path}: is the same run as {other}; give it once.")
        seen[path.resolve()] = path
    return [read_run(path) for path in paths]


def read_run(path: pathlib.Path) -> Run:
    """One run directory.

    Raises:
      ConfigError: if it is none, or no step of it was logged.
    """
    if not (path / "config.json").is_file():
        beside = [p.parent.name for p in path.parent.glob("*/config.json")]
        raise ConfigError(
            f"{path}: not a run directory (there is no {path / 'config.json'})."
            f"{nearest(path.name, beside)}"
        )
    log = path / "metrics.jsonl"
    lines: dict[str, dict[int, dict]] = {kind: {} for kind in KINDS}
    for line in read_lines(log) if log.is_file() else ():
        if line["kind"] in KINDS:
            # A step that was done again after a crash comes again: the last counts.
            lines[line["kind"]][line["step"]] = line
    lines = {kind: dict(sorted(found.items())) for kind, found in lines.items()}
    if not lines["train"]:
        raise ConfigError(f"{path}: no training step is logged in {log} yet.")
    for kind, found in lines.items():
        for step, line in found.items():
            for name in NEEDED[kind]:
                if name not in line:
                    where = f"{log}: the {kind} line of step {step}"
                    raise ConfigError(f"{where} has no {name}.")
    return Run(path, load_config(path), lines)


def read_lines(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl, but for a last one that is being written.

    Of training and evaluation all values are numbers, null and NaN among them, but for
    names of layers.

    Raises:
      ConfigError: naming the file and the line, if any other line is not JSON, or none
        that moex writes.
    """
    return [
        _checked(line, f"{path}, line {number}")
        for number, line in read_json_lines(path, nan=True)
    ]


def _checked(line: dict, where: str) -> dict:
    kind, step = read_place(line, where)
    if kind == "sample":
        field(line, "texts", list[str], where)
    if kind not in KINDS:
        return line
    found = {"kind": kind, "step": step}
    for name, value in line.items():
        if name.endswith(WHICH):
            found[name] = field(line, name, str, where)
        elif name not in found:
            value = field(line, name, float | None, where)
            ok = value is None or abs(value) < 2**63 or not isinstance(value, int)
            require(ok, f"{where}: {name}", value, "below 2**63")
            found[name] = math.nan if value is None else value
    if "tokens_seen" in line:  # a count: it has no NaN
        tokens = field(line, "tokens_seen", int, where)
        require(tokens >= 0, f"{where}: tokens_seen", tokens, ">= 0")
    return found


def read_place(line: dict, where: str) -> tuple[str, int]:
    """Kind and step of a line of metrics.jsonl or routing.jsonl.

    Raises:
      ConfigError: if it has none.
    """
    kind, step = field(line, "kind", str, where), field(line, "step", int, where)
    require(0 <= step <= LARGEST, f"{where}: step", step, f"in 0 to {LARGEST:,}")
    return kind, step


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
    found = {}
    for kind, lines in run.lines.items():
        at_S = np.array(list(lines), dtype=int)
        nll_S = np.array([line["nll"] for line in lines.values()], dtype=float)
        by_then = {name: np.interp(at_S, step_S, y_S) for name, y_S in spent.items()}
        found[kind] = Curve(step_S=at_S, nll_S=nll_S, **by_then)
    return found


def flops_spent(tokens_S: np.ndarray, rate_S: np.ndarray) -> np.ndarray:
    """FLOPs up to each line: the trapezoid rule over tokens.

    Args:
      tokens_S: seen up to each line, ascending; the first is where the sum is 0.
      rate_S: FLOPs per token at each line.
    """
    parts_S = np.diff(tokens_S) * (rate_S[1:] + rate_S[:-1]) / 2
    return np.concatenate([[0.0], np.cumsum(parts_S)])
