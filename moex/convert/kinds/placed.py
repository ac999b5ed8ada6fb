"""Placement: experts change places, so that each device holds those of a plan.

Plans come from `moex place`; the arrays are in `to_placed.py`.
"""

import dataclasses
from typing import TYPE_CHECKING

from moex.config.base import ConfigError
from moex.convert.base import Conversion
from moex.convert.planned import PLAN_FLAGS

if TYPE_CHECKING:  # --help does not need JAX
    from moex.convert.plans import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed(Conversion):
    """Block p of the expert axis gets the experts of device p of a plan."""

    kind = "placed"
    keeps_family = True
    about = "experts change places, so that each device holds those of a plan"
    flags = {"plan": PLAN_FLAGS["plan"]}
    needed = {"plan": "`moex place` makes a plan from a trace."}

    plan: "Plan"

    @classmethod
    def from_flags(cls, given):
        from moex.convert.plans import Plan

        return cls(plan=Plan.read(given["plan"], "place"))

    def check(self):
        return

    def ready(self, source):
        from moex.convert import to_placed

        to_placed.check(self.plan, source.model)
        if not any(own.changes() for own in self.plan.layers):
            raise ConfigError(
                f"{self.plan.where}: changes nothing: all experts of all layers stay "
                "where they are."
            )
        return self

    def options(self):
        return {"how": self.plan.how}

    def write(self, run):
        self.plan.save(run.plan)

    def model(self, model):
        return model

    def arrays(self, run, job, say):
        from moex.convert.to_placed import placed_arrays

        trees = (run.params, run.state)
        made = [placed_arrays(tree, run.cfg.model, self.plan) for tree in trees]
        moved = {
            str(number): sum(e != i for i, e in enumerate(own.order()))
            for number, own in self.plan.by_layer().items()
        }
        return *made, {"moved": moved}

    def lines(self, report):
        count = sum(report["moved"].values())
        where = f"{len(report['moved'])} layers"
        return [f"{count:,} experts of {where} have another place"]
