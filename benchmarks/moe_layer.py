"""Time of a whole MoE feed-forward, router and dispatch included, over the dense limit.

  python -m benchmarks.moe_layer [--shape=cpu] [--loads=balanced,random,zipf,two]
      [--implementations=cpu,xla] [--dtype=float32] [--repeats=7] [--json=FILE]
  python -m benchmarks.moe_layer --variants [--shape=2048,8,512,128,32] ...

`--shape` is a name in kernels_pallas/grouped_matmul/shapes.py, or T,K,D,F,E. The limit
is three (forward) or nine (forward and backward) dense matmuls with the same FLOPs,
without anything between them. Ratios are of minima over interleaved repeats in one
process, by the wall clock and by the process's CPU time. TFLOP/s count 6 T K D F
forward and 12 T K D F backward.

Besides moex's implementations, each under every load: `ragged_dot` is the layer as one
writes it in plain JAX, `all experts` computes every expert on every token, `dense` is
one expert of width F on T * K rows, `grouped_mm` is torch's, where torch is installed,
and `tokamax` its ragged dot. "router out" is the same with the choice given.

With `--variants`, whole layers of moex over the top-k layer: top-p with p set so that
it computes as many experts, latent experts, two rounds of half the k.

T tokens · K slots per token · D model width · F expert width · E experts
"""

import argparse
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, peers
from benchmarks.variants import variants
from kernels_pallas import IMPLEMENTATIONS, grouped_swiglu, make_plan

OTHERS = ("ragged_dot", "all experts", "dense", "grouped_mm", "tokamax")


def inputs(shape, dtype):
    """`(x_TD, w_router_DE, w_in_ED2F, w_out_EFD, dy_TD)`."""
    T, _, D, F, E = shape
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key, *size, scale=1.0):
        return (scale * jax.random.normal(key, size)).astype(dtype)

    return (
        normal(keys[0], T, D),
        normal(keys[1], D, E, scale=0.02),
        normal(keys[2], E, D, 2, F, scale=D**-0.5),
        normal(keys[3], E, F, D, scale=F**-0.5),
        normal(keys[4], T, D),
    )


def route(x_TD, w_router_DE, bias_TE, K):
    """`(expert_TK, gate_TK)` of softmax top-k; `bias_TE` forces the choice."""
    logits_TE = (x_TD @ w_router_DE).astype(jnp.float32)
    probs_TE = jax.nn.softmax(logits_TE)
    _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE) + bias_TE, K)
    gate_TK = jnp.take_along_axis(probs_TE, expert_TK, axis=1)
    return expert_TK, gate_TK / jnp.sum(gate_TK, axis=1, keepdims=True)


def bias_of(expert_TK, E):
    """float32[T, E]: added to probabilities it makes top-k choose `expert_TK`."""
    bias_TE = np.zeros((expert_TK.shape[0], E), np.float32)
    np.put_along_axis(bias_TE, expert_TK, 10.0, axis=1)
    return jnp.asarray(bias_TE)


def moex_experts(implementation):
    """`(x, w_in, w_out, expert, gate) -> y` by one implementation."""

    def experts(x_TD, w_in, w_out, expert_TK, gate_TK):
        plan = make_plan(expert_TK, jnp.ones(expert_TK.shape, bool), w_in.shape[0])
        return grouped_swiglu(
            x_TD, w_in, w_out, gate_TK, plan, implementation=implementation
        )

    return experts


def all_experts(x_TD, w_in, w_out, expert_TK, gate_TK):
    """Compute every expert on every token, then the weighted sum."""
    h_TE2F = jnp.einsum("td,edgf->tegf", x_TD, w_in)
    h_TEF = jax.nn.silu(h_TE2F[:, :, 0]) * h_TE2F[:, :, 1]
    y_TED = jnp.einsum("tef,efd->ted", h_TEF, w_out)
    combine_TE = jnp.zeros(y_TED.shape[:2], y_TED.dtype)
    row_T1 = jnp.arange(x_TD.shape[0])[:, None]
    combine_TE = combine_TE.at[row_T1, expert_TK].set(gate_TK.astype(y_TED.dtype))
    return jnp.einsum("ted,te->td", y_TED, combine_TE)


def both(f, *args):
    """`(forward, forward and backward)` jobs of f, whose last argument is dy."""
    *primals, dy = args

    def backward(*primals_and_dy):
        *primals, dy = primals_and_dy
        y, pull = jax.vjp(f, *primals)
        return y, *pull(dy)

    forward, backward = jax.jit(f), jax.jit(backward)
    return (lambda: forward(*primals)), (lambda: backward(*primals, dy))


