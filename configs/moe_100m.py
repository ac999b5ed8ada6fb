"""100 M-class MoE (0.40 B parameters in all, 93 M active): one GPU.

  moex train --config=moe_100m --workdir=runs/moe_100m \\
      --config.data.sources[0].paths='("/data/text/*.txt",)'

Hardware: one 80 GB GPU. Expected time and loss: not measured yet, see
benchmarks/README.md.
"""

from moex import (
    LM,
    AdamW,
    Attention,
    Checkpoint,
    Dense,
    Eval,
    Glu,
    Log,
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
        num_experts=32,
        router=TopK(k=4, bias_rate=1e-3),
        experts=Glu(hidden=512),
        shared=Dense(hidden=512),
    )
    cfg.model = LM(
        dim=640,
        attention=Attention(heads=10, kv_heads=5, qk_norm=True),
        layers=(
            Segment(pattern=(Dense(hidden=2048),)),
            Segment(pattern=(moe,), repeat=11),
        ),
        tied_embeddings=True,
    )
    cfg.data = lm_data.get_data(arg)
    cfg.steps = 20_000
    cfg.batch_size = 128
    cfg.seq_len = 2048
    cfg.grad_accum = 2
    cfg.remat = "dots"
    cfg.optim = Optim(rule=AdamW(b2=0.95), lr=1e-3, warmup_steps=500, weight_decay=0.1)
    cfg.eval = Eval(every=1000, sequences=512)
    cfg.checkpoint = Checkpoint(every=1000, keep=2, keep_best=1)
    cfg.log = Log(every=20, images_every=500, sample_every=2000)
    return cfg
