"""Output of an `Analysis`: a few figures per router, a table, a file.

D domains · E experts
"""

import dataclasses

import numpy as np

from moex.analysis import statistics as stats
from moex.analysis.archive import Archive, write_archive
from moex.analysis.header import read_layer
from moex.analysis.summary import Analysis, LayerAnalysis, Step
from moex.json_files import field

ARRAYS = ("tokens_D", "tokens_P", "tokens_V", "marker_ids")


def figures(analysis: Analysis) -> dict[str, dict[str, float]]:
    """Plain floats of every router, by label.

    Returns:
      experts_per_token, experts_per_token_std: number of experts that compute.
      max_violation, dead_frac, effective_frac: from `statistics.load_figures`.
      uniform_share: the value of the specialisations if routing were uniform.
      domain_specialisation: mean over slots of P(expert | domain of the token).
      domain_information: nats that an expert tells of the domain.
      vocabulary_specialisation: mean over slots of P(expert | token id).
      next_given, next_blind: from `statistics.predictability`, for the router that
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
    """The weighted mean of the values with a weight; NaN if there is none."""
    there = np.asarray(weights) > 0
    if not there.any():
        return float("nan")
    return float(np.average(values[there], weights=weights[there]))


# The columns of the table: head, and meaning.
COLUMNS = {
    "experts_per_token": ("experts", "experts that compute, per token, mean"),
    "max_violation": ("imbalance", "largest load / mean load - 1; 0 is balanced"),
    "dead_frac": ("dead", "share of experts without a token"),
    "uniform_share": ("k/E", "value of domain and token if routing were uniform"),
    "domain_specialisation": ("domain", "P(expert | domain), mean over slots"),
    "vocabulary_specialisation": ("token", "P(expert | token id), mean over slots"),
    "next_given": ("next", "share of tokens whose next expert this one foretells"),
    "next_blind": ("blind", "the same without knowing this expert"),
    "saturation": ("same", "share of experts that both checkpoints choose"),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """`figures` for a terminal, one line per router, without empty columns."""
    names = _columns(rows)
    lines = ["layer  " + "".join(f"{COLUMNS[n][0]:>10}" for n in names)]
    for label, row in rows.items():
        cells = "".join(f"{row[n]:10.4f}" if n in row else " " * 10 for n in names)
        lines.append(f"{label:<7}{cells}")
    return "\n".join(lines)


def legend(rows: dict[str, dict[str, float]]) -> str:
    """The meaning of each column of `table`, one a line."""
    heads = (COLUMNS[name] for name in _columns(rows))
    return "\n".join(f"{head:>9}: {meaning}" for head, meaning in heads)


def _columns(rows: dict[str, dict[str, float]]) -> list[str]:
    return [n for n in COLUMNS if any(n in row for row in rows.values())]


def marker_lines(analysis: Analysis, most: int = 5) -> dict[str, str]:
    """The experts of highest nPMI of each marker, of all layers, for people.

    Only experts that at least half of the marker's tokens have are listed: one that
    fired once, by luck, would come first. An expert is written as layer/number.
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
    write_archive(path, about, arrays)


def load(path) -> Analysis:
    """Read what `save` wrote.

    Raises:
      ConfigError: if it is no such file.
    """
    archive = Archive(path, "an analysis")
    about, where = archive.about, archive.where
    layers = {}
    for i, fields in enumerate(field(about, "layers", list[dict], where)):
        info = read_layer(fields, f"{where}: layer {i}")
        arrays = archive.under(f"layers/{info.label}", LayerAnalysis)
        layers[info.label] = LayerAnalysis(info=info, **arrays)
    steps = []
    for i, names in enumerate(field(about, "steps", list[dict], where)):
        plain = {n: field(names, n, str, where) for n in ("source", "target", "kind")}
        steps.append(Step(**plain, **archive.under(f"steps/{i}", Step)))
    plain = {
        f.name: field(about, f.name, f.type, where)
        for f in dataclasses.fields(Analysis)
        if f.name not in (*ARRAYS, "layers", "steps")
    }
    tuples = {k: tuple(v) for k, v in plain.items() if isinstance(v, list)}
    arrays = {name: archive.array(name) for name in ARRAYS}
    return Analysis(**plain | tuples | arrays, layers=layers, steps=steps)
