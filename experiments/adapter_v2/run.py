"""Do disjoint parameters and early fusion keep captions from spoiling instructions?

  python -m experiments.adapter_v2.run [--out=DIR] [--seeds=3]

Trains a small model on text, then its adapters on instructions and captions in several
ways. Runs that are already in --out are not repeated. Writes results.json, table.md and
plot.png next to this file.
"""

import argparse
import json
import pathlib
import statistics

import jax

from experiments.adapter_v2.scenes import WIDTH, LateFusion, Reading64, Scenes
from moex import LM, AdamW, Attention, Dense, Optim, Segment
from moex.adapters.v2 import AdapterV2, Visual
from moex.configs import base
from moex.runs.directory import RunDir
from moex.runs.keys import Checkpoint, Eval, Log
from moex.runs.score import score_run
from moex.train.training import train

HERE = pathlib.Path(__file__).parent
BASE_STEPS, STEPS, CAPTIONS = 400, 100, 10  # caption batches for each of instructions
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


def config(kinds, steps: int, seed: int):
    cfg = base.get_config()
    cfg.task, cfg.data = (
        Reading64(),
        Scenes(kinds=kinds, one_source=len(kinds) > 1, threads=0),
    )
    cfg.model = LM(
        dim=32,
        vocab=64,
        attention=Attention(heads=4),
        layers=(Segment(pattern=(Dense(hidden=64),), repeat=4),),
    )
    cfg.steps, cfg.seed, cfg.batch_size, cfg.seq_len = steps, seed, 8, 24
    cfg.kernels = "xla"
    cfg.optim = Optim(rule=AdamW(), lr=3e-3, warmup_steps=20, spike_factor=None)
    cfg.eval, cfg.checkpoint = Eval(every=0, sequences=None), Checkpoint(every=0)
    cfg.log = Log(every=50, images_every=0, sample_tokens=0, tensorboard=False)
    return cfg


def trained(cfg, folder: pathlib.Path) -> dict:
    """The held-out loss of each kind of sequence, nats per token of the answer."""
    told = folder / "domains.json"
    if not told.is_file():
        train(cfg, folder, say=lambda line: None)
        scored = score_run(folder, RunDir(folder).config())["domains"]
        told.write_text(json.dumps(scored) + "\n", encoding="utf-8")
    return json.loads(told.read_text(encoding="utf-8"))


def arms(seed: int, out: pathlib.Path) -> dict:
    """The losses of all arms for one seed."""
    start = out / f"base-{seed}"
    found = {"base": trained(config((("text", 1.0),), BASE_STEPS, seed), start)}
    for name, (adapter, kinds, steps) in ARMS.items():
        cfg = config(kinds, steps, seed)
        cfg.init_from, cfg.model.adapter = str(start), adapter
        folder = out / f"{name.replace(' ', '-').replace(':', '')}-{seed}"
        found[name] = trained(cfg, folder)
        print(seed, name, found[name], flush=True)
    return found


def table(results: dict) -> str:
    """The losses as Markdown: mean and the lowest and highest of the seeds."""
    lines = [
        "| adapters | steps | instructions | captions |",
        "|---|---|---|---|",
    ]
    for name, (_, _, steps) in ARMS.items():
        cells = [name, str(steps)]
        for kind in ("instruction", "caption"):
            own = [run[name].get(kind) for run in results.values()]
            if None in own:
                cells.append("–")
                continue
            mean, low, high = statistics.mean(own), min(own), max(own)
            cells.append(f"{mean:.4f} ({low:.4f} to {high:.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    names = list(ARMS)[::-1]
    for axis, kind in zip(axes, ("instruction", "caption"), strict=True):
        for i, name in enumerate(names):
            for run in results.values():
                if kind in run[name]:
                    axis.plot(run[name][kind], i, "o", color="C0", alpha=0.7)
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(f"held-out loss on {kind}s, nats per token")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="runs/adapter_v2")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    out = args.out.absolute()
    jax.config.update("jax_compilation_cache_dir", str(out / "programs"))
    results = {str(seed): arms(seed, out) for seed in range(args.seeds)}
    text = json.dumps({"losses": results}, indent=1) + "\n"
    (HERE / "results.json").write_text(text, encoding="utf-8")
    (HERE / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, HERE / "plot.png")
    print(table(results))


if __name__ == "__main__":
    main()
