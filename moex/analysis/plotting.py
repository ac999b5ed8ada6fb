"""Loss against tokens, FLOPs and time: as a page of HTML, or as a picture.

A label may be the name of a folder or a text of a config file: nothing in it is markup.

S logged steps · R runs of a group
"""

import base64
import functools
import hashlib
import html
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moex.analysis.compare import Group, Table, estimate, make_table
from moex.analysis.points import write_points
from moex.analysis.reading import Curve
from moex.data.files import naming
from moex.terminal import printable

PANELS = (
    ("tokens_S", "tokens"),
    ("flops_S", "training FLOPs"),
    ("seconds_S", "wall time of training, s"),
)
PLOT = {
    "displaylogo": False,
    "responsive": True,
    "displayModeBar": "hover",
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}
TITLE = "Held-out loss with markers, training loss faint"
SEEDS = "; mean and 95 % interval over seeds"
FAINT, BAND = 0.35, 0.2  # opacity of training losses and of intervals
# Ten colours that both libraries know by these numbers (D3, or matplotlib's "tab10").
COLOURS = (
    *("#1F77B4", "#FF7F0E", "#2CA02C", "#D62728", "#9467BD"),
    *("#8C564B", "#E377C2", "#7F7F7F", "#BCBD22", "#17BECF"),
)


class Line(NamedTuple):
    """One line of each panel."""

    label: str  # the group's label
    kind: str  # "train" or "eval"
    colour: str  # the group's colour
    curve: Curve  # mean over seeds, of what was spent too
    half_S: Any  # half width of the interval of the loss; None for one seed
    has_flops: bool  # its FLOPs are of the experts that were used, not expected ones
    axis: str  # the title of the loss axis, with its unit

    @property
    def name(self) -> str:
        label = printable(self.label)
        return label if self.kind == "eval" else f"{label} (train)"


def plot_lines(groups: Sequence[Group]) -> list[Line]:
    """The lines of all groups, training losses first, below the others."""
    found = []
    for kind in ("train", "eval"):
        for i, group in enumerate(groups):
            curve, half_S = mean_curve([each[kind] for each in group.curves])
            if len(curve.step_S):
                colour = COLOURS[i % len(COLOURS)]
                about = (group.label, kind, colour)
                axis = group.task.FIGURES[0].axis
                found.append(Line(*about, curve, half_S, group.has_flops, axis))
    return found


def mean_curve(curves: Sequence[Curve]) -> tuple[Curve, np.ndarray | None]:
    """The mean of curves at the steps that all have, and half the loss's interval."""
    step_S = functools.reduce(np.intersect1d, (curve.step_S for curve in curves))
    curves = [curve.at(step_S) for curve in curves]
    spent = {
        name: np.mean([getattr(curve, name) for curve in curves], axis=0)
        for name, _ in PANELS
    }
    loss_S, half_S = estimate(np.array([curve.loss_S for curve in curves]))
    return Curve(step_S=step_S, loss_S=loss_S, **spent), half_S


def _title(lines: Sequence[Line]) -> str:
    return TITLE + (SEEDS if any(line.half_S is not None for line in lines) else "")


def _axis(field: str, title: str, lines: Sequence[Line]) -> str:
    expected = field == "flops_S" and not all(line.has_flops for line in lines)
    return f"{title}, as expected before training" if expected else title


def loss_range(lines: Sequence[Line]) -> tuple[float, float] | None:
    """The losses of all lines after the first fifth of the tokens, with a margin.

    The first losses are large and much alike in all runs; None: there is no range.
    """
    after = 0.2 * max(line.curve.tokens_S[-1] for line in lines)
    losses = [line.curve.loss_S[line.curve.tokens_S >= after] for line in lines]
    there = np.concatenate(losses)
    there = there[np.isfinite(there)]
    if not len(there) or there.min() == there.max():
        return None
    margin = 0.05 * (there.max() - there.min())
    return float(there.min() - margin), float(there.max() + margin)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; }
