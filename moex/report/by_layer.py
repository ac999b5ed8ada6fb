"""Parts that the figures of a trace share: a map of each layer, curves over layers.

R rows · C columns
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moex.analysis.summary import Analysis, LayerAnalysis
from moex.report import maps
from moex.report.page import label, layer_name, style

NUMBERS = 400_000  # numbers in all maps of one figure; four bytes each
COLOURS_END = f"Colours end at the {100 * maps.TOP:g} % quantile of all cells."


def unique(names: Sequence[str]) -> list[str]:
    """Texts of a corpus as labels of an axis, told apart where they are alike."""
    labels = [label(name) for name in names]
    return [
        text if labels.count(text) == 1 else f"{text} ({i})"
        for i, text in enumerate(labels)
    ]


def maps_of(found: Analysis, make: Callable[[LayerAnalysis], Any]) -> list:
    """A map of each layer, or of evenly spaced ones where there is no room for all."""
    made = [
        maps.Map(layer_name(name), *_pair(make(layer)))
        for name, layer in found.layers.items()
    ]
    numbers = max(one.z_RC.size * (1 + (one.about_RC is not None)) for one in made)
    return maps.affordable(made, numbers, NUMBERS)


def _pair(result):
    z_RC, about_RC = result if isinstance(result, tuple) else (result, None)
    return z_RC, None, None, about_RC


def left_out(shown_maps: list, total: int) -> str:
    """A sentence about layers that are not shown, or nothing."""
    if len(shown_maps) == total:
        return ""
    return f" {len(shown_maps)} evenly spaced ones of {total}."


def with_rows(made: list, rows: Sequence[str], columns=None) -> list:
    """The same maps with labels of rows and columns."""
    return [maps.Map(m.name, m.z_RC, rows, columns, m.about_RC) for m in made]


def over_layers(found: Analysis, series: Mapping[str, Sequence[float]], title, unit):
    """Curves over the layers, one for each entry; names are labels, escaped."""
    from plotly.graph_objects import Figure

    figure = Figure()
    where = [layer_name(name) for name in found.layers]
    for name, values in series.items():
        figure.add_scatter(
            x=where,
            y=np.asarray(values, np.float32),
            name=name,
            mode="lines+markers",
            hovertemplate="layer %{x}: %{y:.4g}",
        )
    style(figure, height=320, title=title)
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(series) > 1)
    return figure
