"""The optimizer: one `Optim` config -> one optax chain.

clip -> AdamW or Muon with weight decay -> schedule -> factors by parameter path.
Parameters are plain nested dicts; a path is written `segments/0/blocks/1/ffn/...`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from moex.config.base import Config, ConfigError, nearest, require, require_choice
from moex.config.schedule import (
    Schedule,
    is_always_zero,
    require_values,
    static_value,
    value_at,
)
from moex.model.muon import muon
from moex.model.paths import flat_paths, matching, path_name
from moex.model.pruning import PruneRows, prune_rows
from moex.numbers import exact


@dataclasses.dataclass(kw_only=True, slots=True)
class AdamW(Config):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, 1711.05101)."""

    b1: float = 0.9  # decay of the first moment, in [0, 1)
    b2: float = 0.95  # decay of the second moment, in [0, 1)
    eps: float = 1e-8  # added to the root of the second moment, > 0

    def validate(self, path):
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{path}.{name}", value, "in [0, 1)")
        require(self.eps > 0, f"{path}.eps", self.eps, "above 0")


@dataclasses.dataclass(kw_only=True, slots=True)
class Muon(Config):
    """Orthogonalised momentum for matrices, Adam for everything else.

    Every expert, projection and layer is its own matrix. Embeddings, logits, routers
    and norms use Adam with `adam_lr`, without weight decay. Both parts have Nesterov
    momentum, as in optax.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers", as in optax.
    """

    adam_lr: float = 3e-3  # peak learning rate of the Adam part, > 0
    momentum: float = 0.95  # decay of the momentum, in [0, 1)
    b1: float = 0.9  # Adam part: decay of the first moment, in [0, 1)
    b2: float = 0.95  # Adam part: decay of the second moment, in [0, 1)
    ns_steps: int = 5  # Newton-Schulz iterations, >= 1

    def validate(self, path):
        require(self.adam_lr > 0, f"{path}.adam_lr", self.adam_lr, "above 0")
        for name in ("momentum", "b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{path}.{name}", value, "in [0, 1)")
        require(self.ns_steps >= 1, f"{path}.ns_steps", self.ns_steps, "at least 1")


SCHEDULES = ("cosine", "wsd", "constant")


@dataclasses.dataclass(kw_only=True, slots=True)
class Optim(Config):
    """Rule, learning rate over time, clipping, and exceptions by parameter path."""

    rule: Config  # AdamW(...) or Muon(...)
    lr: float  # peak learning rate, > 0
    schedule: str = "cosine"  # "cosine", "wsd" (warm-up, stable, decay) or "constant"
    warmup_steps: int = 0  # linear warm-up from 0; the last of them is at the peak
    decay_frac: float = 0.2  # wsd: share of all steps that decay linearly, in (0, 1]
    final_lr_frac: float = 0.1  # learning rate of the last step over the peak, [0, 1]
    weight_decay: float = 0.0  # times the learning rate; matrices only, >= 0
    clip: float | None = 1.0  # largest global gradient norm, > 0; None: no clipping
    spike_factor: float | None = 10.0  # skip updates of norm > factor * mean; None: off
    # (path pattern, learning-rate factor); 0 freezes, a Schedule may do so for a while.
    lr_factors: tuple[tuple[str, float | Schedule], ...] = ()
    prune: PruneRows | None = None  # set rows of some matrices to 0 while training

    def validate(self, path):
        require(
            isinstance(self.rule, (AdamW, Muon)),
            f"{path}.rule",
            type(self.rule).__name__,
            "AdamW(...) or Muon(...)",
        )
        require(self.lr > 0, f"{path}.lr", self.lr, "above 0")
        require_choice(f"{path}.schedule", self.schedule, SCHEDULES)
        require(
            self.warmup_steps >= 0, f"{path}.warmup_steps", self.warmup_steps, ">= 0"
        )
        require(
            0 < self.decay_frac <= 1, f"{path}.decay_frac", self.decay_frac, "in (0, 1]"
        )
        require(
            0 <= self.final_lr_frac <= 1,
            f"{path}.final_lr_frac",
            self.final_lr_frac,
            "in [0, 1]",
        )
        require(
            self.weight_decay >= 0, f"{path}.weight_decay", self.weight_decay, ">= 0"
        )
        for name in ("clip", "spike_factor"):
            value = getattr(self, name)
            require(
                value is None or value > 0, f"{path}.{name}", value, "above 0, or None"
            )
        for pattern, factor in self.lr_factors:
            where = f"{path}.lr_factors[{pattern!r}]"
            require_values(lambda v: v >= 0, where, factor, ">= 0")

    def decay_steps(self, steps: int) -> int:
        """The number of steps that decay in wsd; the last of them is the last step."""
        return max(1, round(exact(self.decay_frac) * steps))

    def validate_steps(self, steps: int, path: str) -> None:
        """Check that warm-up and decay fit into a run of this many steps."""
        room, why = steps, f"steps = {steps}"
        if self.schedule == "cosine":
            room, why = steps - 1, f"steps - 1 = {steps - 1}, or nothing decays"
        elif self.schedule == "wsd":
            decay = self.decay_steps(steps)
            room = steps - decay
            why = (
                f"steps - decay = {steps} - {decay} = {room}, for the decay of "
                f"decay_frac = {self.decay_frac} of the steps comes last"
            )
        require(
            self.warmup_steps <= room,
            f"{path}.warmup_steps",
            self.warmup_steps,
            f"at most {why}",
        )
        if self.prune is not None:
            self.prune.validate_steps(steps, f"{path}.prune")


