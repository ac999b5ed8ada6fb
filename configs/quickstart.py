"""A small top-k MoE on the Python standard library's source text, on a CPU."""

from configs import base
from moex.data.pipeline import Data
from moex.data.tokenizer import Bpe
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.optim import Muon, Optim
from moex.run import Checkpoint, Eval, Log, Loss


def get_config(arg=""):
    """The quickstart run."""
    cfg = base.get_config()
    moe = MoE(num_experts=8, router=TopK(k=2), experts=Glu(hidden=256))
    cfg.model = LM(
        dim=256,
        attention=Attention(heads=4, qk_norm=True),
        layers=(Segment(pattern=(moe,), repeat=4),),
    )
    cfg.data = Data(tokenizer=Bpe(vocab=4096))
    cfg.steps = 100
    cfg.batch_size = 16
    cfg.seq_len = 256
    cfg.optim = Optim(
        rule=Muon(adam_lr=1e-2),
        lr=2e-2,
        schedule="wsd",
        warmup_steps=20,
        decay_frac=0.4,
        final_lr_frac=0.0,
    )
    cfg.loss = Loss(load_balance=0.01, router_z=0.001)
    cfg.eval = Eval(every=50, sequences=64)
    cfg.checkpoint = Checkpoint(every=50)
    cfg.log = Log(sample_prompts=("def ", "class "), compressors=True)
    return cfg
