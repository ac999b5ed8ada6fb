"""Random run configs: plausible ones, and ones with hostile values in them.

Everything is a function of a seed. Sizes of what is plausible are tiny.
"""

import dataclasses
import random

from moex.config import base as configs
from moex.config.schedule import Schedule
from moex.configs import base
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bpe, Bytes
from moex.model.optim import SCHEDULES, AdamW, Muon, Optim
from moex.moe.balance import Controller
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.forced import Forced
from moex.moe.routers.hash import Hash
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.block import RESIDUALS
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.rope import Linear, Llama3, Yarn
from moex.nn.stack import REMAT, Segment
from moex.runs.keys import BALANCE_SCOPES, Checkpoint, Eval, Log, Loss
from moex.sharding import MeshConfig

DIM = 16
SCORES = ("softmax", "sigmoid", "sqrt_softplus")


def router(rng, choices):
    """A router among so many choices; some do not fit their layer."""
    k = rng.choice((1, choices, rng.randint(1, choices)))
    ramp = Schedule(points=((0, 0.1), (3, 0.6)))
    return rng.choice(
        (
            TopK(
                k=k,
                score=rng.choice(SCORES),
                normalize=rng.choice(("after", "before", "none")),
                bias_rate=rng.choice((0.0, 0.01)),
                groups=rng.choice((None, Groups(num=2, keep=1))),
            ),
            TopP(
                p=rng.choice((0.05, 0.5, 1.0, ramp)),
                k_max=rng.randint(1, choices),
                control=rng.choice((None, Controller(target=1.5))),
            ),
            ExpertChoice(k=rng.uniform(0.3, choices)),
            Hash(k=k),
            Soft(score=rng.choice(SCORES)),
            Forced(k=k, load=rng.choice(("balanced", "adversarial"))),
        )
    )


def experts(rng, num_experts):
    """Experts of any kind."""
    return rng.choice(
        (
            Glu(hidden=rng.choice((1, 8, 24)), bias=rng.random() < 0.3),
            Glu(hidden=8, activation=rng.choice(("gelu", "clamped"))),
            Latent(hidden=8, latent=rng.randint(1, DIM), group=rng.choice((1, 2, 4))),
            LowRank(rank=rng.randint(1, DIM)),
        )
    )


def feed_forward(rng):
    """A dense layer, an MoE layer, a chain of them, or one in a narrower width."""
    if rng.random() < 0.2:
        return Dense(hidden=rng.choice((1, 24)))
    num_experts = rng.choice((1, 2, 4, 8))
    zero = rng.choice((None, None, Zero(null=1, copy=1, constant=2)))
    layer = MoE(
        num_experts=num_experts,
        router=router(rng, num_experts + (zero.count() if zero else 0)),
        experts=experts(rng, num_experts),
        zero=zero,
        shared=rng.choice((None, Dense(hidden=8))),
        shared_gate=rng.random() < 0.3,
        capacity_factor=rng.choice((None, None, 0.5, 2.0)),
        buffer_slots=rng.choice((None, None, 1.0)),
    )
    if rng.random() < 0.3:
        layer = Chain(
            moe=layer,
            iterations=rng.randint(1, 3),
            routers=rng.choice(("independent", "shared")),
            inner_residual=rng.random() < 0.7,
        )
    return Narrow(latent=8, inner=layer) if rng.random() < 0.2 else layer


def attention(rng):
    """An attention of either kind, with or without a longer context."""
    longer = rng.choice(
        (
            None,
            Linear(factor=2.0),
            Llama3(factor=8.0, original=16, low=1.0, high=4.0),
            Yarn(factor=4.0, original=16),
        )
    )
    if rng.random() < 0.3:
        sizes = {"kv_latent": 8, "nope_dim": 4, "rope_dim": 4, "v_dim": 4}
        return LatentAttention(heads=2, rope_scaling=longer, **sizes)
    return Attention(
        heads=rng.choice((2, 4)),
        kv_heads=rng.choice((None, 1, 2)),
        qk_norm=rng.choice((False, True, "whole")),
        window=rng.choice((None, 1, 7)),
        sinks=rng.random() < 0.3,
        rope_scaling=longer,
    )


def optimizer(rng):
    """A rule and a schedule that may or may not fit the number of steps."""
    return Optim(
        rule=rng.choice((AdamW(), Muon(), Muon(ns_steps=1))),
        lr=rng.choice((1e-4, 0.01)),
        schedule=rng.choice(SCHEDULES),
        warmup_steps=rng.choice((0, 1, 4)),
        decay_frac=rng.choice((0.2, 1.0)),
        weight_decay=rng.choice((0.0, 0.1)),
        clip=rng.choice((None, 1.0)),
        lr_factors=rng.choice(
            (
                *((), (("*", 1.0),), (("*router*", 0.1),), (("nothing", 0.5),)),
                (("*", Schedule(points=((1, 0.0), (2, 1.0)))), ("*embed*", 0.0)),
            )
        ),
    )


