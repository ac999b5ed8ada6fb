"""Which experts go together: in a token, in the next layer or round, at another step.

E experts · A, B experts of two layers
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis, Step
from moex.report import by_layer, maps
from moex.report.page import Note, Plot, Section, layer_name


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

    plot, left = by_layer.layer_maps(
        found,
        given,
        maps.share("share of<br>tokens"),
        title="Experts of the same token",
        axes=("of the tokens of expert", "those that have expert too"),
        told="of the tokens of expert {row}, {value} have expert {column} too",
        square=True,
    )
    about = (
        "P(column | row) over tokens (OLMoE); the diagonal, always 1, is left out. "
        f"{by_layer.COLOURS_END}"
    )
    return Section(title, [plot], about + left)


def _steps(found: Analysis, kind: str) -> list[Step]:
    return [step for step in found.steps if step.kind == kind]


def _places(steps: list[Step]) -> list[str]:
    return [f"{layer_name(s.source)} → {layer_name(s.target)}" for s in steps]


def _transitions(
    steps: list[Step], title: str, count: Callable[[Step], Any]
) -> tuple[Plot, str]:
    """The plot of P(column | row) between routers, and what is left out."""
    shares = [stats.affinity(count(step)) for step in steps]
    return by_layer.slider(
        [maps.Map(*pair) for pair in zip(_places(steps), shares, strict=True)],
        maps.share("share"),
        title=title,
        axes=("expert before", "expert after"),
        slider="layers ",
        told="after expert {row}: expert {column} for {value}",
        square=True,
    )


def affinity(found: Analysis) -> Section:
    """The section on experts in the next layer: the ExFlow statistic."""
    title = "Affinity"
    steps = _steps(found, "layer")
    if not steps:
        return Section(title, [Note("No data: one layer alone is routed.")])
    plot, left = _transitions(
        steps, "Expert of the next layer, given that of this one", lambda s: s.top_AB
    )
    known = [stats.predictability(step.top_AB) for step in steps]
    guessed = by_layer.curves(
        _places(steps),
        {
            "given the expert before": [k["given"] for k in known],
            "blind, by load": [k["blind"] for k in known],
        },
        "How often the next layer's expert is guessed",
        "share of tokens",
        "layers",
    )
    about = (
        "P(column | row) over tokens, by their experts of greatest gate (the ExFlow "
        "statistic). Guesses are the most frequent expert. "
        + by_layer.COLOURS_END
        + left
    )
    return Section(title, [plot, guessed], about)


def chain(found: Analysis) -> Section:
    """The section on experts in the next round of a chain."""
    title = "Chain"
    steps = _steps(found, "round")
    if not steps:
        return Section(title, [Note("No data: the model has no chain of experts.")])
    plot, left = _transitions(
        steps, "Expert of the next round, given that of this one", lambda s: s.pairs_AB
    )
    same = [
        stats.repeats(s.pairs_AB, found.layers[s.source].load_E)
        if s.pairs_AB.shape[0] == s.pairs_AB.shape[1]
        else np.nan
        for s in steps
    ]
    taken = by_layer.curves(
        _places(steps),
        {"repeated": same},
        "Slots whose expert the next round takes again",
        "share of slots",
        "layers",
    )
    about = (
        "Transitions over all slots of a token (the Chain-of-Experts figure). "
        + by_layer.COLOURS_END
        + left
    )
    return Section(title, [plot, taken], about)


def saturation(found: Analysis, overlap: dict | None) -> Section:
    """The section on how far another checkpoint routes alike."""
    title = "Saturation"
    if overlap is None:
        text = "No data: give --compare-trace=FILE, of the same tokens by another step."
        return Section(title, [Note(text)])
    series = by_layer.with_domains(
        found,
        [float(stats.saturation([sums.sum(axis=0)])[0]) for sums in overlap.values()],
        lambda d: [float(stats.saturation(sums)[d]) for sums in overlap.values()],
    )
    series["uniform routing"] = [
        float(stats.uniform_share(la.domain_DE, found.tokens_D))
        for la in found.layers.values()
    ]
    plot = by_layer.over_layers(
        found,
        series,
        "Experts that both checkpoints choose",
        "share of a token's experts",
    )
    about = "1: the routing of these tokens is the same in both traces (OLMoE)."
    return Section(title, [plot], about)
