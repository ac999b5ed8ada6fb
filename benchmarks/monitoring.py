"""The cost of watching a run: the training step with its statistics and without.

  python -m benchmarks.monitoring --config=configs/quickstart.py [--config.a.b=value]
      [--repeats=30] [--json=FILE]

"On" is the step that `moex train` runs. "Off" is the same step asked for the new train
state and the loss alone: XLA then removes whatever only the other figures need. The
load that router biases follow, the guard and the losses stay in both. The two run in
turn in one process, in changing order; the figure is the median of the ratios of
neighbours, with a 95 % bootstrap interval. Next to it are the operations, bytes and
instructions of the compiled programs, which do not depend on the machine's load.

Then what the host does at a logged step: fetching the metrics, metrics.jsonl,
routing.jsonl and TensorBoard, over `log.every` steps. The device works meanwhile, so on
an accelerator this costs time only where the host is the slower one.
"""

import argparse
import dataclasses
import pathlib
import re
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import write_json
from moex.cli import split_config_args
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.model import accounting
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.sharding import shard_batch
from moex.train.job import make_job
from moex.train.log import RunLog
from moex.train.loop import Run

LIMIT = 0.02  # share of the step time, for everything together


def programs(job, args) -> dict:
    """The compiled step with and without its statistics."""
    step = job.train_step()
    shardings = jax.tree.map(lambda a: a.sharding, job.abstract_state())

    def without(*args):
        state, metrics = step(*args)
        return state, {"loss": metrics["loss"]}

    off = jax.jit(without, donate_argnums=0, out_shardings=(shardings, job.whole))
    jobs = {"on": step, "off": off}
    return {name: f.lower(*args).compile() for name, f in jobs.items()}


def counts(compiled) -> dict[str, float]:
    """Operations, bytes and instructions of a program, as XLA counts them."""
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    instructions = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.M)
    return {
        "flops": cost.get("flops", 0.0),
        "bytes": cost.get("bytes accessed", 0.0),
        "instructions": len(instructions),
    }


def measure(compiled: dict, job, state, key, repeats: int) -> tuple[dict, dict]:
    """({name: seconds of every step}, metrics of the last step with statistics)."""
    states = {"on": state, "off": jax.tree.map(lambda a: a.copy(), state)}
    batches = job.batches(0)
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    shown: dict = {}
    for i in range(repeats + 2):
        batch = shard_batch(next(batches), job.mesh)
        for name in ("on", "off") if i % 2 else ("off", "on"):
            began = time.perf_counter()
            states[name], metrics = compiled[name](
                states[name], np.int32(i), key, batch
            )
            jax.block_until_ready((states[name], metrics))
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
            shown = metrics if name == "on" else shown
    return seconds, shown


def interval(on: list[float], off: list[float], draws=2000) -> dict[str, float]:
    """Median of the paired ratios and its 95 % bootstrap interval."""
    ratios = np.divide(on, off)
    rng = np.random.default_rng(0)
    sample = rng.choice(ratios, size=(draws, len(ratios)))
    low, high = np.percentile(np.median(sample, axis=1), (2.5, 97.5))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def writing(job, metrics, repeats: int) -> dict[str, dict[str, float]]:
    """Median host seconds of a logged step, without a heat map and with one."""
    cost = accounting.model_cost(job.cfg.model, job.spec, job.cfg.seq_len)
    found: dict[str, dict[str, float]] = {}
    for detail in ("brief", "detailed"):
        cfg = job.cfg.copy_and_resolve_references()
        cfg.steps = 10**9
        cfg.log = dataclasses.replace(
            job.cfg.log, detail=detail, images_every=0, tensorboard=True
        )
        found[detail] = {}
        for name in ("line", "image"):
            with tempfile.TemporaryDirectory() as folder:
                log = RunLog(folder, cfg, step=0, total_steps=cfg.steps)
                log.line = lambda text: None  # type: ignore[method-assign]
                own = dataclasses.replace(job, cfg=cfg)
                log.begin(0)
                none: Any = None  # nothing is saved
                place = RunDir(folder)
                run = Run(own, place, none, cost, log, {}, 0, Consumed())
                cfg.log.images_every = int(name == "image")
                parts = dict.fromkeys(("step", "data", "dispatch", "wait", "other"), 1)
                seconds = []
                for i in range(1, repeats + 2):
                    fresh = jax.tree.map(lambda a: a.copy(), metrics)
                    jax.block_until_ready(fresh)
                    began = time.perf_counter()
                    for leaf in jax.tree.leaves(fresh):
                        leaf.copy_to_host_async()
                    run._log_step(i, jax.device_get(fresh), parts, 1)
                    seconds.append(time.perf_counter() - began)
                log.close()
            found[detail][name] = statistics.median(seconds[1:])
    return found


def report(job, repeats: int) -> dict:
    """All figures as plain data."""
    state, key = job.init_state(), jax.random.key(0)
    batch = shard_batch(next(job.batches(0)), job.mesh)
    compiled = programs(job, (state, np.int32(0), key, batch))
    seconds, metrics = measure(compiled, job, state, key, repeats)
    on, off = (statistics.median(seconds[name]) for name in ("on", "off"))
    of_on, of_off = counts(compiled["on"]), counts(compiled["off"])
    ratio = interval(seconds["on"], seconds["off"])
    host = writing(job, metrics, min(repeats, 20))
    log = job.cfg.log
    for row in host.values():
        per_step = row["line"] / log.every
        if log.images_every:
            per_step += (row["image"] - row["line"]) / log.images_every
        row["share"] = per_step / on
    return {
        "config": {"log.every": log.every, "log.images_every": log.images_every},
        "layers": sum(len(v["load_frac_E"]) for v in metrics["layers"].values()),
        "step_s": {"on": on, "off": off},
        "ratio": ratio,
        "counts": {"on": of_on, "off": of_off},
        "added": {k: of_on[k] / of_off[k] - 1 for k in of_on if of_off[k]},
        "host_s": host,
        "total_share": ratio["median"] - 1 + host[log.detail]["share"],
        "repeats": repeats,
    }


def table(figures: dict, detail: str) -> str:
    """The figures for people."""
    step, ratio, added = figures["step_s"], figures["ratio"], figures["added"]
    rows = [
        f"step with statistics     {1e3 * step['on']:.2f} ms",
        f"step without             {1e3 * step['off']:.2f} ms",
        f"paired ratio             {ratio['median']:.4f} "
        f"(95 %: {ratio['low']:.4f} to {ratio['high']:.4f})",
    ]
    for name, value in added.items():
        both = [figures["counts"][k][name] for k in ("off", "on")]
        rows.append(f"{name:<25}{100 * value:+.3f} %  ({both[0]:.6g} -> {both[1]:.6g})")
    for name, row in figures["host_s"].items():
        rows.append(
            f"host, {name:<19}{1e3 * row['line']:.2f} ms a logged step, "
            f"{1e3 * row['image']:.1f} ms with a heat map: "
            f"{100 * row['share']:.3f} % of the step time"
        )
    rows.append(
        f"all together, {detail:<11}{100 * figures['total_share']:.2f} % "
        f"(aim: {100 * LIMIT:g} %)"
    )
    return "\n".join(rows)


def main() -> None:
    rest, config_args = split_config_args(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(rest)
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: must be at least 1.")
    try:
        job = make_job(load_config(config_args))
    except ConfigError as e:
        raise SystemExit(f"error: {e}") from None
    with jax.set_mesh(job.mesh):
        figures = report(job, args.repeats)
    print(table(figures, job.cfg.log.detail))
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
