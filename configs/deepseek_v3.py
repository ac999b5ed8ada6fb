"""The shape of DeepSeek-V3 (671 B in all, 37 B active): a TPU pod slice of 256 chips.

  moex plan --config=deepseek_v3 --topology=v5p:4x8x8
  moex train --config=deepseek_v3 --workdir=SHARED_FOLDER

Widths, experts, routing and balance are those of the paper (arXiv:2412.19437, section
4.2). Attention is grouped-query in place of multi-head latent attention: 96 query and 8
key/value heads of 128 have 190.8 M parameters per layer, where latent attention has
187.1 M; the model has 671.3 B in all. There is no multi-token prediction.

Hardware: 256 chips of 95 GB (v5p:4x8x8), see docs/plan.md; weights and moments are
float32. Expected time and loss: not measured.
"""

from moex import (
    LM,
    AdamW,
    Attention,
    Checkpoint,
    Dense,
    Eval,
    Glu,
    Groups,
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
        num_experts=256,
        router=TopK(
            k=8,
            score="sigmoid",
            scale=2.5,
            groups=Groups(num=8, keep=4, score="top2"),
            bias_rate=1e-3,
        ),
        experts=Glu(hidden=2048),
        shared=Dense(hidden=2048),
    )
    cfg.model = LM(
        dim=7168,
        attention=Attention(heads=96, kv_heads=8, head_dim=128),
        layers=(
            Segment(pattern=(Dense(hidden=18_432),), repeat=3),
            Segment(pattern=(moe,), repeat=58),
        ),
        vocab=129_280,
    )
    cfg.data = lm_data.get_data(arg)
    cfg.steps = 235_000
    cfg.batch_size = 15_360
    cfg.seq_len = 4096
    cfg.grad_accum = 60
    cfg.remat = "full"
    # Experts of a group are on one device of the expert axis.
    cfg.mesh = MeshConfig(data=1, fsdp=-1, expert=8, exchange_buffer=2.0)
    cfg.optim = Optim(
        rule=AdamW(b2=0.95), lr=2.2e-4, warmup_steps=2000, weight_decay=0.1
    )
    cfg.loss = Loss(load_balance=1e-4, router_z=0.0, balance_scope="sequence")
    cfg.eval = Eval(every=2000, sequences=1024, batch_size=256)
    cfg.checkpoint = Checkpoint(every=500, keep=2, keep_best=1)
    cfg.log = Log(every=10, images_every=1000)
    return cfg
