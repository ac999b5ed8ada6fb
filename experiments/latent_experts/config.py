"""How much do latent experts lose, trained from the start or converted from plain ones?

The model is that of the paper's notes in small: experts of width 32 in a model of width
128, latent width 32, so that groups of 2, 4 and 8 experts have 0.833, 0.667 and 0.583
of the parameters of plain experts.
"""

import dataclasses

from experiments.ladder.config import muon
from experiments.latent_experts.measures import converted, traffic, tuned
from moex import LM, Attention, Bpe, Data, Eval, Glu, Latent, MoE, Narrow, Segment, TopK
from moex.configs import base
from moex.configs.lm_data import get_data
from moex.experiment.contract import Arm, Column, Experiment, Table, Training, Work

ALL = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Size:
    """The numbers that differ between a laptop and a GPU."""

    dim: int
    heads: int
    hidden: int  # of an expert, and the latent width
    layers: int
    experts: int
    k: int
    groups: tuple[int, ...]  # experts that share a projection
    seq_len: int
    batch: int
    steps: int
    tune_steps: int
    vocab: int
    minutes: float  # of one run


SIZES = {
    "cpu": Size(128, 2, 32, 2, 8, 2, (2, 4, 8), 128, 8, 500, 100, 1024, 1.5),
    "gpu": Size(512, 8, 192, 6, 32, 4, (4, 8, 32), 512, 64, 3000, 300, 4096, 4.0),
}


def config(name: str, experts, narrow: int | None = None):
    """The run config of a kind of experts; with `narrow` the layer is in fewer dims."""
    size = SIZES[name]
    cfg = base.get_config()
    moe = MoE(num_experts=size.experts, router=TopK(k=size.k), experts=experts)
    ffn = moe if narrow is None else Narrow(latent=narrow, inner=moe)
    cfg.model = LM(
        dim=size.dim,
        attention=Attention(heads=size.heads, qk_norm=True),
        layers=(Segment(pattern=(ffn,), repeat=size.layers),),
    )
    cfg.data = Data(tokenizer=Bpe(vocab=size.vocab))
    if name == "gpu":
        cfg.data = get_data("data=stdlib")
    cfg.steps, cfg.batch_size, cfg.seq_len = size.steps, size.batch, size.seq_len
    cfg.optim = muon(lr=2e-2)
    cfg.eval = Eval(every=0)
    cfg.checkpoint.every = size.steps // 2
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    return cfg


def kinds(name: str) -> dict:
    """The trained arms: experts and, of `narrow`, its width."""
    size = SIZES[name]
    width = {"hidden": size.hidden, "latent": size.hidden}
    found = {"plain": (Glu(hidden=size.hidden), None)}
    for group in size.groups:
        found[f"latent_{group}"] = (Latent(**width, group=group), None)
    largest = size.groups[-1]
    found["latent_all"] = (Latent(**width, group=largest, ops=ALL), None)
    found["narrow"] = (Glu(hidden=size.hidden), size.dim // 2)
    return found


def get_experiment(name):
    """The arms of a size: "cpu" or "gpu"."""
    size = SIZES[name]
    arms: dict[str, Arm] = {}
    for arm, given in kinds(name).items():
        arms[arm] = Training(config(name, *given), minutes=size.minutes)
    trained, middle = tuple(arms), size.groups[1]
    options = {f"to_{group}": {"group": group} for group in size.groups}
    options[f"to_{middle}_whitened"] = {"group": middle, "calibration": 256}
    # Phase 1 of the paper: each expert is cut to a lower rank first.
    options[f"to_{middle}_rank"] = {"group": middle, "rank": size.hidden // 2}
    options[f"to_{middle}_rank_refit"] = options[f"to_{middle}_rank"] | {"refit": True}
    for arm, given in options.items():
        args = {"options": given, "steps": size.tune_steps}
        arms[arm] = Work(converted, args, needs=("plain",), minutes=1.0)
    args = {"steps": size.tune_steps}
    arms["plain_tuned"] = Work(tuned, args, needs=("plain",), minutes=0.5)
    for arm in trained:
        args = {"name": name, "arm": arm}
        arms[f"bytes_{arm}"] = Work(traffic, args, seeds=(0,), minutes=0.1)
    loss = Column("nll", "held-out loss, nats per token", "{:.4f}")
    return Experiment(
        arms=arms,
        tables=(
            Table(
                "Trained from the start",
                trained,
                (
                    loss,
                    Column("params", "parameters, M", "{:.3f}", 1e-6),
                    Column("train_flops", "training TFLOPs", "{:.3f}", 1e-12),
                ),
                "plain",
            ),
            Table(
                "Converted from plain experts, and the factors tuned",
                ("plain", "plain_tuned", *options),
                (
                    loss,
                    Column("converted", "before tuning", "{:.4f}"),
                    Column("error", "relative error of weights", "{:.3f}"),
                    Column("ratio", "parameters of experts", "{:.3f}"),
                ),
                "plain",
            ),
            Table(
                "Bytes that a token moves between devices in a layer (8 devices)",
                tuple(f"bytes_{arm}" for arm in trained),
                (
                    Column("bytes", "bytes a token", "{:.0f}"),
                    Column("bank", "parameters of experts, M", "{:.4f}", 1e-6),
                ),
                "bytes_plain",
            ),
        ),
    )
