"""The training loop, which is the same for a laptop and for a pod.

Each iteration dispatches a step and then looks at the metrics of earlier steps, so that
logging never makes the device wait; see `train/in_flight.py`.
"""

import contextlib
import dataclasses
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from moex.cluster import distributed
from moex.config import base as configs
from moex.config.base import RunError, require_path
from moex.config.schedule import is_always_zero
from moex.data.changes import changed_data, save_data
from moex.model import accounting
from moex.model.figures import by_layer, moe_summary
from moex.model.paths import path_name
from moex.runs.checkpoint import Checkpointer, CheckpointError
from moex.runs.checksums import all_finite
from moex.runs.claim import claimed
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.runs.environment import save_environment
from moex.runs.keys import COEFFICIENTS, check_run
from moex.runs.lock import RunLock
from moex.runs.open import load_run, saved_with
from moex.runs.record import check_may_begin
from moex.runs.score import domain_losses, eval_step, evaluate
from moex.runs.write import about_step
from moex.sharding import shard_batch, told_by_each
from moex.train.in_flight import Flight
from moex.train.job import Job, make_job
from moex.train.log import RunLog, Stopwatch, clock, load_lines, memory_bytes, step_line
from moex.train.profiler import Profiler, profile_steps
from moex.train.resume import check_init_from, check_resume
from moex.train.stop import said_where_it_stands, stands, stop_on_signals


class TrainingStopped(RunError):
    """Training cannot go on; the message says why and what is intact."""


def train(cfg, workdir, *, dry_run=False, profile=None, say=None) -> dict:
    """Train `cfg` in `workdir`, or continue the run there.

    Args:
      cfg: run config (keys of `run.RUN_KEYS`).
      workdir: run directory; made if there is none. None only for a dry run.
      dry_run: check everything, print the model table and stop.
      profile: steps to trace, "START:STOP"; None: no steps.
      say: called with each line before the run's own log exists.

    Returns:
      The last figures: {"step", "loss", "eval_nll", ...}; empty for a dry run.

    Raises:
      ConfigError: for a user's mistake, before anything is compiled.
      CheckpointError: if a checkpoint cannot be written or read.
      TrainingStopped: after `nan_limit` skipped updates in a row.
    """
    say = say or (print if jax.process_index() == 0 else lambda *_: None)
    check_run(cfg)  # before anything else, so that a mistake leaves no folder
    profiled = profile_steps(profile, cfg.steps)
    source = RunDir(cfg.init_from)
    if dry_run:
        folder = None if workdir is None else RunDir.of(workdir)
        job = make_job(cfg, log=say)
        _compare(job, folder, source, say)
        job.trace_step()
        say("dry run: the config is good; nothing was trained")
        return {}
    require_path("--workdir", workdir)
    folder = RunDir.of(workdir)
    with said_where_it_stands(folder), claimed(folder, say) as lock:
        job = make_job(cfg, log=say)
        cost = _compare(job, folder, source, say)
        checkpointer = Checkpointer(
            folder,
            keep=cfg.checkpoint.keep,
            keep_best=cfg.checkpoint.keep_best,
            score=cfg.task.score,
        )
        run = _start(job, folder, source, checkpointer, cost, say)
        run.lock = lock
        run.profiler = Profiler(profiled, folder.profile, run.log.line)
        if jax.process_index() == 0:
            # The config comes last, as it makes the folder a run that can be used.
            cfg.task.save(job.data, folder)
            save_data(folder.data_file, job.data.manifest)
            save_environment(folder, run.step)
            folder.save_config(cfg)
        with jax.set_mesh(job.mesh), stop_on_signals(run):
            try:
                return run.loop()
            finally:
                _close(run)


def _compare(job: Job, folder: RunDir | None, source: RunDir, say) -> accounting.Cost:
    """Print the model table, and compare a job with the run that it goes on from.

    Raises:
      ConfigError: if that run has another model or other data.
    """
    cfg = job.cfg
    cost = accounting.model_cost(cfg.model, job.spec, cfg.seq_len)
    say(accounting.model_table(cfg.model, job.spec, job.tx, cfg.seq_len))
    resuming = folder is not None and folder.is_run()
    distributed.agree(
        {
            "data": {k: v["sha256"] for k, v in job.data.manifest.items()},
            **cfg.task.identity(job.data),
            "answer to whether --workdir holds a run": resuming,
        }
    )
    if resuming and folder is not None:
        for line in changed_data(folder.data_file, job.data.manifest):
            say(line)
        for change in check_resume(cfg, folder, job.data):
            say(f"resuming with a changed config: {change}")
    elif cfg.init_from:
        check_init_from(job, source)
    if not job.holds_out:
        say("no data is held out: nothing will be evaluated")
    return cost


def _close(run: "Run") -> None:
    """Close everything that a run has open, also while an error is raised."""
    run.profiler.end(run.step)
    run.log.close()
    # If one process of several has an error, the others do not get here, and Orbax
    # would wait for them for ever.
    if jax.process_count() == 1 or sys.exception() is None:
        with contextlib.suppress(CheckpointError):
            run.checkpointer.wait()
        run.checkpointer.close()


