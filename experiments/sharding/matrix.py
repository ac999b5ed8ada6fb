"""Layers, meshes, and how far a sharded training step is from one device.

Used by `run.py` for all pairs and by `tests/test_sharded.py` for some.

B batch · L length
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moex.adapters.lora import LoRA
from moex.model import spec as states
from moex.model.optim import AdamW, Optim
from moex.model.paths import flat_paths, path_name
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
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.sharding import MeshConfig, shard_batch
from moex.tasks.lm import LanguageModelling
from moex.train.step import make_train_step

B, L, VOCAB = 8, 8, 48
STEPS = 3
KEY = 7
# All losses of routers are on, so that an error of any of them on a mesh is seen.
LOSS = {"z": 1e-3, "load_balance": 0.1, "router_z": 0.01, "entropy": 0.01}
LOSS |= {"importance": 0.01}
# The largest gradient norm: so small that every step is clipped.
CLIP, RATE = 0.3, 0.5
P_0 = 0.4  # where a controlled p starts


def moe(router=None, experts=None, **fields):
    router = TopK(k=2, init_std=0.7) if router is None else router
    experts = Glu(hidden=8) if experts is None else experts
    return MoE(num_experts=8, router=router, experts=experts, **fields)


def latent(**fields):
    return Latent(**{"hidden": 8, "latent": 4, "group": 4} | fields)


ALL = ("gate", "up", "down")
ROUTED_THRICE = TopK(k=3, init_std=0.7)
LAYERS = {
    "top-k": moe(TopK(k=2, init_std=0.7, bias_rate=0.1)),
    "top-k sigmoid, groups, scale": moe(
        TopK(
            k=3,
            score="sigmoid",
            scale=2.5,
            groups=Groups(num=4, keep=2, score="top2"),
            bias_rate=0.1,
            init_std=0.7,
        )
    ),
    "top-k, quantile bias": moe(
        TopK(k=2, init_std=0.7, bias_rate=0.3, bias_rule="quantile")
    ),
    "top-k with noise": moe(TopK(k=2, init_std=0.7, jitter=0.1, noise=0.3)),
    "top-k with capacity": moe(
        TopK(k=2, init_std=0.7, bias_rate=0.1), capacity_factor=0.8
    ),
    "top-k with buffers": moe(ROUTED_THRICE, buffer_slots=3.5),
    "top-p": moe(TopP(p=0.4, k_max=4, init_std=0.7)),
    "top-p, controlled": moe(
        TopP(
            p=0.4, k_max=6, init_std=0.7, logit_norm=True, control=Controller(target=3)
        )
    ),
    "expert choice": moe(ExpertChoice(k=2.0, init_std=0.7)),
    "hash": moe(Hash(k=2)),
    "soft": moe(Soft(init_std=0.7)),
    "forced, skewed": moe(Forced(k=2, load="skewed", init_std=0.7)),
    "forced, all to two": moe(Forced(k=2, load="adversarial", init_std=0.7)),
    "glu with biases": moe(experts=Glu(hidden=8, bias=True, activation="clamped")),
    "latent": moe(ROUTED_THRICE, latent()),
    "latent, all, one space": moe(ROUTED_THRICE, latent(group=8, ops=ALL)),
    "latent, all, many spaces": moe(experts=latent(group=2, ops=ALL)),
    "latent, down": moe(experts=latent(group=3, ops=("down",))),
    "low rank": moe(experts=LowRank(rank=2, alpha=4.0)),
    "zero, shared, gated": moe(
        TopP(p=0.5, k_max=4, init_std=0.7, normalize="after"),
        zero=Zero(null=1, copy=1, constant=2),
        shared=Dense(hidden=8),
        shared_gate=True,
    ),
    "chain": Chain(moe=moe(TopK(k=2, init_std=0.7, bias_rate=0.1)), iterations=2),
    "chain, shared router, latent": Chain(
        moe=moe(
            TopK(k=2, init_std=0.7, bias_rate=0.1), latent(), shared=Dense(hidden=8)
        ),
        iterations=3,
        routers="shared",
        shared_once=True,
    ),
    "shared weights": dataclasses.replace(
        moe(ROUTED_THRICE), num_experts=16, stored_experts=8
    ),
    "expert choice, shared weights": dataclasses.replace(
        moe(ExpertChoice(k=2.0, init_std=0.7)), num_experts=16, stored_experts=8
    ),
    "narrow": Narrow(latent=8, inner=moe()),
    "top-k, balance of sequences": moe(TopK(k=2, init_std=0.7, bias_rate=0.1)),
    "top-k, balance of steps": moe(TopK(k=2, init_std=0.7, bias_rate=0.1)),
}
# Models with adapters on all of their matrices; all other parameters are trained too.
ADAPTERS = {
    "top-k, LoRA": LoRA(
        rank=2,
        alpha=4.0,
        targets=(
            "attention",
            "experts",
            "shared",
            "router/w_DE",
            "w_embed",
            "w_logits",
        ),
        also_train=("*",),
    ),
}
LAYERS["top-k, LoRA"] = moe(TopK(k=2, init_std=0.7), shared=Dense(hidden=8))
# Layers with other fields of `Loss` or another number of microbatches.
LOSSES = {
    "top-k, balance of sequences": {"balance_scope": "sequence"},
    "top-k, balance of steps": {"balance_scope": "step"},
}
GRAD_ACCUM = {"top-k, balance of steps": 2}

# Meshes of eight devices, by name.
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "expert 8, all_to_all": MeshConfig(data=1, expert=8, exchange="all_to_all"),
    "expert 8, gather": MeshConfig(data=1, expert=8, exchange="gather"),
    "2 data, 2 expert, 2 tensor, all_to_all": MeshConfig(
        data=2, expert=2, tensor=2, exchange="all_to_all"
    ),
    "2 data, 2 expert, 2 tensor, gather": MeshConfig(
        data=2, expert=2, tensor=2, exchange="gather"
    ),
    "1 data, 4 expert, 2 tensor, all_to_all": MeshConfig(
        data=1, expert=4, tensor=2, exchange="all_to_all"
    ),
    "2 fsdp, 2 expert, 2 seq, all_to_all": MeshConfig(
        data=1, fsdp=2, expert=2, seq=2, exchange="all_to_all"
    ),
    "2 fsdp, 2 expert, 2 seq, gather": MeshConfig(
        data=1, fsdp=2, expert=2, seq=2, exchange="gather"
    ),
}


def model(layer, adapter=None) -> LM:
    """A model with two copies of `layer`."""
    return LM(
        dim=16,
        attention=Attention(heads=4, kv_heads=2, qk_norm=True),
        layers=(Segment(pattern=(layer,), repeat=2),),
        vocab=VOCAB,
        adapter=adapter,
    )


def batch(rows: int = B) -> dict:
    """Rows of two documents each; every other row ends in padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (rows, L + 1)).astype(np.int32)
    at = np.broadcast_to(np.arange(L), (rows, L))
    cut = rng.integers(2, L - 2, (rows, 1))
    padding = (np.arange(rows)[:, None] % 2 == 1) & (at >= L - 2)
    segment = np.where(padding, 0, 1 + (at >= cut)).astype(np.int32)
    position = np.where(at >= cut, at - cut, at).astype(np.int32)
    following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment": segment,
        "position": position,
        "loss_mask": ((segment > 0) & (segment == following)).astype(np.float32),
        "num_bytes": np.ones((rows, L), np.int32),
        "domain": np.zeros(rows, np.int32),
        "example_id": np.arange(rows, dtype=np.int32),
    }


