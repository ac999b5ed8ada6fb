"""Decoding with some experts resident, beside decoding with all of them in memory.

  python -m benchmarks.offload [--shape=middle] [--slots=100%,50%,25%] [--batches=1,8]
      [--weights=float32,bfloat16,int8,int4] [--new=17] [--repeats=5]
      [--dtype=float32] [--bank=disk] [--policy=lru] [--prefetch=router] [--json=FILE]

Random weights; all write the same prompts greedily, in one process, runs interleaved.
A step is the time of all new tokens without that of the first, over their number. Slots
begin with what the run before left there. "hits" are those of all runs; "moved" is the
bytes of experts that a step loads. "same" says whether the tokens are equal.
"""

import argparse
import functools
import pathlib
import tempfile
import time

import jax
import numpy as np

from benchmarks import common
from benchmarks.decode import moex_model, split
from benchmarks.decode_weights import WEIGHTS, in_fewer_bytes
from moex.model.decode import generate
from moex.nn.context import Compute
from moex.offload import decode
from moex.offload.executor import Executor
from moex.offload.settings import BANKS, POLICIES, PREFETCH, Settings
from moex.offload.setup import of_arrays


def _olmoe(dim: int, hidden: int, experts: int, k: int, layers: int, vocab: int):
    return {
        "model_type": "olmoe",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_experts": experts,
        "num_experts_per_tok": k,
        "num_hidden_layers": layers,
        "num_attention_heads": max(dim // 128, 1),
        "num_key_value_heads": max(dim // 128, 1),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.06,
        "eos_token_id": None,
    }


# "middle": experts of 6.3 MB in float32, 0.8 GB in all; "olmoe": its layers, 4 of them.
SHAPES = {
    "tiny": _olmoe(16, 32, 4, 2, 2, 64),
    "middle": _olmoe(1024, 512, 32, 4, 4, 8192),
    "olmoe": _olmoe(2048, 1024, 64, 8, 4, 50304),
}


def counts(executor: Executor) -> tuple[int, int, int]:
    """(hits, misses, bytes moved) since its slots were made."""
    told = [slots.cache.statistics for slots in executor.slots]
    fields = ("hits_L", "misses_L", "bytes_L")
    hits, misses, moved = (sum(int(getattr(t, n).sum()) for t in told) for n in fields)
    return hits, misses, moved


def rows_of(args, folder: pathlib.Path) -> list[dict]:
    """One row for each form of weights, batch and size, printed."""
    whole = moex_model(SHAPES[args.shape])
    return [
        row
        for weights in args.weights.split(",")
        for row in rows_in(args, folder / weights, weights, whole)
    ]


def rows_in(args, folder: pathlib.Path, weights: str, whole) -> list[dict]:
    """The rows of one form of weights.

    Args:
      args: those of `main`.
      folder: a new one, for banks.
      weights: as for `--weights` of moex; "float32": as they are.
      whole: (spec, model, params, state) as they are.
    """
    spec, model, params, state = whole
    form = None if weights == "float32" else weights
    compute = Compute(dtype=args.dtype)
    executors = {}
    for size in args.slots.split(","):
        settings = Settings(
            size,
            policy=args.policy,
            bank=args.bank,
            prefetch=args.prefetch,
            weights=form,
        )
        own = folder / size
        own.mkdir(parents=True)
        executors[size] = of_arrays(model, params, state, own, settings, compute)
    if form is not None:
        spec, params = in_fewer_bytes(model, params, form)
    rows = []
    for batch in map(int, args.batches.split(",")):
        prompts = np.random.default_rng(0).integers(2, model.vocab, (batch, 16))
        common_args = (model, prompts.tolist())
        how = {"temperature": 0.0, "compute": compute}
        makers = {
            "plain": functools.partial(
                generate, spec, model, params, state, prompts.tolist(), **how
            )
        } | {
            size: functools.partial(decode.generate, own, *common_args, **how)
            for size, own in executors.items()
        }
        jobs = {
            (name, n): functools.partial(make, max_new_tokens=n)
            for name, make in makers.items()
            for n in (1, args.new)
        }
        before = {size: counts(own) for size, own in executors.items()}
        seconds = common.measure(jobs, args.repeats)
        want = jobs["plain", args.new]()
        for name in makers:
            row = {"weights": weights, "batch": batch, "slots": name}
            row |= split(seconds, name, args.new)
            row |= {"tokens_per_s": batch / row["step_s"]}
            if name != "plain":
                now = np.subtract(counts(executors[name]), before[name])
                hits, misses, moved = now.tolist()
                begun = counts(executors[name])[2]
                row["same"] = jobs[name, args.new]() == want
                row["hits"] = hits / (hits + misses)
                row["moved"] = (counts(executors[name])[2] - begun) / args.new
            print(line(row), flush=True)
            rows.append(row)
    return rows


def line(row: dict) -> str:
    """A row as text."""
    text = "{weights:<9} batch {batch}  {slots:>6}  {ms:>8.2f} ms/step "
    text += "{tokens_per_s:>8.1f} tokens/s"
    if "hits" in row:
        text += "  hits {hits:.2f}, {mb:,.1f} MB a step, same: {same}"
    return text.format(**row, ms=1e3 * row["step_s"], mb=row.get("moved", 0) / 1e6)


def main(argv=None) -> None:
    """Measure and print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=[*SHAPES], default="middle")
    add("--slots", default="100%,50%,25%")
    add("--batches", default="1,8")
    add("--weights", default=",".join(WEIGHTS))
    add("--new", type=int, default=17)
    add("--repeats", type=int, default=5)
    add("--dtype", default="float32")
    add("--bank", choices=BANKS, default="disk")
    add("--policy", choices=POLICIES[:3], default="lru")
    add("--prefetch", choices=PREFETCH[:2])
    add("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        common.check_names(args.weights, WEIGHTS)
    except ValueError as e:
        parser.error(str(e))
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(args, pathlib.Path(folder))
    found = {"shape": SHAPES[args.shape], "rows": rows}
    found |= {"args": {n: getattr(args, n) for n in ("dtype", "bank", "policy")}}
    print(f"{time.perf_counter() - begin:.0f} s on {jax.devices()[0].device_kind}")
    common.write_json(args.json, found)


if __name__ == "__main__":
    main()
