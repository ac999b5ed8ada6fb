"""Does a chain of experts reach a lower loss than a plain mixture of equal work?

The model is that of the paper in small: every layer has routed experts and one shared
expert, SwiGLU, with gates that are not normalised, and the sequence loss for balance.
k counts routed experts of a round, n all experts with the shared one.
"""

import dataclasses

from experiments.chain_of_experts.measures import STUDENTS, memory, teacher, transitions
from moex import (
    LM,
    AdamW,
    Attention,
    Bpe,
    Chain,
    Data,
    Dense,
    Eval,
    Glu,
    Loss,
    MoE,
    Optim,
    Segment,
    TopK,
    WordProblems,
)
from moex.configs import base
from moex.experiment.contract import Column, Experiment, Table, Training, Work


@dataclasses.dataclass(frozen=True)
class Size:
    """The numbers that differ between a laptop and a GPU."""

    dim: int
    heads: int
    hidden: int  # of an expert
    layers: int
    experts: int  # n
    k: int  # of the mixture; a chain of two has half of it
    seq_len: int
    batch: int
    steps: int
    lr: float
    vocab: int
    documents: int
    minutes: float  # of one run


SIZES = {
    "cpu": Size(96, 4, 64, 3, 32, 8, 64, 16, 1000, 2e-3, 512, 60_000, 2.0),
    # The paper's model at half of its width, as its specification for one GPU says.
    "gpu": Size(512, 8, 352, 4, 64, 8, 256, 128, 2000, 6e-4, 4096, 1_000_000, 4.0),
}


def layer(
    size: Size,
    *,
    rounds=1,
    k=None,
    n=None,
    routed=None,
    shared=1,
    inner=True,
    routers="independent",
):
    """The feed-forward of a block; `rounds` = 1 is a plain mixture."""
    moe = MoE(
        num_experts=routed or (n or size.experts) - 1,
        router=TopK(k=k or size.k, normalize="none"),
        experts=Glu(hidden=size.hidden),
        shared=Dense(hidden=shared * size.hidden),
    )
    if rounds == 1:
        return moe
    return Chain(moe=moe, iterations=rounds, inner_residual=inner, routers=routers)


