"""Numeric time series from CSV files, cut into windows of tokens.

A token is `patch` steps of all columns; a model learns to predict the next token. Each
file is a series of its own: no window has values of two files.

Not here: batches (`batches.py`).

Shapes: T steps of a series · C columns · L tokens of a window · P steps per token.
"""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from moex.config.base import ConfigError, check, nearest, require, short
from moex.data.batches import Dataset, Datasets, Example, Reading, count_windows
from moex.data.files import File, find_files, read_text, size_and_hash


@dataclasses.dataclass(kw_only=True, slots=True)
class Series(Reading):
    """CSV files with a line of names at the top, then one line per step in time."""

    paths: tuple[str, ...] = ()  # files, directories or globs, at least one
    # Columns to read, which must have numbers; None: all columns of the first file
    # except for `time`; training fills them in.
    columns: tuple[str, ...] | None = None
    time: str | None = "date"  # a column that is not read; None: there is none
    patch: int = 1  # P, steps per token, >= 1
    stride: int = 1  # steps between the starts of two training windows, >= 1
    holdout: float = 0.2  # share at the end of each series that is held out, in [0, 1]
    # Mean and standard deviation of each column: a value is read as its deviation from
    # the mean, in standard deviations. None: those of the training steps, filled in.
    scale: tuple[tuple[float, float], ...] | None = None

    def validate(self, path: str) -> None:
        """Check the numbers; files and columns are checked when they are read."""
        Reading.validate(self, path)
        for name in ("patch", "stride"):
            require(
                getattr(self, name) >= 1, f"{path}.{name}", getattr(self, name), ">= 1"
            )
        require(0 <= self.holdout <= 1, f"{path}.holdout", self.holdout, "in [0, 1]")
        for mean, deviation in self.scale or ():
            ok = math.isfinite(mean) and 0 < deviation < math.inf
            require(ok, f"{path}.scale", (mean, deviation), "finite, deviations > 0")

    def num_columns(self, where: str) -> int:
        """The number of columns, by the config or the first line of the first file."""
        if self.columns is not None:
            return len(self.columns)
        return len(_columns(self, find_files(self.paths, f"{where}.paths")[0], where))


def prepare(
    config: Series,
    seq_len: int,
    *,
    overlap: int = 0,
    scoring: bool = False,
    log=print,
    where: str = "data",
) -> Datasets:
    """Read all files; the first steps of each are for training, the last held out.

    Fills in `config.columns` and `config.scale`.

    Args:
      config: the files.
      seq_len: L, tokens of a window, >= 1.
      overlap: tokens that a held-out window repeats from the one before as context, in
        [0, seq_len).
      scoring: only held-out data will be read, so training data may be missing.
      log: called with one line that says what was read.
      where: the path of `config`, for error messages.

    Raises:
      ConfigError: naming file, line and column, for a value that is not a number; if
        the files have other columns, or too few steps.
    """
    check(config, where)
    files = find_files(config.paths, f"{where}.paths", log)
    domains = tuple(Path(file.name).stem for file in files)
    if len(set(domains)) < len(domains):
        domains = tuple(file.name for file in files)
    config.columns = names = _columns(config, files[0], where)
    series = [read_series(config, file, names, where) for file in files]
    cuts = [round(len(value_TC) * (1 - config.holdout)) for value_TC in series]
    if config.scale is None:
        known = [value_TC[:cut] for value_TC, cut in zip(series, cuts, strict=True)]
        config.scale = _scale(np.concatenate(known), names, where)
    pairs = f"one pair for each of the {len(names)} columns"
    require(len(config.scale) == len(names), f"{where}.scale", config.scale, pairs)
    mean_C, deviation_C = np.array(config.scale, np.float64).T
    train, held_out = [], []
    for i, (value_TC, cut) in enumerate(zip(series, cuts, strict=True)):
        value_TC = ((value_TC - mean_C) / deviation_C).astype(np.float32)
        options: dict[str, Any] = {"seq_len": seq_len, "domain": i}
        options["patch"] = config.patch
        own = SeriesWindows(value_TC[:cut], stride=config.stride, **options)
        if not len(own) and not scoring:
            raise ConfigError(
                f"{where} ({domains[i]!r}): there are {cut} steps to train on, and a "
                f"window takes {own.steps}, {seq_len} tokens of {config.patch} and the "
                "next token. Lower seq_len, patch or holdout."
            )
        train.append(own)
        options["stride"] = (seq_len - overlap) * config.patch
        held_out.append(
            SeriesWindows(value_TC[cut:], overlap=overlap, partial=True, **options)
        )
    log(f"data: {sum(map(len, series)):,} steps of {len(names)} columns")
    most = max(map(len, train))
    return Datasets(
        config=config,
        train=train,
        eval=held_out,
        weights=tuple(len(windows) / max(most, 1) for windows in train),
        domains=domains,
        manifest={
            domain: {"sha256": sha, "files": [[file.name, size, sha]]}
            for domain, file in zip(domains, files, strict=True)
            for size, sha in [size_and_hash(file.path)]
        },
    )


