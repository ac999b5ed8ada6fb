"""Figures of MoE layers by the numbers that people give layers, as logs have them.

E experts · S bins of a histogram
"""

import math
import re
from typing import Any

import numpy as np

from moex.model.layers import label, routers, site_at, sites
from moex.moe import metrics


def by_layer(model, layers: dict, *, expert_devices=1) -> dict[str, dict[str, Any]]:
    """The figures of every MoE layer in order, as `{label: {name: value}}`.

    The label is the absolute layer number, such as "003"; the rounds of a chain are
    layers of their own, "003.1", "003.2" and so on.

    Args:
      model: `Model` config, whose segments give the numbers.
      layers: metrics by module path, each stacked [repeat, ...] or [repeat, C, ...].
      expert_devices: devices that the experts are split over; with several there is
        "device_violation" too.
    """
    found: dict[str, dict[str, Any]] = {}
    places = sites(model)
    for path, figures in layers.items():
        site = site_at(places, path)
        assert site.sparse is not None, path
        arrays = {name: np.asarray(value) for name, value in figures.items()}
        for r, number in enumerate(site.numbers):
            own = {name: value[r] for name, value in arrays.items()}
            rounds = _rounds(number, own, site.sparse)
            # Where experts share weights, their devices are not known here.
            if expert_devices > 1 and site.sparse.moe.stored_experts is None:
                # Every device has the zero-computation experts: they do not count.
                num_experts = site.sparse.moe.num_experts
                for row in rounds.values():
                    row["device_violation"] = device_violation(
                        row["load_frac_E"][:num_experts], expert_devices
                    )
            found |= rounds
    labels = [routed.label for routed in routers(model)]
    return {name: found[name] for name in labels if name in found}


def _rounds(number, figures, sparse) -> dict:
    """The figures of a layer by label; those of a chain have a leading dim [C]."""
    if not sparse.chained:
        return {label(number): figures}
    return {
        label(number, t + 1): {name: value[t] for name, value in figures.items()}
        for t in range(len(sparse.routers))
    }


def device_violation(load_frac_E, num_devices: int) -> float:
    """The largest load of a device over the mean load - 1; 0 if there is no load.

    Args:
      load_frac_E: float[E] load of the computing experts, a multiple of the devices;
        device d holds the d-th run of E / num_devices experts.
    """
    load = np.asarray(load_frac_E, np.float64).reshape(num_devices, -1).sum(axis=1)
    return float(load.max() / load.mean() - 1) if load.any() else 0.0


def layer_rows(model, layers: dict, name: str) -> list[tuple[str, Any]]:
    """The pairs (label, value) of one figure, for every MoE layer; see `by_layer`."""
    return [(label, own[name]) for label, own in by_layer(model, layers).items()]


def moe_summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum up all MoE layers: the mean of each figure, the worst, and its layer.

    Args:
      rows: from `by_layer`.

    Returns:
      For each scalar NAME a float "NAME"; where one can be the worst "NAME_worst", and
      the label "NAME_worst_layer". Empty without MoE layers.
    """
    out: dict[str, Any] = {}
    worst = {figure.name: figure.worst for figure in metrics.FIGURES}
    for name in scalar_names(rows):
        values = {label: float(own[name]) for label, own in rows.items()}
        # A layer that no token came to has no figure.
        values = {label: v for label, v in values.items() if not math.isnan(v)}
        if not values:
            continue
        out[name] = sum(values.values()) / len(values)
        if choose := worst.get(name):
            label = choose(values, key=values.__getitem__)
            out[f"{name}_worst"] = values[label]
            out[f"{name}_worst_layer"] = label
    return out


def scalar_names(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the figures that are one number per layer."""
    first = next(iter(rows.values()), {})
    return [name for name, value in first.items() if np.ndim(value) == 0]


def slot_shares(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The shares of tokens by number of computing experts, as a mean over layers.

    There are few keys for any number: "0", "1", "2", "3-4", "5-8", "9-16", "17+".

    Args:
      rows: from `by_layer`; not empty.
    """
    histograms = [np.asarray(own["slots_hist_S"]) for own in rows.values()]
    total = np.zeros(max(map(len, histograms)))
    for share_S in histograms:
        total[: len(share_S)] += share_S / len(rows)
    shares = {}
    for name, low, high in SLOT_RANGES:
        if low < len(total):
            shares[name] = float(total[low:high].sum())
    return shares


SLOT_RANGES = (
    *(("0", 0, 1), ("1", 1, 2), ("2", 2, 3), ("3-4", 3, 5), ("5-8", 5, 9)),
    *(("9-16", 9, 17), ("17+", 17, None)),
)


def routing_record(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The record of each layer in routing.jsonl: numbers of 6 significant digits.

    Names lose their shapes: "load_frac_E" becomes "load_frac", a list.
    """
    return {
        label: {re.sub(r"_[A-Z]$", "", k): _plain(v) for k, v in own.items()}
        for label, own in rows.items()
    }


def _plain(value) -> float | list:
    if np.ndim(value) == 0:
        return float(f"{float(value):.6g}")
    return [float(f"{v:.6g}") for v in np.asarray(value).tolist()]
