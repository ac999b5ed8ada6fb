"""What becomes of an `Analysis`: a few figures per router, a table, a file.

D domains · E experts
"""

import dataclasses
import json
import pathlib

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.summary import Analysis, LayerAnalysis, Step
from moex.analysis.trace import LayerInfo
from moex.config import ConfigError

ARRAYS = ("tokens_D", "tokens_P", "tokens_V", "marker_ids")


def figures(analysis: Analysis) -> dict[str, dict[str, float]]:
    """Plain floats of every router, by label.

    Returns:
      experts_per_token, experts_per_token_std: that compute.
      max_violation, dead_frac, effective_frac: of `statistics.load_figures`.
      uniform_share: what the specialisations would be if routing were uniform.
      domain_specialisation: mean over slots of P(expert | domain of the token).
      domain_information: nats that an expert tells of the domain.
      vocabulary_specialisation: mean over slots of P(expert | token id).
      next_given, next_blind: of `statistics.predictability`, for the router that
        follows, if there is one.
      repeats: in a chain, share of slots whose expert the next round takes too.
    """
    after = {step.source: step for step in analysis.steps}
    return {
        label: _layer_figures(layer, analysis.tokens_D, after.get(label))
        for label, layer in analysis.layers.items()
    }


def _layer_figures(layer: LayerAnalysis, tokens_D, step: Step | None) -> dict:
    size = stats.size_figures(layer.size_DK.sum(axis=0))
    by_domain_DE = stats.specialisation(layer.domain_DE, tokens_D)
    slots_E = layer.count_E
    out = {
        "experts_per_token": size["mean"],
        "experts_per_token_std": size["std"],
        **stats.load_figures(layer.load_E),
        "uniform_share": stats.uniform_share(layer.domain_DE, tokens_D),
        "domain_specialisation": _mean(by_domain_DE, layer.domain_DE),
        "domain_information": stats.mutual_information(layer.domain_DE),
        "vocabulary_specialisation": _mean(layer.vocabulary_E, slots_E),
    }
    if step is not None:
        told = stats.predictability(step.top_AB)
        out |= {"next_given": told["given"], "next_blind": told["blind"]}
        if step.kind == "round":
            out["repeats"] = stats.repeats(step.pairs_AB, layer.load_E)
    return out


def _mean(values, weights) -> float:
    """Weighted mean where there are weights; NaN if there are none."""
    there = np.asarray(weights) > 0
    if not there.any():
        return float("nan")
    return float(np.average(values[there], weights=weights[there]))


COLUMNS = {
    "experts_per_token": "experts",
    "max_violation": "imbalance",
    "dead_frac": "dead",
    "uniform_share": "k/E",
    "domain_specialisation": "domain",
    "vocabulary_specialisation": "token",
    "next_given": "next",
    "next_blind": "blind",
    "saturation": "same",
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """`figures` for a terminal, one line per router, without empty columns."""
    names = [n for n in COLUMNS if any(n in row for row in rows.values())]
    lines = ["layer  " + "".join(f"{COLUMNS[n]:>10}" for n in names)]
    for label, row in rows.items():
        cells = "".join(f"{row[n]:10.4f}" if n in row else " " * 10 for n in names)
        lines.append(f"{label:<7}{cells}")
    return "\n".join(lines)


def marker_lines(analysis: Analysis, most: int = 5) -> dict[str, str]:
    """The experts of highest nPMI of each marker, of all layers, for people.

    Only experts that at least half of the marker's tokens have: one that fired once, by
    luck, would come first. An expert is written as layer/number.
    """
    lines = {}
    markers_M = analysis.tokens_V[analysis.marker_ids]
    for m, marker in enumerate(analysis.markers):
        found = [
            (layer.npmi_ME[m, e], hits / markers_M[m], f"{label}/{e}")
            for label, layer in analysis.layers.items()
            for e, hits in enumerate(layer.hits_ME[m])
            if 2 * hits >= markers_M[m]
        ]
        best = sorted(found, key=lambda row: -row[0])[:most]
        lines[marker] = ", ".join(f"{n} {v:.3f} {p:.2f}" for v, p, n in best) or "none"
    return lines


def save(analysis: Analysis, path) -> None:
    """Write an analysis as a numpy archive; `load` reads it.

    Arrays are named `tokens_D`, `layers/003/load_E`, `steps/0/top_AB` and so on; the
    rest is JSON under `about`.
    """
    arrays = {name: getattr(analysis, name) for name in ARRAYS}
    for label, layer in analysis.layers.items():
        found = dataclasses.asdict(layer) | {"info": None}
        arrays |= {f"layers/{label}/{k}": v for k, v in found.items() if v is not None}
    for i, step in enumerate(analysis.steps):
        arrays |= {f"steps/{i}/{k}": getattr(step, k) for k in ("top_AB", "pairs_AB")}
    plain = [f.name for f in dataclasses.fields(Analysis) if f.name not in ARRAYS]
    about = {n: getattr(analysis, n) for n in plain if n not in ("layers", "steps")}
    about["layers"] = [dataclasses.asdict(v.info) for v in analysis.layers.values()]
    names = ("source", "target", "kind")
    about["steps"] = [{n: getattr(step, n) for n in names} for step in analysis.steps]
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    partial = pathlib.Path(path).with_name(pathlib.Path(path).name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, about=text, **arrays)
    partial.rename(path)


def load(path) -> Analysis:
    """Read what `save` wrote.

    Raises:
      ConfigError: if it is no such file.
    """
    try:
        with np.load(path) as file:
            data = dict(file)
        about = json.loads(data.pop("about").tobytes())
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"{path}: not an analysis of moex ({e}).") from None
    layers = {}
    for fields in about.pop("layers"):
        info = LayerInfo(**fields)
        layers[info.label] = LayerAnalysis(info=info, **_under(data, info.label))
    steps = [
        Step(**names, **_under(data, str(i), "steps"))
        for i, names in enumerate(about.pop("steps"))
    ]
    tuples = {k: tuple(v) for k, v in about.items() if isinstance(v, list)}
    arrays = {name: data[name] for name in ARRAYS}
    return Analysis(**about | tuples | arrays, layers=layers, steps=steps)


def _under(data: dict, name: str, part: str = "layers") -> dict:
    start = f"{part}/{name}/"
    return {k.removeprefix(start): v for k, v in data.items() if k.startswith(start)}
