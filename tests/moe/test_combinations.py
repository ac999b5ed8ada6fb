"""Random layers: any router x any expert x any depth of chain, against the loop.

Each seed draws a whole layer and a batch, awkward sizes included. `-m slow` draws many.

B batch · L length · T = B * L tokens · D model width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.moe.capacity import expert_capacity
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.forced import Forced
from moex.moe.routers.hash import Hash
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from tests.helpers import XLA, context, split_module
from tests.marks import thorough_but_for
from tests.moe import oracle
from tests.moe.test_chain import string_keys
from tests.moe.test_layer import WEIGHTS, flat, nested
from tests.tolerances import assert_close

FEW = range(3)
MANY = range(100, 180)


def drawn(rng, *choices):
    return choices[rng.integers(len(choices))]


def draw_router(rng, E):
    """A router among E choices; a third of the k are 1 or E."""
    k = int(drawn(rng, 1, E, rng.integers(1, E + 1)))
    groups = None
    if E % 2 == 0 and k <= E // 2:
        groups = drawn(rng, None, Groups(num=2, keep=1))
    std = {"init_std": 0.7}
    score = drawn(rng, "softmax", "sigmoid", "sqrt_softplus")
    k_max = int(rng.integers(1, E + 1))
    return drawn(
        rng,
        TopK(
            k=k,
            score=score,
            normalize=drawn(rng, "after", "before", "none"),
            scale=drawn(rng, 1.0, 1.7),
            groups=groups,
            **std,
        ),
        TopP(
            p=float(drawn(rng, 0.05, 0.4, 0.8, 1.0)),
            k_max=k_max,
            k_min=int(rng.integers(1, k_max + 1)),
            normalize=drawn(rng, "none", "after"),
            **std,
        ),
        ExpertChoice(k=float(rng.uniform(0.3, E)), **std),
        Hash(k=k),
        Soft(score=score, **std),
        Forced(k=k, load=drawn(rng, "balanced", "adversarial"), **std),
    )


def draw_experts(rng, E, D):
    ops = drawn(rng, ("gate", "up"), ("down",), ("gate", "up", "down"))
    latent = int(rng.integers(1, D + 1))
    return drawn(
        rng,
        Glu(
            hidden=3,
            activation=drawn(rng, "silu", "gelu", "clamped"),
            bias=bool(rng.integers(2)),
        ),
        Latent(hidden=3, latent=latent, group=int(rng.integers(1, E + 1)), ops=ops),
        LowRank(rank=int(rng.integers(1, D + 1)), alpha=drawn(rng, None, 3.0)),
    )


def draw_layer(rng, D):
    E = int(drawn(rng, 1, 2, 3, 4, 6))
    zero = drawn(rng, None, None, Zero(null=1, copy=1, constant=1))
    router = draw_router(rng, E + (zero.count() if zero else 0))
    shared = drawn(rng, None, Dense(hidden=2))
    capacity = drawn(rng, None, None, 0.5)
    moe = MoE(
        num_experts=E,
        router=router,
        experts=draw_experts(rng, E, D),
        zero=zero,
        shared=shared,
        shared_gate=shared is not None and bool(rng.integers(2)),
        capacity_factor=None if isinstance(router, ExpertChoice) else capacity,
    )
    iterations = int(drawn(rng, 0, 0, 1, 2, 3))
    if iterations == 0:
        return moe
    return Chain(
        moe=moe,
        iterations=iterations,
        routers=drawn(rng, "independent", "shared"),
        inner_residual=bool(rng.integers(4)),
        shared_once=bool(rng.integers(2)),
    )


def truth(cfg, x_TD, params, batch):
    """(y_TD, figures of each round) of a plain layer or a chain."""
    moe = cfg.moe if isinstance(cfg, Chain) else cfg
    capacity = None
    if moe.capacity_factor is not None:
        slots = len(x_TD) * moe.router.slots(moe.num_choices())
        capacity = expert_capacity(moe.capacity_factor, slots, moe.num_choices())
    if isinstance(cfg, Chain):
        routers = {int(t): w for t, w in params.get("routers", {}).items()}
        params = {"router": {}} | params | {"routers": routers}
        return oracle.chain(cfg, x_TD, params, capacity=capacity, **batch)
    found = oracle.moe(cfg, x_TD, params, capacity=capacity, **batch)
    return found["y_TD"], [found]


def check_seed(seed):
    rng = np.random.default_rng(seed)
    D = int(rng.integers(2, 6))
    cfg = draw_layer(rng, D)
    shape = (int(rng.integers(1, 4)), int(drawn(rng, 1, 3, 7)))
    padding = int(drawn(rng, 0, 0, shape[1] // 2, shape[1]))
    ties = rng.integers(5) == 0
    graphdef, params, state = split_module(cfg.make(D, nnx.Rngs(params=seed)))
    params = string_keys(params)
    if ties:  # all experts look alike to the routers
        params = {
            k: jax.tree.map(jnp.zeros_like, v) if k.startswith("router") else v
            for k, v in params.items()
        }
    x_BLD, dy_BLD = jax.random.normal(jax.random.key(seed), (2, *shape, D))
    token_BL = jnp.asarray(rng.integers(0, 50, shape), jnp.int32)
    ctx = context(*shape, num_padding=padding, token_BL=token_BL, compute=XLA)

    def loss(params, x_BLD):
        y_BLD, aux = nnx.merge(graphdef, params, state)(x_BLD, ctx)
        total = jnp.sum(y_BLD * dy_BLD)
        for name, weight in WEIGHTS.items():
            total += weight * jnp.sum(aux["losses"][name])
        return total, (y_BLD, aux)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y_BLD, aux)), (dparams, dx_BLD) = run(params, x_BLD)
    batch = {
        "shape": shape,
        "valid_T": np.tile(np.arange(shape[1]) < shape[1] - padding, shape[0]),
        "token_T": np.asarray(token_BL).reshape(-1),
    }
    y_TD, rounds = truth(cfg, x_BLD.reshape(-1, D), params, batch)
    assert_close(y_BLD.reshape(-1, D), y_TD, "float32", str(cfg))
    for t, found in enumerate(rounds):
        mine = jax.tree.map(lambda a, t=t: a[t] if isinstance(cfg, Chain) else a, aux)
        np.testing.assert_array_equal(mine["load"], found["load_E"], str(cfg))
        assert float(mine["stats"]["num_kept"]) == found["num_kept"], cfg
        for name in WEIGHTS:
            assert_close(mine["losses"][name], found[name], "float32", f"{name} {cfg}")
    if ties:
        return  # a step in any direction chooses other experts

    def true_loss(arguments):
        own = nested({k: v for k, v in arguments.items() if k != "x"})
        y_TD, rounds = truth(cfg, arguments["x"], own, batch)
        total = np.sum(y_TD * np.asarray(dy_BLD, np.float64).reshape(-1, D))
        return total + sum(w * r[n] for r in rounds for n, w in WEIGHTS.items())

    gradients = flat(dparams) | {"x": dx_BLD.reshape(-1, D)}
    arguments = flat(params) | {"x": x_BLD.reshape(-1, D)}
    for leaf, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        slope = oracle.slope(true_loss, arguments, leaf, direction, step=1e-7)
        assert_close(np.sum(gradient * direction), slope, "difference", f"{leaf} {cfg}")


@pytest.mark.parametrize("seed", thorough_but_for(FEW, 0, later=[2]))
def test_a_random_layer_is_the_loop(seed):
    check_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_many_random_layers_are_the_loop(seed):
    check_seed(seed)
