"""Merging: groups of experts become one set of weights each (M-SMoE, REAM).

A model and its parameters are in `to_merged.py`, which experts merge in `merge.py`.
"""

import dataclasses
from typing import Any, ClassVar

from moex.config.arguments import positive
from moex.config.base import ConfigError, require, require_choice
from moex.convert.base import SHARED
from moex.convert.planned import PLAN_FLAGS, Planned

ALIGN = ("dominant", "first", "none")
CHOICES = {
    "method": ("msmoe", "ream"),
    "budget": ("adaptive", "uniform"),
    "similarity": (
        *("logits", "weights", "router", "inputs", "outputs", "logits+outputs"),
        *("gradients", "mse", "random"),
    ),
    "average": ("score", "uniform"),
    "align": ALIGN,
}
NOT_IN_SUMS = ("inputs", "gradients", "mse")  # similarities that sums do not tell
DEFAULTS: dict[str, dict[str, Any]] = {
    "msmoe": {"budget": "adaptive", "similarity": "logits", "largest": None},
    "ream": {"budget": "uniform", "similarity": "logits+outputs", "largest": 16},
}


def _choice(name: str, about: str) -> dict[str, Any]:
    return dict(help=f"{about}: {', '.join(CHOICES[name])}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(Planned):
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
        "layers": SHARED["layers"],
        "seed": SHARED["seed"],
        **PLAN_FLAGS,
    }
    keeps_family = True
    plan_kind = "merge"
    # Options that say how a plan is made; it has them in `how`.
    HOW: ClassVar[tuple[str, ...]] = (
        *("groups", "method", "budget", "similarity", "average", "align"),
        *("largest", "layers", "seed"),
    )

    groups: int = 0  # G, on average; 0: the plan says
    method: str = "msmoe"
    budget: str = "adaptive"
    similarity: str = "logits"
    average: str = "score"
    align: str = "dominant"
    largest: int | None = None  # the most experts of a group
    layers: str = "all"  # see `chosen_layers`
    seed: int = 0  # for a random similarity

    @classmethod
    def from_flags(cls, given):
        if "plan" not in given and "groups" not in given:
            raise ConfigError("--groups: missing; how many groups has a layer?")
        method = given.get("method", "msmoe")
        require_choice("--method", method, CHOICES["method"])
        made = super().from_flags(given)
        if "seed" in given and given.get("similarity") != "random":
            raise ConfigError("--seed: is for --similarity=random.")
        rest = {k: v for k, v in DEFAULTS[method].items() if k not in given}
        return dataclasses.replace(made, **rest)

    def check(self):
        for name, choices in CHOICES.items():
            require_choice(f"--{name}", getattr(self, name), choices)
        if self.plan is None:
            require(self.groups >= 1, "--groups", self.groups, "at least 1")
        require(self.seed >= 0, "--seed", self.seed, ">= 0")
        if self.method == "ream":
            allowed = "uniform with --method=ream"
            require(self.budget == "uniform", "--budget", self.budget, allowed)
        if self.sums is not None and self.similarity in NOT_IN_SUMS:
            raise ConfigError(
                f"--similarity = {self.similarity!r}: sums do not tell it; leave out "
                "--sums, and training sequences are read."
            )

    def measured(self) -> set[str]:
        """The similarities that are measured only if they are asked for."""
        return {self.similarity} & {"gradients", "mse"}

    def ready(self, source):
        from moex.convert.to_merged import make_plan, mergeable, pairs_of
        from moex.convert.used import Counter

        if self.plan is not None:
            align = self.plan.how.get("align", "dominant")
            require_choice(f"{self.plan.where}: how.align", align, ALIGN)
            pairs_of(self.plan)  # before anything is read
            return dataclasses.replace(super().ready(source), align=align)
        mergeable(source.model, self)  # before anything is read
        if self.sums is not None:
            return super().ready(source)
        source.say(f"usage of experts in {self.calibration} training sequences")
        job = source.job(source.folder.config())
        counter = Counter(source.loaded, job, self.calibration, self)
        used = counter.used(source.loaded.params)
        plan = make_plan(source.loaded, counter, used, self)
        return dataclasses.replace(self, plan=plan)

    def make_plan(self, source, sums):
        from moex.convert.to_merged import make_plan
        from moex.convert.used import used_of_sums

        if self.method == "ream":
            source.say("with --sums REAM does not look again after each layer")
        used = used_of_sums(sums)
        return make_plan(source.loaded, None, used, self)

    def model(self, model):
        from moex.convert.to_merged import merged_model

        assert self.plan is not None
        return merged_model(model, self.plan)

    def arrays(self, run, job, say):
        from moex.convert.to_merged import merged_arrays, pairs_of

        assert self.plan is not None
        args = (run.params, run.state, run.cfg.model, self.plan)
        params, state = merged_arrays(*args, self.align)
        plans = self.plan.by_layer()
        groups = {str(n): len(own.groups) for n, own in plans.items()}
        pairs = pairs_of(self.plan)
        return params, state, {"layer_groups": groups, "pairs": pairs}

    def lines(self, report):
        lines = [f"{'layer':>5} {'groups':>6}"]
        for number, count in report["layer_groups"].items():
            lines.append(f"{number:>5} {count:>6}")
        if report["pairs"]:
            lines.append(f"{'layer':>5} {'expert':>6} {'into':>6} {'error >=':>10}")
        for row in report["pairs"]:
            form = "{layer:>5} {expert:>6} {dominant:>6} {bound:>10.3g}"
            lines.append(form.format(**row))
        return lines
