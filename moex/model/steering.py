"""Steering files: JSON that people read and edit, and the arrays that a model takes.

A file names experts of some layers; `moex/moe/steering.py` says what becomes of them:

  {"kind": "steering", "layers": [
    {"layer": 2, "experts": 16, "scale": {"10": 4.0}, "force": [3], "ban": [0, 5]}]}

All fields of a layer but its number may be left out; `experts` is checked against the
model. All rounds of a chain are steered alike. A plan of kept experts ("kind": "keep")
is read too: it bans the others.

E experts (zero-computation ones included)
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from moex.config.base import MOST as LIMITS
from moex.config.base import ConfigError, require
from moex.data.files import atomic_write
from moex.json_files import check_names, dump_json, field, read_object
from moex.model.layers import Site, layers

STEERING, KEEP = "steering", "keep"  # kinds of files
FIELDS = {
    STEERING: ("layer", "experts", "scale", "force", "ban"),
    KEEP: ("layer", "experts", "keep", "scores"),
}
TOP = {
    STEERING: ("kind", "how", "layers"),
    KEEP: ("version", "kind", "run", "step", "base", "how", "layers"),
}
MOST = float(np.finfo(np.float32).max)  # gates are float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSteering:
    """How the experts of one layer are steered."""

    layer: int  # number of the layer from 0; dense ones count
    experts: int | None = None  # E, to be checked; None: any
    # Factors of the gates of experts, >= 0; the others keep theirs.
    scale: dict[int, float] = dataclasses.field(default_factory=dict)
    force: tuple[int, ...] = ()  # experts that every token gets
    ban: tuple[int, ...] = ()  # experts that no token gets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """How the experts of a model are steered."""

    layers: tuple[LayerSteering, ...]
    how: dict[str, Any] = dataclasses.field(default_factory=dict)  # for people
    where: str = "steering"  # names it in errors
    base: str | None = None  # of a plan of kept experts: `Plan.base`

    def save(self, path) -> None:
        """Write the file that `read` reads; one line for each layer."""
        rows = []
        for own in self.layers:
            row: dict[str, Any] = {"layer": own.layer, "experts": own.experts}
            row |= {"scale": {str(e): v for e, v in own.scale.items()}}
            row |= {"force": own.force, "ban": own.ban}
            row = {k: v for k, v in row.items() if v not in (None, {}, ())}
            rows.append(dump_json(row))
        head = f'{{"kind": "{STEERING}", "how": {dump_json(self.how)}, "layers": [\n  '
        atomic_write(pathlib.Path(path), head + ",\n  ".join(rows) + "\n]}\n")

    @classmethod
    def read(cls, path) -> "Steering":
        """Read a steering file, or a plan of kept experts.

        Raises:
          ConfigError: if it is neither, or a number in it is out of range.
        """
        data, where = read_object(path), str(path)
        kind = field(data, "kind", str, where)
        both = f"{STEERING!r}, or {KEEP!r} for a plan of kept experts"
        require(kind in FIELDS, f"{where}: kind", kind, both)
        check_names(data, TOP[kind], where)
        rows = field(data, "layers", list[dict[str, Any]], where)
        require(len(rows) > 0, f"{where}: layers", rows, "not empty")
        found = []
        for i, row in enumerate(rows):
            at = f"{where}: layers[{i}]"
            check_names(row, FIELDS[kind], at)
            found.append(_steered(row, at) if kind == STEERING else _kept(row, at))
        numbers = [own.layer for own in found]
        for number in numbers:
            once = numbers.count(number) == 1
            require(once, f"{where}: layer", number, "named once")
        how = field(data, "how", dict[str, Any], where, {})
        base = field(data, "base", str, where) if kind == KEEP else None
        return cls(layers=tuple(found), how=how, where=where, base=base)

    def of_kept(self, model, keep: Mapping[int, Sequence[int]], told: str) -> Self:
        """The same steering for a model that has only some of its experts.

        Args:
          model: the `Model` config with all experts.
          keep: the experts that are left of layers, by number; others have all.
          told: what they were kept for, in errors.

        Raises:
          ConfigError: if this is not for `model`, forces an expert that is not left, or
            bans all that are.
        """
        self.arrays(model)  # checks it
        moes = {n: s.sparse for s, _ in layers(model) if s.sparse for n in s.numbers}
        found = []
        for own in self.layers:
            E, where = (
                moes[own.layer].moe.num_experts,
                f"{self.where}: layer {own.layer}",
            )
            left = [
                *sorted(keep.get(own.layer, range(E))),
                *range(E, moes[own.layer].moe.num_choices()),
            ]
            new = {e: i for i, e in enumerate(left)}
            for e in own.force:
                allowed = f"an expert that {told} keeps: {left}"
                require(e in new, f"{where}: force", e, allowed)
            ban = tuple(new[e] for e in own.ban if e in new)
            allowed = f"fewer than all experts that {told} keeps: {left}"
            require(len(ban) < len(new), f"{where}: ban", list(own.ban), allowed)
            scale = {new[e]: v for e, v in own.scale.items() if e in new}
            force = tuple(new[e] for e in own.force)
            found.append(
                dataclasses.replace(
                    own, scale=scale, force=force, ban=ban, experts=None
                )
            )
        return dataclasses.replace(self, layers=tuple(found), base=None)

    def arrays(self, model) -> dict:
        """The arrays of `Context.steer` for a `Model` config.

        All files that only scale need one program, and all others another.

        Raises:
          ConfigError: if the file is not for this model.
        """
        own = {one.layer: one for one in self.layers}
        chooses = any(one.force or one.ban for one in self.layers)
        tree: dict[str, Any] = {}
        for site, copy in layers(model):
            if site.sparse is None:
                continue
            leaf = tree
            for name in site.sparse.path.split("/"):
                leaf = leaf.setdefault(name, {})
            if not leaf:
                shape = (site.repeat, site.sparse.moe.num_choices())
                leaf["scale_E"] = np.ones(shape, np.float32)
                if chooses:
                    leaf["force_E"], leaf["ban_E"] = np.zeros((2, *shape), bool)
            one = own.pop(site.numbers[copy], None)
            if one is not None:
                _check(one, site, f"{self.where}: layer {one.layer}")
                leaf["scale_E"][copy, list(one.scale)] = list(one.scale.values())
                if chooses:
                    leaf["force_E"][copy, list(one.force)] = True
                    leaf["ban_E"][copy, list(one.ban)] = True
        for number in own:
            routed = [n for s, r in layers(model) if s.sparse for n in [s.numbers[r]]]
            raise ConfigError(
                f"{self.where}: layer {number}: has no experts in this model; layers "
                f"with experts: {', '.join(map(str, routed)) or 'none'}."
            )
        return tree


def _number(row: dict[str, Any], where: str) -> int:
    number = field(row, "layer", int, where)
    require(number >= 0, f"{where}: layer", number, "0 or more")
    return number


def _ids(row: dict[str, Any], name: str, where: str, default: Any = ()) -> tuple:
    ids = field(row, name, list[int], where, *([] if default is None else [[]]))
    once = len(set(ids)) == len(ids) and all(e >= 0 for e in ids)
    require(once, f"{where}: {name}", ids, "numbers of experts, each once")
    return tuple(ids)


def _steered(row: dict[str, Any], where: str) -> LayerSteering:
    scale = {}
    for text, value in field(row, "scale", dict[str, float], where, {}).items():
        decimal = text.isascii() and text.isdecimal() and str(int(text)) == text
        allowed = "by the numbers of experts, such as '3'"
        require(decimal, f"{where}: scale", text, allowed)
        ok = math.isfinite(value) and 0 <= value <= MOST
        require(ok, f"{where}: scale[{text}]", value, f"in [0, {MOST:.1e}]")
        scale[int(text)] = float(value)
    return LayerSteering(
        layer=_number(row, where),
        experts=field(row, "experts", int | None, where, None),
        scale=scale,
        force=_ids(row, "force", where),
        ban=_ids(row, "ban", where),
    )


def _kept(row: dict[str, Any], where: str) -> LayerSteering:
    experts, most = field(row, "experts", int, where), LIMITS["num_experts"]
    ok = 1 <= experts <= most
    require(ok, f"{where}: experts", experts, f"in 1 to {most:,}")
    keep = _ids(row, "keep", where, None)
    inside = len(keep) > 0 and max(keep) < experts
    require(inside, f"{where}: keep", keep, f"some of the experts 0 to {experts - 1}")
    ban = tuple(e for e in range(experts) if e not in keep)
    return LayerSteering(layer=_number(row, where), experts=experts, ban=ban)


def _check(own: LayerSteering, site: Site, where: str) -> None:
    """Check what depends on the layer that is steered."""
    sparse = site.sparse
    assert sparse is not None
    E = sparse.moe.num_choices()
    same = own.experts in (None, E, sparse.moe.num_experts)
    require(same, f"{where}: experts", own.experts, f"{E}, those of this model")
    for name, ids in (("scale", own.scale), ("force", own.force), ("ban", own.ban)):
        for e in ids:
            require(e < E, f"{where}: {name}", e, f"an expert from 0 to {E - 1}")
    both = sorted(set(own.force) & set(own.ban))
    require(not both, f"{where}: force", both, "other experts than those of ban")
    left = len(own.ban) < E
    require(left, f"{where}: ban", list(own.ban), "fewer than all experts")
    for router in sparse.routers:
        kind = type(router).__name__
        bans = router.takes_bans or not own.ban
        require(bans, f"{where}: ban", list(own.ban), f"empty: {kind} takes no bans")
        forces = router.takes_forces or not own.force
        require(forces, f"{where}: force", list(own.force), f"empty: {kind} takes none")
        most = router.slots(E)
        told = f"at most {most} experts, the slots of a token"
        require(len(own.force) <= most, f"{where}: force", list(own.force), told)
