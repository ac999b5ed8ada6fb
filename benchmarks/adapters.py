"""A training step of LoRA on a frozen MoE, against all parameters and against peft.

  python -m benchmarks.adapters [--experts=8|64] [--rank=8] [--repeats=7] [--threads=N]
      [--peft=grouped_mm,eager] [--base=float32,int8] [--json=FILE]

The models, the batch and AdamW are those of `benchmarks.train_step_peers`, in float32.
LoRA is on q, k, v and o and on the stacked experts, at equal rank on both sides; peft
runs each experts implementation of transformers that is named. Steps alternate in one
process, and each loss must fall. "trained" are the bytes of what is trained and of its
two moments, as the arrays have them; the formula is 12 bytes for each number of A and
B. "state" are the bytes of all arrays of the train state, "scratch" what XLA needs
beside them in a step. Needs the extra `hf`.

D model width · E experts · F expert width
"""

import argparse
import math
import os
import pathlib

import jax
import numpy as np
import peft
import torch
import transformers

from benchmarks import common
from benchmarks import train_step_peers as peers
from benchmarks.train_step import random_batch
from moex.adapters.lora import LoRA
from moex.model.accounting import num_bytes
from moex.model.paths import flat_paths
from moex.sharding import shard_batch

ALPHA = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKED = ["experts.gate_up_proj", "experts.down_proj"]
FULL, OURS = "moex, all parameters", "moex, LoRA"


def formula(E: int, rank: int) -> int:
    """The bytes of A and B of all layers, and of their moments."""
    D, F = peers.D, peers.SETTINGS[E][1]
    attention, experts = 4 * (D + D), E * ((D + 2 * F) + (F + D))
    return 12 * peers.LAYERS * rank * (attention + experts)


def moex_figures(job) -> dict:
    """The bytes of a job's state, and of what its step needs beside it."""
    state = job.init_state()
    batch = shard_batch(random_batch(peers.B, peers.L, peers.V), job.mesh)
    step = job.train_step().lower(state, np.int32(0), jax.random.key(0), batch)
    trained = [
        array
        for name, array in flat_paths(state["params"]).items()
        if not job.spec.info[name].frozen
    ]
    return {
        "trained": num_bytes(trained) + num_bytes(state["opt"]),
        "state": num_bytes(state),
        "scratch": step.compile().memory_analysis().temp_size_in_bytes,
    }


def peft_step(E: int, rank: int, experts: str, losses: list):
    """A function that trains one step of peft's LoRA, and its model."""
    model = peers.torch_model(E, "sdpa", experts)
    settings = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=LINEAR, target_parameters=STACKED
    )
    model = peft.get_peft_model(model, settings)
    return peers.torch_step(model, "fused", False, losses), model


def run(E: int, args) -> dict:
    """The figures of one setting."""
    jobs, losses, figures = {}, {}, {}
    targets = ("attention", "experts")
    models = {FULL: None}
    for dtype in args.base.split(","):
        name = OURS if dtype == "float32" else f"{OURS}, base in {dtype}"
        fields = {"rank": args.rank, "alpha": float(ALPHA), "base_dtype": dtype}
        models[name] = LoRA(targets=targets, **fields)
    made = {name: peers.moex_job(E, adapter) for name, adapter in models.items()}
    for experts in filter(None, args.peft.split(",")):
        name = f"peft, LoRA, {experts}"
        losses[name] = []
        jobs[name], model = peft_step(E, args.rank, experts, losses[name])
        own = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in model.parameters())
        figures[name] = {"trained": 12 * own, "state": 8 * own + 4 * whole}
    for name, job in made.items():
        losses[name] = []
        with jax.set_mesh(job.mesh):
            figures[name] = moex_figures(job)
            jobs[name] = peers.moex_step(job, losses[name])
    with jax.set_mesh(made[FULL].mesh):
        seconds = common.measure(jobs, args.repeats, peers.PAUSE_S)
    rows = common.summary(seconds, OURS if OURS in jobs else FULL)
    for name, row in rows.items():
        noted = losses[name][-args.repeats :]
        falls = all(map(math.isfinite, noted)) and losses[name][-1] < losses[name][0]
        row |= figures[name] | {"losses": noted, "falls": falls}
    return {"formula": formula(E, args.rank), "rows": rows}


def table(E: int, rank: int, figures: dict) -> str:
    """The figures of one setting for people; x is over LoRA of moex."""
    K, F = peers.SETTINGS[E]
    wanted = figures["formula"]
    lines = [
        f"{E} experts, top-{K}, width {F}; rank {rank}; by the formula "
        f"{wanted / 2**20:.2f} MiB are trained",
        f"{'':<30}{'min ms':>9}{'median':>9}{'x':>7}{'trained':>9}{'/formula':>9}"
        f"{'state':>9}{'scratch':>9}  (MiB)",
    ]
    for name, row in figures["rows"].items():
        sizes = [row.get(key, math.nan) for key in ("trained", "state", "scratch")]
        trained, state, scratch = (size / 2**20 for size in sizes)
        share = "" if name == FULL else f"{row['trained'] / wanted:.3f}"
        lines.append(
            f"{name:<30}{1e3 * row['min_s']:>9.0f}{1e3 * row['median_s']:>9.0f}"
            f"{row['ratio']:>7.2f}{trained:>9.2f}{share:>9}{state:>9.1f}{scratch:>9.1f}"
            f"{'' if row['falls'] else '  LOSS DOES NOT FALL'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, choices=peers.SETTINGS, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--peft", default="grouped_mm,eager")
    parser.add_argument("--base", default="float32,int8")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    figures = run(args.experts, args)
    print(table(args.experts, args.rank, figures), flush=True)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    common.write_json(args.json, figures | versions | {"threads": args.threads})


if __name__ == "__main__":
    main()
