"""Plans of conversions: which experts of a layer merge, stay, or share a device.

They are files that people read and edit, so every field is checked when a file is read,
and each layer is one line of the file. `docs/convert.md` describes the fields.

E experts of a layer
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Self

from moex.config.base import MOST, ConfigError, require, require_choice
from moex.data.files import atomic_write
from moex.json_files import check_names, dump_json, field, read_object
from moex.model.layers import layers as layers_of
from moex.runs.base import base_hash


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The part of a plan for one layer; a layer without one stays as it is."""

    layer: int  # number of the layer, from 0; dense layers count
    experts: int  # E, how many it has before

    def check(self, where: str) -> None:
        """Raise `ConfigError` unless the fields are right; `where` names the layer."""
        raise NotImplementedError

    def changes(self) -> bool:
        """Tell whether the layer will be another one."""
        raise NotImplementedError

    def experts_in(self, moe) -> int:
        """The number in the config of a layer that `experts` must be."""
        return moe.num_experts

    def check_ids(self, ids, where: str) -> None:
        """Raise `ConfigError` unless these are different experts of the layer."""
        seen: set[int] = set()
        for e in ids:
            require(0 <= e < self.experts, where, e, f"from 0 to {self.experts - 1}")
            if e in seen:
                raise ConfigError(f"{where}: expert {e} stands there twice.")
            seen.add(e)

    def check_numbers(self, values, where: str, least: float) -> None:
        """Raise `ConfigError` unless these are E finite numbers, at least `least`."""
        count = f"{self.experts} numbers, one for each expert"
        require(len(values) == self.experts, where, f"{len(values)} numbers", count)
        for value in values:
            allowed = (
                f"finite and at least {least:g}" if least > -math.inf else "finite"
            )
            require(math.isfinite(value) and value >= least, where, value, allowed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(LayerPlan):
    """Groups of experts, each of which becomes one."""

    groups: tuple[tuple[int, ...], ...]  # all experts, each in one group
    dominant: tuple[int, ...]  # one of each group: the others are aligned to it
    # The weight of each expert in the mean of its group, at least 0; a group whose
    # weights are all 0 gets the plain mean.
    weights: tuple[float, ...]

    def check(self, where):
        every = [e for group in self.groups for e in group]
        self.check_ids(every, f"{where}: groups")
        missing = sorted(set(range(self.experts)) - set(every))
        if missing:
            raise ConfigError(f"{where}: groups: expert {missing[0]} is in none.")
        for g, group in enumerate(self.groups):
            require(len(group) > 0, f"{where}: groups[{g}]", list(group), "not empty")
        count = f"{len(self.groups)} experts, one of each group"
        told = f"{where}: dominant"
        require(len(self.dominant) == len(self.groups), told, self.dominant, count)
        for group, expert in zip(self.groups, self.dominant, strict=True):
            require(expert in group, told, expert, f"in its group, {list(group)}")
        self.check_numbers(self.weights, f"{where}: weights", 0.0)

    def changes(self):
        return len(self.groups) < self.experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep(LayerPlan):
    """The experts that stay; the others are removed."""

    keep: tuple[int, ...]  # at least one
    scores: tuple[float, ...] | None = None  # why: the score of each expert, for people

    def check(self, where):
        require(len(self.keep) > 0, f"{where}: keep", list(self.keep), "not empty")
        self.check_ids(self.keep, f"{where}: keep")
        if self.scores is not None:
            self.check_numbers(self.scores, f"{where}: scores", -math.inf)

    def changes(self):
        return len(self.keep) < self.experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place(LayerPlan):
    """The experts of each device, or their sets of weights where experts share them."""

    devices: tuple[tuple[int, ...], ...]  # all experts, equally many on each device

    def experts_in(self, moe):
        return moe.num_stored()

    def check(self, where):
        every = self.order()
        self.check_ids(every, f"{where}: devices")
        missing = sorted(set(range(self.experts)) - set(every))
        if missing:
            raise ConfigError(f"{where}: devices: expert {missing[0]} is on none.")
        for p, own in enumerate(self.devices):
            count = f"{self.experts // len(self.devices)} experts, as on the others"
            same = len(own) == len(self.devices[0])
            require(same, f"{where}: devices[{p}]", list(own), count)

    def changes(self):
        return self.order() != list(range(self.experts))

    def order(self) -> list[int]:
        """The experts in the order in which they stand in the placed model."""
        return [e for own in self.devices for e in own]


KINDS: dict[str, type[LayerPlan]] = {"merge": Merge, "keep": Keep, "place": Place}
_FIELDS: dict[str, dict[str, Any]] = {
    "merge": {"groups": list[list[int]], "dominant": list[int], "weights": list[float]},
    "keep": {"keep": list[int], "scores": list[float] | None},
    "place": {"devices": list[list[int]]},
}
# Fields that a file may lack: {name: value for a layer of E experts}.
_DEFAULTS = {"weights": lambda count: [1.0] * count, "scores": lambda count: None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan: for some layers of a run, where its experts go."""

    VERSION: ClassVar[int] = 1

    kind: str  # one of `KINDS`
    run: str  # the run that it was made for, and the step; for people
    step: int
    # `base_hash` of its model: a plan fits any run with these parameters. "": it is not
    # known, as a placement may be made from a trace alone.
    base: str
    layers: tuple[LayerPlan, ...]  # in the order of their numbers, all of the kind
    # How it was made and how to apply it; the keys belong to the kind of conversion.
    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Names it in errors: the file that it was read from.
    where: str = dataclasses.field(default="the plan", compare=False)

    def by_layer(self) -> dict[int, Any]:
        """The part of each layer, by its number."""
        return {own.layer: own for own in self.layers}

    def check(self, model) -> None:
        """Check that it is for a `Model` config.

        Raises:
          ConfigError: naming the file and the layer.
        """
        where = self.where
        found = dict(enumerate(site.sparse for site, _ in layers_of(model)))
        for own in self.layers:
            told = f"{where}, layer {own.layer}"
            if own.layer not in found:
                raise ConfigError(f"{told}: the model has {len(found)} layers, from 0.")
            sparse = found[own.layer]
            if sparse is None:
                raise ConfigError(f"{told}: is dense; it has no experts.")
            count = own.experts_in(sparse.moe)
            allowed = f"{count}, as in the model"
            require(own.experts == count, f"{told}: experts", own.experts, allowed)
        known = self.kind != "place" or self.base
        if known and self.base != base_hash(model):
            raise ConfigError(
                f"{where}: the plan is for another model ({self.run}): names or shapes "
                "of parameters differ."
            )

    def save(self, file) -> None:
        """Write it as JSON, with each layer on a line of its own."""
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del head["layers"], head["where"]
        head = {"version": self.VERSION, **head}
        lines = [f" {json.dumps(k)}: {dump_json(v)}," for k, v in head.items()]
        layers = [f"  {dump_json(dataclasses.asdict(own))}" for own in self.layers]
        text = "\n".join(["{", *lines, ' "layers": [', ",\n".join(layers), " ]", "}"])
        atomic_write(Path(file), text + "\n")

    @classmethod
    def read(cls, file, kind: str) -> Self:
        """Read a plan of one kind from a file.

        Raises:
          ConfigError: naming the file, the layer, and the value that is wrong.
        """
        where, data = str(file), read_object(file)
        known = [f.name for f in dataclasses.fields(cls) if f.name != "where"]
        check_names(data, ("version", *known), where)
        version = field(data, "version", int, where, cls.VERSION)
        require(version == cls.VERSION, f"{where}: version", version, str(cls.VERSION))
        own = field(data, "kind", str, where)
        require_choice(f"{where}: kind", own, KINDS)
        require(own == kind, f"{where}: kind", own, f"{kind!r} for this conversion")
        plans, seen = [], set()
        for row in field(data, "layers", list[dict], where):
            plan = layer_plan(row, kind, where)
            if plan.layer in seen:
                raise ConfigError(f"{where}: layer {plan.layer} stands there twice.")
            seen.add(plan.layer)
            plans.append(plan)
        require(len(plans) > 0, f"{where}: layers", plans, "not empty")
        return cls(
            kind=kind,
            run=field(data, "run", str, where),
            step=field(data, "step", int, where),
            base=field(data, "base", str, where),
            layers=tuple(sorted(plans, key=lambda plan: plan.layer)),
            how=field(data, "how", dict, where, {}),
            where=where,
        )


def layer_plan(row: dict[str, Any], kind: str, where: str) -> LayerPlan:
    """Read the part of one layer."""
    number = field(row, "layer", int, where)
    told = f"{where}, layer {number}"
    experts, most = field(row, "experts", int, told), MOST["num_experts"]
    require(1 <= experts <= most, f"{told}: experts", experts, f"from 1 to {most:,}")
    values = {}
    for name, form in _FIELDS[kind].items():
        if name not in row and name in _DEFAULTS:
            value = _DEFAULTS[name](experts)
        else:
            value = field(row, name, form, told)
        values[name] = _tuples(value)
    check_names(row, ("layer", "experts", *values), told)
    plan = KINDS[kind](layer=number, experts=experts, **values)
    plan.check(told)
    return plan


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
