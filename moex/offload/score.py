"""Scoring a run with offloaded experts on held-out data: `moex eval --offload`.

B batch · L length
"""

import functools

import jax
import jax.numpy as jnp

from moex.config.base import ConfigError
from moex.model.spec import merged
from moex.model.steering import Steering
from moex.offload.executor import Executor
from moex.offload.settings import Settings
from moex.offload.setup import open_offloaded
from moex.progress import tell
from moex.runs.directory import Place, RunDir
from moex.runs.program import Evaluated
from moex.runs.score import evaluate, steering_for, told_score, with_data


def score_offloaded(
    place: Place,
    cfg,
    settings: Settings,
    *,
    sequences=None,
    steering: Steering | None = None,
) -> dict:
    """Do what `score_run` does, with the same results but for rounding.

    Args:
      settings: how experts are offloaded; the other arguments are those of `score_run`.

    Raises:
      ConfigError: for a bad run directory or bad data.
      CheckpointError: if the checkpoint is damaged.
    """
    folder = RunDir.of(place)
    if cfg.mesh != folder.config().mesh:
        raise ConfigError(
            "config.mesh: --offload computes on one device; leave it out."
        )
    steer = steering_for(folder, steering)
    opened = open_offloaded(folder, settings, cfg)
    run = opened.run
    program = with_data(run, cfg)
    with jax.set_mesh(run.mesh):
        step = eval_step(opened.executor, program)
        none: dict = {"params": {}, "state": {}}
        result = evaluate(program, none, step, sequences, steer=steer)
    tell(opened.executor.report())
    how = {} if settings.weights is None else {"weights": settings.weights}
    return how | told_score(run, result)


def eval_step(executor: Executor, program: Evaluated):
    """The step of `evaluate` that runs the layers of an executor."""
    graphdef, *arrays = executor.outer
    task, compute = program.cfg.task, program.compute(train=False)

    @jax.jit
    def begin(arrays, batch):
        model = merged(graphdef, *arrays)
        ctx = task.context(batch, mode="eval", compute=compute)
        embedded = []

        def run(x_BLD, ctx, caches=None):
            embedded.append(x_BLD.astype(compute.dtype))
            return x_BLD, {}, None

        model.run = run  # what follows on the layers is left out
        task.run(model, ctx, batch)
        return embedded[0], ctx

    @functools.partial(jax.jit, static_argnames="names")
    def end(arrays, batch, x_BLD, ctx, auxes, *, names):
        model = merged(graphdef, *arrays)
        model.run = lambda *_: (model.norm(x_BLD), _stacked(auxes, names), None)
        return task.sums(model, ctx, batch, num_domains=program.num_domains)

    def step(params, state, batch, steer=None):
        del params, state  # the executor has them
        x_BLD, ctx = begin(arrays, batch)
        x_BLD, told, _ = executor.run(x_BLD, ctx, None, steer)
        auxes = [aux for aux, _ in told]
        names = tuple(step.site.path for step in executor.steps)
        return end(arrays, batch, x_BLD, ctx, auxes, names=names)

    return step


def _stacked(auxes: list[dict], names: tuple[str, ...]) -> dict:
    """The aux of all blocks, as `Layers.run` gives it: [repeat, ...] for each site."""
    tree: dict = {}
    for name in dict.fromkeys(names):
        own = [aux for aux, at in zip(auxes, names, strict=True) if at == name]
        *parts, last = name.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return tree
