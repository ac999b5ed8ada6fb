"""The sections of a trace, in the order of the page."""

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis
from moex.report import coactivation, expert_scores, load
from moex.report.material import Routing
from moex.report.page import Note, Section
from moex.report.tokens import section as tokens

NO_TRACE = "No data: give --trace=FILE, which `moex trace` writes."
TITLES = (
    *("Trace", "Domains", "Positions", "Tokens", "Experts per token"),
    *("Co-activation", "Affinity", "Chain", "Saturation", "Scores", "Markers"),
)


def sections(found: Analysis | None, overlap: dict | None, about: str) -> list[Section]:
    """The sections of a trace.

    Args:
      found: the result of `analyse`; None: there is no trace.
      overlap: result of `summary.compare` with another trace; None: there is none.
      about: whose trace it is, and of which data.
    """
    if found is None:
        return [
            Section("Trace", [Note(NO_TRACE)], f"With one: {', '.join(TITLES[1:])}.")
        ]
    return [
        load.load(found, about),
        load.domains(found),
        load.positions(found),
        tokens(found),
        load.sizes(found),
        coactivation.coactivation(found),
        coactivation.affinity(found),
        coactivation.chain(found),
        coactivation.saturation(found, overlap),
        expert_scores.scores(found),
        expert_scores.markers(found),
    ]


def figures(found: Analysis) -> Routing:
    """The figures of a trace as those of one logged step, for the checks of layers."""
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
