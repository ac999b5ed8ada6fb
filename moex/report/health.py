"""The checks of `health_checks.py` on a run: what was found, what was looked at.

S logged steps · E experts
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moex.model.layers import routers, shown
from moex.moe.routers.topp import TopP
from moex.report import health_checks
from moex.report.health_checks import Finding
from moex.report.material import Material, Routing

DEVICES = "device_violation"
# The checks that need a figure, by its name.
LOOKED_AT = {
    "load_frac": "dead experts and collapse",
    "experts_per_token": "saturated routers",
    "entropy": "router entropy",
    "dropped_frac": "dropped and lost slots",
    "logit_norm": "router logits",
    DEVICES: "balance of devices",
}
LINES = 3  # training lines that per-layer checks need; with fewer, evaluations are used


@dataclasses.dataclass(frozen=True)
class Health:
    """The result of the checks."""

    findings: tuple[Finding, ...]  # all of them
    checked: tuple[str, ...]  # the checks that were made
    unchecked: tuple[str, ...]  # the checks that could not be made, and why

    @property
    def groups(self) -> dict[str, list[str]]:
        """Texts by kind, in order of their first one."""
        found: dict[str, list[str]] = {}
        for finding in self.findings:
            found.setdefault(finding.kind, []).append(finding.text)
        return found

    @property
    def headline(self) -> str:
        """One line on all checks."""
        if not self.findings:
            return "No warnings"
        return f"Warnings: {', '.join(self.groups)}"


def examine(material: Material, traced: Routing | None = None) -> Health:
    """Run all checks that a run has figures for.

    Args:
      traced: figures of a trace, for a run that logged none of its own.
    """
    checked: list[str] = []
    unchecked: list[str] = []
    findings = [
        *_training(material, checked, unchecked),
        *_layers(material, traced, checked, unchecked),
    ]
    return Health(tuple(findings), tuple(checked), tuple(unchecked))


def _training(material: Material, checked, unchecked) -> Iterator[Finding]:
    score = material.cfg.task.score
    step_S, loss_S = material.series("train", score)
    if len(step_S) == 0:
        unchecked.append("training, for no step is logged")
    else:
        checked += ["NaN and infinities", "skipped updates", "loss spikes"]
        checked.append("divergence")
        norm = material.series("train", "grad_norm")
        yield from _found(
            health_checks.not_finite(f"training {score}", step_S, loss_S),
            health_checks.not_finite("training grad_norm", *norm),
            health_checks.divergence(step_S, loss_S),
            health_checks.spikes(step_S, loss_S),
            health_checks.skipped_updates(*material.series("train", "skipped")),
        )
    step_S, loss_S = material.series("eval", score)
    if len(step_S) == 0:
        unchecked.append("held-out loss, for there is no evaluation")
        return
    checked.append("held-out loss")
    _, tokens_S = material.series("eval", "tokens")
    yield from _found(health_checks.not_finite("held-out loss", step_S, loss_S))
    if len(tokens_S) == len(step_S):
        yield from _found(health_checks.overfitting(step_S, loss_S, tokens_S))


def _found(*results: Finding | None) -> Iterator[Finding]:
    yield from (result for result in results if result is not None)


def judged(material: Material) -> tuple[str, Routing] | None:
    """`(kind, figures)` that layers are judged by: those of training if possible."""
    train, held = (material.routing.get(kind) for kind in ("train", "eval"))
    if train is not None and (held is None or len(train.step_S) >= LINES):
        return "train", train
    return None if held is None else ("eval", held)


def _layers(material: Material, traced, checked, unchecked) -> Iterator[Finding]:
    found = judged(material)
    if found is None and traced is None:
        unchecked.append("routing, for there is no routing.jsonl, and no trace")
        return
    routing = traced if found is None else found[1]
    names = {name for figures in routing.layers.values() for name in figures}
    dynamic = most_experts(material.cfg.model)
    for name, what in LOOKED_AT.items():
        if name in names:
            if name != "experts_per_token" or dynamic:
                checked.append(what)
        else:
            split = name != DEVICES or traced is routing
            why = f"{name} is not logged" if split else "experts lie on one device"
            unchecked.append(f"{what}, for {why}")
    by_layer = [
        _layer(label, routing.step_S, figures, dynamic.get(label))
        for label, figures in routing.layers.items()
    ]
    for results in zip(*by_layer, strict=True):  # of one check
        yield from _found(*results)


def _layer(label, step_S, figures, most) -> Iterator[Finding | None]:
    """Run the checks of one layer, always the same number in the same order."""
    where = f"layer {shown(label)}"
    experts, load = 0, _complete(figures.get("load_frac"))
    if load is None:
        yield from (None, None)
    else:
        rows, load_SE = load
        experts = load_SE.shape[1]
        yield health_checks.dead_experts(where, step_S[rows], load_SE)
        yield health_checks.collapse(where, load_SE)

    def of(check, *names, **more):
        series = [figures.get(name) for name in names]
        if series[0] is None or not (good := np.isfinite(series[0])).any():
            return None
        return check(where, *(s if s is None else s[good] for s in series), **more)

    yield of(health_checks.saturated, "experts_per_token", most=most or 0)
    yield of(health_checks.entropy_collapse, "entropy", num_experts=experts)
    yield of(health_checks.growing_logits, "logit_norm", num_experts=max(experts, 1))
    yield of(health_checks.lost_slots, "dropped_frac", "lost_frac")
    zero = figures.get("zero_frac")
    meant = zero is not None and np.nanmax(zero) > 0
    yield None if meant else of(health_checks.unrouted, "unrouted_frac")
    yield of(health_checks.uneven_devices, DEVICES)


def _complete(load_SE) -> tuple[np.ndarray, np.ndarray] | None:
    """Lines with any slots at all, and their shares, which sum to 1."""
    if load_SE is None:
        return None
    rows = np.isfinite(load_SE).all(axis=1) & (np.nansum(load_SE, axis=1) > 0.5)
    return (rows, load_SE[rows]) if rows.any() else None


def most_experts(model) -> dict[str, int]:
    """The most experts that a token can have, by label of layers with a top-p router.

    Experts are those that compute; a chain's rounds are labelled "003.1", "003.2".
    """
    found: dict[str, int] = {}
    for routed in routers(model):
        if isinstance(routed.router, TopP):
            experts = routed.moe.num_experts
            found[routed.label] = min(routed.router.k_max or experts, experts)
    return found
