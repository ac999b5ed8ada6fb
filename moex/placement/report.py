"""Reports of placements: crossings before and after, and where there is no affinity."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from moex.config.base import ConfigError
from moex.convert.plans import Plan
from moex.json_files import field
from moex.placement import affinity as counts
from moex.placement import eplb
from moex.placement.affinity import Affinity
from moex.placement.plan import placement_of
from moex.placement.solve import Crossings, How, Placement, contiguous, place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The counts that a placement is made of and scored by."""

    file: str
    own: Affinity
    other: Affinity | None  # held out; None: nothing is
    every: int = 0  # as in `affinity.of_trace`
    stored: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(
        cls, file, *, objective: str, every: int, held_out=None, facts=None
    ) -> "Text":
        """Read a trace or sums, and what is held out.

        Args:
          file: a trace, or sums (.npz).
          objective: as in `affinity.read`.
          every: every so many examples one is held out; 0, or another file: none.
          held_out: another file; None: examples of this one.
          facts: `Facts` of the run, or None.

        Raises:
          ConfigError: if a file cannot be read, or they are of different models.
        """
        every = 0 if held_out is not None or str(file).endswith(".npz") else every
        own, other = counts.read(file, objective=objective, every=every)
        if held_out is not None:
            other, _ = counts.read(held_out, objective=objective)
            if not own.same_layers(other):
                raise ConfigError(
                    f"--held-out: {held_out} is of another model: layers or experts "
                    "differ."
                )
        if facts is not None:
            own = facts.tell(own, file)
            other = None if other is None else facts.tell(other, held_out or file)
        own.check(file)
        stored = {} if facts is None else facts.stored
        return cls(file=str(file), own=own, other=other, every=every, stored=stored)


def report(text: Text, how: How, *, null: bool = True) -> tuple[dict, Placement]:
    """The figures of a new placement, as plain data, and the placement."""
    placed = place(text.own, how)
    rows = {
        "contiguous": _row(contiguous(placed.layers, how.devices, how.nodes), text),
        "placed": _row(placed, text),
    }
    if null:
        shuffled = text.own.shuffled(how.seed)
        rows["null"] = _both(place(shuffled, how).crossings(shuffled), None)
    found = _facts(text, placed) | {"crossings": rows}
    found |= {"gap": placed.gap, "notes": list(placed.notes)}
    return found, placed


def drift(text: Text, plan: Plan, how: How) -> dict:
    """The figures of a plan that was made of another text or checkpoint.

    Args:
      how: for a placement that is made anew, to compare; its devices are the plan's.
    """
    old = placement_of(plan, text.own)
    how = dataclasses.replace(how, devices=old.devices, nodes=old.nodes)
    anew = place(text.own, how)
    rows = {
        "contiguous": _row(contiguous(old.layers, old.devices, old.nodes), text),
        "plan": _row(old, text),
        "anew": _row(anew, text),
    }
    if (then := _crossings_in(plan)) is not None:
        rows["then"] = then
    made = {"run": plan.run, "step": plan.step}
    return _facts(text, old) | {"crossings": rows, "plan": made}


def _crossings_in(plan: Plan) -> dict[str, float | None] | None:
    """The crossings that a plan file tells of itself, or None."""
    where = f"{plan.where}: how"
    rows = field(plan.how, "crossings", dict, where, {})
    row = field(rows, "placed", dict, f"{where}.crossings", {})
    where = f"{where}.crossings.placed"
    names = ("between", "within", "all", "other")
    found = {name: field(row, name, float | None, where, None) for name in names}
    return None if found["all"] is None else found