def _columns(config: Series, file: File, where: str) -> tuple[str, ...]:
    """The names of the columns to read from a file, in their order."""
    with file.path.open("rb") as opened:
        line = opened.readline()
    try:
        there = tuple(next(csv.reader([line.decode("utf-8-sig")]), ()))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ConfigError(f"{where}.paths: {file.path}, line 1: {e}.") from None
    wanted = config.columns
    if wanted is None:
        if config.time is not None and config.time not in there:
            raise ConfigError(
                f"{where}.time = {config.time!r}: {file.path} has no such column."
                f"{nearest(config.time, there)} It has {short(there)}; None: all "
                "columns are numbers."
            )
        wanted = tuple(name for name in there if name != config.time)
    for name in wanted:
        if there.count(name) != 1:
            raise ConfigError(
                f"{where}.columns: {file.path} has {there.count(name)} columns "
                f"{name!r}.{nearest(name, there)} It has {short(there)}."
            )
    require(len(wanted) > 0, f"{where}.columns", wanted, "one column at least")
    return wanted


def read_series(config: Series, file: File, names, where: str) -> np.ndarray:
    """Read the columns `names` of a file as float64[T, C].

    Raises:
      ConfigError: naming file, line and column, for a value that is not finite.
    """
    _columns(config, file, where)  # check that the file has them
    text = read_text(file, f"{where}.paths")
    reader = csv.reader(io.StringIO(text, newline=""))
    here = f"{where}.paths: {file.path}, line"
    try:
        head = next(reader)
        places = [head.index(name) for name in names]
        rows = []
        for row in filter(None, reader):  # empty lines are skipped
            if len(row) != len(head):
                raise ConfigError(
                    f"{here} {reader.line_num}: has {len(row)} columns, not the "
                    f"{len(head)} of line 1."
                )
            rows.append([_number(row[i]) for i in places])
            for name, i, value in zip(names, places, rows[-1], strict=True):
                if not math.isfinite(value):
                    raise ConfigError(
                        f"{here} {reader.line_num}, column {name!r} = {short(row[i])}: "
                        "must be a finite number."
                    )
    except csv.Error as e:
        raise ConfigError(f"{here} {reader.line_num}: {e}.") from None
    return np.array(rows, np.float64).reshape(-1, len(names))


def _number(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)  # Python reads 1_0 as 10
    except ValueError:
        return math.nan


def _scale(value_TC: np.ndarray, names, where: str) -> tuple[tuple[float, float], ...]:
    """Compute (mean, deviation) of each column; a constant one has deviation 1."""
    if not len(value_TC):
        raise ConfigError(
            f"{where}.scale = None: nothing is trained on, so that means and "
            "deviations are not known; give them, or lower holdout."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        both_C = value_TC.mean(axis=0), value_TC.std(axis=0)
    for name, mean, deviation in zip(names, *both_C, strict=True):
        ok = math.isfinite(mean) and math.isfinite(deviation)
        require(ok, f"{where}: the deviation of column {name!r}", deviation, "finite")
    return tuple((float(m), float(d) or 1.0) for m, d in zip(*both_C, strict=True))


class SeriesWindows(Dataset):
    """A series cut into windows of `seq_len` tokens, each with the token after it.

    Args:
      value_TC: float32 values, in standard deviations of the columns.
      seq_len: L, tokens of a window.
      patch: P, steps per token.
      stride: steps between the starts of two windows.
      domain: index of the series, copied into every example.
      overlap: tokens at the start of each window but the first that are not scored.
      partial: pad a last window that is not full, instead of dropping it.
    """

    def __init__(
        self,
        value_TC: np.ndarray,
        *,
        seq_len: int,
        patch: int,
        stride: int,
        domain: int,
        overlap: int = 0,
        partial: bool = False,
    ):
        self.value_TC, self.seq_len, self.patch = value_TC, seq_len, patch
        self.stride, self.overlap = stride, overlap
        self.steps = (seq_len + 1) * patch  # steps that a full window needs
        targets = len(value_TC) - patch
        if partial:  # only whole tokens can be predicted
            targets -= targets % patch
        count = count_windows(targets, seq_len * patch, stride, partial)
        super().__init__(count, domain)

    def sequence(self, index: int) -> Example:
        """A window: float32[L, P, C] values and targets, and the common fields."""
        start = index * self.stride
        part_TC = self.value_TC[start : start + self.steps]
        tokens = len(part_TC) // self.patch
        shape = (tokens, self.patch, part_TC.shape[1])
        value_LPC = part_TC[: tokens * self.patch].reshape(shape)
        n, L = tokens - 1, self.seq_len
        place_L = np.arange(L, dtype=np.int32)
        padding = ((0, L - n), (0, 0), (0, 0))
        return {
            "values": np.pad(value_LPC[:-1], padding),
            "targets": np.pad(value_LPC[1:], padding),
            "segment": (place_L < n).astype(np.int32),
            "position": np.where(place_L < n, place_L, 0).astype(np.int32),
            "loss_mask": (
                (place_L < n) & (place_L >= (self.overlap if index else 0))
            ).astype(np.float32),
        }
