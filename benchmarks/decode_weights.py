"""Decoding with weights in fewer bytes: tokens/s, and the share of the memory's rate.

A token reads the matrices of attention, routers and logits and those of the experts
that it uses; a batch reads each expert of any of its tokens once. These bytes, over the
time of a step and the rate at which a program reads that does nothing else
(bandwidth.py), are the share. Weights are random, in the shape that they are kept in.
"""

import functools

import jax
import numpy as np

from benchmarks import bandwidth, common
from moex.model.accounting import bytes_per_token, num_bytes
from moex.model.paths import flat_paths, nested
from moex.model.spec import model_spec
from moex.nn.lowered import SCALES

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
        if leaf.dtype in (np.int8, np.int32):
            whole = rng.bytes(int(np.prod(leaf.shape)) * leaf.dtype.itemsize)
            return np.frombuffer(whole, leaf.dtype).reshape(leaf.shape)
        if path.endswith(SCALES):
            return np.full(leaf.shape, 2e-4, leaf.dtype)
        array = np.empty(leaf.shape, leaf.dtype)
        for index in np.ndindex(leaf.shape[:2] if array.ndim > 3 else ()):
            part = rng.random(array[index].shape, np.float32)
            array[index] = 0.06 * (part - 0.5) if array.ndim > 1 else 1.0
        return array

    params = {
        p: jax.device_put(drawn(p, a)) for p, a in flat_paths(spec.params).items()
    }
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), spec.state)
    return spec, model, nested(params), state


def step_bytes(model, params: dict, num_experts: int, k: int, B: int) -> float:
    """The bytes of weights that a step of B tokens reads, if routers draw evenly."""
    used = num_experts * (1 - (1 - k / num_experts) ** B)
    return bytes_per_token(model, flat_paths(params), used)


def rows_of(model, make_run, split, args) -> list[dict]:
    """The rows of all WEIGHTS and batches, printed.

    Args:
      model: model config.
      make_run: `(model, prompts, number of tokens) -> function`, as `decode.moex_run`.
      split: `decode.split`.
      args: those of `decode.main`.
    """
    pages = (bandwidth.read_rate(4, large_pages=large)["median"] for large in (0, 1))
    rate = max(pages)
    print(f"weights  memory is read at {rate / 1e9:.1f} GB/s", flush=True)
    models = {w: random_model(model, w) for w in args.weights.split(",")}
    rows = []
    for B in args.batches:
        prompts = np.random.default_rng(0).integers(2, model.vocab, (B, 16)).tolist()
        jobs = {
            (w, n): functools.partial(make_run(own, prompts, n))
            for w, own in models.items()
            for n in (1, args.new)
        }
        seconds = common.measure(jobs, args.repeats)
        for w, (_, _, params, _) in models.items():
            size = step_bytes(
                model, params, SHAPE["num_experts"], SHAPE["num_experts_per_tok"], B
            )
            row = {"weights": w, "batch": B} | split(seconds, w, args.new)
            row |= {"read_bytes": size, "memory_bytes": num_bytes(params)}
            row["tokens_per_s"] = B / row["step_s"]
            row["share"] = size / row["step_s"] / rate
            row["share_of_quickest"] = size / row["step_min_s"] / rate
            text = (
                "weights  {:<9} batch {}  {:>8.2f} ms/step {:>7.1f} tokens/s, {:.3f} "
            )
            text += "GB read, {:.2f} of the rate (quickest {:.2f}); {:.2f} GB in memory"
            cells = 1e3 * row["step_s"], row["tokens_per_s"], size / 1e9, row["share"]
            quickest, memory = row["share_of_quickest"], row["memory_bytes"] / 1e9
            print(text.format(w, B, *cells, quickest, memory), flush=True)
            rows.append(row)
    return [{"rate": rate}, *rows]
