"""Training, from a config to the last step: on a laptop and on a pod alike.

`train` checks and prepares everything; `train/loop.py` has the loop over steps.
"""

import contextlib
import sys

import jax

from moex.adapters.attach import adapter_table
from moex.cluster import distributed
from moex.config.base import require_path
from moex.config.reopen import check_reopens
from moex.data.changes import changed_data, save_data
from moex.model import accounting
from moex.model.paths import flat_paths
from moex.runs.checkpoint import Checkpointer, CheckpointError
from moex.runs.claim import claimed
from moex.runs.directory import RunDir
from moex.runs.environment import save_environment
from moex.runs.keys import check_run
from moex.train.job import Job, make_job
from moex.train.log import RunLog
from moex.train.loop import Run
from moex.train.profiler import Profiler, profile_steps
from moex.train.resume import (
    check_init_from,
    check_resume,
    check_starts_alone,
    starting_point,
)
from moex.train.stop import said_where_it_stands, stop_on_signals
from moex.train.teacher import check_teacher, load_teacher


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
    check_reopens(cfg)
    profiled = profile_steps(profile, cfg.steps)
    source = RunDir(cfg.init_from)
    check_teacher(cfg, None if workdir is None else RunDir.of(workdir))
    if dry_run:
        folder = None if workdir is None else RunDir.of(workdir)
        job = make_job(cfg, log=say, resumed=folder)
        _compare(job, folder, source, say)
        job.trace_step()
        say("dry run: the config is good; nothing was trained")
        return {}
    require_path("--workdir", workdir)
    folder = RunDir.of(workdir)
    with said_where_it_stands(folder), claimed(folder, say) as lock:
        job = make_job(cfg, log=say, resumed=folder)
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
    if cfg.model.adapter is not None:
        params = flat_paths(job.spec.params)
        say(adapter_table(cfg.model.adapter, params, job.spec.info))
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
    elif not resuming:
        check_starts_alone(job)
    if not job.holds_out:
        say("no data is held out: nothing will be evaluated")
    return cost


def _close(run: Run) -> None:
    """Close everything that a run has open, also while an error is raised."""
    run.profiler.end(run.step)
    run.log.close()
    # If one process of several has an error, the others do not get here, and Orbax
    # would wait for them for ever.
    if jax.process_count() == 1 or sys.exception() is None:
        with contextlib.suppress(CheckpointError):
            run.checkpointer.wait()
        run.checkpointer.close()


def _start(job: Job, folder: RunDir, source: RunDir, checkpointer, cost, say) -> Run:
    """Make the run that goes on from the newest checkpoint, or begins."""
    step, consumed, state, final = starting_point(
        job, folder, source, checkpointer, say
    )
    log = RunLog(
        folder,
        job.cfg,
        step=step,
        total_steps=job.cfg.steps,
        num_domains=len(job.data.domains),
    )
    run = Run(job, folder, checkpointer, cost, log, state, step, consumed, final)
    run.in_row = int(state["guard"]["skipped_in_row"])
    run.teacher = load_teacher(job, folder, say)
    return run
