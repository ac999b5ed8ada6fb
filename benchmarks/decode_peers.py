"""Decoding beside transformers, its offload by accelerate, and llama.cpp.

  python -m benchmarks.decode_peers [--peers=transformers,accelerate,llama.cpp]
      [--layers=2] [--batches=1,8] [--new=17] [--repeats=3] [--threads=N] [--json=FILE]

transformers draws a random checkpoint of layers of OLMoE's size, moex reads it, and
llama.cpp a GGUF file of it (llama_peer.py). All continue the same prompts greedily, in
one process, runs interleaved; "same" counts the rows whose tokens are those of moex in
float32: rounded weights soon write other text, so llama.cpp in float32 is compared too,
without its time. With "accelerate" the
experts of transformers are on the disk, all of them: it has no finer part than the
experts of a layer. Bytes are those of weights that a token reads in moex's form, and
the share is theirs of the rate at which memory is read (bandwidth.py).

Extras: `hf` for the first, also `accelerate` for the second; for the third see
llama_peer.py. Run nothing else: threads of other libraries wait busily for each other.
"""

import argparse
import functools
import importlib.util
import json
import operator
import os
import pathlib
import tempfile

import numpy as np

from benchmarks import common, llama_peer
from benchmarks.decode import COMMON, PAUSE_S, moex_model, moex_run, peers, split
from benchmarks.decode_weights import (
    SHAPE,
    WEIGHTS,
    in_fewer_bytes,
    read_rate,
    step_bytes,
)

PEERS = ("transformers", "accelerate", "llama.cpp")
SAME_BYTES = {"bf16": "bfloat16", "q8_0": "int8", "iq4_nl": "int4"}  # of llama.cpp


def write_checkpoint(folder: pathlib.Path, layers: int) -> None:
    """Let transformers write a random checkpoint."""
    torch, transformers = peers()
    fields = COMMON | SHAPE | {"num_hidden_layers": layers, "initializer_range": 0.03}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def moex_sides(folder: pathlib.Path) -> dict:
    """`{weights: (spec, model, params, state)}` of a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec, model, params, state = moex_model(config, str(folder))
    sides = {"float32": (spec, model, params, state)}
    for weights in WEIGHTS[1:]:
        low, made = in_fewer_bytes(model, params, weights)
        sides[weights] = (low, model, made, state)
    return sides


def torch_side(folder: pathlib.Path, name: str, **how):
    """`(prompts, n) -> tokens` of a model of transformers."""
    torch, transformers = peers()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, name), **how).eval()

    @torch.no_grad()
    def run(prompts, n):
        prompt = torch.tensor(prompts)
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, **options)
        return made[:, prompt.shape[1] :].tolist()

    return run


def accelerated(folder: pathlib.Path, spare: pathlib.Path, layers: int):
    """The same with all experts on the disk."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("accelerate is missing: pip install accelerate")
    places = {f"model.layers.{i}.mlp.experts": "disk" for i in range(layers)}
    for i in range(layers):
        own = ("mlp.gate", "self_attn", "input_layernorm", "post_attention_layernorm")
        places |= {f"model.layers.{i}.{name}": "cpu" for name in own}
    outer = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places |= dict.fromkeys(outer, "cpu")
    return torch_side(folder, "float32", device_map=places, offload_folder=spare)


def theirs(args, folder: pathlib.Path, batch: int) -> dict:
    """`{name: Decoder}` of llama.cpp, in each form, for a batch."""
    if "llama.cpp" not in args.peers:
        return {}
    files = {f: llama_peer.quantised(folder / "model.gguf", f) for f in SAME_BYTES}
    sizes = batch, args.prompt + args.new, args.threads
    return {f"llama.cpp {f}": llama_peer.Decoder(a, *sizes) for f, a in files.items()}