def whole_layer(experts, K):
    """`(forward, forward and backward)` programs, router included."""

    def layer(x, w_router, w_in, w_out, bias):
        expert, gate = route(x, w_router, bias, K)
        return experts(x, w_in, w_out, expert, gate)

    def backward(*arrays):
        *arrays, bias, dy = arrays
        return _value_and_pull(lambda *a: layer(*a, bias), arrays, dy)

    return jax.jit(layer), jax.jit(backward)


def router_out(experts, arrays, K, dy_TD):
    """The programs of `whole_layer` with experts and gates given, without a router."""
    gate_TK = jnp.full((dy_TD.shape[0], K), 1 / K, jnp.float32)
    forward = jax.jit(experts)

    @jax.jit
    def backward(x, w_in, w_out, expert, gate, dy):
        def run(x, w_in, w_out, gate):
            return experts(x, w_in, w_out, expert, gate)

        return _value_and_pull(run, (x, w_in, w_out, gate), dy)

    return (
        lambda expert: forward(*arrays, expert, gate_TK),
        lambda expert: backward(*arrays, expert, gate_TK, dy_TD),
    )


def limit(shape, dtype):
    """The dense matmuls of equal FLOPs, as `(forward, forward and backward)`."""
    T, K, D, F, _ = shape
    keys = jax.random.split(jax.random.key(1), 6)
    x, a, h, b, da, g = (
        jax.random.normal(key, size).astype(dtype)
        for key, size in zip(
            keys,
            ((T * K, D), (D, 2 * F), (T * K, F), (F, D), (T * K, 2 * F), (T * K, D)),
            strict=True,
        )
    )
    forward = jax.jit(lambda x, a, h, b: (x @ a, h @ b))
    backward = jax.jit(
        lambda x, a, h, b, da, g: (x @ a, h @ b, da @ a.T, x.T @ da, g @ b.T, h.T @ g)
    )
    return (lambda: forward(x, a, h, b)), (lambda: backward(x, a, h, b, da, g))


def jobs_of(args, shape):
    """`{name: (forward, forward and backward)}`."""
    T, K, D, F, E = shape
    dtype = jnp.dtype(args.dtype)
    x, w_router, w_in, w_out, dy = inputs(shape, dtype)
    out = {"limit": limit(shape, dtype)}
    kinds = {f"moex {n}": moex_experts(n) for n in args.implementations.split(",")}
    wanted = [n for n in args.others.split(",") if n]
    if "ragged_dot" in wanted:
        kinds["ragged_dot"] = peers.ragged_dot_experts(jax.lax.ragged_dot)
    if "tokamax" in wanted and (ragged_dot := peers.tokamax_ragged_dot()):
        kinds["tokamax"] = peers.ragged_dot_experts(ragged_dot)
    if "all experts" in wanted:
        kinds["all experts"] = all_experts
    if "dense" in wanted:
        rows = jnp.tile(x, (K, 1))

        def dense(rows, w_in, w_out):
            h = jnp.einsum("nd,dgf->ngf", rows, w_in)
            return (jax.nn.silu(h[:, 0]) * h[:, 1]) @ w_out

        out["dense"] = both(dense, rows, w_in[0], w_out[0], jnp.tile(dy, (K, 1)))
    programs = {name: whole_layer(experts, K) for name, experts in kinds.items()}
    first = next(iter(kinds))
    outside = router_out(kinds[first], (x, w_in, w_out), K, dy)
    for load in args.loads.split(","):
        seeds = range(common.NUM_CHANGING if load == "changing" else 1)
        choices = [common.experts_of(load, T, K, E, seed) for seed in seeds]
        for name, (forward, backward) in programs.items():
            biases = itertools.cycle([bias_of(choice, E) for choice in choices])
            out[f"{name}, {load}"] = (
                lambda f=forward, b=biases: f(x, w_router, w_in, w_out, next(b)),
                lambda f=backward, b=biases: f(x, w_router, w_in, w_out, next(b), dy),
            )
            if name == first:
                expert = jnp.asarray(choices[0])
                out[f"{name}, {load}, router out"] = tuple(
                    functools.partial(f, expert) for f in outside
                )
        if "grouped_mm" in wanted and (
            job := peers.torch_grouped_mm((x, w_router, w_in, w_out, dy), choices[0])
        ):
            out[f"grouped_mm, {load}"] = job
    return out