def replicas(text: Text, how: How, count: int) -> list[dict[str, Any]]:
    """The replicas of each layer by load, as plain data."""
    found = []
    for layer, load_E in zip(text.own.layers, text.own.load, strict=True):
        size = next((b for b in layer.blocks), layer.experts)
        sizes = (count, how.devices, how.nodes, layer.experts // size)
        made = eplb.replicate(load_E, *sizes)
        before_P = load_E.reshape(how.devices, -1).sum(axis=1)
        found.append(
            {
                "layer": layer.number,
                "replicas": made.expert_X.reshape(how.devices, -1).tolist(),
                "imbalance": {
                    "contiguous": float(before_P.max() / max(before_P.mean(), 1e-300)),
                    "replicated": made.imbalance,
                },
            }
        )
    return found


def check_replicas(text: Text, how: How, count: int) -> None:
    """Raise `ConfigError` if layers cannot have so many replicas."""
    for layer in text.own.layers:
        eplb.check(layer.experts, count, how.devices, how.nodes, 1)


def _row(placement: Placement, text: Text) -> dict[str, float | None]:
    other = None if text.other is None else placement.crossings(text.other)
    return _both(placement.crossings(text.own), other)


def _both(own: Crossings, other: Crossings | None) -> dict[str, float | None]:
    row: dict[str, float | None] = {"between": own.between, "within": own.within}
    return row | {"all": own.all, "other": None if other is None else other.all}


def _facts(text: Text, placed: Placement) -> dict[str, Any]:
    own, other = text.own, text.other
    before = contiguous(placed.layers, placed.devices, placed.nodes)
    found: dict[str, Any] = {
        "trace": text.file,
        "run": own.run,
        "step": own.step,
        "by": own.objective,
        "layers": len(own.layers),
        "experts": sorted({layer.experts for layer in own.layers}),
        "devices": placed.devices,
        "nodes": placed.nodes,
        "tokens": own.tokens,
        "held_out": None if other is None else other.tokens,
        "imbalance": {
            "contiguous": before.imbalance(own),
            "placed": placed.imbalance(own),
        },
    }
    if not text.file.endswith(".npz"):
        found["devices_per_token"] = {
            name: _devices(text, one)
            for name, one in (("contiguous", before), ("placed", placed))
        }
    return found


def _devices(text: Text, placed: Placement) -> list[float]:
    """The devices of a token, in the text and in what is held out of it."""
    device = {}
    for layer, device_E in zip(placed.layers, placed.device, strict=True):
        stored_E = text.stored.get(layer.number)
        device[layer.number] = device_E if stored_E is None else device_E[stored_E]
    found = counts.devices_per_token(text.file, device, text.every)
    return [x for x in found if not np.isnan(x)]


NAMES = {
    "contiguous": "as it is, neighbours together",
    "placed": "placed",
    "null": "placed without affinity (shuffled)",
    "plan": "the plan, here",
    "then": "the plan, when it was made",
    "anew": "placed anew",
}


def lines(found: dict) -> list[str]:
    """The figures for a terminal."""
    sizes = " or ".join(map(str, found["experts"]))
    nodes = f" in {found['nodes']} nodes" if found["nodes"] > 1 else ""
    held = "none" if found["held_out"] is None else f"{found['held_out']:,}"
    made = [
        f"{found['run']} at step {found['step']:,}: {found['layers']} MoE layers of "
        f"{sizes} experts on {found['devices']} devices{nodes}; {found['tokens']:,} "
        f"tokens, {held} held out"
    ]
    about = {
        "transitions": "tokens that change devices from one MoE layer to the next",
        "coactivation": "pairs of a token's experts of a layer on two devices",
    }
    heads = ("between nodes", "in a node", "all", "held out")
    made.append(f"{about[found['by']]}, share of all:")
    made.append(" " * 36 + "".join(f"{head:>15}" for head in heads))
    for name, row in found["crossings"].items():
        shown = dict(row) if found["nodes"] > 1 else row | {"between": None}
        cells = (shown[k] for k in ("between", "within", "all", "other"))
        told = "".join(f"{'' if v is None else f'{v:.4f}':>15}" for v in cells)
        made.append(f"{NAMES[name]:<36}{told}".rstrip())
    made += _figures(found)
    return made + list(found.get("notes", ()))


def _figures(found: dict) -> list[str]:
    """The lines below the table."""
    made = []
    old, new = (found["imbalance"][k] for k in ("contiguous", "placed"))
    made.append(
        f"load of the fullest device over the mean of its layer: {old:.3f} as it is, "
        f"{new:.3f} placed"
    )
    if (both := found.get("devices_per_token")) is not None:
        (old, *_), (new, *held) = both["contiguous"], both["placed"]
        other = f" ({held[0]:.3f} held out)" if held else ""
        made.append(
            f"devices that a token's experts of a layer are on: {old:.3f} as it is, "
            f"{new:.3f} placed{other}"
        )
    if found.get("gap") is not None:
        gap = found["gap"]
        proven = "no placement crosses less" if gap < 1e-9 else "of the crossings"
        made.append(f"gap to what may be possible: {gap:.4f}, {proven}")
    return made


def replica_lines(rows: list[dict]) -> list[str]:
    """The replicas for a terminal: experts of each device, in every layer."""
    made = []
    for row in rows:
        own = " | ".join(" ".join(map(str, device)) for device in row["replicas"])
        before, after = row["imbalance"]["contiguous"], row["imbalance"]["replicated"]
        made.append(
            f"layer {row['layer']}: fullest device {before:.3f} -> {after:.3f} times "
            f"the mean; experts of the devices: {own}"
        )
    copies = sum(len(list(itertools.chain(*row["replicas"]))) for row in rows)
    return [f"{copies:,} replicas in all, by load alone (EPLB):", *made]
