"""A small MoE that predicts a day of a numeric series from the week before, on a CPU.

  moex train --config=regression --workdir=runs/regression \\
      --config.data.paths='("series.csv",)'

The CSV file has a line of names, a column `date` that is not read, and columns of
numbers, one line per hour; give `--config.data.time=None` if there is no `date`. See
docs/tasks.md.
"""

from moex import (
    AdamW,
    Attention,
    Dense,
    Eval,
    Glu,
    Log,
    MoE,
    Optim,
    Regression,
    Segment,
    Series,
    SeriesModel,
    TopK,
)
from moex.configs import base


def get_config():
    """The run config; it takes no argument."""
    cfg = base.get_config()
    cfg.task = Regression()
    moe = MoE(
        num_experts=8,
        router=TopK(k=2, bias_rate=1e-3),
        experts=Glu(hidden=64),
        shared=Dense(hidden=64),
    )
    cfg.model = SeriesModel(
        dim=64,
        attention=Attention(heads=4, qk_norm=True),
        layers=(Segment(pattern=(moe,), repeat=2),),
    )
    cfg.data = Series(patch=24)
    cfg.steps = 1000
    cfg.batch_size = 32
    cfg.seq_len = 7  # patches
    cfg.optim = Optim(rule=AdamW(), lr=1e-3, warmup_steps=50, weight_decay=0.1)
    cfg.eval = Eval(every=200, sequences=None, overlap=6)
    cfg.log = Log(images_every=200)
    return cfg
