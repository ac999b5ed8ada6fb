"""A small top-k MoE on the source text of Python's standard library: minutes on a CPU.

  moex train --config=quickstart --workdir=runs/quickstart

Hardware: 2 CPU cores. Expected: 4 to 5 minutes, 1.47 bits per byte on held-out files.
experiments/quickstart tells how the sizes were found.

Arguments give every layer of moex, alone or together; experiments/variants trains each:

  quickstart:ffn=dense                   the dense model of equal active parameters
  quickstart:router=topp                 topk topp steered expert_choice hash
                                         soft forced
  quickstart:experts=latent              glu gelu clamped latent lowrank
  quickstart:chain=2                     rounds; each uses k = 2 experts
  quickstart:residual=released           prenorm released both none
  quickstart:zero=4                      1 null, 1 copy, the rest constant experts
  quickstart:narrow=64                   the whole layer in 64 of 128 dims
  quickstart:shared=gated                no plain gated
  quickstart:chain=2,match=flops         widths scaled to the default's params, active
                                         parameters or FLOPs
"""

from moex import (
    LM,
    Attention,
    Bpe,
    Chain,
    Checkpoint,
    Controller,
    Data,
    Dense,
    Eval,
    ExpertChoice,
    Forced,
    Glu,
    Hash,
    Latent,
    Log,
    Loss,
    LowRank,
    MoE,
    Muon,
    Narrow,
    Optim,
    Segment,
    Soft,
    TopK,
    TopP,
    Zero,
)
from moex.configs import base
from moex.configs.parse import parse_arg
from moex.costs.matching import match
from moex.nn.block import RESIDUALS

DIM, SEQ_LEN, VOCAB = 128, 128, 4096
ROUTERS = {
    "topk": TopK(k=2),
    "topp": TopP(p=0.3, k_max=4),
    "steered": TopP(p=0.3, k_max=4, control=Controller(target=2.0)),
    "expert_choice": ExpertChoice(k=2.0),
    "hash": Hash(k=2),
    "soft": Soft(),
    "forced": Forced(k=2),
}
EXPERTS = {
    "glu": Glu(hidden=128),
    "gelu": Glu(hidden=128, activation="gelu"),
    "clamped": Glu(hidden=128, activation="clamped", bias=True),
    "latent": Latent(hidden=128, latent=64, group=8),
    "lowrank": LowRank(rank=32),
}


def feed_forward(options):
    """The feed-forward layer that the argument asks for."""
    if options["ffn"] == "dense":
        return Dense(hidden=256)
    zero = options["zero"]
    layer = MoE(
        num_experts=8,
        router=ROUTERS[options["router"]],
        experts=EXPERTS[options["experts"]],
        shared=None if options["shared"] == "no" else Dense(hidden=128),
        shared_gate=options["shared"] == "gated",
        zero=Zero(null=1, copy=int(zero > 1), constant=max(zero - 2, 0))
        if zero
        else None,
    )
    if options["chain"] > 1:
        layer = Chain(moe=layer, iterations=options["chain"])
    if options["narrow"]:
        layer = Narrow(latent=options["narrow"], inner=layer)
    return layer


def model(options):
    """The language model with that layer."""
    segment = Segment(
        pattern=(feed_forward(options),), repeat=4, residual=options["residual"]
    )
    attention = Attention(heads=2, qk_norm=True)
    return LM(dim=DIM, attention=attention, layers=(segment,))


CHOICES = {
    "ffn": ("moe", "dense"),
    "router": tuple(ROUTERS),
    "experts": tuple(EXPERTS),
    "chain": range(1, 9),
    "residual": RESIDUALS,
    "zero": range(9),
    "narrow": range(DIM + 1),
    "shared": ("no", "plain", "gated"),
    "match": ("no", "params", "active", "flops"),
}


def get_config(arg=""):
    """The run config; `arg` is KEY=VALUE,... with the keys above, or "": top-k MoE."""
    options = parse_arg(arg, **CHOICES)
    cfg = base.get_config()
    cfg.model = model(options)
    if options["match"] != "no":
        like = model(parse_arg("", **CHOICES))
        cfg.model.vocab = like.vocab = VOCAB
        found = match(cfg.model, like, by=options["match"], seq_len=SEQ_LEN)
        cfg.model = found.model
    cfg.data = Data(tokenizer=Bpe(vocab=VOCAB))
    cfg.steps = 400
    cfg.batch_size = 16
    cfg.seq_len = SEQ_LEN
    cfg.optim = Optim(
        rule=Muon(adam_lr=1e-2),
        lr=2e-2,
        schedule="wsd",
        warmup_steps=20,
        decay_frac=0.5,
        final_lr_frac=0.0,
    )
    if options["router"] in ("topp", "steered"):
        cfg.loss = Loss(entropy=1e-4)  # the paper's weight of the dynamic loss
    cfg.eval = Eval(every=100, sequences=256)
    cfg.checkpoint = Checkpoint(every=100)
    cfg.log = Log(images_every=100, sample_prompts=("def ", "class "), compressors=True)
    if options["router"] == "expert_choice":
        cfg.log.sample_tokens = 0  # it cannot generate
    return cfg
