"""Every router with every kind of experts, once and in a chain: what do they reach?

One small budget for all: the first rung of the ladder. Expert choice and soft routing
look at later tokens, so that their losses are not those of a language model.
"""

from experiments.ladder import config as ladder
from moex import (
    Chain,
    Controller,
    ExpertChoice,
    Glu,
    Hash,
    Latent,
    Loss,
    LowRank,
    Soft,
    TopK,
    TopP,
)
from moex.experiment.contract import Arm, Experiment, Table, Training

RUNG = 0  # of the ladder
FREE = Loss(load_balance=0.0)  # for routers that balance themselves
ROUTERS = {
    "topk": (lambda k: TopK(k=k, normalize="none"), None),
    "sigmoid": (lambda k: TopK(k=k, score="sigmoid", bias_rate=1e-3), FREE),
    "topp": (lambda k: TopP(p=0.15 * k, k_max=2 * k), Loss(entropy=1e-4)),
    "steered": (
        lambda k: TopP(p=0.15 * k, k_max=2 * k, control=Controller(target=k)),
        Loss(entropy=1e-4),
    ),
    "expert_choice": (lambda k: ExpertChoice(k=float(k)), FREE),
    "hash": (lambda k: Hash(k=k), FREE),
    "soft": (lambda k: Soft(), FREE),
}
EXPERTS = {
    "glu": lambda d: Glu(hidden=d),
    "gelu": lambda d: Glu(hidden=d, activation="gelu"),
    "clamped": lambda d: Glu(hidden=d, activation="clamped", bias=True),
    "latent": lambda d: Latent(hidden=d, latent=d // 2, group=4),
    "lowrank": lambda d: LowRank(rank=d // 4),
}
ROUNDS = (1, 2)


def get_experiment(size):
    """The arms of a size: "cpu" or "gpu"."""
    rung = ladder.SIZES[size].rungs[RUNG]
    arms: dict[str, Arm] = {}
    for router, (make, loss) in ROUTERS.items():
        for experts, kind in EXPERTS.items():
            for rounds in ROUNDS:
                # A chain of two rounds has half of the experts in each.
                own = make(ladder.K // rounds)
                moe = ladder.moe(rung.dim, router=own, experts=kind(rung.dim))
                ffn = moe if rounds == 1 else Chain(moe=moe, iterations=rounds)
                cfg = ladder.config(size, RUNG, ffn, loss)
                name = f"{router}_{experts}_{rounds}"
                arms[name] = Training(cfg, minutes=rung.minutes)
    table = Table("All, by router", tuple(arms), (ladder.LOSS, *ladder.COST))
    return Experiment(arms=arms, tables=(table,))
