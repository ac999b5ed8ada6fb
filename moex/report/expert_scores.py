"""Score maps of experts: for a domain (PreMoe), at given tokens (RICE).

D domains · E experts · M markers
"""

import operator

import numpy as np

from moex.analysis.summary import Analysis
from moex.report import maps
from moex.report.by_layer import layer_maps, unique
from moex.report.page import Note, Section, token


def scores(found: Analysis) -> Section:
    """The section on TCESS and PEU, with domains as tasks."""
    plots = []
    viridis = {"colorscale": "Viridis", "colorbar": {"title": {"text": "score"}}}
    tcess = [layer.tcess_DE for layer in found.layers.values()]
    most = max(float(np.nanmax(np.abs(z_DE), initial=1e-9)) for z_DE in tcess)
    for title, name, colours in (
        ("Predicted expert utility (PEU)", "peu_DE", {"zmin": 0} | viridis),
        (
            "Expected selection score (TCESS)",
            "tcess_DE",
            maps.around_zero("score", most),
        ),
    ):
        plot, left = layer_maps(
            found,
            operator.attrgetter(name),
            colours,
            rows=unique(found.domains),
            title=title,
            axes=("domain", "expert"),
            told="{row}, expert {column}: {value}",
        )
        plots.append(plot)
    about = (
        "Mean over a domain's tokens of what the router scores an expert that is among "
        "a token's choices, 0 where it is not (PreMoe): which experts a task needs. "
        "PEU counts scores above the domain's threshold, made positive; TCESS logits."
    )
    return Section("Scores", plots, about + left)


def markers(found: Analysis) -> Section:
    """The section on nPMI of experts and given tokens."""
    title = "Markers"
    if not found.markers:
        text = "No data: give --token=TOKEN for the experts that go with a token."
        return Section(title, [Note(text)])
    plot, left = layer_maps(
        found,
        operator.attrgetter("npmi_ME"),
        maps.around_zero("nPMI", 1.0),
        rows=unique(found.markers),
        title="Experts and marker tokens",
        axes=("marker", "expert"),
        told="{row}, expert {column}: {value}",
    )
    counts = ", ".join(
        f"{token(m)}: {int(found.tokens_V[i]):,}"
        for m, i in zip(found.markers, found.marker_ids, strict=True)
    )
    about = (
        "Normalised pointwise mutual information (RICE): 1 if an expert is chosen at "
        "the marker and nowhere else, 0 if independent, -1 if never together."
    )
    return Section(title, [Note(f"Occurrences: {counts}."), plot], about + left)
