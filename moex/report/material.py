"""Everything that a report is made of, read from a run directory.

S logged steps of one kind, ascending
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from moex.analysis.gates import GateLog, read_gates
from moex.config.base import ConfigError
from moex.model.accounting import Cost, model_cost
from moex.model.spec import model_spec
from moex.runs.directory import RunDir
from moex.runs.environment import read_environment
from moex.runs.lines import Routing, read_metrics, read_routing


@dataclasses.dataclass(frozen=True)
class Material:
    """A run directory as it was when it was read."""

    path: pathlib.Path  # as it was given
    cfg: Any  # the resolved run config
    # Parameters and FLOPs; None if the config leaves the vocabulary open.
    cost: Cost | None
    # Lines of metrics.jsonl by kind and by step, ascending; resumed steps once.
    lines: dict[str, dict[int, dict]]
    # Figures by kind, "train" and "eval", of the kinds that were logged.
    routing: dict[str, Routing]
    gates: dict[str, GateLog]  # of experts inside of adapters, likewise
    environment: list[dict]  # one entry per start of the run

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`(step_S, float64[S])` of a figure in the lines of a kind that have it."""
        have = {s: line for s, line in self.lines.get(kind, {}).items() if name in line}
        values = [line[name] for line in have.values()]
        return np.array(list(have), dtype=int), np.array(values, dtype=float)

    @property
    def step(self) -> int:
        """The last step that anything was logged of."""
        return max((s for lines in self.lines.values() for s in lines), default=0)


def read(run: RunDir) -> Material:
    """The material of a run directory, also of one that was never trained.

    Raises:
      ConfigError: if it is no run directory, or a file of it is damaged.
    """
    cfg = run.config()
    return Material(
        path=run.path,
        cfg=cfg,
        cost=_cost(cfg),
        lines=read_metrics(run.metrics),
        routing=read_routing(run.routing),
        gates=read_gates(run.adapters),
        environment=read_environment(run),
    )


def _cost(cfg) -> Cost | None:
    try:
        cfg.task.fill(cfg)
    except ConfigError:
        return None
    return model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
