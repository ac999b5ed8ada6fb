"""The base of all run configs: every run key with its default.

A config sets `model`, `steps`, `batch_size`, `seq_len` and whatever else differs.
"""

import ml_collections

from moex import (
    AdamW,
    Checkpoint,
    Data,
    Eval,
    LanguageModelling,
    Log,
    Loss,
    MeshConfig,
    Optim,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The defaults of a run, without a model; not a run by itself."""
    del arg
    # A key may take another kind of config; `check_run` checks all types.
    cfg = ml_collections.ConfigDict(type_safe=False, convert_dict=False)
    cfg.seed = 0  # initial parameters, data order, router noise
    cfg.steps = 1000  # optimizer steps
    cfg.batch_size = 64  # sequences per optimizer step over the whole job
    cfg.seq_len = 512  # tokens per sequence
    cfg.grad_accum = 1  # microbatches per optimizer step
    cfg.precision = "auto"  # compute: bfloat16 on accelerators, float32 on CPU
    cfg.remat = "none"  # recompute in the backward pass: "none", "dots" or "full"
    cfg.scan_layers = True  # False: each layer is compiled; that is slow, steps are not
    cfg.kernels = "auto"  # or implementations such as "triton,xla": the first that can
    cfg.nan_limit = 10  # skipped updates in a row before the run stops
    cfg.init_from = ""  # run directory whose parameters start this run
    cfg.task = LanguageModelling()  # the task that is learned: docs/tasks.md
    cfg.data = Data()
    cfg.optim = Optim(rule=AdamW(), lr=1e-3, warmup_steps=50, weight_decay=0.1)
    cfg.loss = Loss()
    cfg.mesh = MeshConfig()
    cfg.eval = Eval()
    cfg.checkpoint = Checkpoint()
    cfg.log = Log()
    return cfg