def _start(job: Job, folder: RunDir, source: RunDir, checkpointer, cost, say) -> "Run":
    """Restore or make the train state."""
    identity = job.cfg.task.identity(job.data)
    found = checkpointer.restore(
        job.abstract_state(), warn=say, check=saved_with(job.cfg, identity)
    )
    final = None
    if found is not None:
        step, state, data, meta = found
        final = meta["final"]
        say(f"resuming {folder} after step {step}")
        consumed = Consumed.of(data, job.cfg.seq_len)
    else:
        if folder.is_run():
            check_may_begin(folder, folder.config().checkpoint.every)
            say(f"{folder} has no checkpoint yet: it begins again at step 0")
        checkpointer.write_record()  # from now on the record lists the saved steps
        step, consumed, state = 0, Consumed(), job.init_state()
        if job.cfg.init_from:
            old = load_run(source, job.cfg.mesh, warn=say)
            # State that depends on this run's own schedule or target starts afresh.
            fresh, info = state["state"], job.spec.info
            carried = jax.tree_util.tree_map_with_path(
                lambda path, was, new: was if keeps_value(info, path) else new,
                old.state,
                fresh,
            )
            state |= {"params": old.params, "state": carried}
            say(f"starting from the parameters of {source} at step {old.step}")
    log = RunLog(
        folder,
        job.cfg,
        step=step,
        total_steps=job.cfg.steps,
        num_domains=len(job.data.domains),
    )
    run = Run(job, folder, checkpointer, cost, log, state, step, consumed, final)
    run.in_row = int(state["guard"]["skipped_in_row"])
    return run


def _lost(rows: int) -> str:
    """The part of a message about rows that found no room, if there are any."""
    if rows == 0:
        return ""
    return (
        f", {rows} rows found no room on their way to the experts: raise "
        "config.mesh.exchange_buffer"
    )


