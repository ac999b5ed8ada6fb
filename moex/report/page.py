"""A page of HTML out of sections: plots, tables, notes; one file that needs no other.

Every text is escaped here, by Jinja; plots come as plotly figures, whose labels were
escaped by `label`, for plotly reads them as markup.
"""

import dataclasses
import html
import itertools
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from moex.analysis.plotting import PLOT, policy, scripts_of
from moex.model.layers import shown
from moex.terminal import printable

POLICY = "<!-- policy -->"  # stands in the template before all other texts
MARGIN = {"l": 70, "r": 30, "t": 60, "b": 50}
TITLE = {"x": 0, "y": 0.98, "yanchor": "top", "font": {"size": 14}}
WHITE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}  # how tokens show them


@dataclasses.dataclass(frozen=True)
class Note:
    """A line of text."""

    text: str
    kind: str = "note"


@dataclasses.dataclass(frozen=True)
class Verbatim:
    """Text with its line breaks, closed if it has a title."""

    text: str
    title: str = ""
    kind: str = "verbatim"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first column is text too, numbers are right-aligned."""

    head: Sequence[str]  # names of the columns
    rows: Sequence[Sequence[str]]  # cells; a number is a str already
    caption: str = ""  # what the table shows
    words: Sequence[int] = (0,)  # indices of the columns that hold words, not numbers
    title: str = ""  # title of a table that is closed until somebody opens it
    kind: str = "table"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A plotly figure and what it shows."""

    figure: Any
    caption: str = ""
    kind: str = "plot"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Small plots side by side."""

    plots: Sequence[Plot]
    kind: str = "grid"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str  # also of its entry in the table of contents
    parts: Sequence[Any]  # the parts that it shows, in order
    about: str = ""  # what it is and how to read it

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def label(text: str, most: int = 40) -> str:
    """Text of a corpus as a plotly label: shortened, nothing in it is markup."""
    return html.escape(token(text, most))


def layer_name(name: str) -> str:
    """The label of a layer in a trace or a log as a plotly label."""
    return html.escape(printable(shown(name)))


def token(text: str, most: int = 40) -> str:
    """Text of a corpus on one line, with its white space visible, and shortened."""
    runs = [(char, len(list(run))) for char, run in itertools.groupby(text[: 4 * most])]
    parts = [
        f"{_visible(c)}×{count}" if c in WHITE and count > 2 else _visible(c) * count
        for c, count in runs
    ]
    shown = "".join(parts)
    whole = len(shown) <= most and len(text) <= 4 * most
    return shown if whole else shown[:most] + "…"


def _visible(char: str) -> str:
    if char in WHITE:
        return WHITE[char]
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def style(figure, *, height: int, title: str = "") -> Any:
    """A figure in the look of the page."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin=MARGIN,
        title={"text": title} | TITLE,
        font={"size": 12},
        hovermode="closest",
    )
    return figure


class _Plots:
    """Figures as markup with ids in order, so that equal runs make equal pages."""

    def __init__(self):
        self.count = 0
        self.scripts: list[str] = []

    def __call__(self, figure) -> markupsafe.Markup:
        # Plotly writes <, > and / of its JSON as escapes, so no text ends the script.
        text = figure.to_html(
            config=PLOT,
            include_plotlyjs=False,
            full_html=False,
            div_id=f"plot-{self.count}",
        )
        self.count += 1
        self.scripts += scripts_of(text)
        return markupsafe.Markup(text)


def render(title: str, about: Sequence[str], findings, sections) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moex.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plot, plotlyjs = _Plots(), get_plotlyjs()
    text = environment.get_template("page.html.j2").render(
        title=title,
        about=about,
        findings=findings,
        sections=sections,
        plot=plot,
        plotlyjs=markupsafe.Markup(plotlyjs),
    )
    text = text.replace(POLICY, policy([plotlyjs, *plot.scripts]), 1)
    # A name of a file may hold what UTF-8 cannot.
    return text.encode(errors="backslashreplace").decode()
