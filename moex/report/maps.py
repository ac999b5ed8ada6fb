"""Heat maps behind a slider, and the colours of the page.

R rows · C columns
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moex.report import downsample
from moex.report.page import style

# Load over balanced load: black is dead, white balanced, red twice or more.
LOAD_COLOURS = (
    (0.0, "#000000"),
    (0.005, "#000000"),
    (0.0051, "#15407a"),
    (0.25, "#4f8fc4"),
    (0.5, "#f7f7f7"),
    (0.75, "#e0755d"),
    (1.0, "#7f0d1f"),
)
LOAD = {
    "zmin": 0,
    "zmax": 2,
    "colorscale": LOAD_COLOURS,
    "colorbar": {
        "title": {"text": "load /<br>balanced"},
        "tickvals": [0, 0.5, 1, 1.5, 2],
        "ticktext": ["0 (dead)", "0.5", "1", "1.5", "2 or more"],
    },
}
TOP = 0.995  # quantile of all cells where a scale without a fixed end stops
NARROW = 40  # columns; where there are more, cells have no gaps
BAR = 160  # pixels of a colour bar, and of the lowest map
DOUBLINGS = 3  # doublings of a ratio, up and down, that have colours of their own
# log2 of a ratio: black is a ratio of 0, white is 1, red is 8 or more.
RATIO = {
    "zmin": -DOUBLINGS,
    "zmax": DOUBLINGS,
    "colorscale": LOAD_COLOURS,
    "colorbar": {
        "title": {"text": "times the<br>mean"},
        "tickvals": list(range(-DOUBLINGS, DOUBLINGS + 1)),
        "ticktext": ["1/8 or less", "1/4", "1/2", "1", "2", "4", "8 or more"],
    },
}


def share(what: str) -> dict:
    """Colours of shares from 0 up."""
    bar = {"title": {"text": what}, "tickformat": ".0%"}
    return {"zmin": 0, "colorscale": "Viridis", "colorbar": bar}


def around_zero(what: str, most: float) -> dict:
    """Colours of a figure of either sign."""
    colours = {"zmin": -most, "zmax": most, "colorscale": "RdBu_r"}
    return colours | {"colorbar": {"title": {"text": what}}}


@dataclasses.dataclass(frozen=True)
class Map:
    """One position of the slider."""

    name: str  # name of the position
    z_RC: np.ndarray  # float, NaN for blanks
    rows: Sequence[Any] | None = None  # labels; None: numbers from 0
    columns: Sequence[Any] | None = None  # labels or numbers; None: numbers from 0
    # Values to show for a cell in place of its colour's number.
    about_RC: np.ndarray | None = None


def sliding(
    maps: Sequence[Map],
    colours: dict,
    *,
    title: str,
    axes: tuple[str, str],
    slider: str,
    told: str,
    active: int = 0,
    gap: float = 0.5,
    square: bool = False,
) -> Any:
    """A figure that shows one of some heat maps.

    Args:
      colours: fields of plotly's heat map, such as `LOAD`.
      axes: titles of rows and columns.
      slider: word before the name of a position, such as "layer ".
      told: how a cell is told; {row}, {column} and {value} stand for its own.
      active: the map that is shown first.
    """
    from plotly.graph_objects import Figure

    if "zmax" not in colours:
        # All positions have one scale, so that they can be compared.
        every = np.concatenate([one.z_RC[np.isfinite(one.z_RC)] for one in maps])
        most = float(np.quantile(every, TOP)) if every.size else 0.0
        colours = colours | {"zmax": max(most, 1e-9)}
    bar = {"lenmode": "pixels", "len": BAR} | colours["colorbar"]
    figure = Figure()
    for i, one in enumerate(maps):
        value, about = "%{z:.3g}", {}
        if one.about_RC is not None:
            value, about = "%{customdata:.3g}", {"customdata": _small(one.about_RC)}
        space = gap if one.z_RC.shape[1] <= NARROW else 0
        figure.add_heatmap(
            z=_small(one.z_RC),
            x=one.columns,
            y=one.rows,
            visible=i == active,
            xgap=space,
            ygap=space,
            hovertemplate=told.format(row="%{y}", column="%{x}", value=value)
            + "<extra></extra>",
            **about,
            **(colours | {"colorbar": bar}),
        )
    _slide(figure, slider, [one.name for one in maps], active)
    tall = max(one.z_RC.shape[0] for one in maps)
    wide = max(one.z_RC.shape[1] for one in maps)
    room = 190 if len(maps) > 1 else 120
    style(figure, height=room + _height(tall, square), title=title)
    if square:
        figure.update_layout(width=room + 160 + _height(tall, square))
    rows = _axis(axes[0], maps[0].rows, tall)
    figure.update_yaxes(autorange="reversed", automargin=True, **rows)
    columns = _axis(axes[1], maps[0].columns, wide)
    figure.update_xaxes(automargin=True, **columns)
    return figure


def by_row(rows: Mapping[str, Any], colours: dict, **look) -> Any:
    """A figure of one heat map, from rows by label that may be shorter than others."""
    one = Map("", padded(list(rows.values())), list(rows))
    return sliding([one], colours, slider="", **look)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array [R, C], with NaN where one is shorter."""
    z_RC = np.full((len(rows), max(map(len, rows))), np.nan)
    for z_C, row in zip(z_RC, rows, strict=True):
        z_C[: len(row)] = row
    return z_RC


def _small(z_RC) -> np.ndarray:
    return np.ascontiguousarray(z_RC, dtype=np.float32)


def _height(rows: int, square: bool) -> int:
    if square:
        return 420
    return max(16 * rows, BAR) if rows <= 40 else max(640, 5 * rows)


def _axis(title: str, labels, count: int) -> dict:
    about: dict[str, Any] = {
        "title": {"text": title},
        "showgrid": False,
        "zeroline": False,
    }
    if labels is None or isinstance(labels[0], str):
        about["dtick"] = _every(count)
    if labels is not None and isinstance(labels[0], str):
        about["type"] = "category"
    return about


def _every(count: int, most: int = 32) -> int:
    """The distance between labels that makes at most `most` of them."""
    step = 1
    while count > most * step:
        step *= 2
    return step


def _slide(figure, prefix: str, names: list[str], active: int) -> None:
    shown = np.eye(len(names), dtype=bool).tolist()
    steps = [
        {"label": name, "method": "restyle", "args": [{"visible": visible}]}
        for name, visible in zip(names, shown, strict=True)
    ]
    look = {"currentvalue": {"prefix": prefix}, "pad": {"t": 55, "b": 5}}
    if len(names) > 1:
        figure.update_layout(sliders=[{"active": active} | look | {"steps": steps}])


def affordable(items: Sequence[Any], numbers: int, budget: int) -> list[Any]:
    """Evenly spaced items that together hold at most `budget` numbers; at least one.

    Args:
      numbers: how many numbers the largest of them holds.
    """
    return [
        items[i]
        for i in downsample.spaced(len(items), max(1, budget // max(numbers, 1)))
    ]


def log_ratio(part_RC, whole_C) -> tuple[np.ndarray, np.ndarray]:
    """`(log2 of the ratio, the ratio)` of rows to one row; NaN where that is 0.

    A ratio of 0 has the lowest colour.
    """
    blank_RC = np.full(np.shape(part_RC), np.nan)
    ratio_RC = np.divide(part_RC, whole_C, out=blank_RC, where=np.asarray(whole_C) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_RC = np.maximum(np.log2(ratio_RC), -DOUBLINGS + 0.04)  # only 0 is black
    return np.where(ratio_RC == 0, -DOUBLINGS, log_RC), ratio_RC
