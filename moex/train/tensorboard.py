"""The events of a run for TensorBoard: series, histograms, a heat map, its fields.

"brief" shows means over the MoE layers and the worst layer, so the number of series
depends on neither experts nor layers. "detailed" adds every figure of every layer and
chain round. The names of series are those of `charts.py`.
"""

import contextlib
import os
import pathlib
from typing import Any, ClassVar

import numpy as np
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import hparams

from moex.data.files import naming
from moex.model.figures import scalar_names, slot_shares
from moex.model.layers import shown
from moex.runs.fields import named_fields
from moex.train.charts import SLOT_SHARES, layer_series, series

PREFIX = "moex:"  # begins the paths that `_EventFiles` opens
# Fields of a run config that change what is watched and kept, and not what is learned.
WATCHING = ("checkpoint.", "data.cache_dir", "data.given", "eval.", "log.")


class _EventFile:
    """A file of events that remembers the first error and raises none.

    tensorboardX writes in a thread of its own. An error would end that with a
    traceback, and the run would wait for it once the queue is full.
    """

    errors: ClassVar[dict[pathlib.Path, OSError]] = {}  # the first error of each folder

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self._file, self._failed = self.path.open("wb"), False

    def _try(self, work) -> None:
        if self._failed:
            return
        try:
            with naming(self.path):
                work()
        except OSError as e:
            self._failed, self.errors[self.path.parent] = True, e

    def write(self, data: bytes) -> None:
        """Add bytes."""
        self._try(lambda: self._file.write(data))

    def flush(self) -> None:
        """Write all bytes to the disk."""
        self._try(self._file.flush)
        self._try(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


class _EventFiles:
    """The class by which tensorboardX opens paths that begin with `PREFIX`."""

    def open(self, path: str) -> _EventFile:
        return _EventFile(path.removeprefix(PREFIX))

    def directory_check(self, path: str) -> None:
        pathlib.Path(path.removeprefix(PREFIX)).mkdir(parents=True, exist_ok=True)


register_writer_factory(PREFIX[:-1], _EventFiles())


def event_folder(folder: pathlib.Path) -> str:
    """The `logdir` for a `SummaryWriter` whose errors `check_events` raises."""
    _EventFile.errors.pop(folder, None)
    return f"{PREFIX}{folder}"


def check_events(folder: pathlib.Path) -> None:
    """Raise the error of writing events to a folder, if there was one; only once.

    Raises:
      OSError: naming the file.
    """
    if folder in _EventFile.errors:
        raise _EventFile.errors.pop(folder)


class Board:
    """Writes figures as series; `write` of a tensorboardX `SummaryWriter`."""

    def __init__(self, writer, cfg):
        self.writer, self.task = writer, cfg.task
        self.detailed = cfg.log.detail == "detailed"

    def values(self, kind: str, step: int, values: dict) -> None:
        """Write the scalars of a line of metrics.jsonl that have a series."""
        for name, value in values.items():
            tag = series(self.task, kind, name)
            if tag is not None and isinstance(value, (int, float)):
                self.writer.add_scalar(tag, value, step)

    def fields(self, name: str, cfg) -> None:
        """Write a row of the page HPARAMS: the run's name, and what it learns and how.

        Fields of `WATCHING` are left out: they would stand before the model's.
        TensorBoard adds the last value of every series. Without a list of columns,
        which the run that is read first would give to all, it makes its own of all
        runs, and begins with the fields that differ.
        """
        fields = named_fields(cfg).items()
        kept = {k: v for k, v in fields if not k.startswith(WATCHING) and v is not None}
        values = {k: _cell(v) for k, v in kept.items()}
        _, start, _ = hparams(values | {"run": name}, {})
        self.writer.file_writer.add_summary(start)

    def layers(self, step: int, rows: dict[str, dict[str, Any]], *, image) -> None:
        """Write series and histograms of MoE layers, and the heat map if `image`.

        Args:
          rows: the result of `layers.by_layer`, which must not be empty.
        """
        for name, share in slot_shares(rows).items():
            self.writer.add_scalar(f"{SLOT_SHARES}/{name}", share, step)
        loads = {k: relative_load(own["load_frac_E"]) for k, own in rows.items()}
        self._histogram("moe/load", np.concatenate(list(loads.values())), step)
        if self.detailed:
            for label, own in rows.items():
                for name in scalar_names(rows):
                    tag = layer_series(name, label)
                    self.writer.add_scalar(tag, float(own[name]), step)
                self._histogram(layer_series("load", label), loads[label], step)
                slots_S = own["slots_hist_S"]
                self._slots(layer_series("slots", label), slots_S, step)
        if image:
            self.writer.add_figure("moe/expert_load", load_figure(loads, step), step)

    def _histogram(self, tag: str, load_E, step: int) -> None:
        """Write a histogram of load / mean; the first bucket has dead experts alone."""
        where = np.searchsorted(LOAD_LIMITS, load_E, side="left")
        counts = np.bincount(where, minlength=len(LOAD_LIMITS))
        self._raw(tag, load_E, counts, LOAD_LIMITS, step)

    def _slots(self, tag: str, share_S, step: int) -> None:
        """Write the percentage of tokens by their number of experts."""
        percent = 100 * np.asarray(share_S, np.float64)
        slots = np.arange(len(percent))
        self._raw(tag, slots, percent, slots + 0.5, step, weights=percent)

    def _raw(self, tag, values, counts, limits, step, weights=None):
        weights = np.ones(len(values)) if weights is None else weights
        used = int(np.max(np.nonzero(counts), initial=0)) + 1
        self.writer.add_histogram_raw(
            tag,
            min=float(np.min(values)),
            max=float(np.max(values)),
            num=float(np.sum(weights)),
            sum=float(np.sum(weights * values)),
            sum_squares=float(np.sum(weights * np.square(values))),
            bucket_limits=limits[:used].tolist(),
            bucket_counts=counts[:used].tolist(),
            global_step=step,
        )


def _cell(value) -> float | str:
    """A field as a cell of HPARAMS; a bool is a text, as it would count as a number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else str(value)


# Limits of load / mean: 0 alone, then steps of 0.1 up to 2, then wider ones.
LOAD_LIMITS = np.array(
    [*(i / 10 for i in range(21)), 2.5, 3, 4, 6, 8, 12, 16, 32, 64, 128, 1e9]
)


def relative_load(load_frac_E):
    """The load of each expert over their mean, float64[E]; 1 is balanced."""
    return np.asarray(load_frac_E, np.float64) * len(load_frac_E)


def load_figure(loads: dict[str, np.ndarray], step: int):
    """Draw a heat map, layers x experts, of load over its mean; 1 is balanced.

    Layers with fewer experts are padded with blanks.
    """
    from matplotlib.figure import Figure

    width = max(map(len, loads.values()))
    grid = np.full((len(loads), width), np.nan)
    for i, load_E in enumerate(loads.values()):
        grid[i, : len(load_E)] = load_E
    figure = Figure(figsize=(6, 1.2 + 0.25 * len(loads)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    axes.set(xlabel="expert", ylabel="layer", title=f"load / mean, step {step}")
    axes.set_yticks(range(len(loads)), list(map(shown, loads)))
    figure.colorbar(image)
    return figure
