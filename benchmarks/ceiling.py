"""The most that a device can do: a dense matmul, and a copy of its memory.

  python -m benchmarks.ceiling [--size=8192] [--gigabytes=4] [--repeats=7] [--json=FILE]

The matmul is [size, size] x [size, size] of random numbers (zeros run faster on some
GPUs), of XLA and, where it sees the same GPU, of torch. A copy counts the bytes that
are read and those that are written.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import common, peers


def jobs_of(size: int, gigabytes: float, dtype: str) -> dict:
    """`{name: job}`; each runs once here, and those that fail are left out."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size)).astype(dtype) for key in keys)
    x = jax.random.normal(keys[0], (int(gigabytes * 2**30 / 4),))
    dot, negative = jax.jit(jnp.dot), jax.jit(jnp.negative)
    jobs = {("matmul",): lambda: dot(a, b), ("copy",): lambda: negative(x)}
    for name, job in peers.torch_dot(a, b).items():
        jobs[name, "torch"] = job
    jobs, _ = common.warmed({(name, ""): job for name, job in jobs.items()})
    return {" ".join(name): job for (name, _), job in jobs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", type=int, default=1024 if on_cpu else 8192)
    parser.add_argument("--gigabytes", type=float, default=0.25 if on_cpu else 4.0)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    jobs = jobs_of(args.size, args.gigabytes, args.dtype)
    sample_s = common.sample_seconds()
    rows = common.summary(common.measure(jobs, args.repeats, sample_s=sample_s))
    for name, row in rows.items():
        if name == "copy":
            row["gb_per_s"] = 2 * args.gigabytes * 2**30 / row["median_s"] / 1e9
            print(f"{name:<16}{row['gb_per_s']:>10,.0f} GB/s")
        else:
            row["tflops"] = 2 * args.size**3 / row["median_s"] / 1e12
            print(f"{name:<16}{row['tflops']:>10,.1f} TFLOP/s")
    figures = {"size": args.size, "dtype": args.dtype, "rows": rows}
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
