"""Time of attention on this platform: blocks of queries against the plain einsum.

  python -m benchmarks.attention [--shape=8,256,4,4,64] [--dtype=float32] [--repeats=9]
      [--implementations=einsum,blocks] [--json=FILE]

Forward and backward of rows of two documents each, in one process, runs interleaved;
x is the time over the first implementation's. The shape is B,L,H,G,A.

B batch · L length · H query heads · G key/value heads · A head width
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import common, moe_layer
from moex.nn.attention import IMPLEMENTATIONS, attend


def job(shape, dtype, implementation):
    """A forward and backward pass, ready to run."""
    B, L, H, G, A = shape
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (H, G, G, H)
    arrays = [
        jax.random.normal(key, (B, L, n, A)).astype(dtype)
        for key, n in zip(keys, heads, strict=True)
    ]
    row_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
    segment_BL = 1 + (row_BL >= L // 3)
    position_BL = jnp.where(segment_BL == 2, row_BL - L // 3, row_BL)
    pairs = (segment_BL,) * 2, (position_BL,) * 2

    def run(q, k, v):
        return attend(q, k, v, *pairs, implementation=implementation)

    return moe_layer.both(run, *arrays)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8,256,4,4,64", help="B,L,H,G,A")
    parser.add_argument("--implementations", default="einsum,blocks")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    names = args.implementations
    try:
        shape = tuple(int(n) for n in args.shape.split(","))
        if len(shape) != 5:
            raise ValueError(f"--shape={args.shape}: must be B,L,H,G,A.")
        common.check_names(names, IMPLEMENTATIONS)
    except ValueError as e:
        parser.error(str(e))
    jobs = {name: job(shape, args.dtype, name) for name in names.split(",")}
    rows = common.summary(common.measure(jobs, args.repeats), next(iter(jobs)))
    for name, row in rows.items():
        print("{:<10}{:>10.2f} ms  x {:.2f}, CPU time x {:.2f}".format(
            name, 1e3 * row["min_s"], row["ratio"], row["cpu_ratio"]))  # fmt: skip
    figures = {"shape_BLHGA": shape, "dtype": args.dtype, "rows": rows}
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
