"""The shape of Mixtral 8x7B (46.7 B in all, 12.9 B active): a TPU pod slice.

  moex train --config=moe_8x7b --workdir=SHARED_FOLDER

Hardware: 64 chips of 95 GB (v5p-128) or 8 nodes of 8 GPUs. Expected time and loss: not
measured yet, see benchmarks/README.md.
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
    moe = MoE(num_experts=8, router=TopK(k=2), experts=Glu(hidden=14_336))
    cfg.model = LM(
        dim=4096,
        attention=Attention(heads=32, kv_heads=8, rope_theta=1e6),
        layers=(Segment(pattern=(moe,), repeat=32),),
        vocab=32_000,
    )
    cfg.data = lm_data.get_data(arg)
    cfg.steps = 250_000
    cfg.batch_size = 1024
    cfg.seq_len = 4096
    cfg.grad_accum = 4
    cfg.remat = "full"
    cfg.mesh = MeshConfig(data=1, fsdp=-1)
    cfg.optim = Optim(rule=AdamW(b2=0.95), lr=3e-4, warmup_steps=2000, weight_decay=0.1)
    cfg.loss = Loss(load_balance=0.02, router_z=0.001)
    cfg.eval = Eval(every=2000, sequences=1024, batch_size=256)
    cfg.checkpoint = Checkpoint(every=500, keep=2, keep_best=1)
    cfg.log = Log(every=10, images_every=1000)
    return cfg
