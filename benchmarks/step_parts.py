"""A training step by part, each compared with its floor in FLOPs and bytes.

  python -m benchmarks.step_parts [--experts=8|64] [--config=configs/quickstart.py ...]
      [--repeats=9] [--json=FILE]

`--experts` is the step of `benchmarks.train_step_peers`; `--config` is any run whose
blocks are of one kind. A part runs forward and backward by itself, for one layer, and
counts for all layers; "the rest" is the whole step less its parts: embedding, residual
stream, figures, the guard of the update. Runs are interleaved in one process.

The floor of a part is the larger of its FLOPs over the rate of a large dense product
and of its bytes over the speed of a copy, both measured in the same process. The floor
of the optimizer is their sum: its products work on what lies in the cache. FLOPs are
those of `moex.model.accounting`, backward twice forward. Bytes are weights (read twice,
gradients written) and what goes in and out; of the optimizer what each rule must read
and write. Muon's orthogonalisation counts its symmetric products as half.

T tokens of a batch · D model width
"""

import argparse
import pathlib
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import common
from kernels_pallas import matmul
from moex.cli import split_config_args
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.model.accounting import model_cost
from moex.model.optim import Muon
from moex.model.paths import flat_paths
from moex.sharding import shard_batch
from moex.train.job import make_job

FLOAT = 4  # bytes


def peers_job(E: int):
    """The job that is compared with transformers, and its batch."""
    from benchmarks import train_step_peers as peers  # needs the extra `hf`

    job = peers.moex_job(E)
    return job, shard_batch(peers.random_batch(peers.B, peers.L, peers.V), job.mesh)


def config_job(config_args: list[str]):
    """The job of a run config, and its first batch."""
    job = make_job(load_config(config_args), log=lambda line: None)
    return job, shard_batch(next(job.batches(0)), job.mesh)


