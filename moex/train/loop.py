"""A run in progress: the loop over its steps, evaluations and checkpoints.

Each iteration dispatches a step and then looks at the metrics of earlier steps, so that
logging never makes the device wait; see `train/in_flight.py`.
"""

import dataclasses
import math
import shutil
import time
from typing import Any

import jax
import numpy as np
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from moex.config import base as configs
from moex.config.base import RunError
from moex.model import accounting
from moex.model.figures import by_layer, moe_summary
from moex.progress import phase
from moex.runs.checkpoint import Checkpointer
from moex.runs.checksums import all_finite
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.runs.lines import read_metrics
from moex.runs.lock import RunLock
from moex.runs.score import eval_step, evaluate
from moex.runs.write import about_step
from moex.sharding import shard_batch, told_by_each
from moex.train.in_flight import Flight
from moex.train.job import Job
from moex.train.lines import (
    eval_line,
    eval_values,
    gate_values,
    last_lines,
    load_lines,
    speed,
    step_line,
    step_values,
    told_figures,
    told_lost,
)
from moex.train.log import RunLog
from moex.train.stop import stands
from moex.train.stopwatch import Stopwatch


class TrainingStopped(RunError):
    """Training cannot go on; the message says why and what is intact."""


@dataclasses.dataclass
class Run:
    """A run in progress: the job, its arrays and where it stands."""

    job: Job
    dir: RunDir
    checkpointer: Checkpointer
    cost: accounting.Cost
    log: RunLog
    state: dict
    step: int  # optimizer steps done
    consumed: Consumed
    final: dict | None = None  # figures of a complete run that was restored
    stop_asked: bool = False  # this process was asked to stop
    interrupted: bool = False  # Ctrl-C asked to stop
    lock: RunLock | None = None  # the lock of the run directory, in process 0
    stop_agreed: bool = False  # all processes know that one was asked to stop
    in_row: int = 0  # updates skipped in a row, up to the last step looked at
    idle: bool = False  # the gradient was 0 at the step that was logged last
    suspect: int | None = None  # the step before the first loss that was not finite
    owed: set[str] = dataclasses.field(default_factory=set)  # see `_due`
    last_eval: Any = None  # (step, figures) of the newest evaluation
    last: Any = dataclasses.field(default_factory=dict)
    profiler: Any = None
    teacher: dict | None = None  # arrays of the model that the task learns from

    def loop(self) -> dict:
        """Train to the last step; returns the last figures."""
        cfg, log = self.job.cfg, self.log
        if self.step >= cfg.steps and self.final is not None:
            log.line(
                f"the run is complete: it has taken {self.step} steps and "
                f"config.steps is {cfg.steps}{told_figures(self.final)}; nothing to "
                "do. To go on, raise config.steps."
            )
            return {"step": self.step} | self.final
        batches = self.job.batches(self.consumed.sequences)
        key = jax.random.key(cfg.seed + 1)
        self.eval_step, train_step = None, None
        self.watch = Stopwatch()
        self.logged = (self.step, self.consumed.targets)
        self.profiler.check_start(self.step)
        flight = Flight(self._look, self._is_logged)
        if self._owes_evaluation():
            self._aside(lambda: self._evaluate(cfg.eval.sequences))
        while self.step < cfg.steps and not self._should_stop():
            if self.lock is not None:
                self.lock.check_told()
            with self.watch.part("data"), TraceAnnotation("data"):
                batch = shard_batch(next(batches), self.job.mesh)
                if self.teacher is not None:
                    batch["teacher"] = self.teacher
                if jax.process_count() > 1:
                    asked = int(self.stop_asked)
                    batch["stop_N"] = told_by_each(asked, self.job.mesh)
            if train_step is None:
                train_step = self._compile(batch, key)
            self.profiler.begin(self.step)
            with StepTraceAnnotation("train", step_num=self.step):
                with self.watch.part("dispatch"):
                    self.state, metrics = train_step(
                        self.state, np.int32(self.step), key, batch
                    )
                self.step += 1
                flight.add(self.step, metrics)
            if self.profiler.ends(self.step):
                self._aside(lambda: self.profiler.end(self.step, self.state))
            self.owed |= self._due()
            if self.owed and self.step < cfg.steps:  # at the end `_finish` does all
                flight.land()
                # After a skipped update the state may be spoiled: all tasks wait.
                if not self.in_row:
                    self._pause()
        flight.land()
        return self._leave() if self.step < cfg.steps else self._finish()

    def _leave(self) -> dict:
        """Save this step, and say where the run stands."""
        saved = self.step in self.checkpointer.steps() or self._save()
        self.checkpointer.wait()
        done = "checkpoint saved; the same command goes on from here"
        self.log.line(
            f"stopped at step {self.step} of {self.job.cfg.steps}: "
            f"{done if saved else stands(self.dir)}"
        )
        left = {"stopped": True, "interrupted": self.interrupted}
        return self.last | {"step": self.step} | left

    def _should_stop(self) -> bool:
        # Several processes must leave at the same step. The metrics of a step tell them
        # to, and all of them look at these after the same number of steps.
        return self.stop_asked if jax.process_count() == 1 else self.stop_agreed

    def _stops_evaluation(self) -> bool:
        # Several processes do the same steps, so that all of them go on to its end. A
        # sweep takes a run that has saved its last step for finished: SIGTERM, which
        # it sends, does not stop the last evaluation.
        asked = self.interrupted or (self.stop_asked and self.step < self.job.cfg.steps)
        return asked and jax.process_count() == 1

    def _owes_evaluation(self) -> bool:
        """Whether the run was stopped in the evaluation of the step it goes on from."""
        begun = 0 < self.step < self.job.cfg.steps
        if jax.process_count() > 1 or not begun or "eval" not in self._due():
            return False
        return self.step not in read_metrics(self.dir.metrics).get("eval", {})

    def _due(self) -> set[str]:
        """The tasks that are due after this step: "eval", "sample", "save"."""
        cfg = self.job.cfg
        every = {
            "eval": cfg.eval.every if self.job.holds_out else 0,
            "sample": cfg.log.sample_every,
            "save": cfg.checkpoint.every,
        }
        return {k for k, n in every.items() if n > 0 and self.step % n == 0}

    def _is_logged(self, step: int) -> bool:
        return step % self.job.cfg.log.every == 0 or step in (1, self.job.cfg.steps)

    def _compile(self, batch, key):
        """Compile the train step; the time is reported and not counted as training."""
        began = time.perf_counter()
        args = (self.state, np.int32(self.step), key, batch)
        with phase("compiling the train step"):
            compiled = self.job.train_step().lower(*args).compile()
        seconds = time.perf_counter() - began
        self.log.line(f"compiled the train step in {seconds:.1f} s")
        self.log.record("compile", self.step, {"seconds": seconds})
        self.watch = Stopwatch()
        self.log.begin(self.step)
        return compiled

    def _look(self, step: int, metrics, due: bool) -> None:
        """Look at the metrics of a step: stop if too many were skipped; log if due."""
        cfg = self.job.cfg
        with self.watch.part("wait"), TraceAnnotation("wait"):
            in_row = self.in_row = int(metrics["skipped_in_row"])
            self.consumed.sequences += cfg.batch_size
            self.consumed.tokens += cfg.batch_size * cfg.seq_len
            self.consumed.targets += int(metrics["tokens"])
            self.stop_agreed |= bool(metrics.get("stop", False))
        if in_row:
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            lost = int(metrics["lost_rows"])
            if in_row == 1 and not math.isfinite(loss):
                self.suspect = step - 1
            self.log.line(
                f"warning: update {step} skipped (loss {loss:.4g}, gradient norm "
                f"{norm:.4g}{told_lost(lost)}); {in_row} in a row, "
                f"{int(metrics['skipped'])} in all"
            )
            if in_row >= cfg.nan_limit:
                self._give_up(step, in_row, lost)
        if not due:
            self.log.advance()
            return
        with self.watch.part("wait"):
            metrics = jax.device_get(metrics)
        self.log.advance(float(metrics[self.job.cfg.task.score]))
        before, self.logged = self.logged, (step, self.consumed.targets)
        steps = max(step - before[0], 1)
        seconds = {k: v / steps for k, v in self.watch.lap().items()}
        self._log_step(step, metrics, seconds, (self.logged[1] - before[1]) / steps)

    def _give_up(self, step: int, in_row: int, lost: int) -> None:
        self.checkpointer.wait()
        good, doubt = self.checkpointer.last_good(), ""
        if good is not None and good == self.suspect:
            doubt = f" (not {good}: the first loss after it was not finite)"
            good = self.checkpointer.last_good(before=good)
        raise TrainingStopped(
            f"{in_row} updates in a row had a loss or gradient that is not finite or "
            f"spikes{told_lost(lost)} (config.nan_limit = {self.job.cfg.nan_limit}); "
            f"stopped at step {step}. Last good checkpoint: "
            f"{'none' if good is None else good}{doubt}."
        )

    def _log_step(self, step, metrics, seconds: dict[str, float], targets) -> None:
        """Log a step; seconds and targets are means since the step logged before."""
        cfg = self.job.cfg
        rows = self._rows(metrics["layers"])
        values = step_values(self.job, metrics, self.consumed)
        values |= speed(self.job, self.cost, metrics, seconds["step"], targets)
        values |= {f"perf/{name}_s": value for name, value in seconds.items()}
        values |= {f"moe/{name}": value for name, value in moe_summary(rows).items()}
        values |= gate_values(metrics["adapters"])
        self.log.record("train", step, values)
        every = cfg.log.images_every
        image = step == cfg.steps or (every > 0 and step % every == 0)
        self.log.layers("train", step, rows, image=image)
        self.log.gates("train", step, metrics["adapters"])
        self.last = values
        brief, left = cfg.task.brief(values), self.log.bar.seconds_left(step)
        columns = shutil.get_terminal_size().columns  # 80 where there is no terminal
        self.log.line(step_line(step, cfg.steps, values, brief, left, columns))
        idle = values["grad_norm"] == 0
        if idle and not self.idle:
            self.log.line(
                f"warning: all gradients are 0 at step {step}: nothing is trained"
            )
        self.idle = idle

    def _rows(self, layers: dict) -> dict:
        """The figures of the MoE layers by label."""
        devices = self.job.mesh.shape["expert"]
        return by_layer(self.job.cfg.model, layers, expert_devices=devices)

    def _pause(self) -> None:
        """Do the tasks that are owed, with the training clock stopped."""
        owed, self.owed = self.owed, set()
        if "eval" in owed:
            self._aside(lambda: self._evaluate(self.job.cfg.eval.sequences))
        if "sample" in owed and not self._should_stop():
            self._aside(self._sample)
        if "save" in owed:
            self._aside(self._save)

    def _aside(self, work):
        self.watch.stop()
        try:
            return work()
        finally:
            self.watch.start()

    def _evaluate(self, limit) -> dict | None:
        """Score held-out data; None if this process was asked to stop meanwhile."""
        if self.eval_step is None:
            self.eval_step = eval_step(self.job)
        result = evaluate(
            self.job, self.state, self.eval_step, limit, self._stops_evaluation
        )
        if result is None:
            return None
        task = self.job.cfg.task
        values = eval_values(task, result)
        rows = self._rows(result["layers"])
        if rows:
            values["max_violation"] = moe_summary(rows)["max_violation"]
        values |= gate_values(result["adapters"])
        self.log.record("eval", self.step, values)
        self.log.layers("eval", self.step, rows)
        self.log.gates("eval", self.step, result["adapters"])
        self.last_eval = (self.step, result)
        said = eval_line(task, result)
        self.log.line(f"held out at step {self.step}: {said}")
        return result

    def _save(self, final: dict | None = None) -> bool:
        """Save this step; if parameters are not finite, warn and return False."""
        if self.lock is not None:
            self.lock.check()
        if not all_finite((self.state["params"], self.state["state"])):
            self.log.line(
                f"warning: step {self.step} is not saved: some parameters are not "
                "finite"
            )
            return False
        scored = self.last_eval is not None and self.last_eval[0] == self.step
        job, score = self.job, self.job.cfg.task.score
        identity = job.cfg.task.identity(job.data)
        self.checkpointer.save(
            self.step,
            job.saved(self.state),
            data=dataclasses.asdict(self.consumed),
            meta=about_step(self.step, job.cfg, identity, final),
            metrics={score: self.last_eval[1][score]} if scored else None,
            skipped_in_row=self.in_row,
        )
        return True

    def _sample(self) -> None:
        texts = self.job.cfg.task.samples(self.job, self.state, self.job.data)
        if not texts:
            return
        self.log.record("sample", self.step, {"texts": texts})
        self.log.text("sample", self.step, "\n----\n".join(texts))
        for text in texts:
            shown = text.replace("\n", "\n  | ")
            self.log.line(f"sample at step {self.step}:\n  | {shown}")

    def _finish(self) -> dict:
        """Score all held-out data, save, sample, and say where to look."""
        cfg, log = self.job.cfg, self.log
        scored = self._evaluate(None) if self.job.holds_out else None
        if scored is None and self.job.holds_out:
            return self._leave()
        names = [figure.name for figure in cfg.task.FIGURES]
        figures = {f"eval_{n}": scored[n] for n in names} if scored else {}
        figures = {k: v for k, v in figures.items() if math.isfinite(v)}
        if self.step not in self.checkpointer.steps() and not self._save(figures):
            raise TrainingStopped(
                f"the last step, {self.step}, has parameters that are not finite. Last "
                f"good checkpoint: {self.checkpointer.last_good()}."
            )
        self.checkpointer.wait()
        if not self._should_stop():
            self._sample()
        if scored is not None:
            self._report(scored)
        log.text("config", self.step, configs.describe(cfg))
        log.line(last_lines(cfg, self.dir, self.watch.read()))
        return self.last | {"step": self.step} | figures

    def _report(self, scored: dict) -> None:
        """Log the results on held-out data."""
        cfg, log = self.job.cfg, self.log
        if scored["layers"]:
            log.line(load_lines(cfg.model, scored["layers"]))
        data = self.job.data
        log.line(cfg.task.conclusion(cfg, data, scored, self.step, log))
