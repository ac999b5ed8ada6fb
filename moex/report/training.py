"""Curves of training: what metrics.jsonl holds."""

import dataclasses
import fnmatch
import html
from collections.abc import Sequence

import numpy as np

from moex.adapters import figures as gates
from moex.analysis.plotting import COLOURS
from moex.moe.metrics import FIGURES, UNSCALED
from moex.report import downsample
from moex.report.material import Material
from moex.report.page import Grid, Note, Plot, Section, style
from moex.tasks.base import Task

STEP = "optimizer step"
MOST_CURVES = 64  # curves in one plot; nobody can tell more apart


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: figures of training lines, and of evaluations, over steps."""

    title: str
    unit: str  # unit of its vertical axis
    names: Sequence[str]  # names of figures; "*" stands for any text
    kinds: Sequence[str] = ("train",)  # kinds of lines
    log: bool = False  # whether the vertical axis is logarithmic
    scale: float = 1.0  # factor on the values
    missing: str = "not logged"  # why there may be no data


BOTH = ("train", "eval")


def panels(task: Task) -> tuple[Panel, ...]:
    """The plots of runs of a task: its figures, then what all runs log."""
    score, *others = task.FIGURES
    title = _capital(score.title)
    return (
        Panel(title, score.unit, (score.name,), BOTH),
        *(Panel(_capital(f.title), f.unit, (f.name,), BOTH) for f in others),
        Panel(
            f"{title} by data domain",
            score.unit,
            (f"{score.name}/*",),
            BOTH,
            missing="the data has one domain, or nothing is logged",
        ),
        *PANELS,
    )


def _capital(title: str) -> str:
    return title[:1].upper() + title[1:]


PANELS = (
    Panel("Gradient norm", "L2 norm", ("grad_norm", "grad_norm/*"), log=True),
    Panel("Learning rate", "learning rate", ("lr",)),
    Panel("Throughput", "tokens per second", ("perf/tokens_per_s",)),
    Panel(
        "Model FLOPs utilisation",
        "% of the devices' peak",
        ("perf/mfu",),
        scale=100.0,
        missing="the device's peak is not known, or nothing is logged",
    ),
    Panel("Time of a step", "seconds", ("perf/*_s",)),
    Panel("Memory, peak", "GiB", ("perf/memory_gib",)),
    Panel(
        "Losses beside that of the tokens, weighted",
        "in the unit of the loss",
        ("loss/*",),
        missing="all coefficients are 0, or nothing is logged",
    ),
    Panel(
        "Losses of the router before their coefficients, mean of layers",
        "each in its own unit",
        (*(f"moe/{f.name}" for f in FIGURES if f.unit == UNSCALED), "moe/*_loss"),
        log=True,
        missing="no layer is routed, or nothing is logged",
    ),
)


def gate_panels(model) -> tuple[Panel, ...]:
    """The plots of experts inside of adapters, for a model that has such."""
    if model.adapter is None or not model.adapter.MIXES:
        return ()
    names = ((f, f"adapters/{f.name}") for f in gates.FIGURES)
    return tuple(
        Panel(f"{f.title} in adapters", f.unit, (name, f"{name}_worst"), BOTH)
        for f, name in names
    )


def section(material: Material) -> Section:
    """Plots of all that was logged, and a line for what was not."""
    plots, missing = [], []
    for panel in (*panels(material.cfg.task), *gate_panels(material.cfg.model)):
        plot = _plot(panel, material)
        if plot is None:
            missing.append(f"{panel.title} ({panel.missing})")
        else:
            plots.append(plot)
    parts: list = [Grid(tuple(plots))] if plots else []
    if missing:
        parts.append(Note(f"No data: {'; '.join(missing)}."))
    about = (
        f"Lines are training steps, dots evaluations of held-out data. Of more than "
        f"{downsample.POINTS:,} points a curve keeps the lowest and highest of equal "
        "stretches, so no spike is lost."
    )
    return Section("Training", parts, about)


def _plot(panel: Panel, material: Material) -> Plot | None:
    from plotly.graph_objects import Figure

    figure, task = Figure(), material.cfg.task
    found = [
        (kind, name) for kind in panel.kinds for name in _names(panel, kind, material)
    ]
    colours: dict[str, str] = {}
    drawn, title = [], panel.title
    if len(found) > MOST_CURVES:
        title += f" ({MOST_CURVES} of {len(found):,} curves)"
    for kind, name in found[:MOST_CURVES]:
        step_S, value_S = material.series(kind, name)
        step_S, value_S = downsample.curve(step_S, value_S)
        drawn.append(value_S)
        held = kind == "eval"
        colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
        figure.add_scatter(
            x=step_S,
            y=(value_S * panel.scale).astype(np.float32),
            name=html.escape(_title(name, task) + (", held out" if held else "")),
            mode="lines+markers" if held or len(step_S) == 1 else "lines",
            line={"color": colour, "width": 1 if held else 1.6}
            | ({"dash": "dot"} if held else {}),
            marker={"size": 7, "color": colour},
            hovertemplate="step %{x}: %{y:.5g}",
        )
    if not found:
        return None
    style(figure, height=300, title=title)
    figure.update_xaxes(title_text=STEP, rangemode="tozero")
    figure.update_yaxes(title_text=panel.unit)
    if panel.log:
        # Ticks at powers of ten, or at 1, 2 and 5 times these where they are few.
        values = np.concatenate(drawn)
        values = values[(values > 0) & np.isfinite(values)]
        wide = len(values) > 0 and values.max() / values.min() > 100
        figure.update_yaxes(type="log", dtick=1 if wide else "D2")
    figure.update_layout(
        showlegend=len(found) > 1,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0}
        | {"font": {"size": 11}},
    )
    return Plot(figure)


def _title(name: str, task: Task) -> str:
    titles = {figure.name: figure.title for figure in task.FIGURES}
    titles["grad_norm"] = "all"  # its plot also shows the norms of its parts
    return titles.get(name) or name.partition("/")[2] or name


def _names(panel: Panel, kind: str, material: Material) -> list[str]:
    """Figures of a panel that the lines of a kind have."""
    lines = material.lines.get(kind, {}).values()
    there = list(dict.fromkeys(name for line in lines for name in line))
    found = [name for name in there if any(_fits(name, n) for n in panel.names)]
    if panel.names == (f"{material.cfg.task.score}/*",) and len(found) < 2:
        return []
    return found


def _fits(name: str, pattern: str) -> bool:
    # A rate per second ends in "_s" too, but is no number of seconds.
    is_rate = "*" in pattern and "_per_" in name
    return fnmatch.fnmatchcase(name, pattern) and not is_rate
