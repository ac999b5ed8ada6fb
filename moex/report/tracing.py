"""What a trace tells: where tokens of each kind go, and which experts go together.

E experts · D domains · P buckets of positions · M markers · A, B experts of two layers
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis, Step
from moex.report import maps
from moex.report.material import Routing
from moex.report.page import Note, Plot, Section, label, style, token
from moex.report.tokens import section as tokens
from moex.train.layers import shown

NUMBERS = 400_000  # of the maps of one figure; four bytes each
COLOURS_END = f"Colours end at the {100 * maps.TOP:g} % quantile of all cells."
NO_TRACE = "No data: give --trace=FILE, which `moex trace` writes."
TITLES = (
    *("Trace", "Domains", "Positions", "Tokens", "Experts per token"),
    *("Co-activation", "Affinity", "Chain", "Saturation", "Scores", "Markers"),
)


def sections(found: Analysis | None, overlap: dict | None, about: str) -> list[Section]:
    """The sections of a trace.

    Args:
      found: what `analyse` found; None: there is no trace.
      overlap: of `summary.compare` with another trace; None: there is none.
      about: whose trace it is, and of which data.
    """
    if found is None:
        return [
            Section("Trace", [Note(NO_TRACE)], f"With one: {', '.join(TITLES[1:])}.")
        ]
    parts = (
        *(_load(found, about), _domains(found), _positions(found), tokens(found)),
        *(_sizes(found), _coactivation(found), _affinity(found), _chain(found)),
        *(_saturation(found, overlap), _scores(found), _markers(found)),
    )
    return list(parts)


def figures(found: Analysis) -> Routing:
    """Of a trace, what routing.jsonl has of a logged step: for the checks of layers."""
    layers = {
        name: {
            "load_frac": stats.share(layer.load_E).astype(np.float32)[None],
            "experts_per_token": np.array(
                [stats.size_figures(layer.size_DK.sum(axis=0))["mean"]], np.float32
            ),
        }
        for name, layer in found.layers.items()
    }
    return Routing(step_S=np.array([found.step]), layers=layers, read=1, there=1)


def unique(names: Sequence[str]) -> list[str]:
    """Texts of a corpus as labels of an axis, told apart where they are alike."""
    labels = [label(name) for name in names]
    return [
        text if labels.count(text) == 1 else f"{text} ({i})"
        for i, text in enumerate(labels)
    ]


def _maps(found: Analysis, make: Callable[[LayerAnalysis], Any]) -> list:
    """A map of each layer, or of evenly spaced ones where there is no room for all."""
    made = [
        maps.Map(shown(name), *_pair(make(layer)))
        for name, layer in found.layers.items()
    ]
    numbers = max(one.z_RC.size * (1 + (one.about_RC is not None)) for one in made)
    return maps.affordable(made, numbers, NUMBERS)


def _pair(result):
    z_RC, about_RC = result if isinstance(result, tuple) else (result, None)
    return z_RC, None, None, about_RC


def _left_out(shown_maps: list, total: int) -> str:
    """What to say of layers that are not shown."""
    if len(shown_maps) == total:
        return ""
    return f" {len(shown_maps)} evenly spaced ones of {total}."


def _load(found: Analysis, about: str) -> Section:
    layers = list(found.layers.values())
    width = max(len(layer.load_E) for layer in layers)
    z_RE = np.full((len(layers), width), np.nan)
    for row, layer in zip(z_RE, layers, strict=True):
        row[: len(layer.load_E)] = stats.share(layer.load_E) * len(layer.load_E)
    figure = maps.sliding(
        [maps.Map("", z_RE, [shown(name) for name in found.layers])],
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


def _domains(found: Analysis) -> Section:
    title = "Domains"
    present = found.tokens_D > 0
    if np.sum(present) < 2:
        return Section(title, [Note("No data: the trace has tokens of one domain.")])
    names = unique([found.domains[d] for d in np.flatnonzero(present)])

    def lift(layer: LayerAnalysis):
        special_DE = stats.specialisation(layer.domain_DE, found.tokens_D)[present]
        whole_E = layer.load_E / found.num_tokens
        return maps.log_ratio(special_DE, whole_E)

    shown_maps = _with_rows(_maps(found, lift), names)
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
        + _left_out(shown_maps, len(found.layers))
    )
    told = {
        "domain": [
            stats.mutual_information(la.domain_DE) for la in found.layers.values()
        ],
        "position": [
            stats.mutual_information(la.position_PE) for la in found.layers.values()
        ],
    }
    figure_2 = _by_layer(
        found,
        told,
        "Mutual information of expert and domain, expert and position",
        "nats per slot",
    )
    return Section(title, [Plot(figure), Plot(figure_2, _INFORMATION)], about)


_INFORMATION = (
    "How much a slot's expert tells of the domain, or the position bucket, of its "
    "token; 0 if routing does not depend on it."
)


def _with_rows(made: list, rows: Sequence[str], columns=None) -> list:
    return [maps.Map(m.name, m.z_RC, rows, columns, m.about_RC) for m in made]


def _by_layer(found: Analysis, series: Mapping[str, Sequence[float]], title, unit):
    """Curves over the layers, one for each entry; names are escaped here."""
    from plotly.graph_objects import Figure

    figure = Figure()
    where = [shown(name) for name in found.layers]
    for name, values in series.items():
        figure.add_scatter(
            x=where,
            y=np.asarray(values, np.float32),
            name=html.escape(name),
            mode="lines+markers",
            hovertemplate="layer %{x}: %{y:.4g}",
        )
    style(figure, height=320, title=title)
    figure.update_xaxes(title_text="layer", type="category")
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    figure.update_layout(showlegend=len(series) > 1)
    return figure


def _positions(found: Analysis) -> Section:
    def lift(layer: LayerAnalysis):
        special_PE = stats.specialisation(layer.position_PE, found.tokens_P)
        return maps.log_ratio(special_PE, layer.load_E / found.num_tokens)

    shown_maps = _with_rows(_maps(found, lift), found.positions)
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
    left = _left_out(shown_maps, len(found.layers))
    return Section("Positions", [Plot(figure)], about + left)


def _sizes(found: Analysis) -> Section:
    title = "Experts per token"
    counts = {name: la.size_DK.sum(axis=0) for name, la in found.layers.items()}
    if all(np.sum(count_K > 0) <= 1 for count_K in counts.values()):
        fixed = sorted({int(np.argmax(count_K)) for count_K in counts.values()})
        text = " or ".join(map(str, fixed))
        note = f"No choice: all tokens of a layer have as many experts, {text}."
        return Section(title, [Note(note)])
    present = np.flatnonzero(found.tokens_D)
    series = {
        "all": [stats.size_figures(count_K)["mean"] for count_K in counts.values()]
    }
    if len(present) > 1:
        for d in present:
            series[token(found.domains[d])] = [
                stats.size_figures(la.size_DK[d])["mean"]
                for la in found.layers.values()
            ]
    means = _by_layer(found, series, "Experts per token by layer", "mean number")
    width = max(len(count_K) for count_K in counts.values())
    z_RK = np.full((len(counts), width), np.nan)
    for row, count_K in zip(z_RK, counts.values(), strict=True):
        row[: len(count_K)] = stats.share(count_K)
    spread = maps.sliding(
        [maps.Map("", z_RK, [shown(name) for name in counts])],
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


def _coactivation(found: Analysis) -> Section:
    title = "Co-activation"
    if all(layer.info.slots < 2 for layer in found.layers.values()):
        return Section(title, [Note("No data: no token has two experts.")])

    def given(layer: LayerAnalysis):
        share_EE = stats.coactivation(layer.coactivation_EE)
        share_EE[layer.load_E == 0] = np.nan
        np.fill_diagonal(share_EE, np.nan)  # always 1
        return share_EE

    shown_maps = _maps(found, given)
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
    left = _left_out(shown_maps, len(found.layers))
    return Section(title, [Plot(figure)], about + left)


def _steps(found: Analysis, kind: str) -> list[Step]:
    return [step for step in found.steps if step.kind == kind]


def _transitions(steps: list[Step], title: str, count: Callable[[Step], Any]):
    """`(figure, what is left out)` of P(column | row) between routers."""
    made = [
        maps.Map(f"{shown(s.source)} → {shown(s.target)}", stats.affinity(count(s)))
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
    return figure, _left_out(kept, len(steps))


def _affinity(found: Analysis) -> Section:
    title = "Affinity"
    steps = _steps(found, "layer")
    if not steps:
        return Section(title, [Note("No data: one layer alone is routed.")])
    figure, left = _transitions(
        steps, "Expert of the next layer, given that of this one", lambda s: s.top_AB
    )
    known = [stats.predictability(step.top_AB) for step in steps]
    where = [f"{shown(s.source)} → {shown(s.target)}" for s in steps]
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


def _chain(found: Analysis) -> Section:
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
    where = [f"{shown(s.source)} → {shown(s.target)}" for s in steps]
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


def _saturation(found: Analysis, overlap: dict | None) -> Section:
    title = "Saturation"
    if overlap is None:
        text = "No data: give --compare-trace=FILE, of the same tokens by another step."
        return Section(title, [Note(text)])
    series = {
        "all": [
            float(stats.saturation([sums.sum(axis=0)])[0]) for sums in overlap.values()
        ]
    }
    present = np.flatnonzero(found.tokens_D)
    if len(present) > 1:
        for d in present:
            values = [float(stats.saturation(sums)[d]) for sums in overlap.values()]
            series[token(found.domains[d])] = values
    series["uniform routing"] = [
        float(stats.uniform_share(la.domain_DE, found.tokens_D))
        for la in found.layers.values()
    ]
    figure = _by_layer(
        found,
        series,
        "Experts that both checkpoints choose",
        "share of a token's experts",
    )
    about = "1: the routing of these tokens is the same in both traces (OLMoE)."
    return Section(title, [Plot(figure)], about)


def _scores(found: Analysis) -> Section:
    names = unique(found.domains)
    figures = []
    for title, make, colours in (
        ("Predicted expert utility (PEU)", lambda la: la.peu_DE, None),
        ("Expected selection score (TCESS)", lambda la: la.tcess_DE, "both signs"),
    ):
        made = _with_rows(_maps(found, make), names)
        most = max(float(np.nanmax(np.abs(m.z_RC), initial=1e-9)) for m in made)
        look = {"zmin": 0, "colorscale": "Viridis"}
        look |= {"colorbar": {"title": {"text": "score"}}}
        figure = maps.sliding(
            made,
            maps.around_zero("score", most) if colours else look,
            title=title,
            axes=("domain", "expert"),
            slider="layer ",
            told="{row}, expert {column}: {value}",
        )
        figures.append(Plot(figure))
    about = (
        "Mean over a domain's tokens of what the router scores an expert that is among "
        "a token's choices, 0 where it is not (PreMoe): which experts a task needs. "
        "PEU counts scores above the domain's threshold, made positive; TCESS logits."
        + _left_out(made, len(found.layers))
    )
    return Section("Scores", figures, about)


def _markers(found: Analysis) -> Section:
    title = "Markers"
    if not found.markers:
        text = "No data: give --marker=TOKEN for the experts that go with a token."
        return Section(title, [Note(text)])
    rows = unique(found.markers)
    made = _with_rows(_maps(found, lambda la: la.npmi_ME), rows)
    figure = maps.sliding(
        made,
        maps.around_zero("nPMI", 1.0),
        title="Experts and marker tokens",
        axes=("marker", "expert"),
        slider="layer ",
        told="{row}, expert {column}: {value}",
    )
    counts = ", ".join(
        f"{token(m)}: {int(found.tokens_V[i]):,}"
        for m, i in zip(found.markers, found.marker_ids, strict=True)
    )
    about = (
        "Normalised pointwise mutual information (RICE): 1 if an expert is chosen at "
        "the marker and nowhere else, 0 if independent, -1 if never together."
        + _left_out(made, len(found.layers))
    )
    return Section(title, [Note(f"Occurrences: {counts}."), Plot(figure)], about)
