"""How does loss fall with compute and time, for a mixture and for a dense model?

The ladder is the baseline by which `moex compare --ladder` and experiments/ideas judge.
Sizes grow together: width, depth and tokens. The dense model of a size has as many
active parameters in its feed-forward as the mixture, and trains on the same tokens.
"""

import dataclasses

from experiments.ladder.timing import step_times
from moex import (
    LM,
    Attention,
    Bpe,
    Data,
    Dense,
    Eval,
    Glu,
    Loss,
    MoE,
    Muon,
    Optim,
    Segment,
    TopK,
)
from moex.configs import base
from moex.configs.lm_data import get_data
from moex.experiment.contract import Arm, Column, Experiment, Table, Training, Work


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size."""

    dim: int
    layers: int
    steps: int
    minutes: float  # of one run on one core, or on one GPU


@dataclasses.dataclass(frozen=True)
class Size:
    """The numbers that all rungs of a machine share."""

    rungs: tuple[Rung, ...]
    head_dim: int
    seq_len: int
    batch: int
    vocab: int
    lr: float


SIZES = {
    "cpu": Size(
        rungs=(
            Rung(48, 2, 300, 0.4),
            Rung(64, 3, 450, 0.6),
            Rung(96, 3, 700, 1.5),
            Rung(128, 4, 1000, 4.0),
        ),
        head_dim=32,
        seq_len=128,
        batch=8,
        vocab=1024,
        lr=2e-2,
    ),
    "gpu": Size(
        rungs=(
            Rung(256, 4, 1000, 0.5),
            Rung(384, 6, 2000, 1.0),
            Rung(512, 8, 4000, 2.0),
            Rung(768, 8, 6000, 4.0),
        ),
        head_dim=64,
        seq_len=512,
        batch=64,
        vocab=4096,
        lr=1e-2,
    ),
}
EXPERTS, K = 8, 2
KINDS = ("moe", "dense")


def moe(dim: int, **changes) -> MoE:
    """The baseline's mixture: 8 experts as wide as the model, top-2, one shared."""
    kind = {
        "num_experts": EXPERTS,
        "router": TopK(k=K),
        "experts": Glu(hidden=dim),
        "shared": Dense(hidden=dim),
    }
    return MoE(**(kind | changes))


def muon(lr: float) -> Optim:
    """The optimizer of the quickstart at another learning rate."""
    return Optim(
        rule=Muon(adam_lr=lr / 2),
        lr=lr,
        schedule="wsd",
        warmup_steps=20,
        decay_frac=0.5,
        final_lr_frac=0.0,
    )


def config(name: str, number: int, ffn=None, loss=None):
    """The run config of a rung.

    Args:
      name: "cpu" or "gpu".
      number: of the rung, from 0.
      ffn: the feed-forward; None: the baseline's.
      loss: `Loss`; None: the baseline's.
    """
    size = SIZES[name]
    rung = size.rungs[number]
    cfg = base.get_config()
    heads = max(1, rung.dim // size.head_dim)
    cfg.model = LM(
        dim=rung.dim,
        attention=Attention(heads=heads, qk_norm=True),
        layers=(Segment(pattern=(ffn or moe(rung.dim),), repeat=rung.layers),),
    )
    if name == "cpu":
        cfg.data = Data(tokenizer=Bpe(vocab=size.vocab))
    else:
        cfg.data = get_data("data=stdlib")
    cfg.steps, cfg.batch_size, cfg.seq_len = rung.steps, size.batch, size.seq_len
    cfg.optim = muon(size.lr)
    cfg.loss = loss or Loss()
    cfg.eval = Eval(every=0)
    cfg.checkpoint.every = rung.steps // 2
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    return cfg


LOSS = Column("nll", "held-out loss, nats per token", "{:.4f}")
COST = (
    Column("params", "parameters, M", "{:.3f}", 1e-6),
    Column("active", "active, M", "{:.3f}", 1e-6),
    Column("tokens", "tokens, M", "{:.2f}", 1e-6),
    Column("train_flops", "training TFLOPs", "{:.3f}", 1e-12),
    Column("train_s", "training, s", "{:.0f}"),
)


def time_kinds(*, seed, folder, others, name, number):
    """Milliseconds of a training step of both models at a rung, run in turn."""
    del folder, others
    both = [config(name, number, feed_forward(name, number, kind)) for kind in KINDS]
    for cfg in both:
        cfg.seed = seed
    moe_ms, dense_ms = step_times(both)
    return {"moe_ms": moe_ms, "dense_ms": dense_ms, "ratio": moe_ms / dense_ms}


def feed_forward(name: str, number: int, kind: str):
    """The "moe" or "dense" feed-forward of a rung."""
    dim = SIZES[name].rungs[number].dim
    # The dense layer is as wide as the experts of a token and the shared one.
    return moe(dim) if kind == "moe" else Dense(hidden=(K + 1) * dim)


def get_experiment(name):
    """The arms of a size: "cpu" or "gpu"."""
    rungs = SIZES[name].rungs
    arms: dict[str, Arm] = {}
    for kind in KINDS:
        for i, rung in enumerate(rungs):
            cfg = config(name, i, feed_forward(name, i, kind))
            arms[f"{kind}_{i}"] = Training(cfg, minutes=rung.minutes)
    for i in range(len(rungs)):
        args = {"name": name, "number": i}
        arms[f"time_{i}"] = Work(time_kinds, args, minutes=0.5, seeds=(0, 1, 2))
    tables = tuple(
        Table(title, tuple(a for a in arms if a.startswith(f"{kind}_")), (LOSS, *COST))
        for kind, title in zip(KINDS, ("The mixture", "The dense model"), strict=True)
    )
    tables += (
        Table(
            "Steps of both, run in turn",
            tuple(f"time_{i}" for i in range(len(rungs))),
            (
                Column("ratio", "mixture / dense", "{:.2f}"),
                Column("moe_ms", "mixture, ms", "{:.1f}"),
                Column("dense_ms", "dense, ms", "{:.1f}"),
            ),
        ),
    )
    return Experiment(arms=arms, tables=tables, seeds=range(5))
