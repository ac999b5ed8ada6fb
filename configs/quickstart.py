"""A small top-k MoE on the source text of Python's standard library: minutes on a CPU.

  moex train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores. Expected: 4 to 5 minutes, 1.47 bits per byte on
held-out files. `quickstart.py:ffn=dense` is the
dense model with the same active parameters. How the sizes were found:
experiments/quickstart.
"""

from configs import base
from moex.config import ConfigError, nearest
from moex.data.pipeline import Data
from moex.data.tokenizer import Bpe
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.optim import Muon, Optim
from moex.run import Checkpoint, Eval, Log

FEED_FORWARDS = {
    "ffn=moe": MoE(num_experts=8, router=TopK(k=2), experts=Glu(hidden=128)),
    "ffn=dense": Dense(hidden=256),
}


def get_config(arg=""):
    """`arg`: "ffn=moe" (default) or "ffn=dense"."""
    arg = arg or "ffn=moe"
    if arg not in FEED_FORWARDS:
        raise ConfigError(
            f"config argument {arg!r}: must be one of {', '.join(FEED_FORWARDS)}."
            f"{nearest(arg, FEED_FORWARDS)}"
        )
    cfg = base.get_config()
    cfg.model = LM(
        dim=128,
        attention=Attention(heads=2, qk_norm=True),
        layers=(Segment(pattern=(FEED_FORWARDS[arg],), repeat=4),),
    )
    cfg.data = Data(tokenizer=Bpe(vocab=4096))
    cfg.steps = 400
    cfg.batch_size = 16
    cfg.seq_len = 128
    cfg.optim = Optim(
        rule=Muon(adam_lr=1e-2),
        lr=2e-2,
        schedule="wsd",
        warmup_steps=20,
        decay_frac=0.5,
        final_lr_frac=0.0,
    )
    cfg.eval = Eval(every=100, sequences=256)
    cfg.checkpoint = Checkpoint(every=100)
    cfg.log = Log(images_every=100, sample_prompts=("def ", "class "), compressors=True)
    return cfg
