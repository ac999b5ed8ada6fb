"""Replays of a trace with every policy and cache size, as a table.

The first half of the examples is the profile, from which fixed scores, affinities and
demands are taken; the second half is replayed.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from moex.analysis.trace import Trace
from moex.config.base import ConfigError, nearest, require, require_choice
from moex.offload.cache import ExpertCache, allocate
from moex.offload.costs import Costs
from moex.offload.forecasts import Forecast, affinity, known, recorded
from moex.offload.policies import (
    Belady,
    Lfu,
    Lru,
    Mrs,
    Policy,
    Predicted,
    Random,
    Static,
)
from moex.offload.routes import Routes, in_step, read_routes
from moex.offload.schedule import SCHEDULERS
from moex.offload.simulate import needs_of, simulate
from moex.offload.tokens import regrouped
from moex.progress import counted

POLICIES = ("random", "lru", "lfu", "static", "mrs", "predicted", "belady")
PREFETCH = ("none", "affinity", "logits", "perfect")
ALLOCATE = ("equal", "demand", "shared")
# Without a file of costs only counts are shown; times would be those of no machine.
UNIT = Costs(device=1.0, move=1.0)
# The costs that a scheduler cannot do without.
NEEDED = {"device": ("device", "move"), "static": ("device", "cpu_row")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """The replays that are asked for.

    Attributes:
      slots: slots of a layer on average, such as "4", or a share of all, such as "25%".
      policies: some of `POLICIES`; empty: all that the other choices allow.
      batch: sequences that are decoded in step.
      regroup: divide every two batches anew at each step, by the experts that the
        forecast of whole steps names, or by the real ones.
      prefetch: one of `PREFETCH`, or the file of a predictor.
      ahead: layers that a forecast of later layers looks ahead.
      impact: prefetch in the order of saved time.
      allocate: how slots are divided between layers, one of `ALLOCATE`.
      scheduler: one of `SCHEDULERS`.
      costs: of the machine; None: no times are shown.
      alpha: of the policy mrs.
      tokens: the most tokens that are read; None: all.
      seed: of random choices.
    """

    slots: tuple[str, ...] = ("25%", "50%", "75%")
    policies: tuple[str, ...] = ()
    batch: int = 1
    regroup: bool = False
    prefetch: str = "none"
    ahead: int = 1
    impact: bool = False
    allocate: str = "equal"
    scheduler: str = "device"
    costs: Costs | None = None
    alpha: float = 0.5
    tokens: int | None = 4096
    seed: int = 0

    def __post_init__(self):
        for name in self.policies:
            require_choice("--policy", name, POLICIES)
        require_choice("--allocate", self.allocate, ALLOCATE)
        require_choice("--scheduler", self.scheduler, SCHEDULERS)
        require(len(self.slots) > 0, "--slots", list(self.slots), "not empty")
        for flag, value in (("--batch", self.batch), ("--ahead", self.ahead)):
            require(value >= 1, flag, value, "1 or more")
        require(0 < self.alpha <= 1, "--alpha", self.alpha, "in (0, 1]")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")
        if self.ahead > 1 and self.prefetch not in ("affinity", "logits"):
            raise ConfigError(
                f"--ahead = {self.ahead}: is for --prefetch=affinity and =logits; "
                "others name the experts of all layers at once."
            )
        if self.costs is None:
            for flag, given in (
                ("--scheduler", self.scheduler != "device"),
                ("--impact", self.impact),
                ("--prefetch", self.prefetch != "none"),
            ):
                if given:
                    raise ConfigError(f"{flag}: depends on times; give --costs.")
        else:
            self._check_costs(self.costs)
        if self.prefetch == "none" and "predicted" in self.policies:
            raise ConfigError(
                "--policy: predicted keeps the experts that --prefetch predicts; give "
                "it too."
            )

    def _check_costs(self, costs: Costs) -> None:
        """Check that somebody can compute the experts that are not resident."""
        needed = NEEDED.get(self.scheduler, ())
        if not needed and not math.isfinite(costs.cpu_row):
            needed = NEEDED["device"]
        needs = {f"--scheduler={self.scheduler}": needed}
        if "belady" in self.policies:
            needs["--policy=belady"] = NEEDED["device"]
        for flag, names in needs.items():
            for name in names:
                if not math.isfinite(getattr(costs, name)):
                    raise ConfigError(f"--costs: has no {name!r}; {flag} needs it.")

    def allowed(self) -> tuple[str, ...]:
        """The policies that the other choices allow."""
        costs, found = self.costs or UNIT, list(POLICIES)
        if self.prefetch == "none":
            found.remove("predicted")
        if not math.isfinite(costs.device + costs.move):
            found.remove("belady")
        return tuple(found)


def simulation(trace: Trace, how: How) -> dict[str, Any]:
    """Replay a trace in every way that is asked for; plain data.

    Raises:
      ConfigError: if the trace cannot be replayed so.
    """
    how = dataclasses.replace(how, policies=how.policies or how.allowed())
    logits = trace.header.logits
    if how.prefetch == "logits" and not logits:
        raise ConfigError(
            f"--prefetch = 'logits': {trace.path} has no logits of all experts; "
            "`moex trace --logits` records them."
        )
    routes = read_routes(trace, tokens=how.tokens, logits=logits)
    if routes.num_examples < 2:
        raise ConfigError(
            f"{trace.path}: one example of {len(routes):,} tokens is too few: the "
            "first half of them is the profile."
        )
    profile, replayed = routes.halves()
    ids_NRK = _named(trace, how, replayed)
    forecast = _forecast(how, profile, replayed, ids_NRK)
    steps = _steps(how, replayed, ids_NRK)
    sizes = {text: _size(text, routes) for text in how.slots}
    rows = [
        _row(how, name, text, total, profile, replayed, steps, forecast)
        for name, (text, total) in counted(
            [(n, s) for n in how.policies for s in sizes.items()],
            "replaying",
            len(how.policies) * len(sizes),
            "replays",
        )
    ]
    return {
        "run": trace.header.run,
        "profile_tokens": len(profile),
        "tokens": len(replayed),
        "steps": len(steps),
        "layers": routes.num_layers,
        "experts": routes.num_experts,
        "how": dataclasses.asdict(how),
        "rows": rows,
    }


def _row(how, name, text, total, profile, replayed, steps, forecast) -> dict[str, Any]:
    shape = replayed.num_layers, replayed.num_experts
    bound = name == "belady"
    policy = make_policy(how, name, profile, replayed, steps)
    per_layer = None
    if how.allocate != "shared":
        equal = how.allocate == "equal"
        demand_L = np.ones(shape[0]) if equal else profile.demand()
        per_layer = allocate(demand_L, total, shape[1])
        total = sum(per_layer)
    cache = ExpertCache(*shape, total, policy, per_layer=per_layer)
    found = simulate(
        replayed,
        steps,
        cache,
        how.costs or UNIT,
        scheduler=SCHEDULERS["device" if bound else how.scheduler],
        forecast=None if bound else forecast,
        impact=how.impact and not bound,
    )
    told = found.statistics
    row = {
        "policy": name,
        "slots": text,
        "total_slots": total,
        "hit_rate": found.hit_rate,
        "moves_per_token": found.moves_per_token,
        "hits": int(told.hits_L.sum()),
        "misses": int(told.misses_L.sum()),
        "prefetched": int(told.prefetched_L.sum()),
        "useful": int(told.useful_L.sum()),
        "hosted": int(told.hosted_L.sum()),
    }
    if how.costs is not None:
        row |= {"time_per_token": found.time / found.tokens}
        row |= {"stall": found.stall / found.time if found.time else 0.0}
    return row


def make_policy(how: How, name: str, profile: Routes, replayed, steps) -> Policy:
    """A fresh policy of `POLICIES`."""
    shape = replayed.num_layers, replayed.num_experts
    match name:
        case "random":
            return Random(*shape, seed=how.seed)
        case "lru":
            return Lru(*shape)
        case "lfu":
            return Lfu(*shape)
        case "static":
            return Static(profile.counts())
        case "mrs":
            return Mrs(*shape, top=2 * replayed.expert_NRK.shape[2], alpha=how.alpha)
        case "predicted":
            return Predicted(*shape)
    return Belady(*shape, needs_of(replayed, steps))


def _size(text: str, routes: Routes) -> int:
    """The slots of all layers together that a text asks for."""
    layers, experts = routes.num_layers, routes.num_experts
    share = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    per_layer = value / 100 * experts if share else value
    allowed = f"from 1 to {experts}, the experts of a layer, or a share such as 25%"
    require(1 <= per_layer <= experts, "--slots", text, allowed)
    return round(per_layer * layers)


def _named(trace: Trace, how: How, replayed: Routes) -> np.ndarray | None:
    """The experts that a forecast of whole steps names for each token, or None."""
    if how.prefetch == "perfect":
        return replayed.expert_NRK
    if how.prefetch in PREFETCH:
        return None
    from moex.offload.predictor import Predictor, windows

    try:
        predictor = Predictor.read(how.prefetch)
    except ConfigError as e:
        names = ", ".join(PREFETCH)
        hint = nearest(how.prefetch, PREFETCH)
        raise ConfigError(
            f"--prefetch: {str(e).rstrip('.')}. It may also be one of {names}.{hint}"
        ) from None
    predictor.about.check(trace.header, how.prefetch)
    return predictor.experts(windows(replayed, predictor.about))


def _forecast(how: How, profile, replayed, ids_NRK) -> Forecast | None:
    if ids_NRK is not None:
        return known(ids_NRK, replayed.num_experts)
    match how.prefetch:
        case "affinity":
            return affinity(profile, replayed, how.ahead)
        case "logits":
            return recorded(replayed, how.ahead)
    return None


def _steps(how: How, replayed: Routes, ids_NRK) -> list[np.ndarray]:
    if not how.regroup:
        return in_step(replayed, how.batch)
    named = replayed
    if ids_NRK is not None:
        named = dataclasses.replace(replayed, expert_NRK=ids_NRK)
    steps = in_step(replayed, 2 * how.batch)
    return regrouped(steps, named.patterns, how.batch, seed=how.seed)


def lines(found: dict[str, Any]) -> list[str]:
    """The table of `simulation`."""
    how, rows = found["how"], found["rows"]
    told = [
        f"{found['tokens']:,} tokens in {found['steps']:,} steps of {found['layers']} "
        f"MoE layers with {found['experts']} experts; {found['profile_tokens']:,} "
        "tokens before them are the profile"
    ]
    columns = {"hit rate": ("hit_rate", "{:.1%}")}
    columns["moves per token"] = ("moves_per_token", "{:.2f}")
    if how["costs"] is not None:
        columns["time per token"] = ("time_per_token", "{:.4g}")
        columns["share of stall"] = ("stall", "{:.1%}")
    for title, (name, form) in columns.items():
        told += ["", f"{title}, by slots of a layer"]
        told.append(f"{'':<12}" + "".join(f"{size:>10}" for size in how["slots"]))
        for policy in how["policies"]:
            own = [form.format(r[name]) for r in rows if r["policy"] == policy]
            told.append(f"{policy:<12}" + "".join(f"{v:>10}" for v in own))
    if "belady" in how["policies"]:
        bound = "knows the future, and loads only what is needed now"
        told += ["", f"belady {bound}: the bound of the others without prefetches"]
    return told
