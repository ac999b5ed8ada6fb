"""Prefill and decode tokens/s of moex and of Hugging Face transformers, one model each.

  python -m benchmarks.decode [--models=mixtral,deepseek_v3,experts] [--batches=1,8]
      [--repeats=7] [--experts=grouped_mm] [--threads=N] [--alone] [--dtype=float32]
      [--json=FILE]

A checkpoint of random float32 weights is made by transformers and read by moex; both
continue the same prompts greedily, in one process, runs interleaved. Prefill is the
time of one new token, decode that of the others; x says how many times as many tokens/s
moex makes, min x the same of the quickest runs. Run nothing else: another process
makes torch's threads wait for each other, many times as long. "same" counts
the rows whose tokens are all equal. "experts" is moex alone: few and many experts of
the same number of multiplications per token; a step should cost in proportion to the
experts used, not to those there are. Needs the extra `hf`; with --alone moex's rows
alone, without it, and a larger model, "olmoe", in another --dtype.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import tempfile

import jax
import numpy as np

from benchmarks import common
from moex.interop.families import find_family, read_model
from moex.interop.folder import Folder
from moex.interop.hf import load_model
from moex.interop.names import pieces
from moex.model import spec as states
from moex.model.decode import generate
from moex.nn.context import Compute
from moex.sharding import MeshConfig

COMMON: dict = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "initializer_range": 0.06,  # 1 / sqrt(width): every part counts in the tokens
    "bos_token_id": 1,
    "eos_token_id": None,  # no row ends early
    "pad_token_id": 0,
}
MIXTRAL = {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 512,
}
MODELS = {
    "mixtral": MIXTRAL,
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 512,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
# Models that run by name only, with --alone. "olmoe" has the shape of OLMoE 1B-7B,
# 28 GB in float32: it is for an accelerator.
MORE = {
    "tiny": MIXTRAL | {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1},
    "olmoe": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 1024,
    },
}
EXPERTS = "experts"
SIZES = ((8, 2, 512), (64, 2, 512), (64, 8, 128))  # E, K, F
PAUSE_S = 0.5  # torch's threads spin for a while after each run, on moex's cores


def prompts_of(B: int, L: int, V: int) -> list[list[int]]:
    """Prompts of random tokens."""
    return np.random.default_rng(0).integers(2, V, size=(B, L)).tolist()


def moex_model(config: dict, folder: str | None = None):
    """(spec, model config, params, state); drawn at random without a checkpoint."""
    model = read_model("config.json", config)
    spec = states.model_spec(model)
    mesh = MeshConfig().make(jax.devices()[:1])
    if folder is None:
        fresh = functools.partial(states.init_params, model)
        init = jax.jit(fresh, out_shardings=states.shardings(spec, mesh))
        return spec, model, *init(jax.random.key(0))
    wanted = list(pieces(model, find_family("config.json", config).names))
    arrays = load_model(spec, mesh, wanted, Folder.open(folder))
    return spec, model, arrays["params"], arrays["state"]


def moex_run(model, prompts, num_new: int, dtype: str = "float32"):
    """A function that makes new tokens."""
    options = {
        "max_new_tokens": num_new,
        "temperature": 0.0,
        "compute": Compute(dtype=dtype),
    }
    return lambda: generate(*model, prompts, **options)


def peers():
    """`(torch, transformers)`, or ValueError where one is missing."""
    try:
        import torch
        import transformers
    except ImportError as e:
        raise ValueError(f"{e.name} is missing: install `hf`, or take --alone.") from e
    return torch, transformers


def torch_model(config: dict, experts: str):
    torch, transformers = peers()
    fields = {k: v for k, v in config.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(config["model_type"], **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation=experts
    )
    return model.float().eval()


def torch_run(model, experts: str, prompts, num_new: int):
    """The same function for a torch model, with one implementation of its experts."""
    torch, _ = peers()
    prompt = torch.tensor(prompts)
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}

    @torch.no_grad()
    def run():
        model.set_experts_implementation(experts)
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, **options)
        return made[:, prompt.shape[1] :].tolist()

    return run


def both(name: str, args) -> tuple:
    """(moex's model, torch's with the same weights or None)."""
    config = COMMON | (MODELS | MORE)[name]
    if args.alone:
        return moex_model(config), None
    theirs = torch_model(config, args.experts.split(",")[0])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        saved = json.loads(
            (pathlib.Path(folder) / "config.json").read_text(encoding="utf-8")
        )
        return moex_model(saved, folder), theirs


def split(seconds: dict, name, num_new: int) -> dict:
    """Prefill and one step, from the times of 1 and of all new tokens."""
    first, whole = (seconds[name, n]["wall"] for n in (1, num_new))
    return {
        "prefill_s": statistics.median(first),
        "prefill_min_s": min(first),
        "step_s": (statistics.median(whole) - statistics.median(first)) / (num_new - 1),
        "step_min_s": (min(whole) - min(first)) / (num_new - 1),
        "wall_s": {1: first, num_new: whole},
    }


def timed(sides: dict, B: int, args) -> dict:
    """Prefill and decode of each side; `sides` is {name: number of tokens -> run}."""
    jobs = {(name, n): make(n) for name, make in sides.items() for n in (1, args.new)}
    pause = 0.0 if args.alone else PAUSE_S
    seconds = common.measure(jobs, args.repeats, pause)
    made = {name: jobs[name, args.new]() for name in sides}
    rows = {name: split(seconds, name, args.new) for name in sides}
    for row in rows.values():
        row["prefill_tokens_per_s"] = B * args.prompt / row["prefill_s"]
        row["decode_tokens_per_s"] = B / row["step_s"]
    for name, row in rows.items():
        for part in ("prefill", "step"):
            for key in (f"{part}_s", f"{part}_min_s"):
                row[key.replace("_s", "_ratio")] = row[key] / rows["moex"][key]
        pairs = zip(made[name], made["moex"], strict=True)
        row["same"] = sum(theirs == ours for theirs, ours in pairs)
    return rows


def beside(name: str, args) -> dict:
    """{batch: rows} of one model, printed."""
    ours, theirs = both(name, args)
    figures = {}
    for B in args.batches:
        prompts = prompts_of(B, args.prompt, ours[1].vocab)
        run = functools.partial(moex_run, ours, prompts, dtype=args.dtype)
        sides = {"moex": run}
        for experts in [] if theirs is None else args.experts.split(","):
            make = functools.partial(torch_run, theirs, experts, prompts)
            sides[f"transformers {experts}"] = make
        rows = timed(sides, B, args)
        figures[B] = {"load_average": os.getloadavg()[0], "rows": rows}
        for side, row in rows.items():
            cells = [
                row[key]
                for part, unit in (("prefill", "prefill"), ("decode", "step"))
                for key in (
                    f"{part}_tokens_per_s",
                    f"{unit}_ratio",
                    f"{unit}_min_ratio",
                )
            ]
            text = "{:<12}{:>3}  {:<24}" + 2 * "{:>9,.0f}{:>7.2f}{:>7.2f}" + "  {}/{}"
            print(text.format(name, B, side, *cells, row["same"], B), flush=True)
    return figures


def experts_cost(args) -> list[dict]:
    """Time of a step with few and many experts, moex alone, printed."""
    models = {}
    for E, K, F in SIZES:
        sizes = {"num_local_experts": E, "num_experts_per_tok": K}
        config = COMMON | MIXTRAL | sizes | {"intermediate_size": F}
        models[E, K, F] = moex_model(config)
    rows = []
    for B in args.batches:
        prompts = prompts_of(B, args.prompt, COMMON["vocab_size"])
        jobs = {
            (size, n): moex_run(model, prompts, n)
            for size, model in models.items()
            for n in (1, args.new)
        }
        seconds = common.measure(jobs, args.repeats)
        for E, K, F in SIZES:
            row: dict = {"E": E, "K": K, "F": F, "batch": B}
            row |= split(seconds, (E, K, F), args.new)
            # The mean if routers draw evenly; a layer reads each such expert once.
            row["experts_used"] = used = E * (1 - (1 - K / E) ** B)
            width = 3 * COMMON["hidden_size"] * F * COMMON["num_hidden_layers"]
            row["used_bytes"], row["all_bytes"] = 4 * used * width, 4 * E * width
            text = "experts cost  {:>2} of K={} F={} {:<10}{:>8.2f} ms/step"
            text += ", {:.1f} used per layer: {:.0f} of {:.0f} MB"
            mb = [row[key] / 1e6 for key in ("used_bytes", "all_bytes")]
            ms = 1e3 * row["step_s"]
            print(text.format(E, K, F, f"batch {B}", ms, used, *mb), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join((*MODELS, EXPERTS)))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens, 2 at least")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--experts", default="grouped_mm", help="of transformers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--dtype", default="float32", help="of moex")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    figures: dict = {"prompt": args.prompt, "new": args.new, "dtype": args.dtype}
    figures["models"] = {}
    try:
        common.check_names(args.models, (*MODELS, *MORE, EXPERTS))
        args.batches = [int(n) for n in args.batches.split(",")]
        if args.new < 2 or min(args.batches) < 1:
            raise ValueError("--new must be 2 at least, and --batches 1 at least.")
        args.alone |= args.models == EXPERTS
        if not args.alone:
            torch, transformers = peers()
            torch.set_num_threads(args.threads)
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            figures |= {"torch": torch.__version__, "threads": args.threads}
            figures |= {"transformers": transformers.__version__}
    except ValueError as e:
        parser.error(str(e))
    names = args.models.split(",")
    if names != [EXPERTS]:
        head = ("prefill", "x", "min x", "decode", "x", "min x", "same")
        text = "{:<12}{:>3}  {:<24}{:>9}{:>7}{:>7}{:>9}{:>7}{:>7}  {}"
        print(text.format("model", "B", "tokens/s of", *head))
    for name in names:
        if name != EXPERTS:
            figures["models"][name] = beside(name, args)
    if EXPERTS in names:
        figures["experts_cost"] = experts_cost(args)
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
