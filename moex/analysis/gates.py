"""Gates of the experts inside of adapters, by type of sequence, as files have them.

They are the records that `moex/adapters/figures.py` makes, from `adapters.jsonl` of a
run or from a trace. Needs no model and no JAX.

Y types of sequences · N parts · E experts inside of the adapter
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from moex.config.base import require
from moex.json_files import field, parse_object
from moex.runs.lines import kind_and_step
from moex.terminal import aligned

MOST_BYTES = 2**27  # of adapters.jsonl that are parsed; of a longer file some lines
Number = float | None  # null where there is no token


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gates of one adapted matrix; float64, NaN where there is no token."""

    tokens_Y: np.ndarray
    load_YNE: np.ndarray  # share of each expert in the sum of the gates
    entropy_YN: np.ndarray  # of a token's gates, mean, nats
    dead_YN: np.ndarray  # share of experts that no token uses

    @classmethod
    def of(cls, record: dict[str, Any], where: str) -> "Gates":
        """Read a record.

        Raises:
          ConfigError: for a field that is missing or of another shape.
        """
        found = {
            "tokens_Y": field(record, "tokens_by_type", list[float], where),
            "load_YNE": field(
                record, "load_frac_by_type", list[list[list[Number]]], where
            ),
            "entropy_YN": field(record, "entropy_by_type", list[list[Number]], where),
            "dead_YN": field(record, "dead_frac_by_type", list[list[Number]], where),
        }
        try:
            arrays = {k: np.array(v, dtype=float) for k, v in found.items()}
            shape = arrays["load_YNE"].shape
            fits = len(shape) == 3 and arrays["tokens_Y"].shape == shape[:1]
            fits &= arrays["entropy_YN"].shape == arrays["dead_YN"].shape == shape[:2]
        except ValueError:  # lists of unequal lengths
            fits = False
        allowed = "lists of [types][parts][experts] that fit together"
        require(fits, f"{where}: load_frac_by_type", found["load_YNE"], allowed)
        return cls(**arrays)


def gates_of(matrices: dict[str, Any], where: str) -> dict[str, Gates]:
    """Read the records of all adapted matrices, by path."""
    return {
        name: Gates.of(field(matrices, name, dict, where), f"{where}: {name}")
        for name in matrices
    }


@dataclasses.dataclass(frozen=True)
class GateLog:
    """The gates of logged steps of one kind."""

    step_S: np.ndarray  # int64[S], ascending
    by_type: dict[str, np.ndarray]  # `by_type` of each step: float64[S, Y]
    last: dict[str, Gates]  # those of the last step, by matrix


def read_gates(file: pathlib.Path) -> dict[str, GateLog]:
    """The gates of an adapters.jsonl by kind; none if there is no such file.

    Of a long file it takes evenly spaced lines, and the last one.

    Raises:
      ConfigError: if one of these is damaged.
    """
    if not file.is_file():
        return {}
    stride = 1 + file.stat().st_size // MOST_BYTES
    found: dict[str, dict[int, dict[str, Gates]]] = {}
    with file.open("rb") as lines:
        number, raw = 0, b""
        for number, raw in enumerate(lines):
            if raw.endswith(b"\n") and number % stride == 0:
                _add(found, raw, f"{file}, line {number + 1}")
        if raw.endswith(b"\n") and number % stride:
            _add(found, raw, f"{file}, line {number + 1}")
    logs = {}
    for kind, steps in found.items():
        steps = dict(sorted(steps.items()))
        told = [by_type(matrices) for matrices in steps.values()]
        most = max(len(one["entropy"]) for one in told)
        logs[kind] = GateLog(
            step_S=np.array(list(steps)),
            by_type={
                name: np.array([_padded(one[name], most) for one in told])
                for name in told[0]
            },
            last=list(steps.values())[-1],
        )
    return logs


def _add(found, raw: bytes, where: str) -> None:
    line = parse_object(raw, where, nan=True)
    kind, step = kind_and_step(line, where)
    matrices = gates_of(field(line, "matrices", dict, where), where)
    found.setdefault(kind, {})[step] = matrices


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=math.nan)


def by_type(matrices: dict[str, Gates]) -> dict[str, np.ndarray]:
    """The figures of each type, float64[Y]: means over matrices and parts.

    Returns:
      tokens, entropy, dead_frac, and max_load: the load of the most used expert over
      that of balanced load.
    """
    most = max((len(own.tokens_Y) for own in matrices.values()), default=0)
    values: dict[str, list] = {
        name: [[] for _ in range(most)]
        for name in ("tokens", "entropy", "dead_frac", "max_load")
    }
    for own in matrices.values():
        E = own.load_YNE.shape[-1]
        parts = {
            "tokens": own.tokens_Y[:, None],
            "entropy": own.entropy_YN,
            "dead_frac": own.dead_YN,
            "max_load": E * own.load_YNE.max(axis=-1),
        }
        for name, array in parts.items():
            for kind, row in enumerate(array):
                values[name][kind] += row[np.isfinite(row)].tolist()
    return {
        name: np.array([np.mean(rows) if rows else math.nan for rows in own])
        for name, own in values.items()
    }


def plain(matrices: dict[str, Gates]) -> dict[str, Any]:
    """`by_type` as plain data under its name in JSON; {} for a model without gates."""
    if not matrices:
        return {}
    return {"adapters_by_type": {k: v.tolist() for k, v in by_type(matrices).items()}}


def table(matrices: dict[str, Gates]) -> str:
    """The figures of each type for a terminal; `matrices` must not be empty."""
    told = by_type(matrices)
    lines: list[tuple[str, ...]] = [("type", "tokens", "entropy", "dead", "largest")]
    for kind in range(len(told["tokens"])):
        numbers = (told[name][kind] for name in ("entropy", "dead_frac", "max_load"))
        cells = ("" if math.isnan(n) else f"{n:.4f}" for n in numbers)
        lines.append((str(kind), f"{told['tokens'][kind]:,.0f}", *cells))
    return (
        f"gates of {len(matrices)} adapted matrices by type of sequence, means:\n"
        f"{aligned(lines, (0,))}\n"
        "entropy: of a token's gates, nats; dead: share of experts that no token uses; "
        "largest: load of the most used expert, 1 is balanced"
    )