def rows_of(args, folder: pathlib.Path) -> list[dict]:
    """The rows of all batches, printed."""
    write_checkpoint(folder, args.layers)
    if "llama.cpp" in args.peers:
        llama_peer.write_gguf(folder, folder / "model.gguf")
    models = moex_sides(folder)
    _, model, *_ = models["float32"]

    def ours(own, prompts, n):
        return moex_run(own, prompts, n)()

    fixed = {f"moex {w}": functools.partial(ours, own) for w, own in models.items()}
    if "transformers" in args.peers:
        for name in ("float32", "bfloat16"):
            fixed[f"transformers {name}"] = torch_side(folder, name)
    rows = []
    for B in args.batches:
        rng = np.random.default_rng(0)
        prompts = rng.integers(2, model.vocab, (B, args.prompt)).tolist()
        decoders = theirs(args, folder, B)
        sides = fixed | {name: own.run for name, own in decoders.items()}
        rate = read_rate()
        found = timed(sides, prompts, args.new, args.repeats)
        rate = (rate + read_rate()) / 2
        for own in decoders.values():
            own.close()
        print(f"memory is read at {rate / 1e9:.1f} GB/s", flush=True)
        if "accelerate" in args.peers:
            side = accelerated(folder, folder / "offloaded", args.layers)
            slow = {"transformers, experts on disk": side}
            found |= timed(slow, prompts, 3, 1)
            del side, slow
        for name, row in found.items():
            form = name.split()[-1]
            form = SAME_BYTES.get(form, form if form in WEIGHTS else "float32")
            size = step_bytes(
                model,
                models[form][2],
                SHAPE["num_experts"],
                SHAPE["num_experts_per_tok"],
                B,
            )
            want = found["moex float32"]["tokens"]
            pairs = zip(row["tokens"], want, strict=True)
            row |= {"batch": B, "side": name, "read_bytes": size, "rate": rate}
            row["same"] = sum(own == ref[: len(own)] for own, ref in pairs)
            row["tokens_per_s"] = B / row["step_s"]
            row["share"] = size / row["step_s"] / rate
            print(line(row), flush=True)
            rows.append(row)
        if "llama.cpp" in args.peers:
            sizes = B, args.prompt + args.new, args.threads
            exact = llama_peer.Decoder(folder / "model.gguf", *sizes)
            made = exact.run(prompts, args.new)
            exact.close()
            want = found["moex float32"]["tokens"]
            same = sum(map(operator.eq, made, want))
            print(f"batch {B}  llama.cpp f32, not timed: same {same}/{B}", flush=True)
            rows.append({"batch": B, "side": "llama.cpp f32", "same": same})
    return rows


def timed(sides: dict, prompts, new: int, repeats: int) -> dict:
    """Prefill, step and tokens of each side."""
    jobs = {
        (name, n): functools.partial(side, prompts, n)
        for name, side in sides.items()
        for n in (1, new)
    }
    seconds = common.measure(jobs, repeats, PAUSE_S)
    rows = {name: split(seconds, name, new) for name in sides}
    for name, row in rows.items():
        row["tokens"] = jobs[name, new]()
    return rows


def line(row: dict) -> str:
    """A row as text."""
    text = (
        "batch {batch}  {side:<30}{ms:>9.2f} ms/step {tokens_per_s:>7.1f} tokens/s, "
        "{gb:.3f} GB read, {share:.2f} of the rate; prefill {prefill:.0f} ms; same "
        "{same}/{batch}"
    )
    sizes = {"gb": row["read_bytes"] / 1e9, "prefill": 1e3 * row["prefill_s"]}
    return text.format(**row, **sizes, ms=1e3 * row["step_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--new", type=int, default=17, help="tokens, 2 at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    try:
        common.check_names(args.peers, PEERS)
        args.peers = args.peers.split(",")
        args.batches = [int(n) for n in args.batches.split(",")]
        torch, transformers = peers()
        torch.set_num_threads(args.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if "llama.cpp" in args.peers:
            llama_peer.packages()
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(args, pathlib.Path(folder))
    except ValueError as e:
        parser.error(str(e))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    common.write_json(args.json, {"layers": args.layers, "rows": rows} | versions)


if __name__ == "__main__":
    main()
