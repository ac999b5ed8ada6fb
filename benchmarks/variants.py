"""Whole layers of moex side by side: `python -m benchmarks.moe_layer --variants`.

T tokens · K slots per token · D model width · F expert width · E experts
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import common
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.context import Compute, Context


def layers(args, shape):
    """`({name: layer config}, x_BLD, ctx)`."""
    T, K, D, F, E = shape
    x_BLD = jax.random.normal(jax.random.key(1), (1, T, D), jnp.dtype(args.dtype))
    index = jnp.arange(T, dtype=jnp.int32)[None]
    ctx = Context(
        segment_BL=jnp.ones_like(index),
        position_BL=index,
        token_BL=index,
        compute=Compute(kernels=args.implementations),
    )
    # Logits deviate by about 1.6, and p is set for K experts: tokens have 1 to 4 K.
    glu, std = Glu(hidden=F), 1.6 * D**-0.5
    top_k = MoE(num_experts=E, router=TopK(k=K, init_std=std), experts=glu)
    k_max = min(4 * K, E)
    p, mean = p_for(K, k_max, x_BLD[0], E, std, ctx)
    top_p = MoE(num_experts=E, router=TopP(p=p, k_max=k_max, init_std=std), experts=glu)

    def latent(ops):
        experts = Latent(hidden=F, latent=F, group=E, ops=ops)
        return dataclasses.replace(top_k, experts=experts)

    configs = {
        f"top-k, k = {K}": top_k,
        f"top-p, {mean:.2f} of at most {k_max}": top_p,
        "the same, buffers for 1.25 k": dataclasses.replace(
            top_p, buffer_slots=1.25 * K
        ),
        "the same, buffers that overflow": dataclasses.replace(
            top_p, buffer_slots=0.9 * K
        ),
        "latent gate, up": latent(("gate", "up")),
        "latent gate, up, down": latent(("gate", "up", "down")),
    }
    if K > 1:
        half = dataclasses.replace(top_k, router=TopK(k=K // 2, init_std=std))
        configs[f"chain C = 2, k = {K // 2}"] = Chain(moe=half, iterations=2)
    return configs, x_BLD, ctx


def p_for(target, k_max, x_TD, E, std, ctx):
    """`(p, mean)`: the p at which a fresh top-p router keeps about `target` experts."""
    low, high = 0.0, 1.0
    for _ in range(20):
        p = (low + high) / 2
        router = TopP(p=p, k_max=k_max, init_std=std)
        keep_TK = router.make(x_TD.shape[1], E, nnx.Rngs(params=0))(x_TD, ctx).keep_TK
        mean = float(jnp.mean(jnp.sum(keep_TK, axis=1)))
        low, high = (p, high) if mean < target else (low, p)
    return p, mean


def variants(args, shape) -> dict:
    """Prints the table; `{name: {"fwd", "fwd_bwd", "weight_bytes", "temp_bytes"}}`."""
    configs, x_BLD, ctx = layers(args, shape)
    jobs, rows = {}, {}
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
        jobs[name, "fwd"] = lambda f=forward, p=params: f(p, x_BLD)
        jobs[name, "fwd_bwd"] = lambda f=backward, p=params: f(p, x_BLD)
        rows[name] = {
            "weight_bytes": sum(a.nbytes for a in jax.tree.leaves(params)),
            "temp_bytes": backward.memory_analysis().temp_size_in_bytes,
        }
    seconds = common.measure(jobs, args.repeats, sample_s=common.sample_seconds())
    first = next(iter(rows))
    for which in ("fwd", "fwd_bwd"):
        part = {n: s for (n, w), s in seconds.items() if w == which}
        for name, row in common.summary(part, first).items():
            rows[name][which] = row
    print(f"{'':<34}{'fwd ms':>9}{'f+b ms':>9}{'fwd x':>7}{'f+b x':>7}"
          f"{'cpu f+b x':>10}{'weights MB':>12}{'temp MB':>9}")  # fmt: skip
    for name, row in rows.items():
        fwd, both = row["fwd"], row["fwd_bwd"]
        print(f"{name:<34}{1e3 * fwd['min_s']:>9.2f}{1e3 * both['min_s']:>9.2f}"
              f"{fwd['ratio']:>7.2f}{both['ratio']:>7.2f}{both['cpu_ratio']:>10.2f}"
              f"{row['weight_bytes'] / 1e6:>12.2f}"
              f"{row['temp_bytes'] / 1e6:>9.1f}")  # fmt: skip
    return rows
