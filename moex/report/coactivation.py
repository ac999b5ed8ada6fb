"""Which experts go together: in a token, in the next layer or round, at another step.

E experts · A, B experts of two layers
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis, Step
from moex.report import maps
from moex.report.by_layer import (
    COLOURS_END,
    NUMBERS,
    left_out,
    maps_of,
    over_layers,
    unique,
)
from moex.report.page import Note, Plot, Section, layer_name, style


def coactivation(found: Analysis) -> Section:
    """The section on experts of the same token."""
    title = "Co-activation"
    if all(layer.info.slots < 2 for layer in found.layers.values()):
        return Section(title, [Note("No data: no token has two experts.")])

    def given(layer: LayerAnalysis):
        share_EE = stats.coactivation(layer.coactivation_EE)
        share_EE[layer.load_E == 0] = np.nan
        np.fill_diagonal(share_EE, np.nan)  # always 1
        return share_EE

    shown_maps = maps_of(found, given)
    figure = maps.sliding(
        shown_maps,
        maps.share("share of<br>tokens"),
        title="Experts of the same token",
        axes=("of the tokens of expert", "those that have expert too"),
        slider="layer ",
        told="of the tokens of expert {row}, {value} have expert {column} too",
        square=True,
    )
    about = (
        "P(column | row) over tokens (OLMoE); the diagonal, always 1, is left out. "
        f"{COLOURS_END}"
    )
    left = left_out(shown_maps, len(found.layers))
    return Section(title, [Plot(figure)], about + left)


def _steps(found: Analysis, kind: str) -> list[Step]:
    return [step for step in found.steps if step.kind == kind]


def _transitions(steps: list[Step], title: str, count: Callable[[Step], Any]):
    """`(figure, what is left out)` of P(column | row) between routers."""
    made = [
        maps.Map(
            f"{layer_name(s.source)} → {layer_name(s.target)}", stats.affinity(count(s))
        )
        for s in steps
    ]
    kept = maps.affordable(made, max(m.z_RC.size for m in made), NUMBERS)
    figure = maps.sliding(
        kept,
        maps.share("share"),
        title=title,
        axes=("expert before", "expert after"),
        slider="layers ",
        told="after expert {row}: expert {column} for {value}",
        square=True,
    )
    return figure, left_out(kept, len(steps))


def affinity(found: Analysis) -> Section:
    """The section on experts in the next layer: the ExFlow statistic."""
    title = "Affinity"
    steps = _steps(found, "layer")
    if not steps:
        return Section(title, [Note("No data: one layer alone is routed.")])
    figure, left = _transitions(
        steps, "Expert of the next layer, given that of this one", lambda s: s.top_AB
    )
    known = [stats.predictability(step.top_AB) for step in steps]
    where = [f"{layer_name(s.source)} → {layer_name(s.target)}" for s in steps]
    plot = _over(
        where,
        {
            "given the expert before": [k["given"] for k in known],
            "blind, by load": [k["blind"] for k in known],
        },
        "How often the next layer's expert is guessed",
        "share of tokens",
    )
    about = (
        "P(column | row) over tokens, by their experts of greatest gate (the ExFlow "
        "statistic). Guesses are the most frequent expert. " + COLOURS_END + left
    )
    return Section(title, [Plot(figure), Plot(plot)], about)


def _over(where: list[str], series: dict[str, list[float]], title, unit):
    from plotly.graph_objects import Figure

    figure = Figure()
    for name, values in series.items():
        y = np.asarray(values, np.float32)
        figure.add_scatter(x=where, y=y, name=name, mode="lines+markers")
    style(figure, height=320, title=title)
    figure.update_xaxes(title_text="layers", type="category")
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(series) > 1)
    return figure


def chain(found: Analysis) -> Section:
    """The section on experts in the next round of a chain."""
    title = "Chain"
    steps = _steps(found, "round")
    if not steps:
        return Section(title, [Note("No data: the model has no chain of experts.")])
    figure, left = _transitions(
        steps, "Expert of the next round, given that of this one", lambda s: s.pairs_AB
    )
    same = [
        stats.repeats(s.pairs_AB, found.layers[s.source].load_E)
        if s.pairs_AB.shape[0] == s.pairs_AB.shape[1]
        else np.nan
        for s in steps
    ]
    where = [f"{layer_name(s.source)} → {layer_name(s.target)}" for s in steps]
    plot = _over(
        where,
        {"repeated": same},
        "Slots whose expert the next round takes again",
        "share of slots",
    )
    about = (
        "Transitions over all slots of a token (the Chain-of-Experts figure). "
        + COLOURS_END
        + left
    )
    return Section(title, [Plot(figure), Plot(plot)], about)


def saturation(found: Analysis, overlap: dict | None) -> Section:
    """The section on how far another checkpoint routes alike."""
    title = "Saturation"
    if overlap is None:
        text = "No data: give --compare-trace=FILE, of the same tokens by another step."
        return Section(title, [Note(text)])
    series = {
        "all tokens": [
            float(stats.saturation([sums.sum(axis=0)])[0]) for sums in overlap.values()
        ]
    }
    present = np.flatnonzero(found.tokens_D)
    if len(present) > 1:
        names = unique([found.domains[d] for d in present])
        for name, d in zip(names, present, strict=True):
            values = [float(stats.saturation(sums)[d]) for sums in overlap.values()]
            series[name] = values
    series["uniform routing"] = [
        float(stats.uniform_share(la.domain_DE, found.tokens_D))
        for la in found.layers.values()
    ]
    figure = over_layers(
        found,
        series,
        "Experts that both checkpoints choose",
        "share of a token's experts",
    )
    about = "1: the routing of these tokens is the same in both traces (OLMoE)."
    return Section(title, [Plot(figure)], about)
