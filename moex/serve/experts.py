"""The experts that are read to answer a prompt: those of a task, from a store.

B = 1 batch · L length of the prompt, with padding · E experts
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moex.analysis.record import routed_layers, slots_by_layer
from moex.config.base import ConfigError
from moex.convert.load_kept import Kept, load_kept, read_parts
from moex.convert.plans import Plan
from moex.convert.segments import cut, cut_model
from moex.convert.store import WORDS, Store, marked_mean
from moex.convert.to_pruned import Pruned
from moex.model.decode import padded_prompt
from moex.model.layers import routers
from moex.model.spec import model_spec
from moex.model.steering import Steering
from moex.nn.context import Context
from moex.progress import phase
from moex.runs.base import check_no_adapters
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, load_run
from moex.runs.rows import Rows, bytes_read
from moex.sharding import MeshConfig

FLAG = "--experts"


class OfTask(NamedTuple):
    """A run with the experts of a task."""

    run: LoadedRun
    plan: Plan  # which experts it has
    steer: dict | None  # `Context.steer` for them


def load_experts(
    place: Place,
    asked: str,
    ids: list[int],
    *,
    steering: Steering | None = None,
    say=print,
    warn=print,
) -> OfTask:
    """Read a run with the experts of a task.

    Args:
      asked: TASK:STORE, the name of a task and the file of a store; "auto:STORE" is the
        task nearest to a prompt, by the router of the first MoE layer, for which what
        comes before it is read; "all:STORE", by all routers, for which all is read.
      ids: tokens of the prompt.
      steering: for the whole model, as which the prompt finds its task too.
      say: called with lines of news.
      warn: as for `load_run`.

    Raises:
      ConfigError: if the store is not for the run, or has no such task; or if the
        steering forces an expert that the task has not.
      CheckpointError: if the checkpoint is damaged.
    """
    task, colon, file = asked.partition(":")
    if not (task and colon and file):
        raise ConfigError(f"{FLAG} = {asked!r}: must be TASK:STORE or auto:STORE.")
    folder, where = RunDir.of(place), f"{FLAG}={asked}"
    store = Store.read(file)
    check_no_adapters(folder, where)
    for own in store.patterns:
        store.plan(own.task).check(folder.config().model)
    store.check(folder.config().model)
    before, whole = bytes_read(), None
    if task in WORDS:
        if not ids:
            raise ConfigError(f"{where}: the prompt is empty; name a task.")
        if task == "all":
            whole = load_run(folder, MeshConfig(), warn=warn)
            found = store.find(queries(whole, ids, store.pool))
        else:
            found = store.find(first_query(folder, ids, store.pool))
        task = found.task
        others = sorted((d, t) for t, d in found.others.items() if t != task)
        told = "".join(f"; {t}: {d:.4g}" for d, t in others[:1])
        say(f"experts of {task}: squared distance {found.distance:.4g}{told}")
    plan, steer = store.plan(task), None
    if steering is not None:
        model, keep = (
            folder.config().model,
            {n: x.keep for n, x in plan.by_layer().items()},
        )
        steering = steering.of_kept(model, keep, f"the task {task} of {file}")
        steer = steering.arrays(Pruned.of(model, plan).model)
    kept = load_kept(folder, plan) if whole is None else _kept(whole, plan)
    size = sum(f.stat().st_size for f in _files(folder, kept.run.step))
    read = bytes_read() - before
    say(f"read {read:,} bytes of a checkpoint of {size:,}")
    for line in kept.clipped:
        say(line)
    return OfTask(kept.run, plan, steer)


def _files(folder: RunDir, step: int):
    """The files of the parameters and the state of a checkpoint."""
    for item in ("params", "state"):
        for file in (folder.checkpoints / str(step) / item).rglob("*"):
            if file.is_file():
                yield file


def _kept(run: LoadedRun, plan: Plan) -> Kept:
    """A run that is in memory, with the experts of a plan."""
    pruned = Pruned.of(run.cfg.model, plan)
    run.cfg.model = pruned.model
    new = {name: pruned.arrays(vars(run)[name]) for name in ("params", "state")}
    new = jax.tree.map(jnp.asarray, new)
    spec = model_spec(pruned.model, run.mesh)
    return Kept(dataclasses.replace(run, spec=spec, **new), 0, pruned.clipped)


def first_query(folder: RunDir, ids: list[int], pool: int) -> dict[str, np.ndarray]:
    """The query of a prompt by the first router; only what comes before it is read."""
    model = folder.config().model
    first = next(routers(model))
    found = []
    for piece in cut(model, {first.layer: True}):
        found.append(dataclasses.replace(piece, labels=(None,) * len(piece.labels)))
        if any(piece.labels):
            break
    nothing = Plan(kind="keep", run="", step=0, base="", layers=())
    begin = Pruned(nothing, model, cut_model(model, found), found, [])

    def skip(path):  # no expert, and nothing after the layers
        return "/experts/" in path or path.startswith("w_logits")

    run = read_parts(folder, Rows(folder), begin, skip)
    return {first.label: queries(run, ids, pool)[first.label]}


def queries(run: LoadedRun, ids: list[int], pool: int) -> dict[str, np.ndarray]:
    """The query of a prompt by every router of a model, by label."""
    L = padded_prompt([ids])
    token_BL = np.zeros((1, L), np.int32)
    token_BL[0, : len(ids)] = ids
    valid_BL = np.arange(L)[None] < len(ids)
    ctx = Context(
        segment_BL=jnp.asarray(valid_BL, jnp.int32),
        position_BL=jnp.arange(L, dtype=jnp.int32)[None],
        token_BL=jnp.asarray(token_BL),
        mode="eval",
        collect=True,
        compute=run.compute(train=False),
    )

    @jax.jit
    def routed(params, state, ctx):
        _, aux = run.spec.merge(params, state)(ctx)
        return routed_layers(aux, logits=True)

    with jax.set_mesh(run.mesh), phase("reading the prompt"):
        arrays = jax.device_get(routed(run.params, run.state, ctx))
    slots = slots_by_layer(run.cfg.model, arrays, valid_BL.reshape(-1))
    return {name: marked_mean(own.logits_NE, pool) for name, own in slots.items()}
