"""Scoring on held-out data, during training and for a run directory."""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from moex.config.base import ConfigError
from moex.model.steering import Steering
from moex.progress import phase, tell
from moex.runs.base import base_hash
from moex.runs.directory import Place, RunDir
from moex.runs.keys import check_run
from moex.runs.open import LoadedRun, load_run
from moex.runs.program import Evaluated, Program, check_eval_devices, eval_batch_size
from moex.runs.weights import load_lowered
from moex.sharding import batch_shards, shard_batch


def eval_step(program: Program):
    """Make the jitted evaluation step of a program."""
    step = make_eval_step(
        program.cfg.task,
        program.spec,
        num_domains=program.num_domains,
        compute=program.compute(train=False),
    )
    return jax.jit(step, out_shardings=program.whole)


def make_eval_step(task, spec, *, num_domains, compute):
    """Make `(params, state, batch) -> sums`; `task.figures` takes their total.

    The step takes `Context.steer` too, as a fourth argument.
    """

    def step(params, state, batch, steer=None):
        ctx = task.context(batch, mode="eval", compute=compute, steer=steer)
        model = spec.merge(params, state)
        return task.sums(model, ctx, batch, num_domains=num_domains)

    return step


def evaluate(
    program: Evaluated,
    state: dict,
    step,
    limit: int | None,
    stop: Callable[[], bool] = lambda: False,
    steer: dict | None = None,
) -> dict | None:
    """Compute the held-out figures: `Task.result`, the loss by domain, routing, gates.

    They are made of the sums of all batches, so the batch size does not change them. A
    mean over nothing is NaN.

    Args:
      step: the result of `eval_step`.
      limit: sequences to score; None: all.
      stop: asked before every batch whether to give up.
      steer: `Context.steer`.

    Returns:
      The figures; None if `stop` said so.

    Raises:
      ConfigError: if nothing is held out.
    """
    total, running = None, None
    for batch in program.eval_batches(limit):
        if stop():
            return None
        batch = shard_batch(batch, program.mesh)
        # One step runs at a time, while the next batch is read. Two steps could run in
        # any order (neither reads results of the other), and processes that start their
        # collectives in different orders wait for each other for ever.
        total = _add(total, running)
        compiles = phase("compiling the evaluation")
        with compiles if running is None else contextlib.nullcontext():
            running = step(state["params"], state["state"], batch, steer)
    total = _add(total, running)
    if total is None:
        raise ConfigError("config.data: no data is held out; raise holdout.")
    task = program.cfg.task
    figures = jax.device_get(task.figures(total))
    return task.result(figures) | {
        "domains": domain_losses(program.data.domains, figures),
        "layers": figures["layers"],
        "adapters": figures["adapters"],
    }


def _add(total, sums):
    """Wait for the sums of a batch (None: no batch) and add them to `total`.

    They are added in 64 bits: float32 loses counts above 2**24.
    """
    if sums is None:
        return total
    sums = jax.tree.map(np.float64, jax.device_get(sums))
    return sums if total is None else jax.tree.map(np.add, total, sums)


def domain_losses(domains, metrics) -> dict[str, float]:
    """The mean loss of the domains that have any tokens, from `Task.figures`."""
    named = zip(domains, metrics["domain_score"], metrics["domain_tokens"], strict=True)
    return {name: float(score) for name, score, tokens in named if tokens > 0}


def score_run(
    place: Place,
    cfg,
    *,
    sequences=None,
    steering: Steering | None = None,
    weights: str | None = None,
) -> dict:
    """Score a run on the held-out data of `cfg`, as its task does.

    Args:
      cfg: as `run_with_data` takes it.
      sequences: score at most this many held-out sequences; None: all.
      steering: how experts are steered; None: as trained.
      weights: as for `run_with_data`.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if no checkpoint is intact.
    """
    steer = steering_for(place, steering)
    run, program = run_with_data(place, cfg, weights=weights)
    state = {"params": run.params, "state": run.state}
    with jax.set_mesh(run.mesh):
        step = eval_step(program)
        result = evaluate(program, state, step, sequences, steer=steer)
    how = {} if weights is None else {"weights": weights}
    return how | told_score(run, result)