def keeps_value(info, path) -> bool:
    """Whether a router state keeps its meaning in another run, as biases do."""
    return info[path_name(path)].rule.keeps_value


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

    def loop(self) -> dict:
        """Train to the last step; returns the last figures."""
        cfg, log = self.job.cfg, self.log
        if self.step >= cfg.steps and self.final is not None:
            log.line(
                f"the run is complete: step {self.step} of {cfg.steps}, "
                f"{self.final}; nothing to do. To go on, raise config.steps."
            )
            return {"step": self.step} | self.final
        batches = self.job.batches(self.consumed.sequences)
        key = jax.random.key(cfg.seed + 1)
        self.eval_step, train_step = None, None
        self.watch = Stopwatch()
        self.logged = (self.step, self.consumed.targets)
        self.profiler.check_start(self.step)
        flight = Flight(self._look, self._is_logged)
        while self.step < cfg.steps and not self._should_stop():
            if self.lock is not None:
                self.lock.check_told()
            with self.watch.part("data"), TraceAnnotation("data"):
                batch = shard_batch(next(batches), self.job.mesh)
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
        if self.step < cfg.steps:
            saved = self.step in self.checkpointer.steps() or self._save()
            self.checkpointer.wait()
            done = "checkpoint saved; the same command goes on from here"
            log.line(
                f"stopped at step {self.step} of {cfg.steps}: "
                f"{done if saved else stands(self.dir)}"
            )
            left = {"stopped": True, "interrupted": self.interrupted}
            return self.last | {"step": self.step} | left
        return self._finish()

    def _should_stop(self) -> bool:
        # Several processes must leave at the same step. The metrics of a step tell them
        # to, and all of them look at these after the same number of steps.
        return self.stop_asked if jax.process_count() == 1 else self.stop_agreed

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
        compiled = self.job.train_step().lower(*args).compile()
        seconds = time.perf_counter() - began
        self.log.line(f"compiled the train step in {seconds:.1f} s")
        self.log.record("compile", self.step, {"seconds": seconds})
        self.watch = Stopwatch()
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
                f"{norm:.4g}{_lost(lost)}); {in_row} in a row, "
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
            f"spikes{_lost(lost)} (config.nan_limit = {self.job.cfg.nan_limit}); "
            f"stopped at step {step}. Last good checkpoint: "
            f"{'none' if good is None else good}{doubt}."
        )

    def _log_step(self, step, metrics, seconds: dict[str, float], targets) -> None:
        """Log a step; seconds and targets are means since the step logged before."""
        cfg = self.job.cfg
        rows = self._rows(metrics["layers"])
        values = self._step_values(metrics)
        values |= self._speed(metrics, seconds["step"], targets)
        values |= {f"perf/{name}_s": value for name, value in seconds.items()}
        values |= {f"moe/{name}": value for name, value in moe_summary(rows).items()}
        self.log.record("train", step, values)
        every = cfg.log.images_every
        image = step == cfg.steps or (every > 0 and step % every == 0)
        self.log.layers("train", step, rows, image=image)
        self.last = values
        brief = cfg.task.brief(values)
        self.log.line(step_line(step, cfg.steps, values, brief, seconds["step"]))
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

    def _step_values(self, metrics) -> dict:
        """The values of a line of metrics.jsonl, except for routing and speed."""
        cfg, domains = self.job.cfg, self.job.data.domains
        values = {
            "loss": float(metrics["loss"]),
            **{name: float(metrics[name]) for name, *_ in cfg.task.FIGURES},
            "grad_norm": float(metrics["grad_norm"]),
            "lr": float(metrics["lr"]),
            "skipped": int(metrics["skipped"]),
            "tokens_seen": self.consumed.tokens,
            "targets_seen": self.consumed.targets,
            "padding_frac": int(metrics["padding"]) / (cfg.batch_size * cfg.seq_len),
        }
        for group, norm in metrics["grad_norms"].items():
            values[f"grad_norm/{group}"] = float(norm)
        for name, value in metrics["weighted"].items():
            own = name not in COEFFICIENTS  # of a router, with its own coefficient
            if own or not is_always_zero(getattr(cfg.loss, name)):
                values[f"loss/{name}"] = float(value)
        if len(domains) > 1:
            values |= self._by_domain(domain_losses(domains, metrics))
        return values

    def _by_domain(self, losses: dict[str, float]) -> dict[str, float]:
        return {f"{self.job.cfg.task.score}/{k}": loss for k, loss in losses.items()}

    def _speed(self, metrics, step_seconds: float, targets: float) -> dict:
        """The speed of training: tokens and learned targets per second, and FLOPs."""
        tokens = self.job.cfg.batch_size * self.job.cfg.seq_len
        flops = self.cost.train_flops_at(metrics["layers"])
        values = {
            "perf/tokens_per_s": tokens / step_seconds,
            "perf/targets_per_s": targets / step_seconds,
            "perf/train_flops_per_token": flops,
            "perf/memory_gib": memory_bytes() / 2**30,
        }
        peak = accounting.device_peak_flops()
        if peak is not None:
            rate = tokens / step_seconds * flops
            values["perf/mfu"] = rate / (peak * jax.device_count())
            share = 1 - int(metrics["padding"]) / tokens
            values["perf/mfu_without_padding"] = share * values["perf/mfu"]
        return values

    def _pause(self) -> None:
        """Do the tasks that are owed, with the training clock stopped."""
        owed, self.owed = self.owed, set()
        if "eval" in owed:
            self._aside(lambda: self._evaluate(self.job.cfg.eval.sequences))
        if "sample" in owed:
            self._aside(self._sample)
        if "save" in owed:
            self._aside(self._save)

    def _aside(self, work):
        self.watch.stop()
        try:
            return work()
        finally:
            self.watch.start()

    def _evaluate(self, limit) -> dict:
        if self.eval_step is None:
            self.eval_step = eval_step(self.job)
        result = evaluate(self.job, self.state, self.eval_step, limit)
        task = self.job.cfg.task
        values = {k: result[k] for k in (*(f.name for f in task.FIGURES), *task.COUNTS)}
        values |= self._by_domain(result["domains"])
        rows = self._rows(result["layers"])
        if rows:
            values["max_violation"] = moe_summary(rows)["max_violation"]
        self.log.record("eval", self.step, values)
        self.log.layers("eval", self.step, rows)
        self.last_eval = (self.step, result)
        said = [
            f"{result[name]:.4f} {unit}"
            for name, _, unit, _ in task.FIGURES
            if math.isfinite(result[name])
        ]
        self.log.line(
            f"held out at step {self.step}: {', '.join(said) or 'no target'} "
            f"({result['tokens']:,} tokens)"
        )
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
            self.state,
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
        names = [figure.name for figure in cfg.task.FIGURES]
        figures = {f"eval_{n}": scored[n] for n in names} if scored else {}
        figures = {k: v for k, v in figures.items() if math.isfinite(v)}
        if self.step not in self.checkpointer.steps() and not self._save(figures):
            raise TrainingStopped(
                f"the last step, {self.step}, has parameters that are not finite. Last "
                f"good checkpoint: {self.checkpointer.last_good()}."
            )
        self.checkpointer.wait()
        self._sample()
        if scored is not None:
            self._report(scored)
        log.text("config", self.step, configs.describe(cfg))
        look = f"moex report {self.dir}"
        if cfg.log.tensorboard:
            look = (
                f"tensorboard --logdir {self.dir.tensorboard}\n"
                "              its page Custom Scalars begins with the MoE layers"
            )
        lines = [
            f"training time {clock(self.watch.read())}; run directory {self.dir}",
            f"look at it:   {look}",
            *cfg.task.use_lines(self.dir),
        ]
        log.line("\n".join(lines))
        return self.last | {"step": self.step} | figures

    def _report(self, scored: dict) -> None:
        """Log the results on held-out data."""
        cfg, log = self.job.cfg, self.log
        if scored["layers"]:
            log.line(load_lines(cfg.model, scored["layers"]))
        data = self.job.data
        log.line(cfg.task.conclusion(cfg, data, scored, self.step, log))
        log.hparams(
            {"steps": cfg.steps, "lr": cfg.optim.lr, "batch_size": cfg.batch_size},
            {f"eval/final_{cfg.task.score}": scored[cfg.task.score]},
        )
