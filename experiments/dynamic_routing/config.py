"""Does top-p routing give hard tokens more experts, and save work for the same loss?

The text is easy (copies), hard (chains modulo a prime) and in between (word problems),
in equal shares; all models have the same parameters.
"""

import dataclasses

from experiments.dynamic_routing.measures import by_domain, forward_time
from moex import (
    LM,
    AdamW,
    Attention,
    Bpe,
    Controller,
    Copies,
    Data,
    Eval,
    Glu,
    Loss,
    Modular,
    MoE,
    Optim,
    Segment,
    TopK,
    TopP,
    WordProblems,
)
from moex.configs import base
from moex.experiment.contract import Arm, Column, Experiment, Table, Training, Work


@dataclasses.dataclass(frozen=True)
class Size:
    """The numbers that differ between a laptop and a GPU."""

    dim: int
    heads: int
    hidden: int  # of an expert
    layers: int
    seq_len: int
    batch: int
    steps: int
    lr: float
    vocab: int
    documents: int  # of each source
    minutes: float  # of one run


SIZES = {
    "cpu": Size(96, 4, 48, 3, 64, 16, 800, 2e-3, 512, 60_000, 2.0),
    "gpu": Size(512, 8, 1024, 8, 512, 64, 3000, 6e-4, 4096, 1_000_000, 4.0),
}
EXPERTS, P, K_MAX = 16, 0.4, 16
BETAS = {"0": 0.0, "1e-4": 1e-4, "1e-3": 1e-3, "1e-2": 1e-2, "1e-1": 1e-1}
ENTROPY = Loss(load_balance=1e-2, balance_scale="count", router_z=0.0)
KEEP = ("moe/experts_per_token", "moe/entropy", "moe/max_violation")


def config(size: Size, router, beta=0.0):
    """The run config of one arm."""
    cfg = base.get_config()
    moe = MoE(num_experts=EXPERTS, router=router, experts=Glu(hidden=size.hidden))
    cfg.model = LM(
        dim=size.dim,
        attention=Attention(heads=size.heads),
        layers=(Segment(pattern=(moe,), repeat=size.layers),),
    )
    kinds = (Copies, Modular, WordProblems)
    sources = tuple(kind(count=size.documents) for kind in kinds)
    cfg.data = Data(sources=sources, tokenizer=Bpe(vocab=size.vocab))
    cfg.steps, cfg.batch_size, cfg.seq_len = size.steps, size.batch, size.seq_len
    cfg.optim = Optim(rule=AdamW(b2=0.95), lr=size.lr, warmup_steps=size.steps // 10)
    cfg.loss = dataclasses.replace(ENTROPY, entropy=beta)
    cfg.eval = Eval(every=size.steps // 4, sequences=256)
    cfg.checkpoint.every = size.steps // 2
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    return cfg


def get_experiment(name):
    """The arms of a size: "cpu" or "gpu"."""
    size = SIZES[name]
    routers = {
        "top1": (TopK(k=1, normalize="none"), 0.0),
        "top2": (TopK(k=2, normalize="none"), 0.0),
        **{f"top_p_{b}": (TopP(p=P, k_max=K_MAX), v) for b, v in BETAS.items()},
        "controlled": (
            TopP(p=P, k_max=K_MAX, control=Controller(target=2.0)),
            BETAS["1e-4"],
        ),
    }
    arms: dict[str, Arm] = {
        arm: Training(config(size, *given), keep=KEEP, minutes=size.minutes)
        for arm, given in routers.items()
    }
    dynamic = [arm for arm in arms if arm not in ("top1", "top2")]
    for arm in dynamic:
        args = {"run": arm, "tokens": 20_000}
        arms[f"by_domain_{arm}"] = Work(by_domain, args, needs=(arm,), minutes=0.5)
    for arm in ("top_p_1e-2", "controlled"):
        args = {"run": arm, "against": "top2"}
        needs = (arm, "top2")
        arms[f"time_{arm}"] = Work(forward_time, args, needs=needs, minutes=0.5)
    domains = ("copies", "word_problems", "modular")
    return Experiment(
        arms=arms,
        tables=(
            Table(
                "Held-out loss",
                tuple(routers),
                (
                    Column("nll", "held-out loss, nats per token", "{:.4f}"),
                    Column("moe/experts_per_token", "experts a token", "{:.2f}"),
                    Column("train_flops", "training TFLOPs", "{:.2f}", 1e-12),
                    *(Column(f"nll/{d}", f"loss, {d}", "{:.4f}") for d in domains),
                ),
                "top2",
            ),
            Table(
                "Experts of a held-out token",
                tuple(f"by_domain_{arm}" for arm in dynamic),
                (
                    Column("all", "all", "{:.2f}"),
                    *(Column(domain, domain, "{:.2f}") for domain in domains),
                    *(Column(f"layer_{i}", f"layer {i}", "{:.2f}")
                      for i in range(size.layers)),
                ),
            ),
            Table(
                "Scoring held-out text, beside top-2 in one process",
                ("time_top_p_1e-2", "time_controlled"),
                (
                    Column("time_ratio", "time / that of top-2", "{:.3f}"),
                    Column("flops_ratio", "FLOPs / those of top-2", "{:.3f}"),
                ),
            ),
        ),
    )  # fmt: skip
