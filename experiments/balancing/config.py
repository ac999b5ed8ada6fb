"""Which rule balances the experts, and what does it cost in loss?

One size of the ladder's mixture with 16 experts; only what balances is changed.
"""

from experiments.ladder import config as ladder
from moex import Loss, TopK
from moex.experiment.contract import Arm, Column, Experiment, Table, Training

RUNG = 1  # of the ladder
EXPERTS = 16
KEEP = ("moe/max_violation", "moe/max_violation_worst", "moe/dead_frac")
KEEP += ("moe/entropy", "moe/logit_norm")


def get_experiment(size):
    """The arms of a size: "cpu" or "gpu"."""
    rung = ladder.SIZES[size].rungs[RUNG]
    none, z = Loss(load_balance=0.0, router_z=0.0), {"router_z": 1e-3}
    softmax, sigmoid = TopK(k=2), {"k": 2, "score": "sigmoid"}
    by_sign = TopK(**sigmoid, bias_rate=1e-3)
    by_quantile = TopK(**sigmoid, bias_rate=1.0, bias_rule="quantile")
    kinds = {
        "none": (softmax, none),
        "z": (softmax, Loss(load_balance=0.0, **z)),
        "loss": (softmax, Loss(load_balance=1e-2, router_z=0.0)),
        "loss_and_z": (softmax, Loss(load_balance=1e-2, **z)),
        "strong_loss": (softmax, Loss(load_balance=1e-1, router_z=0.0)),
        "sigmoid_none": (TopK(**sigmoid), none),
        "bias_sign": (by_sign, none),
        "bias_sign_and_z": (by_sign, Loss(load_balance=0.0, **z)),
        "bias_quantile": (by_quantile, none),
    }
    arms: dict[str, Arm] = {}
    for arm, (router, loss) in kinds.items():
        ffn = ladder.moe(rung.dim, num_experts=EXPERTS, router=router)
        cfg = ladder.config(size, RUNG, ffn, loss)
        arms[arm] = Training(cfg, keep=KEEP, minutes=rung.minutes)
    columns = (
        Column("nll", "held-out loss, nats per token", "{:.4f}"),
        Column("max_violation", "max violation, held-out", "{:.2f}"),
        Column("moe/max_violation_worst", "of the worst layer, training", "{:.2f}"),
        Column("moe/dead_frac", "dead experts", "{:.3f}"),
        Column("moe/entropy", "router entropy, nats", "{:.2f}"),
        Column("moe/logit_norm", "norm of logits", "{:.1f}"),
    )
    table = Table("What balances", tuple(arms), columns, "none")
    return Experiment(arms=arms, tables=(table,), seeds=range(5))
