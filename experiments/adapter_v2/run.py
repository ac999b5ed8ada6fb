"""Do disjoint parameters and early fusion keep captions from spoiling instructions?

  python -m experiments.adapter_v2.run [--seeds=3]

Trains a small model on text, then its adapters on instructions and captions in several
ways. Writes results.json, table.md and plot.png next to this file.
"""

import argparse
import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
import matplotlib
import ml_collections
from matplotlib import pyplot

from experiments.adapter_v2.scenes import VOCAB, WIDTH, LateFusion, Made, Scenes
from experiments.adapter_v2.scenes import SceneModelling as Task
from moex import LM, AdamW, Attention, Compute, Dense, Loss, Optim, Segment
from moex.adapters.v2 import AdapterV2, Visual
from moex.data.batches import stack, train_iterator
from moex.model.optim import make_optimizer
from moex.model.spec import init_guard, init_params, model_spec
from moex.runs.base import with_base
from moex.runs.score import make_eval_step
from moex.train.step import make_train_step

matplotlib.use("Agg")
TASK = Task()
HERE = pathlib.Path(__file__).parent
BASE_STEPS, STEPS, CAPTIONS = 500, 150, 10  # caption batches for each of instructions
BATCH, LENGTH, LR = 8, 24, 3e-3
ALONE, BOTH = (("instruction", 1.0),), (("instruction", 1.0), ("caption", CAPTIONS))
VISUAL = Visual(width=WIDTH)
OFF = {"bias": False, "scale_side": None, "norms": False, "targets": ()}

# name: (adapter, what it is trained on, steps)
ARMS = {
    "instructions only": (AdapterV2(layers=3), ALONE, STEPS),
    "V2: early, disjoint": (
        AdapterV2(layers=3, visual=VISUAL),
        BOTH,
        STEPS * (1 + CAPTIONS),
    ),
    "V1: late, all on both": (
        LateFusion(layers=3, visual=Visual(width=WIDTH, disjoint=False)),
        BOTH,
        STEPS * (1 + CAPTIONS),
    ),
    "early, all on both": (
        AdapterV2(layers=3, visual=Visual(width=WIDTH, disjoint=False)),
        BOTH,
        STEPS * (1 + CAPTIONS),
    ),
    "biases and scales": (AdapterV2(prompt_length=None), ALONE, STEPS),
    "biases, scales on inputs": (
        AdapterV2(prompt_length=None, scale_side="input"),
        ALONE,
        STEPS,
    ),
    "prompts": (AdapterV2(layers=3, **OFF), ALONE, STEPS),
}


def model(adapter=None) -> LM:
    return LM(
        dim=32,
        vocab=VOCAB,
        attention=Attention(heads=4),
        layers=(Segment(pattern=(Dense(hidden=64),), repeat=4),),
        adapter=adapter,
    )


def batches(cfg: LM, kinds, steps: int, seed: int) -> dict:
    """The batches of a run as `moex train` orders them, each array [steps, B, ...]."""
    run = ml_collections.ConfigDict(type_safe=False, convert_dict=False)
    data = Scenes(kinds=kinds, one_source=True, threads=0)
    run.data, run.model, run.seq_len = data, cfg, LENGTH
    made = TASK.prepare(run)
    read = train_iterator(made, batch_size=BATCH, seed=seed)
    return stack([next(read) for _ in range(steps)])


def held_out(cfg: LM, kind: str) -> dict:
    """All held-out sequences of a kind as one batch."""
    made = Made(kind, 1, LENGTH, 0, bool(cfg.adapter and cfg.adapter.fields()))
    return stack([made[i] for i in range(len(made))])


def learn(cfg: LM, starts: dict, kinds, steps: int, seeds: int):
    """Train from the parameters `starts`, stacked over seeds, all seeds at once.

    The step is that of `moex train`; all steps of all seeds are one program.

    Returns:
      (parameters stacked over seeds, {kind: held-out loss of each seed}).
    """
    spec = model_spec(cfg)
    optim = Optim(rule=AdamW(), lr=LR, warmup_steps=20, spike_factor=None)
    tx, _ = make_optimizer(optim, steps, spec.params, spec.info)
    how = Compute(kernels="xla")
    step = make_train_step(
        *(TASK, spec, tx, Loss()),
        grad_accum=1,
        num_domains=len(kinds),
        optim=optim,
        compute=how,
    )

    def one(start, key, batches):
        params, state = init_params(cfg, key)
        params = with_base(start, params)
        own = {"params": params, "opt": tx.init(params), "state": state}

        def advance(own, inputs):
            return step(own, inputs[0], key, inputs[1])[0], None

        inputs = (jnp.arange(steps), batches)
        return jax.lax.scan(advance, own | {"guard": init_guard()}, inputs)[0]["params"]

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    own = stack([batches(cfg, kinds, steps, seed) for seed in range(seeds)])
    params = jax.jit(jax.vmap(one))(starts, keys, own)
    score = make_eval_step(TASK, spec, num_domains=1, compute=how)

    def loss(batch):
        sums = jax.jit(jax.vmap(score, (0, None, None)))(params, spec.state, batch)
        return (sums["nll"] / sums["tokens"]).tolist()

    return params, {kind: loss(held_out(cfg, kind)) for kind, _ in kinds}


def table(results: dict) -> str:
    """The losses as Markdown: the mean, and the lowest and highest of the seeds."""
    lines = ["| adapters | steps | instructions | captions |", "|---|---|---|---|"]
    for name, (_, _, steps) in ARMS.items():
        cells = [name, str(steps)]
        for kind in ("instruction", "caption"):
            own = results[name].get(kind)
            told = (
                own and f"{statistics.mean(own):.4f} ({min(own):.4f} to {max(own):.4f})"
            )
            cells.append(told or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: pathlib.Path) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    names = list(ARMS)[::-1]
    for axis, kind in zip(axes, ("instruction", "caption"), strict=True):
        for i, name in enumerate(names):
            own = results[name].get(kind, [])
            axis.plot(own, [i] * len(own), "o", color="C0", alpha=0.7)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(f"held-out loss on {kind}s, nats per token")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    results = {}
    base, results["base"] = learn(model(), {}, (("text", 1.0),), BASE_STEPS, seeds)
    print("base", results["base"], flush=True)
    for name, (adapter, kinds, steps) in ARMS.items():
        _, results[name] = learn(model(adapter), base, kinds, steps, seeds)
        print(name, results[name], flush=True)
        text = json.dumps({"seeds": seeds, "losses": results}, indent=1) + "\n"
        (HERE / "results.json").write_text(text, encoding="utf-8")
    plot(results, HERE / "plot.png")
    print(table(results))


if __name__ == "__main__":
    main()
