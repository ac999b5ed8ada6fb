"""Everything that a report is made of, read from a run directory.

S logged steps of one kind, ascending · E experts · ... what a figure has per step
"""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from moex.analysis.reading import read_lines, read_place
from moex.config.base import ConfigError, require, short
from moex.costs.accounting import Cost, model_cost
from moex.costs.table import fill_vocab
from moex.json_files import expect_object, field, parse_json
from moex.model.spec import model_spec
from moex.runs.environment import FILE as ENVIRONMENT
from moex.runs.environment import read_environment
from moex.train.job import load_config

LABEL = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
LISTS = ("load_frac", "slots_hist")  # figures that are lists; others are numbers
MOST_LINES = 2000  # of routing.jsonl that are kept, for each kind
MOST_BYTES = 2**28  # of their figures


@dataclasses.dataclass(frozen=True)
class Routing:
    """Per-layer figures of logged steps of one kind.

    Attributes:
      step_S: int64[S].
      layers: by label ("003", or "003.1" for the first round of a chain) and name of
        the figure: float32[S, ...], NaN where a line does not have it.
      read, there: lines that are here, and in the file.
    """

    step_S: np.ndarray
    layers: dict[str, dict[str, np.ndarray]]
    read: int
    there: int


@dataclasses.dataclass(frozen=True)
class Material:
    """A run directory as it was when it was read.

    Attributes:
      path: as it was given.
      cfg: the resolved run config.
      cost: parameters and FLOPs; None if the config leaves the vocabulary open.
      lines: of metrics.jsonl, by kind and by step, ascending; resumed steps once.
      routing: by kind, "train" and "eval", those that were logged.
      environment: one entry per start of the run.
    """

    path: pathlib.Path
    cfg: Any
    cost: Cost | None
    lines: dict[str, dict[int, dict]]
    routing: dict[str, Routing]
    environment: list[dict]

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`(step_S, float64[S])` of a figure in the lines of a kind that have it."""
        have = {s: line for s, line in self.lines.get(kind, {}).items() if name in line}
        values = [line[name] for line in have.values()]
        return np.array(list(have), dtype=int), np.array(values, dtype=float)

    @property
    def step(self) -> int:
        """The last step that anything was logged of."""
        return max((s for lines in self.lines.values() for s in lines), default=0)


def read(path: pathlib.Path) -> Material:
    """The material of a run directory, also of one that was never trained.

    Raises:
      ConfigError: if it is no run directory, or a file of it is damaged.
    """
    cfg = load_config(path)
    lines: dict[str, dict[int, dict]] = {}
    log = path / "metrics.jsonl"
    for line in read_lines(log) if log.is_file() else ():
        lines.setdefault(line["kind"], {})[line["step"]] = line
    return Material(
        path=path,
        cfg=cfg,
        cost=_cost(cfg),
        lines={kind: dict(sorted(found.items())) for kind, found in lines.items()},
        routing=read_routing(path / "routing.jsonl"),
        environment=read_environment(path / ENVIRONMENT),
    )


def _cost(cfg) -> Cost | None:
    try:
        fill_vocab(cfg)
    except ConfigError:
        return None
    return model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)


def read_routing(file: pathlib.Path) -> dict[str, Routing]:
    """The figures of a routing.jsonl by kind; none if there is no such file.

    Of a long file evenly spaced lines are kept, the last one among them, so that memory
    and time have a bound.

    Raises:
      ConfigError: if a line other than the last one is damaged.
    """
    if not file.is_file():
        return {}
    places: dict[str, dict[int, tuple[int, int]]] = {}
    widest = 1
    with file.open("rb") as opened:
        start, number = 0, 0
        for number, raw in enumerate(opened, 1):
            if raw.endswith(b"\n"):  # else it is being written
                kind, step = _head(f"{file}, line {number}", raw)
                places.setdefault(kind, {})[step] = (start, number)
                widest = max(widest, len(raw))
            start += len(raw)
        most = max(2, min(MOST_LINES, MOST_BYTES // widest))
        return {
            kind: _read_kind(file, opened, dict(sorted(found.items())), most)
            for kind, found in places.items()
        }


def _head(where: str, raw: bytes) -> tuple[str, int]:
    """Kind and step of a line, without parsing all of it."""
    end = raw.find(b'"layers"')
    text = raw[:end].rstrip().rstrip(b",") + b"}" if end > 0 else raw
    return read_place(expect_object(parse_json(text, where), where), where)


def _read_kind(file, opened, places: dict, most: int) -> Routing:
    there = len(places)
    chosen = np.unique(np.linspace(0, there - 1, min(there, most)).round().astype(int))
    steps = list(places)
    read = []
    for i in chosen:
        start, number = places[steps[i]]
        opened.seek(start)
        where = f"{file}, line {number}"
        line = expect_object(parse_json(opened.readline(), where, nan=True), where)
        layers = field(line, "layers", dict[str, dict], where)
        read.append({k: _figures(v, f"{where}: {k}") for k, v in layers.items()})
    labels = {label for line in read for label in line}
    for label in labels:
        if not LABEL.fullmatch(label):
            raise ConfigError(
                f"{file}: {short(label)} is no layer, such as '003' or '003.1'."
            )
    return Routing(
        step_S=np.array([steps[i] for i in chosen]),
        layers={
            label: _stack([line.get(label, {}) for line in read])
            for label in sorted(labels, key=_place)
        },
        read=len(chosen),
        there=there,
    )


def _figures(data: dict, where: str) -> dict[str, np.ndarray]:
    """The figures of a layer as float32; null is NaN."""
    found = {}
    with np.errstate(over="ignore"):  # to infinity
        for name in data:
            if name in LISTS:
                value = field(data, name, list[float | None], where)
                require(len(value) > 0, f"{where}: {name}", value, "not empty")
            else:
                value = field(data, name, float | None, where)
            try:
                found[name] = np.asarray(value, dtype=float).astype(np.float32)
            except OverflowError:
                require(False, f"{where}: {name}", value, "a number that floats hold")
    return found


def _place(label: str) -> list[int]:
    return [int(part) for part in label.split(".")]


def _stack(lines: list[dict]) -> dict[str, np.ndarray]:
    """Figures of one layer over lines, NaN where a line has none, or another shape."""
    shapes = {n: v.shape for line in lines for n, v in line.items()}
    found = {}
    for name, shape in shapes.items():
        rows = np.full((len(lines), *shape), np.nan, dtype=np.float32)
        for i, line in enumerate(lines):
            if name in line and line[name].shape == shape:
                rows[i] = line[name]
        found[name] = rows
    return found
