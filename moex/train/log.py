"""What a run says: metrics.jsonl (the source of truth), TensorBoard, the terminal.

Only process 0 writes. The terminal gets a progress bar where there is one, and one
plain line per logging step everywhere.
"""

import json
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

LAYER_SERIES = ("max_violation", "entropy", "dead_frac", "experts_per_token")
LAYOUT = {
    "MoE": {
        "max violation (0 is balanced)": ["Multiline", ["moe/max_violation/.*"]],
        "router entropy, nats": ["Multiline", ["moe/entropy/.*"]],
        "dead experts, share": ["Multiline", ["moe/dead_frac/.*"]],
        "experts per token": ["Multiline", ["moe/experts_per_token/.*"]],
        "zero-computation slots, share": ["Multiline", ["moe/zero_frac.*"]],
        "dropped slots, share": ["Multiline", ["moe/dropped_frac.*"]],
        "slots lost on their way, share": ["Multiline", ["moe/lost_frac.*"]],
    },
    "training": {
        "loss, nats per token": ["Multiline", ["train/nll", "eval/nll"]],
        "weighted losses": ["Multiline", ["loss/.*"]],
        "bits per byte": ["Multiline", ["train/bits_per_byte", "eval/bits_per_byte"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "tokens per second": ["Multiline", ["perf/tokens_per_s"]],
    },
}


def memory_bytes() -> int:
    """Peak bytes in use: of the first device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def layer_rows(model, layers: dict, name: str) -> list[tuple[str, np.ndarray]]:
    """`(label, value)` of one figure of every MoE layer, in order.

    The label is the absolute layer number, such as "003"; the rounds of a chain are
    layers of their own, "003.1", "003.2" and so on.

    Args:
      model: `LM` config, whose segments give the numbers.
      layers: metrics by module path, each stacked [repeat, ...] or [repeat, C, ...].
      name: key of the figure.
    """
    rows, start = [], 0
    for s, segment in enumerate(model.layers):
        for path, values in layers.items():
            parts = path.split("/")
            if parts[:2] != ["segments", str(s)]:
                continue
            chained = np.ndim(values.get("experts_per_token", 0.0)) == 2
            for r, value in enumerate(np.asarray(values[name])):
                number = start + r * len(segment.pattern) + int(parts[3])
                if chained:
                    rows += [(f"{number:03d}.{c}", v) for c, v in enumerate(value, 1)]
                else:
                    rows.append((f"{number:03d}", value))
        start += segment.repeat * len(segment.pattern)
    return sorted(rows, key=lambda row: [int(part) for part in row[0].split(".")])


def shown(label: str) -> str:
    """A label for people: "3", or "3.1" for the first round of a chain."""
    number, dot, chain_round = label.partition(".")
    return f"{int(number)}{dot}{chain_round}"


def moe_summary(model, layers: dict) -> dict[str, float]:
    """Figures of all MoE layers as one dict of plain floats: means, and the worst."""
    if not layers:
        return {}
    out = {}
    names = [n for n in next(iter(layers.values())) if n != "load_frac_E"]
    for name in names:
        values = [float(v) for _, v in layer_rows(model, layers, name)]
        out[name] = sum(values) / len(values)
        if name == "max_violation":
            out["max_violation_worst"] = max(values)
    return out


class RunLog:
    """Writes one run's figures; a no-op on processes other than 0."""

    def __init__(self, workdir, cfg, *, step, total_steps):
        """Continue the logs of `workdir` after `step`; later lines are dropped."""
        self.active = jax.process_index() == 0
        self.cfg = cfg
        self.tb: Any = None
        self.bar: Any = None
        self.jsonl: Any = None
        if not self.active:
            return
        workdir = pathlib.Path(workdir)
        path = workdir / "metrics.jsonl"
        _trim(path, step)
        self.jsonl = path.open("a", buffering=1)
        if cfg.log.tensorboard:
            # TensorBoard forgets what a killed session wrote from this step on.
            self.tb = SummaryWriter(
                str(workdir / "tb"), purge_step=step + 1, flush_secs=5
            )
            self.tb.add_custom_scalars(LAYOUT)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True
            )

    def line(self, text: str) -> None:
        """One line for people."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def advance(self, loss=None) -> None:
        """Move the progress bar by one step."""
        if self.bar is not None:
            if loss is not None:
                self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update()

    def record(self, kind: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl and one scalar per value in TensorBoard."""
        if not self.active:
            return
        self.jsonl.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        if self.tb is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.tb.add_scalar(_tag(kind, name), value, step)

    def layers(self, step: int, layers: dict, *, image: bool) -> None:
        """Per-layer series (four per layer, however many experts) and the heat map."""
        if self.tb is None or not layers:
            return
        for name in LAYER_SERIES:
            for label, value in layer_rows(self.cfg.model, layers, name):
                self.tb.add_scalar(f"moe/{name}/layer_{label}", value, step)
        if image:
            rows = layer_rows(self.cfg.model, layers, "load_frac_E")
            self.tb.add_figure("moe/expert_load", load_figure(rows, step), step)

    def text(self, tag: str, step: int, text: str) -> None:
        """Text for TensorBoard; shown verbatim."""
        if self.tb is not None:
            body = "\n".join("    " + line for line in text.splitlines())
            self.tb.add_text(tag, body, step)

    def hparams(self, values: dict, metrics: dict) -> None:
        """One row of TensorBoard's HPARAMS table, in this run's own folder."""
        if self.tb is None:
            return
        for summary in hparams(values, metrics):
            self.tb.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.tb.add_scalar(name, value)

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self.bar, self.tb, self.jsonl):
            if part is not None:
                part.close()


