"""The log of a run: metrics.jsonl and its like, TensorBoard and the terminal.

Only process 0 writes. A terminal shows how far the training is; a plain line per
logged step is printed everywhere.
"""

import contextlib
import sys
from typing import Any

import jax
from tensorboardX import SummaryWriter

from moex.adapters.figures import gate_record
from moex.model.figures import routing_record
from moex.progress import phase
from moex.runs.directory import Place, RunDir
from moex.runs.lines import Lines, trim
from moex.terminal import printable
from moex.train.charts import layout
from moex.train.tensorboard import Board, check_events, event_folder


class RunLog:
    """Writes the figures of one run; on processes other than 0 it does nothing."""

    def __init__(self, place: Place, cfg, *, step, total_steps, num_domains=1):
        """Continue the logs of a run after `step`; later lines are dropped."""
        self.active, self.total = jax.process_index() == 0, total_steps
        self.shown = contextlib.ExitStack()
        self.tb: Any = None
        self.board: Any = None
        self.bar: Any = None
        self.jsonl: Any = None
        self.routing: Any = None
        self.adapters: Any = None
        if not self.active:
            return
        self.run = run = RunDir.of(place)
        for log in (run.metrics, run.routing, run.adapters):
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
            self.board = Board(self.tb, cfg)
            self.board.fields(run.name, cfg)

    def line(self, text: str) -> None:
        """Print one line for people."""
        if self.active:  # a sample, for example, may hold control characters
            print(printable(text), flush=True)

    def begin(self, step: int) -> None:
        """Show from now on how far the training is, after this step."""
        steps = phase("training", self.total, "steps", initial=step, plain=False)
        self.bar = self.shown.enter_context(steps)

    def advance(self, loss=None) -> None:
        """Count a step of the training."""
        self.bar.add()
        if loss is not None:
            self.bar.note = f"loss {loss:.3f}"

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

    def gates(self, kind: str, step: int, matrices: dict) -> None:
        """Write a line of adapters.jsonl."""
        if not self.active or not matrices:
            return
        if self.adapters is None:
            self.adapters = Lines(self.run.adapters)
        line = {"kind": kind, "step": step, "matrices": gate_record(matrices)}
        self.adapters.write(line)

    def text(self, tag: str, step: int, text: str) -> None:
        """Write text to TensorBoard, which shows it verbatim."""
        if self.tb is not None:
            body = "\n".join("    " + line for line in text.splitlines())
            self.tb.add_text(tag, body, step)

    def close(self) -> None:
        """Flush and close everything."""
        self.shown.close()
        for part in (self.tb, self.jsonl, self.routing, self.adapters):
            if part is not None:
                part.close()
        if self.tb is not None and sys.exception() is None:
            check_events(self.run.tensorboard)
