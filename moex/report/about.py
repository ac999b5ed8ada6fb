"""Sections about a run: its summary, its samples, its config, where it ran."""

import dataclasses
import shlex
from typing import Any

from moex.config.base import Config, children, flat, short, to_dict
from moex.numbers import scaled
from moex.report.material import Material
from moex.report.page import Note, Section, Table, Verbatim
from moex.runs.score import held_out

NONE = dataclasses.MISSING  # the default of a field that has none
SAMPLES = 3  # texts of the newest step that are shown open


def summary(material: Material) -> list[str]:
    """Lines under the title."""
    cfg = material.cfg
    parts = [f"step {material.step:,} of {cfg.steps:,}"]
    scored = held_out(cfg.task, material.lines.get("eval", {}))
    parts.append(scored or "nothing was scored on held-out data")
    size = [
        f"{cfg.model.num_layers()} layers of width {cfg.model.dim}",
        f"seed {cfg.seed}",
        f"batches of {cfg.batch_size:,} x {cfg.seq_len:,} tokens",
    ]
    if material.cost is not None:
        count, active = material.cost.num_params, material.cost.num_active
        size.insert(0, f"{scaled(count)} parameters, {scaled(active)} active per token")
    return ["; ".join(parts) + ".", "; ".join(size) + "."]


def samples(material: Material) -> Section:
    """The section of texts that the run wrote, newest first."""
    lines = list(material.lines.get("sample", {}).items())[::-1]
    parts: list[Any] = []
    for i, (step, line) in enumerate(lines):
        texts = line["texts"]
        if i == 0:
            parts += [Note(f"Step {step:,}."), *(Verbatim(t) for t in texts[:SAMPLES])]
            parts += [Verbatim(t, "another") for t in texts[SAMPLES:]]
        elif i < 20:
            parts.append(Verbatim("\n────\n".join(texts), f"step {step:,}"))
    if not parts:
        parts = [Note("No data: the run has written no samples.")]
    return Section("Samples", parts)


def config(material: Material) -> Section:
    """The section of fields that differ from their defaults, then of all fields."""
    rows = [
        (path, _show(value), _show(default))
        for path, value, default in changes(material.cfg)
    ]
    everything = flat(to_dict(material.cfg))
    text = "\n".join(f"{path} = {_show(value)}" for path, value in everything.items())
    return Section(
        "Config",
        [
            Table(
                ("field", "value", "default"),
                rows,
                "Fields that have no default, or another value than it.",
                words=(0, 1, 2),
            ),
            Verbatim(text, f"all {len(everything)} fields"),
        ],
    )


def _show(value) -> str:
    if isinstance(value, str):
        return value
    if value is NONE:
        return "–"
    if isinstance(value, Config):
        return type(value).__name__
    return repr(value)


def changes(cfg) -> list[tuple[str, Any, Any]]:
    """`(path, value, default)` of fields unlike their defaults; run keys have none."""
    found: list[tuple[str, Any, Any]] = []

    def look(node, path):
        for name, value in children(node):
            inner = path + (name if name.startswith("[") else f".{name}")
            inner = inner.removeprefix(".")
            default = NONE
            if isinstance(node, Config):
                default = _default(node, name)
            if isinstance(value, Config):
                # A run key has no default: list its changed fields, not its kind.
                if path and not isinstance(default, type(value)):
                    found.append((inner, value, default))
                look(value, inner)
            elif children(value) and any(
                isinstance(v, Config) for _, v in children(value)
            ):
                look(value, inner)
            elif default is NONE or value != default:
                found.append((inner, value, default))

    look(cfg, "")
    return found


def _default(node: Config, name: str) -> Any:
    (field,) = [f for f in dataclasses.fields(node) if f.name == name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def environment(material: Material) -> Section:
    """The section on every start of the run: versions, devices, command."""
    starts = material.environment
    if not starts:
        text = "No data: the run has no environment.json, which training writes."
        return Section("Environment", [Note(text)])
    names = [name for name in starts[-1] if name not in ("packages", "command")]
    packages = list(
        dict.fromkeys(n for start in starts for n in start.get("packages", {}))
    )
    rows = [(name, *(_cell(s.get(name)) for s in starts)) for name in names]
    rows.append(("command", *(shlex.join(s.get("command", [])) for s in starts)))
    rows += [
        (name, *(s.get("packages", {}).get(name, "–") for s in starts))
        for name in packages
    ]
    head = ["", *(f"start {i}" for i in range(1, len(starts) + 1))]
    table = Table(head, rows, words=range(len(head)))
    return Section(
        "Environment", [table], "Versions, devices and command of each start."
    )


def _cell(value) -> str:
    return "–" if value is None else short(value) if children(value) else str(value)
