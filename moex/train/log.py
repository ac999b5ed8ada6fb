"""The log of a run: metrics.jsonl, routing.jsonl, TensorBoard and the terminal.

Only process 0 writes. A terminal shows a progress bar; one plain line per logged step
is printed everywhere.
"""

import contextlib
import math
import resource
import sys
import time
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

from moex.model.figures import layer_rows, routing_record
from moex.model.layers import shown
from moex.runs.directory import Place, RunDir
from moex.runs.lines import Lines, trim
from moex.terminal import printable
from moex.train.tensorboard import Board, check_events, event_folder, layout


def memory_bytes() -> int:
    """The peak memory of the first device, or of this process if no device tells it."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return host_bytes()


def host_bytes() -> int:
    """The peak memory of this process."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class RunLog:
    """Writes the figures of one run; on processes other than 0 it does nothing."""

    def __init__(self, place: Place, cfg, *, step, total_steps, num_domains=1):
        """Continue the logs of a run after `step`; later lines are dropped."""
        self.active = jax.process_index() == 0
        self.tb: Any = None
        self.board: Any = None
        self.bar: Any = None
        self.jsonl: Any = None
        self.routing: Any = None
        if not self.active:
            return
        self.run = run = RunDir.of(place)
        for log in (run.metrics, run.routing):
            damaged = trim(log, step)
            if damaged:
                print(
                    f"warning: {log}: {damaged} damaged lines were dropped; the file "
                    f"is kept as {log.name}.damaged"
                )
        self.jsonl = Lines(run.metrics)
        if cfg.log.tensorboard:
            # TensorBoard drops events that a killed session wrote from this step on.
            # The queue is long, so that the loop never waits for the disk.
            self.tb = SummaryWriter(
                event_folder(run.tensorboard),
                purge_step=step + 1,
                flush_secs=5,
                max_queue=1000,
            )
            self.tb.add_custom_scalars(layout(cfg, num_domains))
            self.board = Board(self.tb, cfg.log.detail)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True
            )

    def line(self, text: str) -> None:
        """Print one line for people."""
        if not self.active:
            return
        text = printable(text)  # a sample, for example, may hold control characters
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
        """Write a line of metrics.jsonl, and a scalar per value to TensorBoard."""
        if not self.active:
            return
        self.jsonl.write({"kind": kind, "step": step} | values)
        if self.board is not None:
            check_events(self.run.tensorboard)
            self.board.values(kind, step, values)

    def layers(self, kind: str, step: int, rows: dict, *, image: bool = False) -> None:
        """Write a line of routing.jsonl; for a training step TensorBoard series too."""
        if not self.active or not rows:
            return
        if self.routing is None:
            self.routing = Lines(self.run.routing)
        line = {"kind": kind, "step": step, "layers": routing_record(rows)}
        self.routing.write(line)
        if self.board is not None and kind == "train":
            self.board.layers(step, rows, image=image)

    def text(self, tag: str, step: int, text: str) -> None:
        """Write text to TensorBoard, which shows it verbatim."""
        if self.tb is not None:
            body = "\n".join("    " + line for line in text.splitlines())
            self.tb.add_text(tag, body, step)

    def hparams(self, values: dict, metrics: dict) -> None:
        """Write a row of TensorBoard's HPARAMS table, in this run's own folder."""
        if self.tb is None:
            return
        for summary in hparams(values, metrics):
            self.tb.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.tb.add_scalar(name, value)

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self.bar, self.tb, self.jsonl, self.routing):
            if part is not None:
                part.close()
        if self.tb is not None and sys.exception() is None:
            check_events(self.run.tensorboard)


def clock(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )


def step_line(
    step: int, total: int, values: dict, brief: str, step_seconds: float
) -> str:
    """Format everything about a step as one line; `brief` comes from the task."""
    parts = [
        f"step {step}/{total}",
        f"loss {values['loss']:.4f}",
        brief,
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
    """The expert load of each MoE layer as text: each expert's share of the slots."""
    lines = ["expert load on held-out data (share of slots, per MoE layer):"]
    for label, frac in layer_rows(model, layers, "load_frac_E"):
        shares = " ".join(f"{100 * f:4.1f}" for f in frac[:16])
        more = f" ... ({len(frac)} experts)" if len(frac) > 16 else ""
        lines.append(f"  layer {shown(label):>3} | {shares}{more} %")
    return "\n".join(lines)


class Stopwatch:
    """Measures the training steps alone: stop it around evaluation and saving."""

    PARTS = ("data", "dispatch", "wait")

    def __init__(self):
        self.total, self.mark = 0.0, time.perf_counter()
        self.last, self.parts = 0.0, dict.fromkeys(self.PARTS, 0.0)

    def stop(self) -> None:
        """Count the time since `start`."""
        self.total += time.perf_counter() - self.mark

    def start(self) -> None:
        """Go on counting."""
        self.mark = time.perf_counter()

    def read(self) -> float:
        """The seconds counted so far, those since `start` included."""
        return self.total + time.perf_counter() - self.mark

    @contextlib.contextmanager
    def part(self, name: str):
        """Count the time of the block as one of `PARTS`; the watch must be running."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap: "step", its parts, and "other", the rest."""
        now = self.read()
        parts, self.parts = self.parts, dict.fromkeys(self.PARTS, 0.0)
        step, self.last = now - self.last, now
        return {"step": step, **parts, "other": step - sum(parts.values())}