def remember() -> optax.GradientTransformation:
    """Keeps the gradients of the last step as its state, before they are clipped."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


TX = optax.chain(remember(), optax.clip_by_global_norm(CLIP), optax.sgd(RATE))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of steps on one mesh: numpy arrays by path."""

    gradients: dict[str, Any]  # those of the first step, before clipping
    params: dict[str, Any]  # after the last step
    state: dict[str, Any]  # router biases and other state after the last step
    metrics: dict[str, Any]  # those of the first step
    replicas_differ: tuple[str, ...]  # arrays of which two devices hold unequal copies


@functools.cache
def initial(name: str):
    """(spec, parameters, state) of the model with the layer `name`.

    Plain random numbers: the real initialisation takes seconds to compile.
    """
    spec = states.model_spec(model(LAYERS[name], ADAPTERS.get(name)))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        is_scale = len(spec.info[path_name(path)].axes) < 2
        noise = rng.normal(size=leaf.shape)
        return np.asarray(1 + 0.1 * noise if is_scale else 0.3 * noise, leaf.dtype)

    def start(path, leaf):
        if leaf.dtype == np.int32:  # the sets of weights of experts that share them
            return np.broadcast_to(
                np.arange(leaf.shape[-1], dtype=np.int32) % 8, leaf.shape
            )
        steered = path_name(path).endswith("p_and_error")
        return np.broadcast_to(np.float32([P_0, 0] if steered else 0), leaf.shape)

    params = jax.tree_util.tree_map_with_path(fill, spec.params)
    return spec, params, jax.tree_util.tree_map_with_path(start, spec.state)


