"""A training step of moex and one of Hugging Face transformers, with equal sizes.

  python -m benchmarks.train_step_peers [--experts=8|64] [--repeats=7] [--threads=N]
      [--attention=sdpa,eager] [--optimizer=fused,foreach] [--json=FILE]

Forward, backward and AdamW in float32, with 8 experts (top-2, width 512) and with 64
(top-8, width 64). moex runs the train step of a job with all its figures; torch runs
Mixtral with each experts implementation of transformers, plain and compiled, with the
fastest pair of the attentions and AdamWs named. Load-balance loss and gradient clipping
are off on both sides; a GPU may use TF32 on both. "matmuls alone" is the floor of what
XLA can do: plain dense products of the same FLOPs as the step's (attention at half of
its square), with nothing between them. Steps alternate in one process; each
side trains on one random batch over and over, so that its loss must fall. What cannot
run is a row with the reason. Needs the extra `hf`, and a C++ compiler on a CPU.

B batch · L length · D model width · V vocabulary · E experts · K slots · F expert width
"""

import argparse
import math
import os
import pathlib
import sys
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import common
from benchmarks.train_step import random_batch, random_job
from moex.configs import base
from moex.model import accounting
from moex.model.optim import AdamW, Optim
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.sharding import shard_batch

B, L, D, V, LAYERS, HEADS = 8, 256, 256, 8192, 4, 4
SETTINGS = {8: (2, 512), 64: (8, 64)}  # E: K and F
TARGETS = {8: 1.1, 64: 1.4}  # E: how much faster moex is to be
LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8
GPU = jax.default_backend() == "gpu" and torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ALONE = "matmuls alone (XLA)"
PAUSE_S = 0.5  # torch's threads spin for a while after each step, on moex's cores


def moex_job(E: int, adapter=None):
    """The job whose step is timed, on a random batch; `adapter`: of its model."""
    K, F = SETTINGS[E]
    moe = MoE(num_experts=E, router=TopK(k=K), experts=Glu(hidden=F))
    layers = (Segment(pattern=(moe,), repeat=LAYERS),)
    cfg = base.get_config()
    own = {"attention": Attention(heads=HEADS), "layers": layers, "adapter": adapter}
    cfg.model = LM(dim=D, vocab=V, **own)
    cfg.batch_size, cfg.seq_len, cfg.precision = B, L, "float32"
    cfg.scan_layers = False  # torch unrolls the layers too
    rule = AdamW(b1=BETAS[0], b2=BETAS[1], eps=EPS)
    options = {"schedule": "constant", "weight_decay": DECAY, "clip": None}
    cfg.optim = Optim(rule=rule, lr=LR, **options)
    cfg.loss = Loss(load_balance=0.0, router_z=0.0)
    return random_job(cfg, V)


def moex_step(job, losses: list):
    """A function that trains one step and notes its loss."""
    key, step = jax.random.key(0), job.train_step()
    batch = shard_batch(random_batch(B, L, V), job.mesh)
    held = {"state": job.init_state()}

    def run():
        held["state"], metrics = step(held["state"], np.int32(len(losses)), key, batch)
        jax.block_until_ready(held["state"])
        losses.append(float(metrics["loss"]))

    return run


def matmuls_alone(E: int):
    """A function that runs dense products with the FLOPs of one training step."""
    K, F = SETTINGS[E]
    T, A, causal = B * L, D // HEADS, L // 2
    # (batch, rows, inner, columns) of each forward product; the backward has two each.
    layer = [(1, T, D, 3 * D), (1, T, D, D), (1, T * K, D, 2 * F), (1, T * K, F, D)]
    layer += [(B * HEADS, L, A, causal), (B * HEADS, L, causal, A)]
    sizes = layer * LAYERS + [(1, T, D, V)]
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape[shape[0] == 1 :]), jnp.float32)

    arrays = [(normal(b, m, k), normal(b, k, n), normal(b, m, n))
              for b, m, k, n in sizes]  # fmt: skip

    @jax.jit
    def products(arrays):
        out = []
        for x, w, dy in arrays:
            x_T = jax.lax.optimization_barrier(jnp.matrix_transpose(x))
            out += [x @ w, dy @ jnp.matrix_transpose(w), x_T @ dy]
        return out

    return lambda: products(arrays)


def torch_model(E: int, attention: str, experts: str, device: str = DEVICE):
    K, F = SETTINGS[E]
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    widths = {"vocab_size": V, "hidden_size": D, "intermediate_size": F}
    sizes = {"num_local_experts": E, "num_experts_per_tok": K, **heads, **widths}
    config = transformers.MixtralConfig(num_hidden_layers=LAYERS, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, experts_implementation=experts
        )
    return model.float().train()


def torch_step(model, optimizer: str, compiled: bool, losses: list):
    """The same function for a torch model; `optimizer` is "fused" or "foreach"."""
    batch = {
        k: torch.tensor(v, device=DEVICE) for k, v in random_batch(B, L, V).items()
    }
    options = {"weight_decay": DECAY, "betas": BETAS, "eps": EPS, optimizer: True}
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, **options)

    def loss_of(tokens, targets):
        logits = model(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1))

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def run():
        loss = loss_of(batch["tokens"].long(), batch["targets"].long())
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())  # waits for the whole step

    return run


