"""Where the time of a training step goes: data, forward and backward, optimizer.

  python -m benchmarks.train_step --config=configs/quickstart.py [--config.a.b=value]
      [--repeats=10] [--step-only] [--random=VOCAB] [--json=FILE]

Prints a table and writes JSON: tokens/s, medians of the parts over `--repeats` steps
(spread: 10th and 90th percentile), compile time, peak memory, device, versions, commit.
The parts are timed interleaved in one process; the whole step is one program, so its
time is below the sum of the parts. `--step-only` compiles and times the whole step and
nothing else. `--random=VOCAB` trains on one batch of random tokens, and prepares no
data: for a machine without text, or a tokenizer that would take longer than the rest.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks.common import environment
from moex.cli import split_config_args
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.data.batches import stack
from moex.data.packing import blank_example
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bytes
from moex.model import accounting
from moex.process import memory_bytes
from moex.sharding import shard_batch
from moex.train.job import make_job


def parts(job):
    """The programs that are timed: (name, function of (state, batch))."""
    cfg, spec = job.cfg, job.spec

    def loss(params, state, batch):
        ctx = cfg.task.context(batch, step=0, compute=job.compute(train=True))
        model = spec.merge(params, state)
        domains = job.num_domains
        return cfg.task.loss(model, ctx, batch, cfg.loss, num_domains=domains)

    gradient = jax.grad(loss, has_aux=True)
    forward = jax.jit(lambda s, b: loss(s["params"], s["state"], b)[0])
    backward = jax.jit(lambda s, b: gradient(s["params"], s["state"], b)[0])
    update = jax.jit(lambda g, s: job.tx.update(g, s["opt"], s["params"]))
    return forward, backward, update


def random_batch(B: int, L: int, V: int) -> dict:
    """One document of random tokens per row, as the data pipeline has it."""
    ids = np.random.default_rng(0).integers(V, size=(B, L + 1), dtype=np.int32)
    return stack([blank_example(L)] * B) | {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment": np.ones((B, L), np.int32),
        "position": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        "loss_mask": np.ones((B, L), np.float32),
    }


def random_job(cfg, vocab: int):
    """The job of a config whose data is not read; its text is a stand-in."""
    cfg.model.vocab = vocab
    with tempfile.TemporaryDirectory() as folder:
        text = Text(paths=(__file__,), holdout=0.0)
        cfg.data = Data(sources=(text,), tokenizer=Bytes(), cache_dir=folder)
        return make_job(cfg, log=lambda line: None)


def timed(function, *args) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def measure(job, repeats: int, batches, step_only: bool) -> dict:
    """Seconds of every part, one list per part."""
    state = job.init_state()
    key = jax.random.key(0)
    batch = shard_batch(next(batches), job.mesh)
    began = time.perf_counter()
    step = job.train_step().lower(state, np.int32(0), key, batch).compile()
    compile_s = time.perf_counter() - began
    if not step_only:
        forward, backward, update = parts(job)
        grads = backward(state, batch)
    seconds: dict = {}
    for i in range(repeats + 2):
        row = {}
        if not step_only:
            began = time.perf_counter()
            batch = shard_batch(next(batches), job.mesh)
            row = {
                "data": time.perf_counter() - began,
                "forward": timed(forward, state, batch),
                "gradient": timed(backward, state, batch),
                "optimizer": timed(update, grads, state),
            }
        began = time.perf_counter()
        state, metrics = step(state, np.int32(i), key, batch)
        jax.block_until_ready((state, metrics))
        row["step"] = time.perf_counter() - began
        if i >= 2:  # the first two warm caches and compile
            for name, value in row.items():
                seconds.setdefault(name, []).append(value)
    return {"compile_s": compile_s, "seconds": seconds}


def report(job, measured: dict) -> dict:
    """The figures as plain data."""
    cfg = job.cfg
    tokens = cfg.batch_size * cfg.seq_len
    cost = accounting.model_cost(cfg.model, job.spec, cfg.seq_len)
    spread = {
        name: dict(
            zip(
                ("p10", "median", "p90"),
                np.percentile(values, (10, 50, 90)).tolist(),
                strict=True,
            )
        )
        for name, values in measured["seconds"].items()
    }
    step_s = spread["step"]["median"]
    flops = tokens / step_s * cost.train_flops
    peak = accounting.device_peak_flops()
    return {
        "tokens_per_s": tokens / step_s,
        "model_gflops_per_s": flops / 1e9,
        "mfu": flops / peak / jax.device_count() if peak else None,
        "seconds": spread,
        "compile_s": measured["compile_s"],
        "peak_memory_gib": memory_bytes() / 2**30,
        "tokens_per_step": tokens,
        "params": cost.num_params,
        "active_params": cost.num_active,
        "environment": environment(),
    }


def table(figures: dict) -> str:
    """The figures for people."""
    rows = [f"{'part':<12}{'p10 ms':>10}{'median ms':>12}{'p90 ms':>10}"]
    for name, s in figures["seconds"].items():
        values = (1e3 * s["p10"], 1e3 * s["median"], 1e3 * s["p90"])
        rows.append("{:<12}{:>10.1f}{:>12.1f}{:>10.1f}".format(name, *values))
    mfu = figures["mfu"]
    rows += [
        f"tokens/s         {figures['tokens_per_s']:,.0f}",
        f"model GFLOP/s    {figures['model_gflops_per_s']:,.1f}",
        f"MFU              {'peak not known' if mfu is None else f'{100 * mfu:.1f} %'}",
        f"compile          {figures['compile_s']:.1f} s",
        f"peak memory      {figures['peak_memory_gib']:.2f} GiB",
    ]
    return "\n".join(rows)


def main() -> None:
    rest, config_args = split_config_args(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--step-only", action="store_true")
    parser.add_argument("--random", type=int, metavar="VOCAB")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(rest)
    try:
        cfg = load_config(config_args)
        job = random_job(cfg, args.random) if args.random else make_job(cfg)
    except ConfigError as e:
        raise SystemExit(f"error: {e}") from None
    if args.random:
        batch = random_batch(cfg.batch_size, cfg.seq_len, args.random)
        batches = itertools.repeat(batch)
    else:
        batches = job.batches(0)
    with jax.set_mesh(job.mesh):
        measured = measure(job, args.repeats, batches, args.step_only)
        figures = report(job, measured)
    print(table(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