def _prepared(
    spec,
    params,
    state,
    mesh_cfg,
    devices,
    *,
    losses=None,
    grad_accum=1,
    compute: Compute = Compute(),
):
    """(mesh, jitted step, its arguments) of SGD steps on a mesh.

    `losses`: fields of `Loss` besides those in `LOSS`. A microbatch has `B` rows.
    """
    mesh = mesh_cfg.make(devices)
    states.check_mesh(spec, mesh)
    params, state = jax.device_put((params, state), states.shardings(spec, mesh))
    train_state = {
        "params": params,
        "state": state,
        "opt": TX.init(params),  # zeros on the devices of the parameters
        "guard": states.init_guard(),
    }
    buffer = mesh_cfg.exchange_buffer
    compute = dataclasses.replace(
        compute, exchange=mesh_cfg.exchange, exchange_buffer=buffer
    )
    step = make_train_step(
        LanguageModelling(),
        spec,
        TX,
        Loss(**LOSS | (losses or {})),
        grad_accum=grad_accum,
        num_domains=1,
        optim=Optim(rule=AdamW(), lr=RATE),
        compute=compute,
    )
    key, placed = jax.random.key(KEY), shard_batch(batch(B * grad_accum), mesh)
    return mesh, jax.jit(step), [train_state, np.int32(0), key, placed]


def compiled(cfg: LM, mesh_cfg: MeshConfig, devices):
    """The compiled step of a model that is not among `LAYERS`."""
    spec = states.model_spec(cfg)
    zeros = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), (spec.params, spec.state)
    )
    mesh, step, args = _prepared(spec, *zeros, mesh_cfg, devices)
    with jax.set_mesh(mesh):
        return step.lower(*args).compile()


def outcome(name: str, mesh_cfg: MeshConfig, devices, **options) -> Outcome:
    """Train the layer `name` for `STEPS` clipped steps of SGD on a mesh.

    Args:
      name: a key of `LAYERS`.
      mesh_cfg: the mesh over `devices`.
      devices: all, or one.
      **options: losses, grad_accum and compute.
    """
    own = {"losses": LOSSES.get(name), "grad_accum": GRAD_ACCUM.get(name, 1)}
    mesh, step, args = _prepared(*initial(name), mesh_cfg, devices, **own | options)
    first: Any = None
    with jax.set_mesh(mesh):
        for number in range(STEPS):
            args[1] = np.int32(number)
            args[0], metrics = step(*args)
            if first is None:
                first = (args[0]["opt"][0], metrics)
    kept = {k: args[0][k] for k in ("params", "state")}
    return Outcome(
        gradients=_arrays(first[0]),
        params=_arrays(kept["params"]),
        state=_arrays(kept["state"]),
        metrics=_arrays(first[1]),
        replicas_differ=tuple(k for k, v in flat_paths(kept).items() if _differ(v)),
    )


def _arrays(tree) -> dict:
    return {k: np.asarray(v, np.float64) for k, v in flat_paths(tree).items()}


def _differ(array) -> bool:
    """Whether devices that hold the same part of an array hold unequal copies."""
    parts: dict[str, Any] = {}
    for shard in array.addressable_shards:
        first = parts.setdefault(str(shard.index), np.asarray(shard.data))
        if not np.array_equal(first, shard.data):
            return True
    return False


def distance(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """The largest difference of each kind, relative to the norm of the array.

    An array whose norm is below 1e-6 of the norm of all gradients counts by that: what
    is left of it is rounding.
    """
    whole = np.sqrt(sum(np.sum(v**2) for v in expected.gradients.values()))
    return {
        "gradients": max(_relative(actual.gradients, expected.gradients, 1e-6 * whole)),
        "params": max(_relative(actual.params, expected.params, 1e-6)),
        "state": max(_relative(actual.state, expected.state, 1e-6), default=0.0),
        "metrics": max(_relative(actual.metrics, expected.metrics, 1e-3)),
        "grad_norm": float(
            abs(actual.metrics["grad_norm"] / expected.metrics["grad_norm"] - 1)
        ),
        "replicas_differ": len(actual.replicas_differ),
    }


def _relative(actual: dict, expected: dict, floor: float) -> list[float]:
    if actual.keys() != expected.keys():
        raise ValueError(f"other arrays: {sorted(actual.keys() ^ expected.keys())}")
    return [
        float(
            np.linalg.norm(actual[k] - expected[k])
            / max(np.linalg.norm(expected[k]), floor)
        )
        for k in expected
    ]
