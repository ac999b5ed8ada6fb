"""Plan files of placements: made, read, and compared with what a text does today."""

import dataclasses
from typing import Any

import numpy as np

from moex.config.base import ConfigError, require
from moex.convert.plans import Place, Plan
from moex.convert.to_placed import devices_of, whole_blocks
from moex.json_files import field
from moex.model.layers import sites
from moex.placement.affinity import Affinity
from moex.placement.solve import Placement, contiguous
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.rows import Rows


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts that the run of a trace tells of its layers, by their numbers."""

    base: str
    experts: dict[int, int]  # E, without zero-computation ones
    stored: dict[int, np.ndarray]  # int64[E] where experts share weights
    blocks: dict[int, tuple[int, ...]]

    @classmethod
    def of(cls, run: RunDir) -> "Facts":
        """Read the config of a run, and of its newest checkpoint which experts share.

        Raises:
          ConfigError: if there is no run, or its experts cannot change places.
        """
        model = run.config().model
        experts: dict[int, int] = {}
        stored: dict[int, np.ndarray] = {}
        blocks: dict[int, tuple[int, ...]] = {}
        rows: Rows | None = None
        for site in sites(model):
            if site.sparse is None:
                continue
            own = whole_blocks(site.sparse)
            blocks |= dict.fromkeys(site.numbers, own)
            experts |= dict.fromkeys(site.numbers, site.sparse.moe.num_experts)
            if site.sparse.moe.stored_experts is not None:
                rows = rows or Rows(run)
                stored_RE = rows.read("state", f"state/{site.sparse.path}/stored_E")
                stored |= dict(zip(site.numbers, stored_RE.astype(int), strict=True))
        return cls(base_hash(model), experts, stored, blocks)

    def tell(self, affinity: Affinity, where) -> Affinity:
        """The affinity of the sets and groups of the model.

        Raises:
          ConfigError: if the text was traced in another model.
        """
        for own in affinity.layers:
            same = self.experts.get(own.number) == own.experts
            if not same or (affinity.base and affinity.base != self.base):
                raise ConfigError(
                    f"--run: {where} is of another model: its layer {own.number} has "
                    f"{own.experts} experts."
                )
        told = affinity.told(self.stored, self.blocks)
        return dataclasses.replace(told, base=self.base)


def make_plan(placement: Placement, affinity: Affinity, how: dict[str, Any]) -> Plan:
    """The plan of a placement, for the model whose affinity this is."""
    layers = tuple(
        Place(
            layer=own.number,
            experts=own.experts,
            devices=tuple(map(tuple, placement.experts(i))),
        )
        for i, own in enumerate(placement.layers)
    )
    return Plan(
        kind="place",
        run=affinity.run,
        step=affinity.step,
        base=affinity.base,
        layers=layers,
        how=how,
    )


def placement_of(plan: Plan, affinity: Affinity) -> Placement:
    """The placement of a plan for the layers of a text; others stay contiguous.

    Raises:
      ConfigError: if the plan is for other layers.
    """
    P = devices_of(plan)
    nodes = field(plan.how, "nodes", int, f"{plan.where}: how", 1)
    fits = nodes >= 1 and P % nodes == 0
    require(fits, f"{plan.where}: how.nodes", nodes, f"a divisor of the {P} devices")
    placed = contiguous(affinity.layers, P, nodes)
    sizes = {own.number: own.experts for own in affinity.layers}
    for own in plan.layers:
        told = f"{plan.where}, layer {own.layer}"
        if own.layer not in sizes:
            raise ConfigError(f"{told}: is no MoE layer of the trace.")
        allowed = (
            f"{sizes[own.layer]}, as in the trace; --run tells of experts that share "
            "weights"
        )
        same = own.experts == sizes[own.layer]
        require(same, f"{told}: experts", own.experts, allowed)
    by_layer, device = plan.by_layer(), list(placed.device)
    for i, layer in enumerate(affinity.layers):
        if layer.number in by_layer:
            order = np.array(by_layer[layer.number].order())
            device[i] = np.argsort(order) * P // layer.experts
        elif layer.experts % P:
            raise ConfigError(
                f"{plan.where}: has no layer {layer.number}, whose {layer.experts} "
                f"experts {P} devices do not divide."
            )
    return dataclasses.replace(placed, device=tuple(device))
