"""Experts by their sums (`moex trace --sums`): which matter, and which are alike.

E experts
"""

import numpy as np

from moex.analysis.scores import SCORES, logit_similarity
from moex.analysis.sums import LayerSums, Sums
from moex.report import maps
from moex.report.by_layer import slider
from moex.report.page import Section, layer_name


def section(sums: Sums, about: str) -> Section:
    """The section on the sums of a run; `about` says whose they are."""
    rows = [layer_name(label) for label in sums.layers]
    every = sums.layers.values()
    score, _ = slider(
        [
            maps.Map(kind, maps.padded([_over_mean(of(own)) for own in every]), rows)
            for kind, of in SCORES.items()
        ],
        maps.around_zero("score over<br>its mean size", 3.0),
        title="Scores of the experts",
        axes=("layer", "expert"),
        slider="score ",
        told="layer {row}, expert {column}: {value}",
    )
    alike, left = slider(
        [maps.Map(layer_name(n), _alike(x)) for n, x in sums.layers.items()],
        {"zmin": 0, "zmax": 1, "colorscale": "Viridis"}
        | {"colorbar": {"title": {"text": "similarity"}}},
        title="Experts that the router treats alike",
        axes=("expert", "expert"),
        slider="layer ",
        told="experts {row} and {column}: {value}",
        square=True,
    )
    text = (
        f"{about} {sums.tokens:,} tokens. Scores are divided by the mean of their "
        "sizes in the layer: frequency, TCESS and PEU (PreMoe), all logits, REAP. "
        "Similarity is (cosine + 1) / 2 of the router logits of two experts over all "
        "tokens (M-SMoE); the diagonal, always 1, is left out."
    )
    return Section("Sums", [score, alike], text + left)


def _over_mean(score_E) -> np.ndarray:
    return score_E / max(float(np.mean(np.abs(score_E))), 1e-12)


def _alike(own: LayerSums) -> np.ndarray:
    assert own.gram_EE is not None
    similar_EE = logit_similarity(own.gram_EE)
    np.fill_diagonal(similar_EE, np.nan)
    return similar_EE