def check_memory(E: int, experts: str) -> None:
    """Raises MemoryError where a copy of the weights per slot would not fit."""
    K, F = SETTINGS[E]
    # Every layer keeps the copy for the backward pass; one layer has its gradients too.
    need = (LAYERS + 1) * B * L * K * 3 * D * F * 4
    host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = torch.cuda.mem_get_info()[0] if GPU else host
    if experts == "batched_mm" and need > 0.7 * free:
        text = "copies weights per slot: needs {:.0f} GiB, {:.0f} are free"
        raise MemoryError(text.format(need / 2**30, free / 2**30))


def torch_jobs(E: int, args, losses: dict) -> tuple[dict, dict]:
    """`({name: step}, {name: why it cannot run})`; every step has run once."""
    jobs: dict = {}
    reasons: dict = {}

    def add(experts, mode, attention, optimizer):
        name, noted = f"{experts} {mode}, {attention}, {optimizer}", []
        print(f"preparing {name}", file=sys.stderr, flush=True)
        try:
            check_memory(E, experts)
            model = torch_model(E, attention, experts)
            job = torch_step(model, optimizer, mode == "compiled", noted)
            job()  # compiles
        except Exception as e:  # the row says what a library raises
            reasons[name] = (str(e).strip().splitlines() or [type(e).__name__])[0]
        else:
            jobs[name], losses[name] = job, noted
        return name

    def fastest(kinds, mode):
        """The fastest (attention, optimizer) with grouped_mm; only its job stays."""
        named = {add("grouped_mm", mode, *kind): kind for kind in kinds}
        ran = {name: jobs.pop(name) for name in named if name in jobs}
        if not ran:
            return kinds[0]
        times = common.measure(ran, 2)
        best = min(ran, key=lambda name: min(times[name]["wall"]))
        jobs[best] = ran[best]
        return named[best]

    torch.compiler.reset()
    attentions = args.attention.split(",")
    plain = fastest([*product(attentions, args.optimizer.split(","))], "plain")
    compiled = fastest([*product(attentions, plain[1:])], "compiled")
    for experts in ("eager", "batched_mm"):
        add(experts, "plain", *plain)
        add(experts, "compiled", *compiled)
    return jobs, reasons


def run(E: int, args) -> dict:
    """The figures of one setting."""
    losses: dict = {"moex": []}
    job, theirs = moex_job(E), torch_model(E, "eager", "eager", "meta")
    jobs, reasons = torch_jobs(E, args, losses)
    with jax.set_mesh(job.mesh):
        jobs = {"moex": moex_step(job, losses["moex"])} | jobs
        jobs |= {ALONE: matmuls_alone(E)}
        seconds = common.measure(jobs, args.repeats, PAUSE_S)
        rows = common.summary(seconds, "moex")
    for name, row in rows.items():
        row["median_ratio"] = row["median_s"] / rows["moex"]["median_s"]
        if name in losses:
            row["losses"] = noted = losses[name][-args.repeats :]
            row["falls"] = all(map(math.isfinite, noted)) and noted[-1] < noted[0]
    cost = accounting.model_cost(job.cfg.model, job.spec, L)
    params = (cost.num_params, sum(p.numel() for p in theirs.parameters()))
    assert abs(params[0] / params[1] - 1) < 0.02, params
    return {"params": params, "rows": rows, "cannot_run": reasons}


def table(E: int, figures: dict) -> str:
    """The figures of one setting for people; x says how much faster moex is."""
    params = "parameters: moex {:,}, transformers {:,}".format(*figures["params"])
    lines = ["{} experts, top-{}, width {}; {}".format(E, *SETTINGS[E], params)]
    head = ("min ms", "median", "CPU ms", "tokens/s", "min x", "median x", "CPU x")
    lines.append(" " * 34 + "".join(f"{text:>10}" for text in head) + "  loss")
    cells = "{:<34}{:>10.0f}{:>10.0f}{:>10.0f}{:>10,.0f}{:>10.2f}{:>10.2f}{:>10.2f}"
    for name, row in figures["rows"].items():
        ms = [1e3 * row[key] for key in ("min_s", "median_s", "cpu_min_s")]
        ratios = [row[key] for key in ("ratio", "median_ratio", "cpu_ratio")]
        line = cells.format(name, *ms, B * L / row["min_s"], *ratios)
        if "losses" in row:
            line += "  {:.3f} to {:.3f}".format(row["losses"][0], row["losses"][-1])
            line += "" if row["falls"] else ": DOES NOT FALL"
        lines.append(line)
    lines += [f"{name:<34}  {why}" for name, why in figures["cannot_run"].items()]
    theirs = figures["rows"].keys() - {"moex", ALONE}
    ratios = {name: figures["rows"][name]["ratio"] for name in theirs}
    if ratios:
        best = min(ratios, key=lambda name: ratios[name])
        lines.append(f"over {best}: {ratios[best]:.2f}, target {TARGETS[E]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, choices=SETTINGS, help="default: both")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--attention", default="sdpa,eager")
    parser.add_argument("--optimizer", default="fused,foreach")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high" if GPU else "highest")
    figures = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures |= {"threads": args.threads, "settings": {}}
    for E in [args.experts] if args.experts else SETTINGS:
        figures["settings"][E] = run(E, args)
        print(table(E, figures["settings"][E]), flush=True)
    common.write_json(args.json, figures)


if __name__ == "__main__":
    main()
