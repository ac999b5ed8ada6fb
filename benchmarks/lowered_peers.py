"""Matmuls of experts in int8: our C beside qwix, at the size of OLMoE's experts.

  python -m benchmarks.lowered_peers [--shape=64,8,2048,2048] [--batches=1,8]
      [--repeats=7] [--json=FILE]

The shape is E, k, K, N: each of the k slots of a token multiplies [1, K] by the [K, N]
of its expert. qwix (pip install qwix, without its dependencies) rounds weights with a
scale for each column, and in "int8 x int8" the rows too, with a scale for each. Its
`ragged_dot` has the experts as groups; "gathered" takes those that are used out of
the array first, and then `dot_general` of as many matrices as there are rows. GB/s
count the weights of the experts that are used, once for each; "error" is that of the
result over the exact one's, both by their root of mean squares.
"""

import argparse
import functools
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from kernels_pallas import Lowered, lowered_matmul
from moex.nn.lowered import BLOCK, to_int8

SETS = 24  # of experts, in turn, so that no cache holds the next one's weights


def qwix():
    """The package, or ValueError where it is missing."""
    try:
        import qwix
    except ImportError as e:
        raise ValueError("qwix is missing: pip install --no-deps qwix") from e
    return qwix


def sides_of(w_EKN) -> dict:
    """`{name: (x_MK, expert_M, bounds) -> y_MN}`, with weights inside, in int8."""
    E, K, N = w_EKN.shape
    lib = qwix()
    ours = Lowered(
        *jax.jit(to_int8, static_argnums=(1, 2))(
            w_EKN, (E, K // BLOCK, N), jnp.bfloat16
        )
    )
    theirs = lib.quantize(w_EKN, jnp.int8, channelwise_axes=(0, 2))

    def of_rows(x, rounded: bool):
        axes = range(x.ndim - 1)
        return lib.quantize(x, jnp.int8, channelwise_axes=axes) if rounded else x

    def ragged(rounded, w, x_MK, expert_M, bounds):
        return lib.ragged_dot(of_rows(x_MK, rounded), w, jnp.diff(bounds))

    def gathered(rounded, w, x_MK, expert_M, bounds):
        own = jax.tree.map(lambda a: a[expert_M], w)
        dims = (((2,), (1,)), ((0,), (0,)))
        return lib.dot_general(of_rows(x_MK[:, None], rounded), own, dims)[:, 0]

    def in_c(w, x_MK, expert_M, bounds):
        return lowered_matmul(x_MK, w, bounds)

    sides = {"C, int8 x float32": functools.partial(jax.jit(in_c), ours)}
    for rounded, form in ((False, "float32"), (True, "int8")):
        for name, make in (("ragged_dot", ragged), ("gathered", gathered)):
            function = jax.jit(functools.partial(make, rounded))
            sides[f"qwix {name}, int8 x {form}"] = functools.partial(function, theirs)
    return sides


def drawn(E: int, k: int, K: int, B: int, seed: int):
    """Rows of B tokens, sorted by expert: (x_MK, expert_M, bounds)."""
    rng = np.random.default_rng(seed)
    expert_M = np.sort(np.concatenate([rng.permutation(E)[:k] for _ in range(B)]))
    bounds = np.searchsorted(expert_M, np.arange(E + 1)).astype(np.int32)
    x_MK = rng.normal(size=(B * k, K)).astype(np.float32)
    return jnp.asarray(x_MK), jnp.asarray(expert_M), jnp.asarray(bounds)


def rows_of(args) -> list[dict]:
    """The rows of all batches, printed."""
    E, k, K, N = map(int, args.shape.split(","))
    rng = np.random.default_rng(0)
    w_EKN = jnp.asarray(rng.normal(size=(E, K, N), scale=0.02).astype(np.float32))
    sides, rows = sides_of(w_EKN), []
    for B in map(int, args.batches.split(",")):
        inputs = [drawn(E, k, K, B, seed) for seed in range(SETS)]
        x_MK, expert_M, _ = inputs[0]
        want = np.einsum("mk,mkn->mn", x_MK, np.asarray(w_EKN)[np.asarray(expert_M)])
        used = statistics.mean(len(set(np.asarray(e).tolist())) for _, e, _ in inputs)
        turn = iter(range(10**9))

        def job(side, inputs=inputs, turn=turn):
            return side(*inputs[next(turn) % SETS])

        jobs = {name: functools.partial(job, side) for name, side in sides.items()}
        seconds = common.measure(jobs, args.repeats)
        for name, side in sides.items():
            wall = statistics.median(seconds[name]["wall"])
            off = np.sqrt(np.mean((side(*inputs[0]) - want) ** 2) / np.mean(want**2))
            row = {"batch": B, "side": name, "median_s": wall, "error": float(off)}
            row["GB_per_s"] = used * K * N / wall / 1e9
            text = "batch {batch}  {side:<32}{ms:>9.2f} ms {GB_per_s:>7.2f} GB/s"
            text += "  error {error:.4f}"
            print(text.format(**row, ms=1e3 * wall), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="64,8,2048,2048", help="E,k,K,N")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        rows = rows_of(args)
    except ValueError as e:
        parser.error(str(e))
    common.write_json(args.json, {"shape": args.shape, "rows": rows})


if __name__ == "__main__":
    main()
