"""The TensorBoard pages of a run: ordered charts, series, histograms, a heat map.

"brief" shows means over the MoE layers and the worst layer, so the number of series
depends on neither experts nor layers. "detailed" adds every figure of every layer and
chain round.
"""

import contextlib
import os
import pathlib
from typing import Any, ClassVar

import numpy as np
from tensorboardX.record_writer import register_writer_factory

from moex.data.files import naming
from moex.model.figures import scalar_names, slot_shares
from moex.model.layers import routers, shown
from moex.moe import metrics

PREFIX = "moex:"  # begins the paths that `_EventFiles` opens

CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "training": {
        "weighted losses": ("loss/.*",),
        "gradient norm": ("train/grad_norm$",),
        "gradient norm by group of parameters": ("train/grad_norm/.*",),
        "learning rate": ("train/lr$",),
        "skipped updates": ("train/skipped$",),
    },
    "speed": {
        "tokens per second": ("perf/(tokens|targets)_per_s$",),
        "model FLOPs utilisation": ("perf/mfu(_without_padding)?$",),
        "padding, share of the tokens": ("train/padding_frac$",),
        "seconds of a step": ("perf/(step|data|dispatch|wait|other)_s$",),
        "memory, GiB": ("perf/memory_gib$",),
    },
}


def layout(cfg, num_domains: int) -> dict:
    """Make the custom layout of a run: all charts that have figures, MoE first."""
    pages: dict[str, dict[str, list]] = {}
    if any(routers(cfg.model)):
        detailed = cfg.log.detail == "detailed"
        names = {name for r in routers(cfg.model) for name in r.router.losses()}
        figures = (*metrics.FIGURES, *metrics.own_figures(names))
        for name, title, unit, of, page, *_ in figures:
            if page is None or (of is None and cfg.mesh.expert == 1):
                continue
            tags = f"moe/{name}(_worst)?$", *[f"moe/{name}/.*"] * detailed
            pages.setdefault(f"MoE: {page}", {})[f"{title} ({unit})"] = _chart(*tags)
        pages["MoE: balance"]["which layer is worst"] = _chart("moe/.*_worst_layer$")
        shares = _chart("moe/slots_share/.*")
        pages["MoE: experts per token"]["tokens by number of experts, share"] = shares
    pages["training"] = _task_charts(cfg.task, num_domains)
    for page, others in CHARTS.items():
        own = {title: _chart(*tags) for title, tags in others.items()}
        pages[page] = pages.get(page, {}) | own
    return pages


def _task_charts(task, num_domains: int) -> dict[str, list]:
    """The charts of a task's figures, each with training and held-out data."""
    tags = {f.axis: f"{f.name}$" for f in task.FIGURES}
    if num_domains > 1:
        tags[f"loss by domain, {task.FIGURES[0].unit}"] = f"{task.score}/.*"
    return {title: _chart(f"train/{tag}", f"eval/{tag}") for title, tag in tags.items()}


def _chart(*tags: str) -> list:
    """A chart of all series whose tag one of the patterns matches from its start."""
    return ["Multiline", list(tags)]


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

    def __init__(self, writer, detail: str):
        self.writer = writer
        self.detailed = detail == "detailed"

    def values(self, kind: str, step: int, values: dict) -> None:
        """Write a scalar for each number of a line of metrics.jsonl."""
        for name, value in values.items():
            if name.endswith("_worst_layer"):
                value = int(value.split(".")[0])  # the layer's number without the round
            if isinstance(value, (int, float)):
                own = name.startswith(("perf/", "moe/", "loss/"))
                self.writer.add_scalar(name if own else f"{kind}/{name}", value, step)

    def layers(self, step: int, rows: dict[str, dict[str, Any]], *, image) -> None:
        """Write series and histograms of MoE layers, and the heat map if `image`.

        Args:
          rows: the result of `layers.by_layer`, which must not be empty.
        """
        for name, share in slot_shares(rows).items():
            self.writer.add_scalar(f"moe/slots_share/{name}", share, step)
        loads = {k: relative_load(own["load_frac_E"]) for k, own in rows.items()}
        self._histogram("moe/load", np.concatenate(list(loads.values())), step)
        if self.detailed:
            for label, own in rows.items():
                for name in scalar_names(rows):
                    value = float(own[name])
                    self.writer.add_scalar(f"moe/{name}/layer_{label}", value, step)
                self._histogram(f"moe/load/layer_{label}", loads[label], step)
                self._slots(f"moe/slots/layer_{label}", own["slots_hist_S"], step)
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