table { border-collapse: collapse; margin-bottom: .5rem; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
p { color: #555; margin: .25rem 0; max-width: 60rem; }
"""
ZOOM = (
    "The plot shows the losses after the first fifth of the tokens; double-click it to "
    "see all. A click on a name hides its line."
)


def as_html(table: Table) -> str:
    """A table and its notes as elements of a page."""

    def row(tag, cells):
        text = "".join(f"<{tag}>{html.escape(printable(c))}</{tag}>" for c in cells)
        return f"<tr>{text}</tr>"

    rows = [row("th", table.heads), *(row("td", cells) for cells in table.rows)]
    shared = [f"In all rows: {table.shared}."] if table.shared else []
    notes = [*shared, *table.notes, ZOOM]
    text = "".join(f"<p>{html.escape(printable(note))}</p>" for note in notes)
    return f"<style>{STYLE}</style><table>{''.join(rows)}</table>{text}"


def page(groups: Sequence[Group], file: pathlib.Path) -> None:
    """Write a page of table and plot that needs no other file."""
    from plotly.subplots import make_subplots

    lines = plot_lines(groups)

    figure = make_subplots(rows=1, cols=len(PANELS), shared_yaxes=True)
    for line in sorted(lines, key=lambda line: line.kind):  # held-out labels come first
        for column, (field, title) in enumerate(PANELS, 1):
            for trace in _traces(line, getattr(line.curve, field)):
                trace["showlegend"] = trace["showlegend"] and column == 1
                figure.add_trace(trace, row=1, col=column)
            axis = {"title_text": _axis(field, title, lines), "rangemode": "tozero"}
            figure.update_xaxes(**axis, exponentformat="SI", row=1, col=column)
    figure.update_yaxes(range=loss_range(lines))
    figure.update_yaxes(title_text=lines[0].axis, row=1, col=1)
    legend = {"orientation": "h", "y": -0.2}
    figure.update_layout(
        template="plotly_white", legend=legend, title_text=_title(lines)
    )
    text = figure.to_html(
        include_plotlyjs=True, div_id="plot", config=PLOT, default_height="70vh"
    )
    head, found, rest = text.partition("<head>")
    assert found, "plotly writes a page without a head"
    before, body, after = rest.partition("<body>")
    assert body, "plotly writes a page without a body"
    rest = f"{before}{body}{as_html(make_table(groups))}{after}"
    text = f"{head}{found}{policy(scripts_of(text))}{rest}"
    file.write_text(text, encoding="utf-8")


def scripts_of(text: str) -> list[str]:
    """The scripts of what plotly writes: its JSON has no `<`, so none ends early."""
    return re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)


def policy(scripts: Iterable[str]) -> str:
    """The element of a page that may run these scripts alone, and fetch nothing."""
    digests = (hashlib.sha256(s.encode()).digest() for s in dict.fromkeys(scripts))
    allowed = " ".join(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)
    return (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'\">"
    )


def _traces(line: Line, x_S: np.ndarray) -> list[dict]:
    """A line of one panel, and its interval if there is one."""
    held = line.kind == "eval"
    name = html.escape(line.name)  # plotly reads it as markup
    about = {"type": "scatter", "name": name, "legendgroup": name}
    traces = [
        about
        | {"x": x_S, "y": line.curve.loss_S, "showlegend": True}
        | {"mode": "lines+markers" if held else "lines"}
        | {"line": {"color": line.colour, "width": 2 if held else 1}}
        | {"opacity": 1 if held else FAINT}
    ]
    if line.half_S is not None:
        loss_S, half_S = line.curve.loss_S, line.half_S
        low_S, high_S = loss_S - half_S, loss_S + half_S
        around: dict[str, Any] = {"x": np.concatenate([x_S, x_S[::-1]])}
        around |= {"y": np.concatenate([high_S, low_S[::-1]]), "fill": "toself"}
        around |= {"fillcolor": line.colour, "opacity": BAND if held else BAND * FAINT}
        around |= {"mode": "lines", "line": {"width": 0, "color": line.colour}}
        traces.append(about | around | {"showlegend": False, "hoverinfo": "skip"})
    return traces


def picture(groups: Sequence[Group], file: pathlib.Path) -> None:
    """Write the same plot as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    lines = plot_lines(groups)
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (field, title) in zip(panels, PANELS, strict=True):
        handles = []
        for line in lines:
            x_S, y_S = getattr(line.curve, field), line.curve.loss_S
            held = line.kind == "eval"
            style = {"marker": "o", "markersize": 4} if held else {"alpha": FAINT}
            handles += axes.plot(x_S, y_S, color=line.colour, **style)
            if line.half_S is not None:
                axes.fill_between(
                    *(x_S, y_S - line.half_S, y_S + line.half_S),
                    color=line.colour,
                    alpha=BAND if held else BAND * FAINT,
                    linewidth=0,
                )
        axes.set_xlabel(_axis(field, title, lines))
        axes.set_xlim(left=0)
        if field != "seconds_S":
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.grid(alpha=BAND)
    figure.suptitle(_title(lines), fontsize="medium")
    panels[0].set_ylabel(lines[0].axis)
    panels[0].set_ylim(loss_range(lines))
    names = [line.name for line in lines]
    legend = figure.legend(
        handles, names, loc="outside lower center", ncols=2, fontsize="small"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar begins no formula
    figure.savefig(file, dpi=120)


def write_comparison(groups: Sequence[Group], data: str, out: pathlib.Path) -> None:
    """Write runs side by side as the ending of a file says.

    Args:
      data: the groups as JSON, for ".json".
      out: ends in ".json", ".csv" (points of the curves), ".html" or ".png".
    """
    with naming(out):
        if out.suffix == ".json":
            out.write_text(data + "\n", encoding="utf-8")
        elif out.suffix == ".csv":
            write_points(groups, out)
        else:
            draw = page if out.suffix == ".html" else picture
            draw(groups, out)