def schedule_frac(cfg: Optim, steps: int):
    """The learning rate over its peak, as an optax schedule of the step from 0.

    The last step of the warm-up is at the peak, and the last step of the run at
    `final_lr_frac`. Without warm-up step 0 is at the peak.
    """
    warmup = cfg.warmup_steps
    # The number of steps up to the last one at the peak, and of those after it.
    level = max(steps - cfg.decay_steps(steps) if cfg.schedule == "wsd" else warmup, 1)
    decay = max(steps - level, 1)
    fall = {
        "cosine": optax.cosine_decay_schedule(1.0, decay, alpha=cfg.final_lr_frac),
        "wsd": straight(1.0, cfg.final_lr_frac, decay),
        "constant": optax.constant_schedule(1.0),
    }[cfg.schedule]
    # Step 0 already learns: the ramp runs over (0, 1], not [0, 1).
    ramp = straight(1 / max(warmup, 1), 1.0, max(warmup - 1, 1))
    # `fall` is at the peak at its own step 0, which is the last step of the level part.
    parts = [ramp, optax.constant_schedule(1.0), lambda step: fall(step + 1)]
    return optax.join_schedules(parts, [warmup, level])


def straight(first: float, last: float, steps: int):
    """The schedule on a straight line from `first` at step 0 to `last` at `steps`.

    It ends at `last` exactly. `optax.linear_schedule` misses it in a compiled program,
    where XLA multiplies by the rounded inverse of the steps.
    """

    def value(step):
        left = jnp.clip(steps - step, 0, steps)
        return last + (first - last) * left / steps

    return value


def path_factors(
    cfg: Optim, params, info, path: str = "config.optim"
) -> dict[str, Any]:
    """The learning-rate factor of each parameter; the last matching pattern wins.

    A factor is a float, or the points of a schedule. It is 0 for the base of adapters,
    whatever the patterns are: `also_train` of the adapters trains parts of the base.

    A pattern is a shell pattern against the whole path, or any part of it when it has
    no `*`: `router` matches every router, `segments/0/*` the first segment.

    Raises:
      ConfigError: if a pattern matches no parameter.
    """
    names = list(flat_paths(params))
    factors = {name: 0.0 if info[name].frozen else 1.0 for name in names}
    for pattern, factor in cfg.lr_factors:
        matched = matching(pattern, names)
        if not matched:
            parts = {part for name in names for part in name.split("/")}
            raise ConfigError(
                f"{path}.lr_factors: pattern {pattern!r} matches no parameter."
                f"{nearest(pattern, parts)} Parameters are named like {names[0]!r}."
            )
        trained = [name for name in matched if not info[name].frozen]
        factors.update(dict.fromkeys(trained, static_value(factor)))
    return factors


def _muon_dims(params, info):
    """The `MuonDimensionNumbers` of each matrix (from the right); None for others."""

    def dims(path, leaf):
        entry = info[path_name(path)]
        if entry.matrix is None:
            return None
        rank = len(entry.axes)
        reduction, output = (tuple(d - rank for d in ds) for ds in entry.matrix)
        return MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)

    return jax.tree_util.tree_map_with_path(dims, params)


def decays(name: str, info) -> bool:
    """Whether this parameter has weight decay: matrices do, stacked vectors do not."""
    is_vector = name.split("/")[-1].startswith(("bias", "scale", "gate", "v_", "sink"))
    return len(info[name].axes) >= 2 and not is_vector


def _scale(factor, factors):
    """Multiply the updates of the parameters that have this factor."""

    def mask(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: factors[path_name(path)] == factor, tree
        )

    if isinstance(factor, tuple):
        scale = optax.scale_by_schedule(lambda step: value_at(factor, step))
    else:
        scale = optax.scale(factor)
    return optax.masked(scale, mask)


def make_optimizer(cfg: Optim, steps: int, params, info, kernels=None):
    """Make one optax transformation for `params`.

    Args:
      cfg: `Optim`.
      steps: optimizer steps of the whole run.
      params: nested dict of arrays or `ShapeDtypeStruct`s.
      info: `{path: ParamInfo}` with logical axes and matrix dims of each parameter.
      kernels: name of the matmul implementation, or None to choose; for Muon.

    Returns:
      (optax.GradientTransformation, schedule of the learning rate by step).

    Raises:
      ConfigError: if a pattern of `lr_factors` matches nothing.
    """
    frac = schedule_frac(cfg, steps)
    rule_cfg: Any = cfg.rule
    factors = path_factors(cfg, params, info)
    if isinstance(cfg.rule, Muon):
        rule = muon(
            lambda step: cfg.lr * frac(step),
            lambda step: rule_cfg.adam_lr * frac(step),
            rule_cfg,
            cfg.weight_decay,
            lambda p: _muon_dims(p, info),
            kernels,
        )
    else:
        rule = optax.adamw(
            lambda step: cfg.lr * frac(step),
            b1=rule_cfg.b1,
            b2=rule_cfg.b2,
            eps=rule_cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=lambda p: jax.tree_util.tree_map_with_path(
                lambda path, _: decays(path_name(path), info), p
            ),
        )
    # Clipping keeps its place when it is off: a run can be resumed with another value.
    clip = optax.identity() if cfg.clip is None else optax.clip_by_global_norm(cfg.clip)
    chain = [clip, rule]
    chain += [_scale(f, factors) for f in sorted({*factors.values()} - {0, 1}, key=str)]
    tx = optax.chain(*chain)
    if any(map(is_always_zero, factors.values())):
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: (
                "freeze" if is_always_zero(factors[path_name(path)]) else "train"
            ),
            params,
        )
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
    if cfg.prune is not None:
        frozen = {path for path, factor in factors.items() if is_always_zero(factor)}
        where = "config.optim.prune"
        tx = prune_rows(tx, cfg.prune, steps, params, info, frozen, where)
    return tx, lambda step: cfg.lr * frac(step)
