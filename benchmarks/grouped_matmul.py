"""Time of grouped matmuls, forward, dx and dW, over one dense matmul of equal FLOPs.

  python -m benchmarks.grouped_matmul [--shape=cpu] [--loads=random,zipf]
      [--implementations=cpu,xla] [--dtype=float32] [--repeats=7] [--json=FILE]

`--shape` is a name in kernels_pallas/grouped_matmul/shapes.py, or T,K,D,F,E: the matmul
is the layer's first, [T K, D] x [E, D, 2 F], and its second, [T K, F] x [E, F, D]. The
limit is jnp.dot of the same rows with one matrix, in the same run. "of limit" is what
the GPU's users ask for, the dense time over the grouped time. What cannot run is left
out, with its error.

Besides moex's implementations: `ragged_dot` is JAX's own, with its own gradients;
`tokamax` and `grouped_mm` (torch) where installed.

N sorted rows (T K) · D, F widths · E experts
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common, peers
from kernels_pallas import IMPLEMENTATIONS, grouped_matmul

OTHERS = ("ragged_dot", "tokamax", "grouped_mm")


def products(f, lhs, rhs, dout):
    """`{"fwd", "dx", "dw"}`: one program each of a grouped matmul `f(lhs, rhs)`."""
    fwd = jax.jit(f)
    dx = jax.jit(lambda lhs, rhs, g: jax.vjp(lambda a: f(a, rhs), lhs)[1](g))
    dw = jax.jit(lambda lhs, rhs, g: jax.vjp(lambda b: f(lhs, b), rhs)[1](g))
    return {
        "fwd": lambda: fwd(lhs, rhs),
        "dx": lambda: dx(lhs, rhs, dout),
        "dw": lambda: dw(lhs, rhs, dout),
    }


def jobs_of(args, shape, second: bool) -> dict:
    """`{(name, load, part): job}` of the layer's first or second matmul."""
    T, K, D, F, E = shape
    rows, k, n = T * K, (F if second else D), (D if second else 2 * F)
    dtype = jnp.dtype(args.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    lhs, rhs, dout = (
        jax.random.normal(key, size).astype(dtype)
        for key, size in zip(keys, ((rows, k), (E, k, n), (rows, n)), strict=True)
    )
    out = {}
    for part, job in products(jnp.dot, lhs, rhs[0], dout).items():
        out["dense", "", part] = job
    wanted = [n for n in args.others.split(",") if n]
    for load in args.loads.split(","):
        choice = common.experts_of(load, T, K, E)
        sizes = jnp.asarray(np.bincount(choice.ravel(), minlength=E), jnp.int32)
        kinds = {
            f"moex {name}": (
                lambda a, b, name=name, sizes=sizes: grouped_matmul(
                    a, b, sizes, implementation=name
                )
            )
            for name in filter(None, args.implementations.split(","))
        }
        others = {}
        if "ragged_dot" in wanted:
            others["ragged_dot"] = jax.lax.ragged_dot
        if "tokamax" in wanted:
            others["tokamax"] = peers.tokamax_ragged_dot()
        for name, ragged_dot in others.items():
            if ragged_dot is not None:
                kinds[name] = lambda a, b, f=ragged_dot, s=sizes: f(a, b, s)
        for name, f in kinds.items():
            for part, job in products(f, lhs, rhs, dout).items():
                out[name, load, part] = job
        if "grouped_mm" in wanted:
            for part, job in peers.torch_products(lhs, rhs, dout, sizes).items():
                out["grouped_mm", load, part] = job
    return out


def run(args, shape, second: bool) -> tuple[dict, dict]:
    """`({name: {load: {part: row}}}, failed)`; ratios are over the dense matmul."""
    jobs, failed = common.warmed(jobs_of(args, shape, second))
    seconds = common.measure(jobs, args.repeats, sample_s=common.sample_seconds())
    rows: dict = {}
    for part in ("fwd", "dx", "dw"):
        one = {(n, w): s for (n, w, p), s in seconds.items() if p == part}
        for (name, load), row in common.summary(one, ("dense", "")).items():
            rows.setdefault(name, {}).setdefault(load, {})[part] = row
    return rows, {", ".join(name): error for name, error in failed.items()}


def table(rows: dict, flops: float) -> str:
    """The figures for people."""
    lines = [f"{'':<28}" + "".join(
        f"{p + ' ms':>10}{'TF/s':>8}{'of limit':>10}" for p in ("fwd", "dx", "dw")
    )]  # fmt: skip
    for name, loads in rows.items():
        for load, parts in loads.items():
            cells = "".join(
                f"{1e3 * row['min_s']:>10.2f}{flops / row['min_s'] / 1e12:>8.2f}"
                f"{1 / row['ratio']:>10.2f}"
                for row in parts.values()
            )
            lines.append(f"{name + (', ' + load if load else ''):<28}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--shape", default="cpu", help="a name, or T,K,D,F,E")
    parser.add_argument("--loads", default="random,zipf")
    default = "native,cpu" if on_cpu else "triton,mosaic"
    parser.add_argument("--implementations", default=default)
    parser.add_argument("--others", default="ragged_dot", help=", ".join(OTHERS))
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        shape = common.shape_of(args.shape)
        common.check_names(args.implementations, IMPLEMENTATIONS)
        common.check_names(args.loads, common.LOADS)
        common.check_names(args.others, OTHERS)
    except ValueError as e:
        parser.error(str(e))
    T, K, D, F, _ = shape
    figures = {"shape_TKDFE": shape, "dtype": args.dtype, "rows": {}}
    figures["failed"] = {}
    for which, width in (("first", 2 * F), ("second", F)):
        rows, failed = run(args, shape, which == "second")
        figures["rows"][which], figures["failed"][which] = rows, failed
        print(f"{which} matmul of T,K,D,F,E = {','.join(map(str, shape))}")
        print(table(rows, 2 * T * K * D * width))
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
