"""metrics.jsonl and routing.jsonl of a run: one JSON object a line; write, trim, read.

S logged steps of one kind, ascending · E experts · ... the dimensions of one figure
"""

import contextlib
import dataclasses
import math
import pathlib
import re

import numpy as np

from moex.config.base import LARGEST, ConfigError, require, short
from moex.data.files import naming
from moex.json_files import dump_json, field, parse_object, read_json_lines

KINDS = ("train", "eval")  # kinds of lines of numbers, in their order in a step
# The suffix of values that name a layer: the one with the worst figure.
WHICH = "_worst_layer"
LABEL = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
LISTS = ("load_frac", "slots_hist")  # figures that are lists; others are numbers
MOST_LINES = 2000  # lines of routing.jsonl that are kept, for each kind
MOST_BYTES = 2**28  # memory of their figures


class Lines:
    """A file of JSON lines; each is handed to the system when `write` returns."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self._out = file.open("a", buffering=1, encoding="utf-8")

    def write(self, line: dict) -> None:
        """Append a line; an error names the file."""
        with naming(self.file):
            self._out.write(dump_json(line) + "\n")

    def close(self) -> None:
        """Close the file. A line that could not be written is tried again, without an
        error: `write` has already reported it.
        """
        with contextlib.suppress(OSError):
            self._out.close()


def trim(file: pathlib.Path, step: int) -> int:
    """Drop lines after `step`, a half-written last line and damaged lines.

    Returns:
      How many lines were damaged; if any, the file is kept as it was, as FILE.damaged.
    """
    if not file.exists():
        return 0
    kept, damaged = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            # Logs from before version 0.2 have NaN.
            entry = parse_object(line, "", nan=True)
            if field(entry, "step", int, "") <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
        except ConfigError:
            damaged += line.endswith(b"\n")
    temporary = file.with_name(file.name + ".tmp")
    with naming(file):
        temporary.write_bytes(b"".join(kept))
    if damaged:
        file.replace(file.with_name(f"{file.name}.damaged"))
    temporary.replace(file)
    return damaged


def last_step(file: pathlib.Path) -> int:
    """The last step in a metrics.jsonl, 0 if there is none."""
    if not file.exists():
        return 0
    return max(
        (
            field(line, "step", int, f"{file}, line {number}")
            for number, line in read_json_lines(file, nan=True)
        ),
        default=0,
    )


def read_metrics(file: pathlib.Path) -> dict[str, dict[int, dict]]:
    """The lines of a metrics.jsonl by kind and by step, ascending.

    If a step was done again after a crash, its last line counts. A last line that is
    still being written is left out. All values of `KINDS` are numbers (null and NaN
    too), except for names of layers.

    Returns:
      {} if there is no such file.

    Raises:
      ConfigError: naming the file and the line, if any other line is not JSON, or moex
        cannot have written it.
    """
    lines: dict[str, dict[int, dict]] = {}
    if not file.is_file():
        return lines
    for number, line in read_json_lines(file, nan=True):
        line = _checked(line, f"{file}, line {number}")
        lines.setdefault(line["kind"], {})[line["step"]] = line
    return {kind: dict(sorted(found.items())) for kind, found in lines.items()}


def _checked(line: dict, where: str) -> dict:
    kind, step = kind_and_step(line, where)
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
    if "tokens_seen" in line:  # a count: it cannot be NaN
        tokens = field(line, "tokens_seen", int, where)
        require(tokens >= 0, f"{where}: tokens_seen", tokens, ">= 0")
    return found


def kind_and_step(line: dict, where: str) -> tuple[str, int]:
    """The kind and the step of a line."""
    kind, step = field(line, "kind", str, where), field(line, "step", int, where)
    require(0 <= step <= LARGEST, f"{where}: step", step, f"in 0 to {LARGEST:,}")
    return kind, step


@dataclasses.dataclass(frozen=True)
class Routing:
    """The per-layer figures of logged steps of one kind."""

    step_S: np.ndarray  # int64[S]
    # By label ("003", or "003.1" for the first round of a chain) and name of the
    # figure: float32[S, ...], NaN where a line does not have it.
    layers: dict[str, dict[str, np.ndarray]]
    # read, there: the number of lines that were read, and that the file has.
    read: int
    there: int


def read_routing(file: pathlib.Path) -> dict[str, Routing]:
    """The figures of a routing.jsonl by kind; none if there is no such file.

    From a long file it takes evenly spaced lines, the last one among them, so that
    memory and time are bounded.

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
            if raw.endswith(b"\n"):  # otherwise it is still being written
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
    """The kind and the step of a line, without parsing all of it."""
    end = raw.find(b'"layers"')
    text = raw[:end].rstrip().rstrip(b",") + b"}" if end > 0 else raw
    return kind_and_step(parse_object(text, where), where)


def _read_kind(file, opened, places: dict, most: int) -> Routing:
    there = len(places)
    chosen = np.unique(np.linspace(0, there - 1, min(there, most)).round().astype(int))
    steps = list(places)
    read = []
    for i in chosen:
        start, number = places[steps[i]]
        opened.seek(start)
        where = f"{file}, line {number}"
        line = parse_object(opened.readline(), where, nan=True)
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
            for label in sorted(labels, key=lambda text: [*map(int, text.split("."))])
        },
        read=len(chosen),
        there=there,
    )


def _figures(data: dict, where: str) -> dict[str, np.ndarray]:
    """The figures of a layer as float32; null is NaN."""
    found = {}
    with np.errstate(over="ignore"):  # too large a number becomes infinity
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


def _stack(lines: list[dict]) -> dict[str, np.ndarray]:
    """Stack the figures of a layer; NaN where a line has none or another shape."""
    shapes = {n: v.shape for line in lines for n, v in line.items()}
    found = {}
    for name, shape in shapes.items():
        rows = np.full((len(lines), *shape), np.nan, dtype=np.float32)
        for i, line in enumerate(lines):
            if name in line and line[name].shape == shape:
                rows[i] = line[name]
        found[name] = rows
    return found