def config(size: Size, *, residual="released", layers=None, lr=1.0, **kind):
    """The run config of one arm."""
    cfg = base.get_config()
    ffn = layer(size, **kind)
    depth = layers or size.layers
    cfg.model = LM(
        dim=size.dim,
        attention=Attention(heads=size.heads),
        layers=(Segment(pattern=(ffn,), repeat=depth, residual=residual),),
    )
    cfg.data = Data(
        sources=(WordProblems(count=size.documents),), tokenizer=Bpe(vocab=size.vocab)
    )
    cfg.steps, cfg.batch_size, cfg.seq_len = size.steps, size.batch, size.seq_len
    rule = AdamW(b2=0.95)
    cfg.optim = Optim(
        rule=rule,
        lr=lr * size.lr,
        schedule="constant",
        warmup_steps=size.steps // 10,
        weight_decay=0.01,
    )
    cfg.loss = Loss(load_balance=1e-3, balance_scope="sequence", router_z=0.0)
    cfg.eval = Eval(every=size.steps // 4, sequences=256)
    cfg.checkpoint.every = size.steps // 2
    cfg.log.sample_tokens = 0
    cfg.log.tensorboard = False
    return cfg


def arms(size: Size) -> dict[str, dict]:
    """The changes of each trained arm. `pre` is the usual pre-norm block."""
    k, n = size.k, size.experts
    half, chain = k // 2, {"rounds": 2, "k": k // 2}
    pre = {"residual": "prenorm"}
    fewer = 3 * n // 4
    return {
        f"moe_k{k}": {},
        f"coe_k{half}c2": chain,
        f"coe_k{k}c2": chain | {"k": k},
        f"moe_k{2 * k}": {"k": 2 * k},
        # The shared expert of a chain is computed twice. Here it is twice as wide, and
        # there is one routed expert less: equal parameters, FLOPs and attention.
        "moe_matched": {"routed": n - 2, "shared": 2},
        f"moe_k{k}_n{fewer}": {"n": fewer},
        f"coe_k{half}c2_n{fewer}": chain | {"n": fewer},
        "moe_deep": {"layers": 2 * size.layers},
        "coe_shared_router": chain | {"routers": "shared"},
        f"coe_k{k}c2_shared_router": chain | {"k": k, "routers": "shared"},
        "coe_outer_too": chain | {"residual": "both"},
        "coe_outer_only": chain | {"inner": False} | pre,
        # Does another learning rate change the answer?
        f"moe_k{k}_half_lr": {"lr": 0.5},
        f"coe_k{half}c2_half_lr": chain | {"lr": 0.5},
        f"moe_k{k}_double_lr": {"lr": 2.0},
        f"coe_k{half}c2_double_lr": chain | {"lr": 2.0},
        f"moe_k{k}_pre": pre,
        f"coe_k{half}c2_pre": chain | pre,
        f"coe_k{k}c2_pre": chain | {"k": k} | pre,
        f"moe_k{2 * k}_pre": {"k": 2 * k} | pre,
    }


LOSS = Column("nll", "held-out loss, nats per token", "{:.4f}")
COST = (
    Column("params", "parameters, M", "{:.3f}", 1e-6),
    Column("active", "active, M", "{:.3f}", 1e-6),
    Column("train_flops", "training TFLOPs", "{:.2f}", 1e-12),
    Column("step_ms", "ms a step", "{:.0f}"),
    Column("memory_gib", "process, GiB", "{:.2f}"),
)
BYTES = (
    Column("peak_mib", "peak of a step, MiB", "{:.1f}"),
    Column("arithmetic_mib", "16 bytes a parameter, MiB", "{:.1f}"),
    Column("temporary_mib", "not state, MiB", "{:.1f}"),
)
ROUTES = (
    Column("same", "same expert in both rounds", "{:.3f}"),
    Column("same_by_chance", "by chance", "{:.3f}"),
    Column("information", "mutual information, nats", "{:.3f}"),
)


def get_experiment(name):
    """The arms of a size: "cpu" or "gpu"."""
    size = SIZES[name]
    k, half, fewer = size.k, size.k // 2, 3 * size.experts // 4
    moe, coe = f"moe_k{k}", f"coe_k{half}c2"
    same_k, twice = f"coe_k{k}c2", f"moe_k{2 * k}"
    made = {
        arm: Training(config(size, **changes), minutes=size.minutes)
        for arm, changes in arms(size).items()
    }
    for arm in (moe, coe, same_k, twice):
        args = {"size": name, "arm": arm}
        made[f"memory_{arm}"] = Work(memory, args, minutes=0.5)
    for student in STUDENTS:
        args = {"student": student, "steps": 2000}
        made[f"student_{student}"] = Work(teacher, args, seeds=range(10), minutes=0.5)
    for arm in (coe, same_k, "coe_shared_router"):
        args = {"run": arm, "tokens": 20_000}
        made[f"routes_{arm}"] = Work(transitions, args, needs=(arm,), minutes=0.5)

    def table(title, *names, against, columns=(LOSS, *COST)):
        return Table(title, names, columns, against)

    pre = [f"{arm}_pre" for arm in (moe, coe, same_k, twice)]
    routes = [arm for arm in made if arm.startswith("routes_")]
    return Experiment(
        arms=made,
        tables=(
            table(
                "The released block",
                *(moe, coe, "moe_matched", same_k, twice, "moe_deep"),
                against=moe,
            ),
            table("The usual pre-norm block", *pre, against=pre[0]),
            table(
                "Fewer experts",
                *(moe, f"{moe}_n{fewer}", coe, f"{coe}_n{fewer}"),
                against=moe,
            ),
            table(
                "Other learning rates",
                *(f"{arm}_{rate}_lr" for rate in ("half", "double")
                  for arm in (moe, coe)),
                *(moe, coe),
                against=moe,
            ),
            table(
                "Routers of the rounds",
                *(moe, coe, "coe_shared_router", same_k, f"{same_k}_shared_router"),
                against=moe,
            ),
            table(
                "Residuals",
                *(coe, "coe_outer_too", f"{coe}_pre", "coe_outer_only"),
                against=coe,
            ),
            Table(
                "Learning a random chain of two rounds, k = 2, 8 experts",
                tuple(f"student_{student}" for student in STUDENTS),
                (Column("error", "squared error, share of the output", "{:.4f}"),),
                "student_moe_k4",
            ),
            Table(
                "Memory of the compiled step, activations included",
                tuple(f"memory_{arm}" for arm in (moe, coe, same_k, twice)),
                BYTES,
                f"memory_{moe}",
            ),
            Table("Experts of the second round after those of the first",
                  tuple(routes), ROUTES),
        ),
    )  # fmt: skip
