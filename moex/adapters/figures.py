"""Figures of the gates inside of adapters: load, entropy and dead experts, by type.

An adapter with experts returns their gates, and `projection.gate_sums` adds them up.
A matrix of a segment has leading dims [repeat] in all arrays here.

Y types of sequences · N parts · E experts inside of the adapter
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moex.moe.metrics import mean


class GateFigure(NamedTuple):
    """A figure of an adapted matrix that is one number for each part."""

    name: str  # in logs
    title: str  # for people
    unit: str
    of: Callable[[dict], Any]  # makes it, float32[..., N], from the sums
    worst: Callable | None = None  # `max` or `min`: where the worst matrix is


def _over_types(sums: dict) -> dict:
    """The sums of all types together, as those of one."""
    axes = {"gate_sum_YNE": -3, "used_sum_YNE": -3, "entropy_sum_YN": -2}
    return {k: jnp.sum(sums[k], a, keepdims=True) for k, a in axes.items()} | {
        "tokens_Y": jnp.sum(sums["tokens_Y"], -1, keepdims=True)
    }


def load_frac_YNE(sums):
    """The share of each expert in the sum of the gates; NaN without any."""
    gates = sums["gate_sum_YNE"]
    return mean(gates, jnp.sum(gates, axis=-1, keepdims=True))


def entropy_YN(sums):
    """The entropy of a token's gates, in nats; NaN without a token."""
    return mean(sums["entropy_sum_YN"], sums["tokens_Y"][..., None])


def dead_frac_YN(sums):
    """The share of the experts that no token uses (`projection.USED`)."""
    dead = jnp.mean((sums["used_sum_YNE"] == 0).astype(jnp.float32), axis=-1)
    return jnp.where(sums["tokens_Y"][..., None] > 0, dead, jnp.nan)


def _max_violation(sums):
    load = load_frac_YNE(_over_types(sums))[..., 0, :, :]
    return jnp.max(load, axis=-1) * load.shape[-1] - 1


def _type_distance(sums):
    load = load_frac_YNE(sums)
    apart = jnp.abs(load[..., None, :, :, :] - load[..., :, None, :, :])
    return jnp.nanmax(jnp.sum(apart, axis=-1) / 2, axis=(-3, -2))


FIGURES = (
    GateFigure(
        "entropy",
        "Entropy of gates",
        "nats per token",
        lambda sums: entropy_YN(_over_types(sums))[..., 0, :],
        min,
    ),
    GateFigure(
        "max_violation",
        "Max violation of gates",
        "max load / mean load - 1",
        _max_violation,
        max,
    ),
    GateFigure(
        "dead_frac",
        "Experts that no token uses",
        "share of experts",
        lambda sums: dead_frac_YN(_over_types(sums))[..., 0, :],
        max,
    ),
    GateFigure(
        "type_distance",
        "Distance of load between types",
        "share of the gates that two types give to other experts",
        _type_distance,
    ),
)


def gate_figures(sums: dict) -> dict:
    """The figures of one adapted matrix from its sums, for the log."""
    return {figure.name: figure.of(sums) for figure in FIGURES} | {
        "tokens_Y": sums["tokens_Y"],
        "load_frac_YNE": load_frac_YNE(sums),
        "entropy_YN": entropy_YN(sums),
        "dead_frac_YN": dead_frac_YN(sums),
    }


def gate_summary(matrices: dict[str, dict]) -> dict[str, float]:
    """Sum up all adapted matrices: the mean of each figure, and the worst.

    Args:
      matrices: the results of `gate_figures` by path.

    Returns:
      "NAME", and "NAME_worst" where one can be the worst; none without matrices.
    """
    found = {}
    for figure in FIGURES:
        parts = [np.ravel(own[figure.name]) for own in matrices.values()]
        values = np.concatenate(parts) if parts else np.zeros(0)
        values = values[~np.isnan(values)]
        if values.size:
            found[figure.name] = float(values.mean())
            if figure.worst is not None:
                found[f"{figure.name}_worst"] = float(figure.worst(values))
    return found


def gate_record(matrices: dict[str, dict]) -> dict[str, dict]:
    """The record of each matrix in adapters.jsonl: 6 digits, lists [Y][N][E].

    A matrix of a segment is one for each copy: "segments/0/...[1]" is that of copy 1.
    """
    found = {}
    for path, own in matrices.items():
        arrays = {
            re.sub(r"_Y.*", "_by_type", name): np.asarray(value)
            for name, value in own.items()
        }
        copied = arrays["tokens_by_type"].ndim == 2
        for copy in range(len(arrays["tokens_by_type"]) if copied else 1):
            one = {k: v[copy] if copied else v for k, v in arrays.items()}
            label = f"{path}[{copy}]" if copied else path
            found[label] = {k: _plain(v) for k, v in one.items()}
    return found


def _plain(array):
    if np.ndim(array) == 0:
        value = float(f"{float(array):.6g}")
        return value if np.isfinite(value) else None
    return [_plain(part) for part in array]
