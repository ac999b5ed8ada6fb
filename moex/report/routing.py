"""How tokens were routed over training: what routing.jsonl holds.

S logged steps · E experts · R layers, and rounds of chains ·
K experts per token
"""

import numpy as np

from moex.model.layers import shown
from moex.moe import metrics
from moex.report import downsample, maps
from moex.report.health import judged
from moex.report.material import Material, Routing
from moex.report.page import Grid, Note, Plot, Section, Table, layer_name, style

# The most numbers in all frames, and in all curves, of a page; four bytes each.
FRAME_NUMBERS, MOST_FRAMES = 400_000, 40
HISTORY_NUMBERS, MOST_STEPS = 400_000, 200
CURVE_NUMBERS, MOST_POINTS = 150_000, 300
LEGEND = 12  # layers with a legend; for more there is a colour bar
LIGHTEST = 0.9  # part of the colour scale used for layers: the rest is too faint


def sections(material: Material) -> list[Section]:
    """The sections on the load of the experts and the figures of the layers."""
    found = judged(material)
    title = "Expert load"
    if found is None:
        text = "No data: the run has no routing.jsonl with lines of logged steps."
        return [Section(title, [Note(text)])]
    kind, routing = found
    what = "training" if kind == "train" else "evaluation"
    about = (
        f"Load of an expert: its share of the slots of a layer over the share of "
        f"balanced load. 1 is balanced, 0 dead. From {what} steps"
        + _thinned(routing)
        + "."
    )
    load = [
        Plot(
            load_maps(routing),
            "The slider moves through training; rounds of a chain are rows of their "
            "own (3.1, 3.2).",
        ),
        Plot(
            load_histories(routing),
            "One layer through training, at first the least balanced one.",
        ),
    ]
    grid = [plot for figure in figures_of(routing) if (plot := curves(routing, figure))]
    flat = [
        figure.title
        for figure in metrics.FIGURES
        if figure.rare and _logged(routing, figure.name)
        if not _moves(routing, figure.name)
    ]
    figures: list = [Grid(tuple(grid))] if grid else []
    if flat:
        figures.append(Note(f"Zero in all layers at all steps: {', '.join(flat)}."))
    if plot := slots(routing):
        figures.append(plot)
    figures.append(table(routing))
    return [
        Section(title, load, about),
        Section(
            "Layers",
            figures,
            f"One curve for each of {len(routing.layers)} layers and rounds, coloured "
            "from the first (dark) to the last (light).",
        ),
    ]


def _thinned(routing: Routing) -> str:
    if routing.read == routing.there:
        return ""
    return f" ({routing.read:,} evenly spaced ones of {routing.there:,})"


def ratios(routing: Routing) -> dict[str, np.ndarray]:
    """Load over balanced load of every layer, float32[S, E]."""
    return {
        layer_name(label): figures["load_frac"] * figures["load_frac"].shape[1]
        for label, figures in routing.layers.items()
        if "load_frac" in figures
    }


def load_maps(routing: Routing):
    """The plot of layers x experts at some steps."""
    load = ratios(routing)
    frames = FRAME_NUMBERS // maps.padded([r_SE[0] for r_SE in load.values()]).size
    chosen = downsample.spaced(len(routing.step_S), max(3, min(MOST_FRAMES, frames)))
    found = []
    for s in chosen:
        z_RE = maps.padded([ratio_SE[s] for ratio_SE in load.values()])
        found.append(maps.Map(str(routing.step_S[s]), z_RE, list(load)))
    return maps.sliding(
        found,
        maps.LOAD,
        title="Load by layer and expert",
        axes=("layer", "expert"),
        slider="step ",
        told="layer {row}, expert {column}: {value} x balanced",
        active=len(found) - 1,
    )


def load_histories(routing: Routing):
    """The plot of experts x steps of each layer; it opens at the fullest expert."""
    load = ratios(routing)
    most = HISTORY_NUMBERS // sum(each.shape[1] for each in load.values())
    chosen = downsample.spaced(len(routing.step_S), max(10, min(MOST_STEPS, most)))
    steps = [int(step) for step in routing.step_S[chosen]]
    return maps.sliding(
        [
            maps.Map(label, ratio_SE[chosen].T, columns=steps)
            for label, ratio_SE in load.items()
        ],
        maps.LOAD,
        title="Load by expert and step",
        axes=("expert", "optimizer step"),
        slider="layer ",
        told="step {column}, expert {row}: {value} x balanced",
        active=int(
            np.argmax([np.nan_to_num(r_SE[-1]).max() for r_SE in load.values()])
        ),
        gap=0,
    )


