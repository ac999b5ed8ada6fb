"""Which changes of a mixture save compute, and which of them save time?

Each idea is one change of the ladder's mixture, at two of its sizes. Times are ratios
of steps that are run in turn in one process.
"""

from collections.abc import Callable

from experiments.ladder import config as ladder
from experiments.ladder.timing import step_times
from moex import (
    Chain,
    Dense,
    ExpertChoice,
    Glu,
    Hash,
    Latent,
    Loss,
    Narrow,
    TopK,
    TopP,
    Zero,
)
from moex.experiment.contract import Experiment, Table, Training, Work

RUNGS = (1, 2)  # of the ladder
NO_BALANCE = Loss(load_balance=0.0)

# name: what it is, and a function of the width that gives the feed-forward, and `Loss`.
IDEAS: dict[str, tuple[str, Callable, Loss | None]] = {
    "k1": (
        "one expert for each token",
        lambda d: ladder.moe(d, router=TopK(k=1, normalize="none")),
        None,
    ),
    "k4": ("four experts", lambda d: ladder.moe(d, router=TopK(k=4)), None),
    "fine": (
        "16 experts of half the width, four for each token",
        lambda d: ladder.moe(
            d, num_experts=16, router=TopK(k=4), experts=Glu(hidden=d // 2)
        ),
        None,
    ),
    "experts32": ("32 experts", lambda d: ladder.moe(d, num_experts=32), None),
    "no_shared": ("no shared expert", lambda d: ladder.moe(d, shared=None), None),
    "no_z": ("no router z-loss", ladder.moe, Loss(router_z=0.0)),
    "bias_sign": (
        "balance by a bias, sign rule",
        lambda d: ladder.moe(d, router=TopK(k=2, score="sigmoid", bias_rate=1e-3)),
        NO_BALANCE,
    ),
    "bias_quantile": (
        "balance by a bias, quantile rule",
        lambda d: ladder.moe(
            d,
            router=TopK(k=2, score="sigmoid", bias_rate=1.0, bias_rule="quantile"),
        ),
        NO_BALANCE,
    ),
    "raw_gates": (
        "gates that are not normalised",
        lambda d: ladder.moe(d, router=TopK(k=2, normalize="none")),
        None,
    ),
    "sqrt_softplus": (
        "scores by the root of a softplus",
        lambda d: ladder.moe(d, router=TopK(k=2, score="sqrt_softplus")),
        None,
    ),
    "top_p": (
        "top-p, p = 0.3, at most four experts",
        lambda d: ladder.moe(d, router=TopP(p=0.3, k_max=4)),
        Loss(entropy=1e-4),
    ),
    "null": (
        "two null experts",
        lambda d: ladder.moe(d, zero=Zero(null=2)),
        None,
    ),
    "latent": (
        "latent experts, groups of four",
        lambda d: ladder.moe(d, experts=Latent(hidden=d, latent=d // 2, group=4)),
        None,
    ),
    "chain": (
        "two rounds of one expert each",
        lambda d: Chain(
            moe=ladder.moe(d, router=TopK(k=1, normalize="none")), iterations=2
        ),
        None,
    ),
    "narrow": (
        "the whole layer in half the width",
        lambda d: Narrow(latent=d // 2, inner=ladder.moe(d)),
        None,
    ),
    "expert_choice": (
        "experts choose tokens (not causal)",
        lambda d: ladder.moe(d, router=ExpertChoice(k=2.0)),
        NO_BALANCE,
    ),
    "hash": (
        "experts by a hash of the token (control)",
        lambda d: ladder.moe(d, router=Hash(k=2)),
        NO_BALANCE,
    ),
    "dense": (
        "a dense model of the active width (control)",
        lambda d: Dense(hidden=(ladder.K + 1) * d),
        None,
    ),
}


def config(size: str, idea: str, rung: int):
    """The run config of an idea at a rung of the ladder; "baseline" is the ladder's."""
    if idea == "baseline":
        return ladder.config(size, rung)
    _, make, loss = IDEAS[idea]
    return ladder.config(size, rung, make(ladder.SIZES[size].rungs[rung].dim), loss)


def time_ratio(*, seed, folder, others, size, idea, rung):
    """The time of an idea's training step over that of the ladder's mixture."""
    del folder, others
    configs = [config(size, name, rung) for name in ("baseline", idea)]
    for cfg in configs:
        cfg.seed = seed
    baseline, mine = step_times(configs)
    return {"ratio": mine / baseline, "step_ms": mine, "baseline_ms": baseline}


def get_experiment(size):
    """The arms of a size: "cpu" or "gpu"."""
    rungs = ladder.SIZES[size].rungs
    arms = {}
    for idea in IDEAS:
        for rung in RUNGS:
            cfg = config(size, idea, rung)
            arms[f"{idea}_{rung}"] = Training(cfg, minutes=rungs[rung].minutes)
            args = {"size": size, "idea": idea, "rung": rung}
            timed = Work(time_ratio, args, minutes=0.5, seeds=(0,))
            arms[f"time_{idea}_{rung}"] = timed
    columns = (ladder.LOSS, *ladder.COST)
    tables = tuple(
        Table(f"Rung {rung}", tuple(f"{idea}_{rung}" for idea in IDEAS), columns)
        for rung in RUNGS
    )
    return Experiment(arms=arms, tables=tables)