def rates() -> dict:
    """FLOP/s of a large product and bytes/s of a copy: the best of several runs."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    long = jnp.zeros(2**26)
    jobs = {
        "xla": jax.jit(lambda a: a @ a),
        "matmul": jax.jit(matmul),
        "copy": jax.jit(lambda x: x + 1),
    }
    args = {"xla": (a,), "matmul": (a, a), "copy": (long,)}
    runs = {n: (lambda n=n: jobs[n](*args[n])) for n in jobs}
    best = {n: min(t["wall"]) for n, t in common.measure(runs, 9).items()}
    product = min(best["xla"], best["matmul"])
    return {
        "flops_per_s": 2 * 2048**3 / product,
        "bytes_per_s": 2 * long.nbytes / best["copy"],
    }


def programs(job, batch) -> dict:
    """`{part: function}` of the parts that run by themselves."""
    cfg, spec, task = job.cfg, job.spec, job.cfg.task
    state, key = job.init_state(), jax.random.key(0)
    params, rest = state["params"], state["state"]
    compute = job.compute(train=True)
    block = spec.merge(params, rest).segments[0].blocks[0]
    graphdef, weights, other = nnx.split(block, nnx.Param, ..., graph=False)
    weights, other = jax.tree.map(lambda a: a[0], (weights, other))
    T = batch["segment"].shape
    x, dy = (jax.random.normal(k, (*T, cfg.model.dim)) for k in jax.random.split(key))

    def both(run):
        """Forward and backward of `run(block, ctx, x) -> y`."""

        @jax.jit
        def program(weights, other, batch, x, dy):
            ctx = task.context(batch, step=0, key=key, compute=compute)

            def call(weights, x):
                return run(nnx.merge(graphdef, weights, other), ctx, x)

            y, pull = jax.vjp(call, weights, x)
            return y, pull(dy)

        return lambda: program(weights, other, batch, x, dy)

    @jax.jit
    def head(w_DV, x, dy, batch):
        def loss(w_DV, x):
            logits = matmul(x, w_DV, implementation=compute.kernels)
            lse = jax.nn.logsumexp(logits, axis=-1)
            index = batch["targets"][..., None]
            return jnp.sum(lse - jnp.take_along_axis(logits, index, -1)[..., 0])

        return jax.value_and_grad(loss, (0, 1))(w_DV, x)

    w_DV = jax.random.normal(key, (cfg.model.dim, cfg.model.vocab)) * 0.02
    grads = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), params)

    def update(grads, opt, params):
        updates, opt = job.tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    update = jax.jit(update, donate_argnums=(1, 2))
    held = {"opt": jax.tree.map(jnp.copy, (state["opt"], params)), "step": state}
    step = job.train_step()

    def optimizer():
        opt, params = held["opt"]
        params, opt = update(grads, opt, params)
        held["opt"] = opt, params
        return params

    def whole():
        held["step"], _ = step(held["step"], np.int32(0), key, batch)
        return held["step"]

    return {
        "step": whole,
        "attention": both(
            lambda b, ctx, x: b.attention(b.norm_attention(x), ctx, None)[0]
        ),
        "feed-forward": both(lambda b, ctx, x: b.ffn(b.norm_ffn(x), ctx)[0]),
        "logits and loss": lambda: head(w_DV, x, dy, batch),
        "optimizer": optimizer,
    }


def floors(job, batch) -> dict:
    """`{part: (FLOPs, bytes)}` of all layers."""
    cfg, T = job.cfg, batch["segment"].size
    cost = model_cost(cfg.model, job.spec, cfg.seq_len)
    block, layers = cost.blocks[0], cfg.model.num_layers()
    D, moved = cfg.model.dim, FLOAT * 4 * T * cfg.model.dim
    numbers = block.total()
    attention = 2 * numbers["attention"] + block.score_flops
    own = {
        "attention": (3 * T * attention, numbers["attention"]),
        "feed-forward": (
            3 * T * (block.forward_flops() - attention),
            sum(v for n, v in numbers.items() if n in ("router", "experts", "dense")),
        ),
    }
    out = {
        part: (layers * flops, layers * (3 * FLOAT * count + moved))
        for part, (flops, count) in own.items()
    }
    out["logits and loss"] = (
        3 * T * cost.outer_flops,
        3 * FLOAT * D * cfg.model.vocab + moved,
    )
    out["optimizer"] = update_floor(job)
    return out


def update_floor(job) -> tuple[float, float]:
    """(FLOPs of products, bytes) of one update of all parameters."""
    flops = moved = 0.0
    for path, leaf in flat_paths(job.spec.params).items():
        dims = job.spec.info[path].matrix
        if not isinstance(job.cfg.optim.rule, Muon) or dims is None:
            moved += 7 * FLOAT * leaf.size  # gradient; parameter and two moments twice
            continue
        moved += 5 * FLOAT * leaf.size  # gradient; parameter and momentum, twice
        rank, full = len(job.spec.info[path].axes), len(leaf.shape)
        rows, columns = (
            int(np.prod([leaf.shape[full - rank + d] for d in ds])) for ds in dims
        )
        M, N = sorted((rows, columns))
        # X X^T and A A are symmetric; B X is not.
        once = M * M * N + M**3 + 2 * M * M * N
        flops += job.cfg.optim.rule.ns_steps * once * leaf.size / (rows * columns)
    return flops, moved


def figures_of(job, batch, repeats: int) -> dict:
    """Milliseconds of each part, its floor, and their ratio."""
    with jax.set_mesh(job.mesh):
        speed = rates()
        seconds = common.measure(programs(job, batch), repeats)
    layers = job.cfg.model.num_layers()
    rows: dict = {}
    for name, (flops, moved) in floors(job, batch).items():
        times = layers if name in ("attention", "feed-forward") else 1
        both = flops / speed["flops_per_s"], moved / speed["bytes_per_s"]
        floor = sum(both) if name == "optimizer" else max(both)
        wall = seconds[name]["wall"]
        rows[name] = {
            "min_ms": 1e3 * times * min(wall),
            "median_ms": 1e3 * times * statistics.median(wall),
            "gflop": flops / 1e9,
            "mb": moved / 1e6,
            "floor_ms": 1e3 * floor,
            "over_floor": times * min(wall) / floor,
        }
    wall = seconds["step"]["wall"]
    step = {"min_ms": 1e3 * min(wall), "median_ms": 1e3 * statistics.median(wall)}
    rest = {k: v - sum(row[k] for row in rows.values()) for k, v in step.items()}
    return {"rates": speed, "rows": rows | {"the rest": rest, "step": step}}


def table(figures: dict) -> str:
    """The figures for people."""
    head = ("min ms", "median ms", "GFLOP", "MB", "floor ms", "over it")
    lines = [" " * 16 + "".join(f"{text:>11}" for text in head)]
    for name, row in figures["rows"].items():
        line = f"{name:<16}{row['min_ms']:>11.1f}{row['median_ms']:>11.1f}"
        if "gflop" in row:
            line += f"{row['gflop']:>11.1f}{row['mb']:>11.0f}"
            line += f"{row['floor_ms']:>11.1f}{row['over_floor']:>11.2f}"
        lines.append(line)
    speed = figures["rates"]
    lines.append(
        f"a dense product: {speed['flops_per_s'] / 1e9:.0f} GFLOP/s; "
        f"a copy: {speed['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    return "\n".join(lines)


def main() -> None:
    rest, config_args = split_config_args(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, choices=(8, 64))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(rest)
    if bool(args.experts) == bool(config_args):
        parser.error("give --experts=8, --experts=64 or --config=FILE")
    try:
        job, batch = (
            peers_job(args.experts) if args.experts else config_job(config_args)
        )
    except ConfigError as e:
        raise SystemExit(f"error: {e}") from None
    figures = figures_of(job, batch, args.repeats)
    print(table(figures))
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