def plausible(rng, corpus):
    """A run config that a person could have meant."""
    cfg = base.get_config()
    segments = tuple(
        Segment(
            pattern=tuple(feed_forward(rng) for _ in range(rng.choice((1, 1, 2)))),
            repeat=rng.choice((1, 1, 2)),
            residual=rng.choice(RESIDUALS),
        )
        for _ in range(rng.choice((1, 2)))
    )
    cfg.model = LM(
        dim=DIM,
        attention=attention(rng),
        layers=segments,
        tied_embeddings=rng.random() < 0.3,
    )
    text = Text(paths=(str(corpus),), delimiter="\n\n", holdout=0.1)
    cfg.data = Data(sources=(text,), tokenizer=Bytes(), threads=0)
    cfg.steps = rng.choice((1, 4, 10))
    cfg.grad_accum = rng.choice((1, 2))
    cfg.batch_size = rng.choice((2, 4, 8, 16))
    cfg.seq_len = rng.choice((8, 16))
    cfg.remat = rng.choice(REMAT)
    cfg.scan_layers = rng.random() < 0.7
    cfg.precision = rng.choice(("float32", "bfloat16"))
    cfg.kernels = "xla"
    cfg.optim = optimizer(rng)
    cfg.loss = Loss(
        z=rng.choice((0.0, 1e-4)),
        load_balance=rng.choice((0.0, 0.01, Schedule(points=((0, 0.1), (5, 0.0))))),
        router_z=rng.choice((0.0, 1e-3)),
        entropy=rng.choice((0.0, 1e-3)),
        importance=rng.choice((0.0, 1e-2)),
        balance_scope=rng.choice(BALANCE_SCOPES),
        balance_scale=rng.choice(("share", "count")),
        over_layers=rng.choice(("sum", "mean")),
    )
    cfg.mesh = MeshConfig(
        data=rng.choice((-1, -1, 1, 2)),
        fsdp=rng.choice((1, 1, 2)),
        expert=rng.choice((1, 1, 2, 4)),
        seq=rng.choice((1, 1, 2)),
        tensor=rng.choice((1, 1, 2)),
        exchange=rng.choice(("auto", "gather", "all_to_all")),
        exchange_buffer=rng.choice((None, None, 1.5)),
    )
    cfg.eval = Eval(every=2, sequences=4, overlap=rng.choice((0, 4)))
    cfg.checkpoint = Checkpoint(every=0)
    cfg.log = Log(every=1, images_every=0, sample_tokens=0, tensorboard=False)
    return cfg


# Hostile values, by the kind of the value in their place.
INTS = (-1, 0, 1, 3, 2**31, 2**63, 10**12, 10**30, True, None, "64", 1.5)
FLOATS = (
    *(-1.0, 0.0, 1.0, 1e308, 5e-324, 1e-45, float("nan"), float("inf"), -1e308),
    *(10**400, 2**63, None, "1e-3", True),
)
TEXTS = ("", "x", "x" * 100_000, "\0", "../..", "a\nb", "\ud800", 7, None, ("x",))
TUPLES = ((), (None,), ((),), ("",), (1,) * 3, 7, "x", None, [[]], {"a": 1})
CONFIGS = (
    *(Glu(hidden=8), TopK(k=2), Dense(hidden=8), Attention(heads=2), Bytes()),
    *(Bpe(vocab=300), Schedule(points=((0, 1.0),)), Soft(), AdamW(), Eval()),
    *(None, 7, "x", (), {"hidden": 8}),
)


def hostile_for(value) -> tuple:
    """Values to put in the place of one."""
    if isinstance(value, configs.Config):
        return CONFIGS
    if isinstance(value, bool):
        return (None, 7, "yes", 0.0, not value)
    kinds = {int: INTS, float: FLOATS, str: TEXTS, tuple: TUPLES}
    return kinds.get(type(value), (*INTS, *FLOATS[:9], "x", (), Glu(hidden=8)))


def fields(config) -> list[str]:
    """Names of the fields of a config."""
    return [field.name for field in dataclasses.fields(config)]


def mutate(rng, cfg) -> str:
    """Change one field of a run config in place; says which, and to what."""
    nodes = list(configs.walk(cfg, "config"))
    own = [(p, n) for p, n in nodes if isinstance(n, configs.Config) and fields(n)]
    path, node = rng.choice(own + nodes[:1] * 3)
    if isinstance(node, configs.Config):
        name = rng.choice(fields(node))
        value = rng.choice(hostile_for(getattr(node, name)))
        setattr(node, name, value)
    else:
        name = rng.choice(list(cfg))
        value = rng.choice(hostile_for(cfg[name]))
        with cfg.unlocked(), cfg.ignore_type():
            cfg[name] = value
    return f"{path}.{name} = {repr(value)[:60]}"


def rng_of(*parts) -> random.Random:
    """Random numbers that are a function of some names and numbers."""
    return random.Random(" ".join(map(str, parts)))