def figures_of(routing: Routing) -> tuple[metrics.Figure, ...]:
    """The figures of every layer, and the losses that routers have of their own."""
    names = {name for figures in routing.layers.values() for name in figures}
    own = {name.removesuffix("_loss") for name in names if name.endswith("_loss")}
    return (*metrics.FIGURES, *metrics.own_figures(own))


def _logged(routing: Routing, name: str) -> list[np.ndarray]:
    return [f[name] for f in routing.layers.values() if name in f]


def _moves(routing: Routing, name: str) -> bool:
    values = _logged(routing, name)
    return any(np.nanmax(np.abs(value_S), initial=0) > 0 for value_S in values)


def curves(routing: Routing, what: metrics.Figure) -> Plot | None:
    """The plot of a figure of all layers; None if it was not logged, or is always 0."""
    from plotly.colors import sample_colorscale
    from plotly.graph_objects import Figure

    layers = {
        label: figures[what.name]
        for label, figures in routing.layers.items()
        if what.name in figures and figures[what.name].ndim == 1
    }
    if not layers or (what.rare and not _moves(routing, what.name)):
        return None
    most = CURVE_NUMBERS // (len(metrics.FIGURES) * len(layers))
    chosen = downsample.spaced(len(routing.step_S), max(20, min(MOST_POINTS, most)))
    steps = routing.step_S[chosen].astype(np.int32)
    places = np.linspace(0, LIGHTEST, len(layers)) if len(layers) > 1 else [0.3]
    colours = sample_colorscale("Viridis", list(places))
    figure = Figure()
    for (label, value_S), colour in zip(layers.items(), colours, strict=True):
        figure.add_scatter(
            x=steps,
            y=value_S[chosen],
            name=layer_name(label),
            mode="lines" if len(steps) > 1 else "markers",
            line={"color": colour, "width": 1.3},
            hovertemplate="layer %{fullData.name}, step %{x}: %{y:.4g}<extra></extra>",
        )
    if len(layers) > LEGEND:
        _depth_bar(figure, list(layers))
    style(figure, height=300, title=what.title)
    figure.update_xaxes(title_text="optimizer step", rangemode="tozero")
    figure.update_yaxes(title_text=what.unit)
    figure.update_layout(
        showlegend=1 < len(layers) <= LEGEND,
        legend={"title": {"text": "layer"}, "font": {"size": 10}},
    )
    return Plot(figure)


def _depth_bar(figure, labels: list[str]) -> None:
    """A colour bar of the layers, carried by a trace without points."""
    ends = downsample.spaced(len(labels), 5)
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={
            "color": [0],
            "cmin": 0,
            "cmax": (len(labels) - 1) / LIGHTEST,
            "colorscale": "Viridis",
            "showscale": True,
            "colorbar": {
                "title": {"text": "layer"},
                "tickvals": ends,
                "ticktext": [layer_name(labels[i]) for i in ends],
                "thickness": 12,
            },
        },
    )


def slots(routing: Routing) -> Plot | None:
    """The plot of experts per token at the last step; None if no layer varies it."""
    have = {r: f["slots_hist"] for r, f in routing.layers.items() if "slots_hist" in f}
    if not have:
        return None
    last = {layer_name(label): hist_SK[-1] for label, hist_SK in have.items()}
    if all(np.sum(np.nan_to_num(hist_K) > 0) <= 1 for hist_K in last.values()):
        return None
    figure = maps.by_row(
        last,
        maps.share("share of<br>tokens"),
        title=f"Experts per token at step {routing.step_S[-1]}",
        axes=("layer", "experts of a token"),
        told="layer {row}: {column} experts for {value} of the tokens",
    )
    text = "Share of the tokens of a layer that have so many experts, or more in column"
    return Plot(figure, f"{text} {metrics.MOST_SLOTS}.")


def table(routing: Routing) -> Table:
    """Figures of all layers at the last logged step."""
    there = [
        figure
        for figure in figures_of(routing)
        if figure.is_scalar
        and _logged(routing, figure.name)
        and (not figure.rare or _moves(routing, figure.name))
    ]
    rows = []
    for label, figures in routing.layers.items():
        load_SE = figures.get("load_frac")
        experts = "" if load_SE is None else str(load_SE.shape[1])
        cells = [
            f"{float(figures[name][-1]):.4g}" if name in figures else "–"
            for name, *_ in there
        ]
        rows.append((shown(label), experts, *cells))
    return Table(
        ("layer", "experts", *(figure.title.lower() for figure in there)),
        rows,
        f"All layers at step {routing.step_S[-1]}, but for what is zero everywhere.",
    )
