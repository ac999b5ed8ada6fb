"""1 B-active MoE in the shape of OLMoE (6.9 B in all, 64 experts, top-8): a GPU node.

  moex train --config=moe_1b --workdir=SHARED_FOLDER

Hardware: 8 GPUs of 80 GB or a v5p-16 slice. Expected time and loss: not measured yet,
see benchmarks/README.md.
"""

from moex import (
    LM,
    AdamW,
    Attention,
    Checkpoint,
    Eval,
    Glu,
    Log,
    Loss,
    MeshConfig,
    MoE,
    Optim,
    Segment,
    TopK,
)
from moex.configs import base, lm_data


def get_config(arg=""):
    """The run config; `arg` `data=stdlib` trains on the embedded data, for a look."""
    cfg = base.get_config()
    moe = MoE(
        num_experts=64,
        router=TopK(k=8, normalize="none"),
        experts=Glu(hidden=1024),
    )
    cfg.model = LM(
        dim=2048,
        attention=Attention(heads=16, qk_norm=True),
        layers=(Segment(pattern=(moe,), repeat=16),),
    )
    cfg.data = lm_data.get_data(arg)
    cfg.steps = 100_000
    cfg.batch_size = 1024
    cfg.seq_len = 4096
    cfg.grad_accum = 8
    cfg.remat = "full"
    cfg.mesh = MeshConfig(data=1, fsdp=-1)
    cfg.optim = Optim(rule=AdamW(b2=0.95), lr=4e-4, warmup_steps=2000, weight_decay=0.1)
    cfg.loss = Loss(load_balance=0.01, router_z=0.001)
    cfg.eval = Eval(every=2000, sequences=1024, batch_size=128)
    cfg.checkpoint = Checkpoint(every=1000, keep=2, keep_best=1)
    cfg.log = Log(every=10, images_every=1000)
    return cfg
