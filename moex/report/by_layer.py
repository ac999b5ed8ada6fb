"""Figures of a trace: a map of each layer behind a slider, curves over layers.

R rows · C columns
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moex.analysis.summary import Analysis, LayerAnalysis
from moex.report import maps
from moex.report.page import Plot, label, layer_name, style

NUMBERS = 400_000  # numbers in all maps of one figure; four bytes each
COLOURS_END = f"Colours end at the {100 * maps.TOP:g} % quantile of all cells."


def unique(names: Sequence[str]) -> list[str]:
    """Texts of a corpus as labels of an axis, told apart where they are alike."""
    labels = [label(name) for name in names]
    return [
        text if labels.count(text) == 1 else f"{text} ({i})"
        for i, text in enumerate(labels)
    ]


def layer_maps(
    found: Analysis,
    make: Callable[[LayerAnalysis], Any],
    colours: dict,
    *,
    rows: Sequence[str] | None = None,
    **look,
) -> tuple[Plot, str]:
    """The plot of a map of each layer; see `slider`.

    Args:
      make: gives `z_RC` of a layer, or `(z_RC, about_RC)`: see `maps.Map`.
      colours, look: see `maps.sliding`.
      rows: labels of the rows; None: numbers.
    """
    made = []
    for name, layer in found.layers.items():
        result = make(layer)
        z_RC, about_RC = result if isinstance(result, tuple) else (result, None)
        made.append(maps.Map(layer_name(name), z_RC, rows, about_RC=about_RC))
    return slider(made, colours, slider="layer ", **look)


def slider(made: list[maps.Map], colours: dict, **look) -> tuple[Plot, str]:
    """The plot of as many maps as there is room for, and a sentence on the others.

    The maps that are shown are evenly spaced; the sentence is empty if all are shown.
    """
    numbers = max(one.z_RC.size * (1 + (one.about_RC is not None)) for one in made)
    kept = maps.affordable(made, numbers, NUMBERS)
    left = f" {len(kept)} evenly spaced ones of {len(made)}."
    plot = Plot(maps.sliding(kept, colours, **look))
    return plot, "" if len(kept) == len(made) else left


def over_layers(found: Analysis, series: Mapping[str, Sequence[float]], title, unit):
    """The plot of `curves` over all layers."""
    return curves([layer_name(name) for name in found.layers], series, title, unit)


def curves(
    where: list[str],
    series: Mapping[str, Sequence[float]],
    title: str,
    unit: str,
    axis: str = "layer",
):
    """The plot of one curve for each entry of `series`; names are labels, escaped."""
    from plotly.graph_objects import Figure

    figure = Figure()
    for name, values in series.items():
        figure.add_scatter(
            x=where,
            y=np.asarray(values, np.float32),
            name=name,
            mode="lines+markers",
            hovertemplate=f"{axis} %{{x}}: %{{y:.4g}}",
        )
    style(figure, height=320, title=title)
    figure.update_xaxes(title_text=axis, type="category")
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(series) > 1)
    return Plot(figure)


def with_domains(found: Analysis, whole: Sequence[float], of_domain) -> dict[str, Any]:
    """Series of all tokens, and of each domain where the trace has several.

    Args:
      whole: the series of all tokens.
      of_domain: gives the series of a domain from its number.
    """
    series = {"all tokens": whole}
    present = np.flatnonzero(found.tokens_D)
    if len(present) > 1:
        names = unique([found.domains[d] for d in present])
        series |= dict(zip(names, map(of_domain, present), strict=True))
    return series
