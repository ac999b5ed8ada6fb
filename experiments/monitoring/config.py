"""Small MoE models whose routing is healthy, or goes wrong in one way.

  moex train --config=experiments/monitoring/config.py:collapse --workdir=runs/collapse

Hardware: 2 CPU cores, a minute or less each. "dead" needs `run.py`, which forces it.
"""

from moex.config.base import require_choice
from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import PythonStdlib
from moex.data.tokenizer import Bytes
from moex.model.optim import AdamW, Optim
from moex.moe.balance import Controller
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.runs.keys import Checkpoint, Eval, Log, Loss

EXPERTS = 8
ROUTERS = {
    # The rate is so small that biases stay where they start.
    "healthy": TopK(k=2, bias_rate=1e-9),
    "dead": TopK(k=2, bias_rate=1e-9),
    # No rule balances the load, and the router learns faster than the experts.
    "collapse": TopK(k=1, normalize="none", init_std=0.5),
    # The controller's target is all experts: p climbs until every token has them.
    "saturation": TopP(p=0.3, k_max=EXPERTS, control=Controller(target=8.0)),
}


def get_config(arg="healthy"):
    """The config of a case; `arg` is one of `ROUTERS`."""
    case = arg or "healthy"
    require_choice("experiments/monitoring/config.py", case, tuple(ROUTERS))
    cfg = base.get_config()
    moe = MoE(num_experts=EXPERTS, router=ROUTERS[case], experts=Glu(hidden=64))
    cfg.model = LM(
        dim=64,
        attention=Attention(heads=2, qk_norm=True),
        layers=(Segment(pattern=(moe,), repeat=4),),
    )
    cfg.data = Data(sources=(PythonStdlib(holdout=0.004),), tokenizer=Bytes())
    cfg.steps = 200
    cfg.batch_size = 16
    cfg.seq_len = 128
    factors = (("router", 30.0),) if case == "collapse" else ()
    cfg.optim = Optim(
        rule=AdamW(), lr=3e-3, schedule="constant", warmup_steps=10, lr_factors=factors
    )
    if case == "collapse":
        cfg.loss = Loss(load_balance=0.0, router_z=0.0)
    cfg.eval = Eval(every=0)
    cfg.checkpoint = Checkpoint(every=0)
    cfg.log = Log(every=5, images_every=20, sample_tokens=0, detail="detailed")
    return cfg
