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
# The rank of a LoRA with as many parameters as MoRAM has after all tasks.
WIDE = dataclasses.replace(LORA, rank=TASKS * RANK, alpha=TASKS * RANK)
# name: (adapter of a task, the state of a task -> that in which the next one begins)
ARMS = {
    "one LoRA, reused": (LORA, "kept"),
    "one LoRA of rank 20, reused": (WIDE, "kept"),
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


class Task:
    """The tasks of one seed: numpy arrays, equal for all arms."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.own_TDC = np.linalg.qr(self.rng.normal(size=(TASKS, D, OWN)))[0]
        self.common_DC = np.linalg.qr(self.rng.normal(size=(D, COMMON)))[0]
        left_TDR = self.rng.normal(size=(TASKS, D, RANK)) / D**0.5
        right_TRO = self.rng.normal(size=(TASKS, RANK, O)) / RANK**0.5
        self.change_TDO = left_TDR @ right_TRO

    def batches(self, number, size):
        """(inputs [T, number, B, D], the changes of their outputs [..., O])."""
        at = (TASKS, number * size)
        x_TBD = self.rng.normal(size=(*at, OWN)) @ np.swapaxes(self.own_TDC, 1, 2)
        x_TBD += SHARE * self.rng.normal(size=(*at, COMMON)) @ self.common_DC.T
        y_TBO = x_TBD @ self.change_TDO
        return [np.float32(a.reshape(TASKS, number, size, -1)) for a in (x_TBD, y_TBO)]


def stacked(trees):
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def change_of(graphdef, params, w_DO, x_BD, mode):
    """The outputs for some inputs, less those of the first matrix."""
    made = nnx.merge(graphdef, params)
    y_BLO = project(made, "w_DO", x_BD[None], Context.of(x_BD[None], mode=mode))
    return y_BLO[0] - x_BD @ w_DO


def learn(graphdef, params, w_DO, batches):
    """Train the new parameters of the adapter on the batches of one task."""
    adapter = params["adapters"]["w_DO"]
    tx = optax.adamw(optax.cosine_decay_schedule(LR, STEPS), weight_decay=0.0)

    def merged(own):
        return params | {"adapters": {"w_DO": adapter | own}}

    def step(carry, batch):
        own, opt = carry
        x_BD, target_BO = batch

        def loss(own):
            y_BO = change_of(graphdef, merged(own), w_DO, x_BD, "train")
            return jnp.mean((y_BO - target_BO) ** 2)

        updates, opt = tx.update(jax.grad(loss)(own), opt, own)
        return (optax.apply_updates(own, updates), opt), None

    own = {name: adapter[name] for name in ("a_INR", "b_NRO")}
    (own, _), _ = jax.lax.scan(step, (own, tx.init(own)), batches)
    return merged(own)


def score(graphdef, params, w_DO, x_BD, target_BO):
    """1 - the squared error over that of no change at all: 1 is perfect."""
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


def scores(adapter, how, learned_S, scored_S) -> np.ndarray:
    """The scores of one arm after each task, on each task, [S, T, J].

    Args:
      adapter, how: as in `ARMS`.
      learned_S, scored_S: batches of `Task` for all seeds.
    """
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

        def task(params, w_DO, own, scored, graphdef=graphdefs[0]):
            params = learn(graphdef, params, w_DO, own)
            score_of = functools.partial(score, graphdef, params, w_DO)
            return params, jax.vmap(score_of)(*scored)

        own_S = [a[:, t] for a in learned_S]
        params_S, row_SJ = jax.jit(jax.vmap(task))(params_S, w_S, own_S, scored_S)
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
    tasks = [Task(seed) for seed in range(SEEDS)]
    learned_S = stacked([task.batches(STEPS, BATCH) for task in tasks])
    scored_S = stacked([task.batches(1, HELD_OUT) for task in tasks])
    scored_S = [a[:, :, 0] for a in scored_S]
    for name, (adapter, how) in ARMS.items():
        score_STJ = scores(adapter, how, learned_S, scored_S)
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
