"""Where tokens go: load, and what it has to do with domains and positions.

E experts · D domains · P buckets of positions · K experts of a token
"""

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis
from moex.report import maps
from moex.report.by_layer import layer_maps, over_layers, unique, with_domains
from moex.report.page import Note, Plot, Section, layer_name, token

INFORMATION = (
    "How much a slot's expert tells of the domain, or the position bucket, of its "
    "token; 0 if routing does not depend on it."
)


def load(found: Analysis, about: str) -> Section:
    """The section on the load of all traced tokens."""
    figure = maps.by_row(
        {
            layer_name(name): stats.share(layer.load_E) * len(layer.load_E)
            for name, layer in found.layers.items()
        },
        maps.LOAD,
        title="Load by layer and expert, all traced tokens",
        axes=("layer", "expert"),
        told="layer {row}, expert {column}: {value} x balanced",
    )
    counts = [
        f"{token(name)}: {int(count):,}"
        for name, count in zip(found.domains, found.tokens_D, strict=True)
    ]
    text = f"{found.num_tokens:,} tokens: {', '.join(counts)}."
    return Section("Trace", [Note(text), Plot(figure)], about)


def _ratios(found: Analysis, counts, tokens_G, rows, **look) -> tuple[Plot, str]:
    """Maps of the share that experts get of groups of tokens over that of all tokens.

    `counts` gives `count_GE` of a layer; groups without tokens are left out.
    """
    present = tokens_G > 0

    def ratio(layer: LayerAnalysis):
        special_GE = stats.specialisation(counts(layer), tokens_G)[present]
        return maps.log_ratio(special_GE, layer.load_E / found.num_tokens)

    rows = [rows[g] for g in np.flatnonzero(present)]
    return layer_maps(found, ratio, maps.RATIO, rows=rows, **look)


def domains(found: Analysis) -> Section:
    """The section on the experts that each domain uses."""
    title = "Domains"
    if np.sum(found.tokens_D > 0) < 2:
        return Section(title, [Note("No data: the trace has tokens of one domain.")])
    plot, left = _ratios(
        found,
        lambda layer: layer.domain_DE,
        found.tokens_D,
        unique(found.domains),
        title="Experts by domain",
        axes=("domain", "expert"),
        told="{row}, expert {column}: {value} x its mean share",
    )
    about = (
        "Share of a domain's tokens that an expert gets, over the share of all tokens "
        "that it gets (domain specialisation, OLMoE): 1 does not care, black never."
    )
    layers = found.layers.values()
    told = over_layers(
        found,
        {
            "domain": [stats.mutual_information(la.domain_DE) for la in layers],
            "position": [stats.mutual_information(la.position_PE) for la in layers],
        },
        "Mutual information of expert and domain, expert and position",
        "nats per slot",
    )
    return Section(title, [plot, Plot(told.figure, INFORMATION)], about + left)


def positions(found: Analysis) -> Section:
    """The section on the experts that each position in a document uses."""
    plot, left = _ratios(
        found,
        lambda layer: layer.position_PE,
        found.tokens_P,
        found.positions,
        title="Experts by position in the document",
        axes=("position", "expert"),
        told="positions {row}, expert {column}: {value} x its mean share",
    )
    about = (
        "Share of the tokens at some positions that an expert gets, over the share of "
        "all tokens that it gets: 1 does not care, black never."
    )
    return Section("Positions", [plot], about + left)


def sizes(found: Analysis) -> Section:
    """The section on the number of experts of a token, by layer."""
    title = "Experts per token"
    counts = {name: la.size_DK.sum(axis=0) for name, la in found.layers.items()}
    if all(np.sum(count_K > 0) <= 1 for count_K in counts.values()):
        fixed = sorted({int(np.argmax(count_K)) for count_K in counts.values()})
        text = " or ".join(map(str, fixed))
        note = f"No choice: all tokens of a layer have as many experts, {text}."
        return Section(title, [Note(note)])

    def means(counts):
        return [stats.size_figures(count_K)["mean"] for count_K in counts]

    series = with_domains(
        found,
        means(counts.values()),
        lambda d: means(la.size_DK[d] for la in found.layers.values()),
    )
    spread = maps.by_row(
        {layer_name(name): stats.share(count_K) for name, count_K in counts.items()},
        maps.share("share of<br>tokens"),
        title="Distribution of experts per token",
        axes=("layer", "experts of a token"),
        told="layer {row}: {column} experts for {value} of the tokens",
    )
    about = (
        "Computing experts of a token, before capacity (the Dynamic-routing figure)."
    )
    plot = over_layers(found, series, "Experts per token by layer", "mean number")
    return Section(title, [plot, Plot(spread)], about)
