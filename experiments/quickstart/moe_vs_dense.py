"""Does the quickstart's MoE beat a dense model with the same active parameters?

  python -m experiments.quickstart.moe_vs_dense [--seeds=3] [--steps=N] [--out=DIR]

Same data, order, steps, optimizer and attention; the dense feed-forward is as wide as
the experts that one token uses. Runs that are already in --out are not repeated.
Writes results.json and plot.png next to this file.
"""

import argparse
import json
import pathlib
import statistics

import matplotlib
import ml_collections

from moex.configs import quickstart
from moex.model import accounting
from moex.train.job import make_job
from moex.train.training import train

HERE = pathlib.Path(__file__).parent
KINDS = ("moe", "dense")


def config(kind: str, seed: int, steps: int | None) -> ml_collections.ConfigDict:
    cfg = quickstart.get_config(f"ffn={kind}")
    cfg.seed = seed
    cfg.steps = steps or cfg.steps
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    cfg.checkpoint.every = 0
    return cfg


def run(kind: str, seed: int, steps: int | None, out: pathlib.Path) -> dict:
    """Train one model; returns its figures from metrics.jsonl."""
    workdir = out / f"{kind}-{seed}"
    cfg = config(kind, seed, steps)
    log = workdir / "metrics.jsonl"
    if not log.exists() or f'"step": {cfg.steps}, "nll"' not in log.read_text(
        encoding="utf-8"
    ):
        train(cfg, workdir)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    return {
        "seed": seed,
        "steps": cfg.steps,
        "nll": evals[-1]["nll"],
        "bits_per_byte": evals[-1]["bits_per_byte"],
        "curve": [[e["step"], e["nll"]] for e in evals],
        "max_violation": evals[-1].get("max_violation"),
    }


def sizes(kind: str) -> dict:
    """Parameters of a kind: total, active per token, and FLOPs per token."""
    cfg = config(kind, 0, None)
    job = make_job(cfg, log=lambda *_: None)
    cost = accounting.model_cost(cfg.model, job.spec, cfg.seq_len)
    return {
        "params": cost.num_params,
        "active_params": cost.num_active,
        "train_mflop_per_token": cost.train_flops / 1e6,
    }


def summary(runs: list[dict]) -> dict:
    values = [r["nll"] for r in runs]
    bpb = [r["bits_per_byte"] for r in runs]
    return {
        "nll_mean": statistics.mean(values),
        "nll_std": statistics.stdev(values) if len(values) > 1 else None,
        "bits_per_byte_mean": statistics.mean(bpb),
    }


def plot(results: dict) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for kind, color in zip(KINDS, ("tab:red", "tab:blue"), strict=True):
        for i, one in enumerate(results[kind]["runs"]):
            # The last point scores all held-out data, the others a part of it.
            points = one["curve"][:-1]
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.7,
                      label=kind if i == 0 else None)  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="held-out loss, nats per token")
    axes.legend()
    figure.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: those of the quickstart")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/mvd"))
    args = parser.parse_args()
    results = {kind: {"sizes": sizes(kind), "runs": []} for kind in KINDS}
    for seed in range(args.seeds):
        for kind in KINDS:
            one = run(kind, seed, args.steps, args.out)
            results[kind]["runs"].append(one)
            print(kind, seed, one["nll"], one["bits_per_byte"], flush=True)
    for kind in KINDS:
        results[kind]["summary"] = summary(results[kind]["runs"])
    text = json.dumps(results, indent=1)
    (HERE / "results.json").write_text(text + "\n", encoding="utf-8")
    plot(results)
    print(json.dumps({k: results[k]["summary"] for k in KINDS}, indent=1))


if __name__ == "__main__":
    main()
