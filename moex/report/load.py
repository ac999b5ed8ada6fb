"""Where tokens go: load, and what it has to do with domains and positions.

E experts · D domains · P buckets of positions · K experts of a token
"""

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis
from moex.report import maps
from moex.report.by_layer import left_out, maps_of, over_layers, unique, with_rows
from moex.report.page import Note, Plot, Section, layer_name, token

INFORMATION = (
    "How much a slot's expert tells of the domain, or the position bucket, of its "
    "token; 0 if routing does not depend on it."
)


def load(found: Analysis, about: str) -> Section:
    """The section on the load of all traced tokens."""
    layers = list(found.layers.values())
    width = max(len(layer.load_E) for layer in layers)
    z_RE = np.full((len(layers), width), np.nan)
    for row, layer in zip(z_RE, layers, strict=True):
        row[: len(layer.load_E)] = stats.share(layer.load_E) * len(layer.load_E)
    figure = maps.sliding(
        [maps.Map("", z_RE, [layer_name(name) for name in found.layers])],
        maps.LOAD,
        title="Load by layer and expert, all traced tokens",
        axes=("layer", "expert"),
        slider="",
        told="layer {row}, expert {column}: {value} x balanced",
    )
    counts = [
        f"{token(name)}: {int(count):,}"
        for name, count in zip(found.domains, found.tokens_D, strict=True)
    ]
    text = f"{found.num_tokens:,} tokens: {', '.join(counts)}."
    return Section("Trace", [Note(text), Plot(figure)], about)


def domains(found: Analysis) -> Section:
    """The section on the experts that each domain uses."""
    title = "Domains"
    present = found.tokens_D > 0
    if np.sum(present) < 2:
        return Section(title, [Note("No data: the trace has tokens of one domain.")])
    names = unique([found.domains[d] for d in np.flatnonzero(present)])

    def lift(layer: LayerAnalysis):
        special_DE = stats.specialisation(layer.domain_DE, found.tokens_D)[present]
        whole_E = layer.load_E / found.num_tokens
        return maps.log_ratio(special_DE, whole_E)

    shown_maps = with_rows(maps_of(found, lift), names)
    figure = maps.sliding(
        shown_maps,
        maps.RATIO,
        title="Experts by domain",
        axes=("domain", "expert"),
        slider="layer ",
        told="{row}, expert {column}: {value} x its mean share",
    )
    about = (
        "Share of a domain's tokens that an expert gets, over the share of all tokens "
        "that it gets (domain specialisation, OLMoE): 1 does not care, black never."
        + left_out(shown_maps, len(found.layers))
    )
    told = {
        "domain": [
            stats.mutual_information(la.domain_DE) for la in found.layers.values()
        ],
        "position": [
            stats.mutual_information(la.position_PE) for la in found.layers.values()
        ],
    }
    figure_2 = over_layers(
        found,
        told,
        "Mutual information of expert and domain, expert and position",
        "nats per slot",
    )
    return Section(title, [Plot(figure), Plot(figure_2, INFORMATION)], about)


def positions(found: Analysis) -> Section:
    """The section on the experts that each position in a document uses."""

    def lift(layer: LayerAnalysis):
        special_PE = stats.specialisation(layer.position_PE, found.tokens_P)
        return maps.log_ratio(special_PE, layer.load_E / found.num_tokens)

    shown_maps = with_rows(maps_of(found, lift), found.positions)
    figure = maps.sliding(
        shown_maps,
        maps.RATIO,
        title="Experts by position in the document",
        axes=("position", "expert"),
        slider="layer ",
        told="positions {row}, expert {column}: {value} x its mean share",
    )
    about = (
        "Share of the tokens at some positions that an expert gets, over the share of "
        "all tokens that it gets: 1 does not care, black never."
    )
    left = left_out(shown_maps, len(found.layers))
    return Section("Positions", [Plot(figure)], about + left)


def sizes(found: Analysis) -> Section:
    """The section on the number of experts of a token, by layer."""
    title = "Experts per token"
    counts = {name: la.size_DK.sum(axis=0) for name, la in found.layers.items()}
    if all(np.sum(count_K > 0) <= 1 for count_K in counts.values()):
        fixed = sorted({int(np.argmax(count_K)) for count_K in counts.values()})
        text = " or ".join(map(str, fixed))
        note = f"No choice: all tokens of a layer have as many experts, {text}."
        return Section(title, [Note(note)])
    present = np.flatnonzero(found.tokens_D)
    series = {
        "all tokens": [
            stats.size_figures(count_K)["mean"] for count_K in counts.values()
        ]
    }
    if len(present) > 1:
        names = unique([found.domains[d] for d in present])
        for name, d in zip(names, present, strict=True):
            series[name] = [
                stats.size_figures(la.size_DK[d])["mean"]
                for la in found.layers.values()
            ]
    means = over_layers(found, series, "Experts per token by layer", "mean number")
    width = max(len(count_K) for count_K in counts.values())
    z_RK = np.full((len(counts), width), np.nan)
    for row, count_K in zip(z_RK, counts.values(), strict=True):
        row[: len(count_K)] = stats.share(count_K)
    spread = maps.sliding(
        [maps.Map("", z_RK, [layer_name(name) for name in counts])],
        maps.share("share of<br>tokens"),
        title="Distribution of experts per token",
        axes=("layer", "experts of a token"),
        slider="",
        told="layer {row}: {column} experts for {value} of the tokens",
    )
    about = (
        "Computing experts of a token, before capacity (the Dynamic-routing figure)."
    )
    return Section(title, [Plot(means), Plot(spread)], about)
