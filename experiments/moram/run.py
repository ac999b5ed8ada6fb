"""Does a growing bank of rank-1 atoms forget less than LoRA, task after task?

  python -m experiments.moram.run

Five tasks, each a change of rank 4 to one frozen matrix, on inputs of a subspace of its
own and a common one. Writes results.json, plot.png and the table of README.md's result
next to this file.

S seeds · D inputs · O outputs · B batch · T, J tasks
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moex import Context, LoRA, MoRAM, param
from moex.adapters.attach import attach
from moex.adapters.moram import consolidated
from moex.analysis.continual import figures
from moex.nn.param import split_params
from moex.nn.projection import Projector, project

HERE = pathlib.Path(__file__).parent
SEEDS, TASKS, STEPS, BATCH, HELD_OUT = 5, 5, 400, 128, 1024
D, O, RANK = 64, 32, 4  # noqa: E741
OWN, COMMON, SHARE = 8, 4, 0.3  # dims of the two subspaces; weight of the common one
LR = 1e-2


def moram(**fields):
    own = {"rank": RANK, "alpha": RANK, "k": 4, "temperature": 0.05, "threshold": 0.2}
    return MoRAM(targets=("w_DO",), **own | fields)


LORA = LoRA(rank=RANK, alpha=RANK, targets=("w_DO",))
# name: (adapter of a task, the state of a task -> that in which the next one begins)
ARMS = {
    "one LoRA, reused": (LORA, "kept"),
    "a LoRA per task, summed": (LORA, "summed"),
    "MoRAM, k 4": (moram(), "bank"),
    "MoRAM, k 2": (moram(k=2), "bank"),
    "MoRAM, threshold 0.4": (moram(threshold=0.4), "bank"),
    "MoRAM, no threshold": (moram(threshold=None), "bank"),
    "MoRAM, temperature 0.01": (moram(temperature=0.01), "bank"),
    "MoRAM, temperature 0.5": (moram(temperature=0.5), "bank"),
}


class Matrix(Projector):
    """One matrix, w_DO [D, O]."""

    PROJECTED = ("w_DO",)

    def __init__(self, rngs):
        self.w_DO = param(rngs, (D, O), ("embed", None), fan_in=D, matrix=((0,), (1,)))


def made(adapter, seed):
    """(graph definition, parameters as nested dicts) of the matrix and an adapter."""
    module = Matrix(nnx.Rngs(params=seed))
    attach(module, adapter, nnx.Rngs(params=seed + SEEDS))
    graphdef, params, _ = split_params(module)
    return graphdef, nnx.to_pure_dict(params)


def make_tasks(seed):
    """(own subspaces [T, D, OWN], common one [T, D, COMMON], changes [T, D, O])."""
    rng = np.random.default_rng(seed)
    own_TDC = np.linalg.qr(rng.normal(size=(TASKS, D, OWN)))[0]
    common_DC = np.linalg.qr(rng.normal(size=(D, COMMON)))[0]
    left_TDR = rng.normal(size=(TASKS, D, RANK)) / D**0.5
    right_TRO = rng.normal(size=(TASKS, RANK, O)) / RANK**0.5
    common_TDC = np.broadcast_to(common_DC, (TASKS, D, COMMON))
    return own_TDC, common_TDC, left_TDR @ right_TRO


def stacked(trees):
    return jax.tree.map(lambda *a: jnp.stack(a).astype(jnp.float32), *trees)


def batch(task, key, size):
    """(inputs [B, D], the change that the task makes to their outputs [B, O])."""
    own_DC, common_DC, change_DO = task
    keys = jax.random.split(key)
    x_BD = jax.random.normal(keys[0], (size, OWN)) @ own_DC.T
    x_BD += SHARE * jax.random.normal(keys[1], (size, COMMON)) @ common_DC.T
    return x_BD, x_BD @ change_DO


def change_of(graphdef, params, w_DO, x_BD, mode):
    """The outputs for some inputs, less those of the first matrix."""
    made = nnx.merge(graphdef, params)
    y_BLO = project(made, "w_DO", x_BD[None], Context.of(x_BD[None], mode=mode))
    return y_BLO[0] - x_BD @ w_DO


def learn(graphdef, params, w_DO, task, key):
    """Train the new parameters of the adapter on one task."""
    adapter = params["adapters"]["w_DO"]
    tx = optax.adamw(optax.cosine_decay_schedule(LR, STEPS), weight_decay=0.0)

    def merged(own):
        return params | {"adapters": {"w_DO": adapter | own}}

    def step(carry, key):
        own, opt = carry
        x_BD, target_BO = batch(task, key, BATCH)

        def loss(own):
            y_BO = change_of(graphdef, merged(own), w_DO, x_BD, "train")
            return jnp.mean((y_BO - target_BO) ** 2)

        updates, opt = tx.update(jax.grad(loss)(own), opt, own)
        return (optax.apply_updates(own, updates), opt), None

    own = {name: adapter[name] for name in ("a_INR", "b_NRO")}
    (own, _), _ = jax.lax.scan(step, (own, tx.init(own)), jax.random.split(key, STEPS))
    return merged(own)


def score(graphdef, params, w_DO, task, key):
    """1 - the squared error over that of no change at all: 1 is perfect."""
    x_BD, target_BO = batch(task, key, HELD_OUT)
    y_BO = change_of(graphdef, params, w_DO, x_BD, "eval")
    return 1 - jnp.sum((y_BO - target_BO) ** 2) / jnp.sum(target_BO**2)


def next_start(how, adapter, params, fresh):
    """The parameters that the next task begins with, from those of this one."""
    if how == "kept":
        return params
    if how == "bank":
        params = consolidated(params, adapter.alpha / adapter.rank)
    else:  # summed: the change of the LoRA is merged into the matrix
        own = params["adapters"]["w_DO"]
        change_DO = jnp.einsum("dnr,nro->do", own["a_INR"], own["b_NRO"])
        params = {"w_DO": params["w_DO"] + change_DO, "adapters": {"w_DO": {}}}
    own = fresh["adapters"]["w_DO"] | params["adapters"]["w_DO"]
    return {"w_DO": params["w_DO"], "adapters": {"w_DO": own}}


def scores(adapter, how) -> np.ndarray:
    """The scores of one arm after each task, on each task, [S, T, J]."""
    tasks_S = stacked(map(make_tasks, range(SEEDS)))
    keys_S = jax.random.split(jax.random.key(0), SEEDS)
    params_S, rows = None, []
    for t in range(TASKS):
        if how == "bank":
            adapter = dataclasses.replace(adapter, bank=t * RANK)
        graphdefs, fresh = zip(
            *(made(adapter, 100 * t + s) for s in range(SEEDS)), strict=True
        )
        fresh_S = stacked(fresh)
        if t == 0:
            w_S, params_S = fresh_S["w_DO"], fresh_S
        else:
            start = functools.partial(next_start, how, adapter)
            params_S = jax.vmap(start)(params_S, fresh_S)

        def task(params, w_DO, tasks, key, graphdef=graphdefs[0], t=t):
            own = jax.tree.map(lambda a: a[t], tasks)
            keys = jax.random.split(jax.random.fold_in(key, t))
            params = learn(graphdef, params, w_DO, own, keys[0])
            score_of = functools.partial(score, graphdef, params, w_DO, key=keys[1])
            return params, jax.vmap(score_of)(tasks)

        params_S, row_SJ = jax.jit(jax.vmap(task))(params_S, w_S, tasks_S, keys_S)
        rows.append(np.asarray(row_SJ))
    return np.stack(rows, axis=1)


def table(arms: dict) -> str:
    """The results in Markdown: mean ± standard deviation over seeds."""
    columns = ("learned", "last", "forgetting", "transfer", "average", "bwt")
    lines = [f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, arm in arms.items():
        cells = [f"{np.mean(arm[c]):.3f} ± {np.std(arm[c]):.3f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(curves: dict) -> None:
    """Draw the mean score on the tasks learned so far, after each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, TASKS + 1), curve, marker="o", label=name)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("mean score on them (1 is perfect)")
    axes.set_xticks(range(1, TASKS + 1))
    axes.legend(fontsize=7)
    figure.savefig(HERE / "plot.png", dpi=110)


def main() -> None:
    arms, curves = {}, {}
    for name, (adapter, how) in ARMS.items():
        score_STJ = scores(adapter, how)
        found = [figures(score_TJ) for score_TJ in score_STJ]
        arms[name] = {key: [round(one[key], 4) for one in found] for key in found[0]}
        mean_TJ = score_STJ.mean(axis=0)
        curves[name] = [
            round(float(mean_TJ[t, : t + 1].mean()), 4) for t in range(TASKS)
        ]
        print(name, flush=True)
    settings = {"seeds": SEEDS, "steps": STEPS, "batch": BATCH, "lr": LR}
    results = {"settings": settings, "arms": arms, "score on learned tasks": curves}
    text = json.dumps(results, indent=1) + "\n"
    (HERE / "results.json").write_text(text, encoding="utf-8")
    plot(curves)
    print(table(arms))


if __name__ == "__main__":
    main()