def told_score(run: LoadedRun, result: dict | None) -> dict:
    """The part of a result of `evaluate` that people read, with the step of the run.

    Raises:
      ConfigError: if nothing was scored.
    """
    assert result is not None
    if result["tokens"] == 0:
        raise ConfigError("config.data: what is held out has no target to score.")
    kept = {k: v for k, v in result.items() if k not in ("layers", "adapters")}
    return {"step": run.step} | kept


def steering_for(place: Place, steering: Steering | None) -> dict | None:
    """`Context.steer` for the model of a run; before anything of it is read.

    Raises:
      ConfigError: if the steering is not for this model.
    """
    model = RunDir.of(place).config().model
    if steering is None:
        return None
    if steering.base not in (None, base_hash(model)):
        raise ConfigError(
            f"{steering.where}: the plan is for another model: names or shapes of "
            "parameters differ."
        )
    return steering.arrays(model)


def score_text(task, result: dict) -> list[str]:
    """Format a result of `score_run`: a line for each figure and domain."""
    rows = task.score_lines(result)
    width = max(13, *(len(title) for title, _ in rows))
    return [
        *(f"  {title:<{width}}  {value}" for title, value in rows),
        *(f"  loss on {name}: {loss:.4f}" for name, loss in result["domains"].items()),
    ]


def held_out(task, lines: dict[int, dict]) -> str | None:
    """The newest score of a log as part of a sentence; None without any.

    Args:
      task: task of the run.
      lines: those of the kind "eval" by step, from `read_metrics`.
    """
    score, *others = task.FIGURES
    scored = [(step, line) for step, line in lines.items() if score.name in line]
    if not scored:
        return None
    step, line = scored[-1]
    known = [f for f in others if math.isfinite(line.get(f.name, math.nan))]
    told = ", ".join(f"{line[f.name]:.4f} {f.unit}" for f in (score, *known))
    tokens = f" ({line['tokens']:,} tokens)" if "tokens" in line else ""
    return f"held out at step {step:,}: {told}{tokens}"


def run_with_data(
    place: Place, cfg, *, step=None, weights: str | None = None
) -> tuple[LoadedRun, Evaluated]:
    """Load a trained model, and its program with the held-out data of `cfg`.

    The data is read as the run reads it (its tokenizer, its units), whatever `cfg.data`
    says, so that it means what the model learned.

    Args:
      cfg: run config whose data, seq_len, eval, precision and mesh are used; its model,
        task and eval.batch_size are filled in.
      step: as for `load_run`.
      weights: as for `load_lowered`, which reads the newest step; None: as trained.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if no checkpoint is intact.
    """
    # Take the run's own mesh if it fits the devices here, or else the given one.
    folder = RunDir.of(place)
    given = None if cfg.mesh == folder.config().mesh else cfg.mesh
    if weights is None:
        run = load_run(folder, given, warn=tell, step=step)
    else:
        run = load_lowered(folder, weights, given, warn=tell)
    return run, with_data(run, cfg)


def with_data(run: LoadedRun, cfg) -> Evaluated:
    """The program of an open run with the held-out data of `cfg`: `run_with_data`."""
    folder = run.folder
    cfg.model, cfg.task = run.cfg.model, run.cfg.task
    check_run(cfg, to_train=False)
    shards = batch_shards(run.mesh)
    rows = -(-eval_batch_size(cfg) // shards) * shards  # round up; padding fills it
    cfg.eval = dataclasses.replace(cfg.eval, batch_size=rows)
    check_eval_devices(cfg, run.mesh)
    cfg.task.like(cfg, folder)
    data = cfg.task.prepare(cfg, log=tell, scoring=True)
    cfg.task.fill(cfg, data)
    return Evaluated(cfg=cfg, mesh=run.mesh, spec=run.spec, data=data)
