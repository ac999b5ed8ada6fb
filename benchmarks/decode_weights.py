"""Decoding with weights in fewer bytes: tokens/s, and the share of the memory's rate.

  python -m benchmarks.decode_weights [--weights=float32,bfloat16,int8,int4]
      [--batches=1,8] [--new=32] [--repeats=5] [--json=FILE]

A token reads the matrices of attention, routers and logits and those of the experts
that it uses; a batch reads each expert of any of its tokens once. These bytes, over the
time of a step and the rate at which a program reads that does nothing else
(bandwidth.py), are the share. Weights are random, in the shape that they are kept in.
"""

import argparse
import functools
import pathlib

import jax
import numpy as np

from benchmarks import bandwidth, common
from benchmarks.decode import COMMON, moex_run, split
from moex.interop.families import read_model
from moex.model.accounting import bytes_per_token, num_bytes
from moex.model.paths import flat_paths, nested
from moex.model.spec import model_spec
from moex.nn.lowered import SCALES, VALUES
from moex.runs.weights import in_large_pages, read_as

# Layers of the size of OLMoE's: D = 2048, F = 1024, 64 experts, top-8. Two of them are
# 3.4 GB in float32, and 0.47 GB in int4: more than a cache holds.
SHAPE = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "intermediate_size": 1024,
}
WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def random_model(model, weights: str):
    """`(spec, model, params, state)` with random weights in the form of `weights`."""
    spec = model_spec(model, weights=None if weights == "float32" else weights)
    rng = np.random.default_rng(0)

    def drawn(path: str, leaf):
        array = in_large_pages(leaf.shape, leaf.dtype)  # as `--weights` keeps them
        if leaf.dtype in (np.int8, np.int32):
            array[...] = np.frombuffer(rng.bytes(array.nbytes), leaf.dtype).reshape(
                leaf.shape
            )
        elif path.endswith(SCALES):
            array[...] = 2e-4
        else:
            for index in np.ndindex(leaf.shape[:2] if array.ndim > 3 else ()):
                part = rng.random(array[index].shape, np.float32)
                array[index] = 0.06 * (part - 0.5) if array.ndim > 1 else 1.0
        return array

    params = {
        p: jax.device_put(drawn(p, a)) for p, a in flat_paths(spec.params).items()
    }
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), spec.state)
    return spec, model, nested(params), state


class InMemory:
    """Arrays by path, in the place of a checkpoint (`moex.runs.rows.Rows`)."""

    step = 0

    def __init__(self, arrays: dict):
        self.arrays = arrays

    def lead(self, item, path) -> int:
        return 2 if "/experts/" in path else int(path.startswith("segments/"))

    def read(self, item, path, index):
        return np.asarray(self.arrays[path][*index])


def in_fewer_bytes(model, params, weights: str):
    """`(spec, params)` of a model with its weights in fewer bytes, rounded in pieces.

    Args:
      model: its config.
      params: nested arrays, as trained.
      weights: "bfloat16", "int8" or "int4".
    """
    spec, rows = model_spec(model, weights=weights), InMemory(flat_paths(params))
    places, made = flat_paths(spec.params), {}
    for path in places:
        if path.endswith(SCALES):
            continue
        name = path.removesuffix(VALUES)
        names = [n for n in (path, name + SCALES) if n in places]
        parts = read_as(rows, "params", name, [places[n] for n in names], weights)
        made |= {n: jax.device_put(a) for n, a in zip(names, parts, strict=True)}
    return spec, nested(made)


def step_bytes(model, params: dict, num_experts: int, k: int, B: int) -> float:
    """The bytes of weights that a step of B tokens reads, if routers draw evenly."""
    used = num_experts * (1 - (1 - k / num_experts) ** B)
    return bytes_per_token(model, flat_paths(params), used)


def rows_of(model, args) -> list[dict]:
    """The rows of all weights and batches, printed.

    Args:
      model: model config.
      args: those of `main`.
    """
    models = {w: random_model(model, w) for w in args.weights.split(",")}
    rows = []
    for B in map(int, args.batches.split(",")):
        prompts = np.random.default_rng(0).integers(2, model.vocab, (B, 16)).tolist()
        jobs = {
            (w, n): functools.partial(moex_run(own, prompts, n))
            for w, own in models.items()
            for n in (1, args.new)
        }
        rate = read_rate()  # of this minute: it changes
        seconds = common.measure(jobs, args.repeats)
        rate = (rate + read_rate()) / 2
        print(f"memory is read at {rate / 1e9:.1f} GB/s", flush=True)
        for w, (_, _, params, _) in models.items():
            size = step_bytes(
                model, params, SHAPE["num_experts"], SHAPE["num_experts_per_tok"], B
            )
            row = {"weights": w, "batch": B, "rate": rate} | split(seconds, w, args.new)
            row |= {"read_bytes": size, "memory_bytes": num_bytes(params)}
            row["tokens_per_s"] = B / row["step_s"]
            row["share"] = size / row["step_s"] / rate
            row["share_of_quickest"] = size / row["step_min_s"] / rate
            print(line(row), flush=True)
            rows.append(row)
    return rows


def read_rate() -> float:
    """Bytes per second of reading, with the pages that give more: 2 MB or 4 kB."""
    return max(bandwidth.read_rate(2, large_pages=n)["median"] for n in (True, False))


def line(row: dict) -> str:
    """A row as text."""
    text = (
        "{weights:<9} batch {batch}  {ms:>8.2f} ms/step {tokens_per_s:>7.1f} tokens/s, "
        "{read:.3f} GB read, {share:.2f} of the rate (quickest "
        "{share_of_quickest:.2f}); {memory:.2f} GB in memory"
    )
    sizes = {n: row[f"{n}_bytes"] / 1e9 for n in ("read", "memory")}
    return text.format(**row, **sizes, ms=1e3 * row["step_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=32, help="tokens, 2 at least")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        common.check_names(args.weights, WEIGHTS)
        if args.new < 2:
            raise ValueError("--new must be 2 at least.")
    except ValueError as e:
        parser.error(str(e))
    model = read_model("config.json", COMMON | SHAPE)
    figures = {"new": args.new, "rows": rows_of(model, args)}
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
