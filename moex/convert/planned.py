"""Conversions by a plan, which is given as a file or made from sums of the run."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moex.config.arguments import path
from moex.config.base import ConfigError, require
from moex.convert.base import SHARED, Conversion

if TYPE_CHECKING:  # --help does not need JAX
    from moex.analysis.sums import Sums
    from moex.convert.plans import Plan

# The flags that all of them have; `--write-plan` is of the verb.
PLAN_FLAGS: dict[str, dict[str, Any]] = {
    "plan": dict(
        type=path, metavar="FILE", help="convert by this plan, and make none (JSON)"
    ),
    "sums": dict(
        type=path,
        metavar="FILE",
        help="make the plan from these sums (moex trace --sums); default: from "
        "training data of the run",
    ),
    "calibration": SHARED["calibration"],
}
CALIBRATION = 256  # sequences, if nothing else is said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(Conversion):
    """A conversion that a `Plan` describes."""

    plan_kind: ClassVar[str]  # of its plans

    plan: "Plan | None" = None  # None: it is made
    sums: "Sums | None" = None  # to make it from; None: of training data
    calibration: int = CALIBRATION  # training sequences, where there are no sums

    @classmethod
    def from_flags(cls, given):
        from moex.analysis.sums import Sums
        from moex.convert.plans import Plan

        given = dict(given)
        if "plan" in given:
            for flag in sorted(given.keys() - {"plan"}):
                told = f"--{flag.replace('_', '-')}: is for making a plan"
                raise ConfigError(f"{told}; --plan={given['plan']} is one.")
            given["plan"] = Plan.read(given["plan"], cls.plan_kind)
        if "sums" in given:
            if "calibration" in given:
                raise ConfigError("--calibration: is for a plan without --sums.")
            given["sums"] = Sums.read(given["sums"])
        return cls(**given)

    def ready(self, source) -> Self:
        plan = self.plan
        if plan is None:
            plan = self.make_plan(source, self.fitting(source))
        plan.check(source.model)
        if not any(own.changes() for own in plan.layers):
            raise ConfigError(
                f"{plan.where}: changes nothing: all experts of all layers stay as "
                "they are."
            )
        return dataclasses.replace(self, plan=plan)

    def fitting(self, source) -> "Sums | None":
        """The sums to make the plan from.

        Raises:
          ConfigError: if those that were given are of another model.
        """
        from moex.model.layers import routers

        sums = self.sums or self.recorded(source)
        if sums is not None and sums.base != source.base:
            raise ConfigError(
                f"--sums: they are of another model ({sums.run}): names or shapes "
                "of parameters differ."
            )
        if sums is not None:
            moes = {own.label: own.moe for own in routers(source.model)}
            wanted = {n: (m.num_experts, m.num_choices()) for n, m in moes.items()}
            infos = {name: own.info for name, own in sums.layers.items()}
            found = {n: (i.num_experts, i.num_choices) for n, i in infos.items()}
            told = "--sums: experts and choices of each router"
            require(found == wanted, told, found, f"{wanted}")
            if sums.digest and sums.digest != source.digest:
                source.say(
                    f"--sums: they are of {sums.run} at step {sums.step:,}, and not of "
                    "the checkpoint that is converted"
                )
        return sums

    def recorded(self, source) -> "Sums | None":
        """The sums of training data of the run that `make_plan` needs; None: none."""
        return source.sums(self.calibration)

    @abc.abstractmethod
    def make_plan(self, source, sums: "Sums | None") -> "Plan":
        """The plan for a run with the sums of `recorded`; `source` is a `Source`."""

    def made_plan(self) -> "Plan":
        """The plan, once `ready` has made it."""
        assert self.plan is not None
        return self.plan

    def options(self):
        return {"how": self.made_plan().how}

    def write(self, run):
        self.made_plan().save(run.plan)