def _value_and_pull(f, primals, dy):
    y, pull = jax.vjp(f, *primals)
    return y, *pull(dy)


def sizes_of(args, shape):
    """`{"temp_bytes", "pre_activation_bytes"}` of the first implementation."""
    T, K, _, F, E = shape
    dtype = jnp.dtype(args.dtype)
    structs = jax.eval_shape(lambda: inputs(shape, dtype))
    x, w_router, w_in, w_out, dy = structs
    experts = moex_experts(args.implementations.split(",")[0])

    def run(x, w_router, w_in, w_out, dy):
        def layer(x, w_router, w_in, w_out):
            return experts(x, w_in, w_out, *route(x, w_router, 0.0, K))

        return _value_and_pull(layer, (x, w_router, w_in, w_out), dy)

    compiled = jax.jit(run).lower(x, w_router, w_in, w_out, dy).compile()
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "pre_activation_bytes": T * K * 2 * F * dtype.itemsize,
    }


def table(rows: dict, shape, published: dict | None) -> str:
    """The figures for people."""
    T, K, D, F, _ = shape
    flops = {"fwd": 6 * T * K * D * F, "bwd": 12 * T * K * D * F}
    lines = [f"{'':<34}{'fwd ms':>9}{'f+b ms':>9}{'fwd x':>7}{'f+b x':>7}"
             f"{'cpu f+b x':>10}{'fwd TF/s':>10}{'bwd TF/s':>10}"]  # fmt: skip
    for name, row in rows.items():
        fwd, bwd = row["fwd"]["min_s"], row["fwd_bwd"]["min_s"]
        lines.append(
            f"{name:<34}{1e3 * fwd:>9.2f}{1e3 * bwd:>9.2f}{row['fwd']['ratio']:>7.2f}"
            f"{row['fwd_bwd']['ratio']:>7.2f}{row['fwd_bwd']['cpu_ratio']:>10.2f}"
            f"{flops['fwd'] / fwd / 1e12:>10.3f}"
            f"{flops['bwd'] / max(bwd - fwd, 1e-9) / 1e12:>10.3f}"
        )
    for name, (fwd, bwd) in (published or {}).items():
        both = "" if bwd is None else f"{bwd:>10.0f}"
        label = f"{name} (published)"
        lines.append(f"{label:<34}{'':>42}{fwd:>10.0f}{both}")
    return "\n".join(lines)


def run(args, shape) -> tuple[dict, dict]:
    """Rows of the table as plain data, and errors of those that cannot run."""
    jobs = jobs_of(args, shape)
    flat = {}
    for name, (forward, both_) in jobs.items():
        flat[name, "fwd"], flat[name, "fwd_bwd"] = forward, both_
    flat, failed = common.warmed(flat)
    seconds = common.measure(flat, args.repeats, sample_s=common.sample_seconds())
    rows: dict = {name: {} for name, _ in flat}
    for which in ("fwd", "fwd_bwd"):
        part = {n: s for (n, w), s in seconds.items() if w == which}
        for name, row in common.summary(part, "limit").items():
            rows[name][which] = row
    return rows, {name: error for (name,), error in failed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--variants", action="store_true", help="whole layers")
    parser.add_argument("--shape", default=None, help="a name, or T,K,D,F,E")
    parser.add_argument("--loads", default="balanced,random,zipf,two")
    default = "native,cpu" if on_cpu else "triton,mosaic"
    parser.add_argument("--implementations", default=default)
    parser.add_argument("--others", default="dense", help=", ".join(OTHERS))
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        shape = common.shape_of(
            args.shape or ("2048,8,512,128,32" if args.variants else "cpu")
        )
        for given, known in (
            (args.implementations, IMPLEMENTATIONS),
            (args.loads, common.LOADS),
            (args.others, OTHERS),
        ):
            common.check_names(given, known)
    except ValueError as e:
        parser.error(str(e))
    figures = {"shape_TKDFE": shape, "dtype": args.dtype}
    if args.variants:
        figures["rows"] = variants(args, shape)
    else:
        figures["rows"], figures["failed"] = run(args, shape)
        published = peers.published(args.shape)
        figures["published_tflops"] = published
        print(table(figures["rows"], shape, published))
        if any(name.startswith("moex") for name in figures["rows"]):
            figures["memory"] = memory = sizes_of(args, shape)
            ratio = memory["temp_bytes"] / memory["pre_activation_bytes"]
            print(f"temporary memory {memory['temp_bytes'] / 2**20:.1f} MiB, "
                  f"{ratio:.2f} times the pre-activations")  # fmt: skip
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
