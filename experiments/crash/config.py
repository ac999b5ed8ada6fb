"""A tiny MoE on moex's own source text: seconds on a CPU.

moex train --config=experiments/crash/config.py --workdir=runs/crash
"""

import pathlib

from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bytes
from moex.model.optim import AdamW, Optim
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Checkpoint, Eval, Log

ROOT = pathlib.Path(__file__).absolute().parents[2]


def get_config(arg=""):
    """The run that is killed."""
    cfg = base.get_config()
    moe = MoE(num_experts=4, router=TopK(k=2, bias_rate=0.01), experts=Glu(hidden=32))
    cfg.model = LM(
        dim=32,
        attention=Attention(heads=2),
        layers=(Segment(pattern=(Dense(hidden=64),)), Segment(pattern=(moe,))),
    )
    source = Text(paths=(str(ROOT / "moex" / "**" / "[a-z]*.py"),))
    cfg.data = Data(sources=(source,), tokenizer=Bytes())
    cfg.steps = 200
    cfg.batch_size = 4
    cfg.seq_len = 32
    cfg.kernels = "xla"
    cfg.optim = Optim(rule=AdamW(), lr=1e-2, warmup_steps=10)
    cfg.eval = Eval(every=25, sequences=8)
    cfg.checkpoint = Checkpoint(every=5, keep=2, keep_best=1)
    cfg.log = Log(every=1, images_every=0, sample_tokens=0)
    return cfg
