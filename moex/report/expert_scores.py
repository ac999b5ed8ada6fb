"""Which experts matter: for a domain (PreMoe), at given tokens (RICE).

D domains · E experts · M markers
"""

import numpy as np

from moex.analysis.summary import Analysis
from moex.report import maps
from moex.report.by_layer import left_out, maps_of, unique, with_rows
from moex.report.page import Note, Plot, Section, token


def scores(found: Analysis) -> Section:
    """The section on TCESS and PEU, with domains as tasks."""
    names = unique(found.domains)
    figures = []
    for title, make, colours in (
        ("Predicted expert utility (PEU)", lambda la: la.peu_DE, None),
        ("Expected selection score (TCESS)", lambda la: la.tcess_DE, "both signs"),
    ):
        made = with_rows(maps_of(found, make), names)
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
        + left_out(made, len(found.layers))
    )
    return Section("Scores", figures, about)


def markers(found: Analysis) -> Section:
    """The section on nPMI of experts and given tokens."""
    title = "Markers"
    if not found.markers:
        text = "No data: give --token=TOKEN for the experts that go with a token."
        return Section(title, [Note(text)])
    rows = unique(found.markers)
    made = with_rows(maps_of(found, lambda la: la.npmi_ME), rows)
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
        + left_out(made, len(found.layers))
    )
    return Section(title, [Note(f"Occurrences: {counts}."), Plot(figure)], about)
