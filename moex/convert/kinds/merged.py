"""Merging: groups of experts become one set of weights each (M-SMoE, REAM).

A model and its parameters are in `to_merged.py`, which experts merge in `merge.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from moex.config.arguments import positive
from moex.config.base import ConfigError, require, require_choice
from moex.convert.base import SHARED, Conversion, option

SIMILARITY = ("logits", "weights", "router", "outputs", "logits+outputs", "random")
ALIGN = ("dominant", "first", "none")
CHOICES = {
    "method": ("msmoe", "ream"),
    "budget": ("adaptive", "uniform"),
    "similarity": SIMILARITY,
    "average": ("score", "uniform"),
    "align": ALIGN,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "msmoe": {"budget": "adaptive", "similarity": "logits", "largest": None},
    "ream": {"budget": "uniform", "similarity": "logits+outputs", "largest": 16},
}


def _choice(name: str, about: str) -> dict[str, Any]:
    return dict(help=f"{about}: {', '.join(CHOICES[name])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(Conversion):
    """Groups of experts that share one set of weights; routers stay as they are."""

    kind = "merged"
    about = (
        "groups of experts become one expert each, to which the unchanged router's "
        "choices of all of them lead"
    )
    flags = {
        "groups": dict(
            type=positive, help="groups of a layer, on average; needed without --plan"
        ),
        "method": _choice(
            "method",
            "M-SMoE (default), or REAM: dominant experts by gate times norm of output, "
            "which take their like, one layer after the other",
        ),
        "budget": _choice("budget", "groups of each layer, by usage or equal"),
        "similarity": _choice("similarity", "what makes two experts alike"),
        "align": _choice(
            "align",
            "to which expert hidden units are matched before the mean; default: "
            "dominant",
        ),
        "average": _choice(
            "average", "the mean of a group, by the usage (REAM: the score) or plain"
        ),
        "largest": dict(type=positive, help="most experts of a group"),
        **{n: SHARED[n] for n in ("layers", "seed", "calibration", "sums", "plan")},
        "write_plan": SHARED["write_plan"],
    }
    keeps_family = True
    # Options that say how a plan is made; a plan has them in `how`.
    HOW: ClassVar[tuple[str, ...]] = (
        *("groups", "method", "budget", "similarity", "average", "align"),
        *("largest", "layers", "seed"),
    )

    groups: int = 0  # G, on average; 0: the plan says
    method: str = "msmoe"
    budget: str = "adaptive"
    similarity: str = "logits"
    average: str = "score"
    align: str = ""  # one of `ALIGN`; "": as the plan says, or to the dominant expert
    largest: int | None = None
    layers: str = "all"  # see `chosen_layers`
    seed: int = 0  # for a random similarity
    # Training sequences to look at; 0: none, so that no error bounds are reported.
    calibration: int = 256
    sums: Path | None = None  # of recorded sums, in place of sequences
    plan: Path | None = None  # file of a plan that was made before
    made: Any = None  # `Plan`; None until `planned`
    pairs: Any = None  # the error bounds of its pairs; None: not known yet

    @classmethod
    def from_flags(cls, given):
        options = dict(given)
        options.pop("write_plan", None)
        if "plan" in options:
            makes = {*cls.HOW, "sums"} - {"align"}
            for flag in sorted(options.keys() & makes):
                raise ConfigError(f"{option(flag)}: makes a plan; omit it with --plan.")
        elif "groups" not in options:
            raise ConfigError("--groups: missing; how many groups has a layer?")
        method = options.get("method", "msmoe")
        require_choice("--method", method, CHOICES["method"])
        if {"plan", "sums"} & options.keys():
            options.setdefault("calibration", 0)
        return cls(**DEFAULTS[method] | options)

    def check(self):
        for name, allowed in CHOICES.items():
            if name != "align" or self.align:
                require_choice(f"--{name}", getattr(self, name), allowed)
        if self.plan is None:
            require(self.groups >= 1, "--groups", self.groups, "at least 1")
        require(self.seed >= 0, "--seed", self.seed, ">= 0")
        if self.method == "ream":
            require(
                self.budget == "uniform", "--budget", self.budget, "uniform in REAM"
            )

    def made_plan(self):
        return self.made

    def options(self):
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del found["made"], found["pairs"]
        paths = {
            n: None if found[n] is None else str(found[n]) for n in ("sums", "plan")
        }
        return found | paths

    def planned(self, source, model, say):
        from moex.analysis.sums import Sums
        from moex.convert.plans import Plan
        from moex.convert.to_merged import bounds, make_plan, mergeable
        from moex.convert.used import Counter, used_of_sums

        if self.plan is not None:
            plan = Plan.read(self.plan, "merge")
            plan.check(model, str(self.plan))
            align = self.align or plan.how.get("align", "dominant")
            require_choice(f"{self.plan}: align", align, ALIGN)
            return dataclasses.replace(self, made=plan, align=align)
        mergeable(model, self)  # before anything is read
        self = dataclasses.replace(self, align=self.align or "dominant")
        if self.sums is not None:
            if self.method == "ream":
                say("REAM looks again after each layer only without --sums")
            used, counter = (
                used_of_sums(Sums.read(self.sums), model, str(self.sums)),
                None,
            )
        else:
            say(f"usage of experts in {self.calibration} training sequences")
            counter = Counter(source.loaded, source.job, self.calibration)
            used = counter.used(source.loaded.params)
        plan = make_plan(source.loaded, counter, used, self)
        pairs = None if counter is None else bounds(plan, used)
        return dataclasses.replace(self, made=plan, pairs=pairs)

    def model(self, model):
        from moex.convert.to_merged import merged_model

        return merged_model(model, self.made)

    def arrays(self, run, job, say):
        from moex.convert.to_merged import bounds, merged_arrays
        from moex.convert.used import Counter

        pairs = self.pairs or []
        if self.pairs is None and self.calibration:
            counter = Counter(run, job, self.calibration)
            pairs = bounds(self.made, counter.used(run.params))
        args = (run.params, run.state, run.cfg.model, self.made)
        params, state = merged_arrays(*args, self.align)
        groups = {str(own.layer): len(own.groups) for own in self.made.layers}
        return params, state, {"layer_groups": groups, "pairs": pairs}

    def lines(self, report):
        lines = [f"{'layer':>5} {'groups':>6}"]
        for number, count in report["layer_groups"].items():
            lines.append(f"{number:>5} {count:>6}")
        if report["pairs"]:
            lines.append(f"{'layer':>5} {'expert':>6} {'into':>6} {'error >=':>10}")
            for row in report["pairs"]:
                numbers = "{layer:>5} {expert:>6} {dominant:>6} {bound:>10.3g}"
                lines.append(numbers.format(**row))
        return lines
