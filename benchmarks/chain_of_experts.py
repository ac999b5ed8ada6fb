"""The model of Chain-of-Experts (arXiv:2506.18945), and the one it is compared with.

  python -m benchmarks.train_step --random=102400 \\
      --config=benchmarks/chain_of_experts.py:run=coe

4 layers of width 1024 with 63 routed experts and a shared one of 704, on 64 sequences
of 512 tokens. Attention is plain, of 8 heads, in place of the latent attention of the
authors' code, so that the parameters differ by a few per cent. The authors' 1000 steps
on one H100 took 989 s (`run=moe`) and, with 8 experts in each of 2 rounds, 1755 s
(`run=coe8`); both include an evaluation every 10 steps.
"""

from moex.configs import base
from moex.configs.parse import parse_arg
from moex.model.optim import AdamW, Optim
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment

RUNS = {"coe": (2, 4), "coe8": (2, 8), "moe": (1, 8)}  # rounds, experts of each


def get_config(arg=""):
    """`arg`: `run=coe`, `coe8` or `moe`; `size=tiny` for a test."""
    options = parse_arg(arg, run=tuple(RUNS), size=("paper", "tiny"))
    rounds, k = RUNS[options["run"]]
    tiny = options["size"] == "tiny"
    hidden = 16 if tiny else 704
    moe = MoE(
        num_experts=24 if tiny else 63,
        router=TopK(k=k, normalize="none"),
        experts=Glu(hidden=hidden),
        shared=Dense(hidden=hidden),
    )
    layer = moe if rounds == 1 else Chain(moe=moe, iterations=rounds)
    cfg = base.get_config()
    cfg.model = LM(
        dim=32 if tiny else 1024,
        attention=Attention(heads=2 if tiny else 8),
        layers=(Segment(pattern=(layer,), repeat=1 if tiny else 4),),
    )
    cfg.batch_size, cfg.seq_len = (2, 32) if tiny else (64, 512)
    cfg.optim = Optim(rule=AdamW(b2=0.95), lr=3e-4, warmup_steps=100, weight_decay=0.01)
    return cfg
