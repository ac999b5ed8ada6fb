"""Experts inside of adapters, by type of sequence: what adapters.jsonl holds.

S logged steps · Y types · N parts · E experts inside of the adapter
"""

import numpy as np

from moex.analysis.gates import GateLog, Gates
from moex.report import downsample, maps
from moex.report.material import Material
from moex.report.page import Grid, Note, Plot, Section, label, style

FIGURES = (  # name in `gates.by_type`, title, unit
    ("entropy", "Entropy of gates by type", "nats per token"),
    ("dead_frac", "Experts that no token uses, by type", "share of experts"),
    ("max_load", "Load of the most used expert, by type", "times balanced load"),
)
NUMBERS = 200_000  # numbers in all maps


def sections(material: Material) -> list[Section]:
    """The section of a run whose adapters have experts; none for others."""
    adapter = material.cfg.model.adapter
    if adapter is None or not adapter.MIXES:
        return []
    title = "Experts inside of adapters"
    if not material.gates:
        return [Section(title, [Note("No data: the run has no adapters.jsonl.")])]
    about = (
        "Means over all adapted matrices and parts. Types are those of the adapter's "
        "config. Lines are training steps, dots evaluations of held-out data."
    )
    kind = "eval" if "eval" in material.gates else "train"
    curves = [_curves(material.gates, *figure) for figure in FIGURES]
    load, left = _loads(material.gates[kind])
    what = "held-out data" if kind == "eval" else "a training step"
    return [
        Section(title, [Grid(tuple(curves)), Plot(load, f"Of {what}.{left}")], about)
    ]


def _curves(logs: dict[str, GateLog], name: str, title: str, unit: str) -> Plot:
    from plotly.graph_objects import Figure

    figure = Figure()
    for kind, log in logs.items():
        held = kind == "eval"
        for number, value_S in enumerate(log.by_type[name].T):
            if np.isnan(value_S).all():
                continue
            step_S, value_S = downsample.curve(log.step_S, value_S)
            figure.add_scatter(
                x=step_S,
                y=value_S.astype(np.float32),
                name=f"type {number}" + (", held out" if held else ""),
                mode="lines+markers" if held or len(step_S) == 1 else "lines",
                hovertemplate="step %{x}: %{y:.4g}",
            )
    style(figure, height=300, title=title)
    figure.update_xaxes(title_text="optimizer step", rangemode="tozero")
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    return Plot(figure)


def _loads(log: GateLog):
    """The map of each matrix behind a slider, and a sentence on those left out."""
    made = [
        maps.Map(label(name, 80), *_rows(own)) for name, own in sorted(log.last.items())
    ]
    numbers = max(one.z_RC.size for one in made)
    kept = maps.affordable(made, numbers, NUMBERS)
    figure = maps.sliding(
        kept,
        maps.LOAD,
        title="Load of experts by type",
        axes=("type, part", "expert"),
        slider="",
        told="{row}, expert {column}: {value} x balanced",
    )
    left = f" {len(kept)} evenly spaced matrices of {len(made)}."
    return figure, "" if len(kept) == len(made) else left


def _rows(own: Gates):
    """(load over balanced load [Y N, E], the labels of rows)."""
    Y, N, E = own.load_YNE.shape
    part = [f", {n}" if N > 1 else "" for n in range(N)]
    names = [f"type {y}{end}" for y in range(Y) for end in part]
    return E * own.load_YNE.reshape(Y * N, E), names