def _tag(kind, name):
    if name.startswith(("perf/", "moe/", "loss/")):
        return name
    return f"{kind}/{name}"


def _trim(path: pathlib.Path, step: int) -> None:
    """Drop lines after `step` and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def load_figure(rows, step: int):
    """Heat map layers x experts of load over its mean; 1 is balanced.

    Layers with fewer experts are padded with blanks.
    """
    from matplotlib.figure import Figure

    width = max(len(value) for _, value in rows)
    grid = np.full((len(rows), width), np.nan)
    for i, (_, value) in enumerate(rows):
        grid[i, : len(value)] = np.asarray(value) * len(value)
    figure = Figure(figsize=(6, 1.2 + 0.25 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    axes.set(xlabel="expert", ylabel="layer", title=f"load / mean, step {step}")
    axes.set_yticks(range(len(rows)), [shown(label) for label, _ in rows])
    figure.colorbar(image)
    return figure


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )


def step_line(step: int, total: int, values: dict, step_seconds: float) -> str:
    """One line that says everything about a step."""
    parts = [
        f"step {step}/{total}",
        f"loss {values['loss']:.4f}",
        f"bpb {values['bits_per_byte']:.3f}",
        f"grad {values['grad_norm']:.3g}",
        f"lr {values['lr']:.2e}",
        f"{values['perf/tokens_per_s']:,.0f} tok/s",
        f"mem {values['perf/memory_gib']:.2f} GiB",
    ]
    if "perf/mfu" in values:
        parts.append(f"mfu {100 * values['perf/mfu']:.1f}%")
    if "moe/max_violation" in values:
        parts.append(f"imbalance {values['moe/max_violation']:.2f}")
    if values.get("moe/experts_per_token_std", 0) > 0:
        parts.append(f"experts {values['moe/experts_per_token']:.2f}")
    if values.get("moe/dropped_frac", 0) > 0:
        parts.append(f"dropped {100 * values['moe/dropped_frac']:.1f}%")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    parts.append(f"eta {clock((total - step) * step_seconds)}")
    return " | ".join(parts)


def load_lines(model, layers: dict) -> str:
    """Expert load of each MoE layer as text: share of its slots per expert."""
    lines = ["expert load on held-out data (share of slots, per MoE layer):"]
    for label, frac in layer_rows(model, layers, "load_frac_E"):
        shares = " ".join(f"{100 * f:4.1f}" for f in frac[:16])
        more = f" ... ({len(frac)} experts)" if len(frac) > 16 else ""
        lines.append(f"  layer {shown(label):>3} | {shares}{more} %")
    return "\n".join(lines)


class Stopwatch:
    """Wall time of the training steps alone: stop it around evaluation and saving."""

    def __init__(self):
        self.total, self.mark, self.data = 0.0, time.perf_counter(), 0.0

    def stop(self) -> None:
        """Count the time since `start`."""
        self.total += time.perf_counter() - self.mark

    def start(self) -> None:
        """Go on counting."""
        self.mark = time.perf_counter()

    def read(self) -> float:
        """Seconds counted so far, the current stretch included."""
        return self.total + time.perf_counter() - self.mark
