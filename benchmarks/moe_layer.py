"""Time of one MoE feed-forward against a dense SwiGLU of equal FLOPs.

  python -m benchmarks.moe_layer [--shape=4096,2,256,512,8] [--loads=random,zipf,two]
      [--implementations=cpu,xla] [--dtype=float32] [--repeats=7] [--json=FILE]
  python -m benchmarks.moe_layer --variants [--shape=2048,8,512,128,32] ...

With `--variants`, whole layers, router included, over the top-k layer: top-p with p
set so that it computes as many experts, latent experts, two rounds of half the k.

`--shape` is T,K,D,F,E. The ratio is fwd or fwd+bwd of `grouped_swiglu`, plan included,
over a dense SwiGLU of width K * F on the same tokens; medians of interleaved repeats in
one process. Loads: balanced, random, zipf (popularity 1 / rank), two (all tokens to two
experts).

T tokens · K slots per token · D model width · F expert width · E experts
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.train_step import environment
from kernels_pallas import IMPLEMENTATIONS, grouped_swiglu, make_plan
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.context import Context

LOADS = ("balanced", "random", "zipf", "two")


def experts_of(load: str, T: int, K: int, E: int) -> np.ndarray:
    """int32[T, K]: different experts per token, drawn as `load` says."""
    rng = np.random.default_rng(0)
    if load == "balanced":
        return (np.arange(T * K, dtype=np.int32) % E).reshape(T, K)
    if load == "two":
        return np.tile(np.arange(K, dtype=np.int32) % max(E, 1), (T, 1))
    weight = np.ones(E) if load == "random" else 1 / np.arange(1, E + 1)
    score = np.log(weight) + rng.gumbel(size=(T, E))  # K draws without replacement
    return np.argsort(-score, axis=1)[:, :K].astype(np.int32)


def functions(args, shape):
    """`{name: (forward, forward and backward)}`, jitted, of the same inputs."""
    T, K, D, F, E = shape
    dtype = jnp.dtype(args.dtype)
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (T, D), dtype)
    w_in = jax.random.normal(keys[1], (E, D, 2, F), dtype) * D**-0.5
    w_out = jax.random.normal(keys[2], (E, F, D), dtype) * F**-0.5
    dense_in = jax.random.normal(keys[3], (D, 2, K * F), dtype) * D**-0.5
    dense_out = jax.random.normal(keys[4], (K * F, D), dtype) * F**-0.5
    gate = jnp.full((T, K), 1.0 / K, jnp.float32)
    keep = jnp.ones((T, K), bool)

    def dense(x, w_in, w_out):
        h = jnp.einsum("td,dgf->tgf", x, w_in)
        return (jax.nn.silu(h[:, 0]) * h[:, 1]) @ w_out

    def pair(f, inputs):
        loss = lambda *a: jnp.sum(f(*a).astype(jnp.float32) ** 2)  # noqa: E731
        backward = jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs)))))
        forward = jax.jit(f)
        return (lambda: forward(*inputs)), (lambda: backward(*inputs))

    out = {"dense": pair(dense, (x, dense_in, dense_out))}
    for load in args.loads.split(","):
        expert = jnp.asarray(experts_of(load, T, K, E))
        for name in args.implementations.split(","):

            def sparse(x, w_in, w_out, expert=expert, name=name):
                plan = make_plan(expert, keep, E)
                return grouped_swiglu(x, w_in, w_out, gate, plan, implementation=name)

            out[f"{name}, {load}"] = pair(sparse, (x, w_in, w_out))
    return out


def layers(args, shape):
    """`({name: layer config}, x_BLD, ctx)` of `--variants`."""
    T, K, D, F, E = shape
    x_BLD = jax.random.normal(jax.random.key(1), (1, T, D), jnp.dtype(args.dtype))
    index = jnp.arange(T, dtype=jnp.int32)[None]
    ctx = Context(
        segment_BL=jnp.ones_like(index),
        position_BL=index,
        token_BL=index,
        kernels=args.implementations.split(",")[0],
    )
    glu, std = Glu(hidden=F), D**-0.5
    top_k = MoE(num_experts=E, router=TopK(k=K, init_std=std), experts=glu)
    p, mean = p_for(K, x_BLD[0], E, std, ctx)
    half = dataclasses.replace(top_k, router=TopK(k=K // 2, init_std=std))

    def latent(ops):
        experts = Latent(hidden=F, latent=F, group=E, ops=ops)
        return dataclasses.replace(top_k, experts=experts)

    return (
        {
            f"top-k, k = {K}": top_k,
            f"top-p, {mean:.2f} experts": dataclasses.replace(
                top_k, router=TopP(p=p, k_max=min(2 * K, E), init_std=std)
            ),
            "latent gate, up": latent(("gate", "up")),
            "latent gate, up, down": latent(("gate", "up", "down")),
            f"chain C = 2, k = {K // 2}": Chain(moe=half, iterations=2),
        },
        x_BLD,
        ctx,
    )


def p_for(target, x_TD, E, std, ctx):
    """`(p, mean)`: the p at which a fresh top-p router keeps about `target` experts."""
    low, high = 0.0, 1.0
    for _ in range(20):
        p = (low + high) / 2
        router = TopP(p=p, k_max=min(2 * target, E), init_std=std)
        keep_TK = router.make(x_TD.shape[1], E, nnx.Rngs(params=0))(x_TD, ctx).keep_TK
        mean = float(jnp.mean(jnp.sum(keep_TK, axis=1)))
        low, high = (p, high) if mean < target else (low, p)
    return p, mean


def variants(args, shape):
    """`({name: (forward, both)}, {name: {"weight_bytes", "temp_bytes"}})`."""
    configs, x_BLD, ctx = layers(args, shape)
    pairs, sizes = {}, {}
    for name, config in configs.items():
        module = config.make(shape[2], nnx.Rngs(params=0))
        graphdef, params, state = nnx.split(module, nnx.Param, ...)

        def run(params, x_BLD, graphdef=graphdef, state=state):
            return nnx.merge(graphdef, params, state)(x_BLD, ctx)[0]

        def loss(params, x_BLD, run=run):
            return jnp.sum(run(params, x_BLD).astype(jnp.float32) ** 2)

        forward = jax.jit(run).lower(params, x_BLD).compile()
        backward = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x_BLD)
        backward = backward.compile()
        pairs[name] = (
            lambda f=forward, p=params: f(p, x_BLD),
            lambda f=backward, p=params: f(p, x_BLD),
        )
        sizes[name] = {
            "weight_bytes": sum(a.nbytes for a in jax.tree.leaves(params)),
            "temp_bytes": backward.memory_analysis().temp_size_in_bytes,
        }
    return pairs, sizes


def print_variants(medians, sizes) -> None:
    """The table of `--variants`; ratios are over the first row."""
    first = next(iter(medians.values()))
    print(f"{'':<26}{'fwd ms':>9}{'fwd+bwd ms':>12}{'fwd x':>8}{'fwd+bwd x':>11}"
          f"{'weights MB':>12}{'temp MB':>9}")  # fmt: skip
    for name, (forward, both) in medians.items():
        size = sizes[name]
        print(f"{name:<26}{1e3 * forward:>9.2f}{1e3 * both:>12.2f}"
              f"{forward / first[0]:>8.2f}{both / first[1]:>11.2f}"
              f"{size['weight_bytes'] / 1e6:>12.2f}"
              f"{size['temp_bytes'] / 1e6:>9.1f}")  # fmt: skip


def measure(pairs: dict, repeats: int) -> dict:
    """Median seconds of (forward, forward and backward) of each name."""
    seconds = {name: ([], []) for name in pairs}
    for i in range(repeats + 1):
        for name, pair in pairs.items():
            for which, call in enumerate(pair):
                began = time.perf_counter()
                jax.block_until_ready(call())
                if i:  # the first round compiles
                    seconds[name][which].append(time.perf_counter() - began)
    return {n: [statistics.median(s) for s in both] for n, both in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", action="store_true", help="whole layers")
    parser.add_argument("--shape", help="T,K,D,F,E")
    parser.add_argument("--loads", default="random,zipf,two")
    default = "cpu,xla" if jax.default_backend() == "cpu" else "xla"
    parser.add_argument("--implementations", default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    default = "2048,8,512,128,32" if args.variants else "4096,2,256,512,8"
    args.shape = args.shape or default
    for name in args.implementations.split(","):
        if name not in IMPLEMENTATIONS:
            parser.error(
                f"unknown implementation {name!r}: {', '.join(IMPLEMENTATIONS)}"
            )
    for name in args.loads.split(","):
        if name not in LOADS:
            parser.error(f"unknown load {name!r}: {', '.join(LOADS)}")
    shape = tuple(int(n) for n in args.shape.split(","))
    if args.variants:
        pairs, sizes = variants(args, shape)
        medians = measure(pairs, args.repeats)
        print_variants(medians, sizes)
        write(args, shape, medians, sizes=sizes)
        return
    medians = measure(functions(args, shape), args.repeats)
    T, K, D, F, _ = shape
    flops = 6 * T * K * D * F
    dense = medians["dense"]
    print(f"{'T,K,D,F,E = ' + args.shape:<24}{'fwd ms':>9}{'fwd+bwd ms':>12}"
          f"{'fwd x':>8}{'fwd+bwd x':>11}{'TFLOP/s':>9}")  # fmt: skip
    for name, (forward, both) in medians.items():
        print(f"{name:<24}{1e3 * forward:>9.2f}{1e3 * both:>12.2f}"
              f"{forward / dense[0]:>8.2f}{both / dense[1]:>11.2f}"
              f"{3 * flops / both / 1e12:>9.3f}")  # fmt: skip
    write(args, shape, medians)


def write(args, shape, medians, **more) -> None:
    """The figures as JSON, if a file is named."""
    if args.json:
        figures = {
            "shape_TKDFE": shape,
            "dtype": args.dtype,
            "median_s": {n: {"fwd": f, "fwd_bwd": b} for n, (f, b) in medians.items()},
            **more,
            "environment": environment(),
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
