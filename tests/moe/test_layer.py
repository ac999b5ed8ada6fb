"""The MoE layer against a loop over tokens, at sizes that break things.

B batch · L length · T = B * L tokens · D model width · E experts · F expert width
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.moe.capacity import expert_capacity
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE, split_experts
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.forced import Forced
from moex.moe.routers.hash import Hash
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.context import Compute
from moex.nn.mlp import Dense
from tests.helpers import XLA, context, split_module
from tests.marks import thorough_but_for
from tests.moe import oracle
from tests.tolerances import assert_close

D = 5
# What the loss of these tests adds up: gradients reach the router by three ways.
WEIGHTS = {
    "load_balance": 0.3,
    "sequence_balance": 0.2,
    "router_z": 0.1,
    "entropy": 0.15,
    "importance": 0.25,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One layer and one batch; `bias` overrides the initial router bias."""

    moe: MoE
    shape: tuple[int, int] = (3, 7)
    num_padding: int = 0
    bias: tuple[float, ...] | None = None
    stored: tuple[int, ...] | None = None  # the set of weights of each expert
    kernels: str | None = "xla"

    __hash__ = object.__hash__


def layer(num_experts, k, shared=None, capacity_factor=None, **router):
    return MoE(
        num_experts=num_experts,
        router=TopK(k=k, init_std=0.7, **router),
        experts=Glu(hidden=3),
        shared=shared,
        capacity_factor=capacity_factor,
    )


def other(router, experts=None, num_experts=4, **fields):
    """A layer of any kind."""
    experts = Glu(hidden=3) if experts is None else experts
    return MoE(num_experts=num_experts, router=router, experts=experts, **fields)


ALL = ("gate", "up", "down")


CASES = {
    "odd sizes, padding, shared": Case(
        moe=layer(5, 2, shared=Dense(hidden=4)), num_padding=2
    ),
    "one expert": Case(moe=layer(1, 1)),
    "k = E": Case(moe=layer(3, 3)),
    "one token": Case(moe=layer(7, 2), shape=(1, 1)),
    "idle expert": Case(moe=layer(4, 2, bias_rate=0.1), bias=(0, -9, 0, 0)),
    "all to one": Case(moe=layer(4, 1, bias_rate=0.1), bias=(0, 0, 9, 0)),
    "all padding": Case(moe=layer(4, 2), num_padding=7),
    "capacity": Case(moe=layer(4, 2, capacity_factor=0.6), num_padding=1, kernels=None),
    "capacity of one": Case(
        moe=layer(4, 2, capacity_factor=0.01, bias_rate=0.1), bias=(9, 0, 0, 0)
    ),
    "top-p, zero, latent": Case(
        moe=other(
            TopP(p=0.45, k_max=4, init_std=0.7),
            Latent(hidden=3, latent=2, group=3, ops=ALL),
            zero=Zero(null=1, copy=1, constant=2),
            shared=Dense(hidden=3),
            shared_gate=True,
        ),
        num_padding=2,
    ),
    "top-p, capacity, zero": Case(
        moe=other(
            TopP(p=0.6, k_max=3, normalize="after", init_std=0.7),
            zero=Zero(copy=1),
            capacity_factor=0.4,
        ),
        num_padding=1,
    ),
    "expert choice": Case(
        moe=other(ExpertChoice(k=1.5, init_std=0.7), shared=Dense(hidden=2)),
        num_padding=2,
    ),
    "expert choice, zero, low rank": Case(
        moe=other(ExpertChoice(k=2.0, init_std=0.7), LowRank(rank=2), zero=Zero(copy=1))
    ),
    "shared weights": Case(
        moe=other(
            TopK(k=3, init_std=0.7),
            num_experts=7,
            stored_experts=4,
            shared=Dense(hidden=2),
            capacity_factor=0.8,
        ),
        num_padding=2,
        stored=(0, 2, 1, 1, 0, 2, 0),  # nobody uses the last one
    ),
    "fewer sets of weights than slots, zero": Case(
        moe=other(
            TopP(p=0.7, k_max=4, init_std=0.7), stored_experts=2, zero=Zero(copy=1)
        ),
        stored=(0, 1, 1, 0),
        kernels=None,
    ),
    "expert choice, shared weights": Case(
        moe=other(ExpertChoice(k=1.5, init_std=0.7), stored_experts=2),
        num_padding=1,
        stored=(1, 1, 0, 1),
    ),
    "hash, biases": Case(
        moe=other(Hash(k=2), Glu(hidden=3, activation="gelu", bias=True)),
        num_padding=1,
    ),
}


def inputs(case, dtype="float32"):
    """(graphdef, params, state, x_BLD, dy_BLD, ctx)."""
    graphdef, params, state = split_module(case.moe.make(D, nnx.Rngs(params=0)))
    if case.bias is not None:
        state = {"router": {"bias_E": jnp.array(case.bias, jnp.float32)}}
    if case.stored is not None:
        state |= {"stored_E": jnp.array(case.stored, jnp.int32)}
    for leaf, value in params["experts"].items():
        if leaf.startswith("bias"):
            params["experts"][leaf] = jax.random.normal(jax.random.key(7), value.shape)
    x_BLD, dy_BLD = jax.random.normal(jax.random.key(1), (2, *case.shape, D))
    ctx = context(
        *case.shape,
        num_padding=case.num_padding,
        compute=Compute(dtype=dtype, kernels=case.kernels),
        token_BL=jnp.arange(math.prod(case.shape), dtype=jnp.int32).reshape(case.shape),
    )
    return graphdef, params, state, x_BLD.astype(dtype), dy_BLD, ctx


def loss_of(graphdef, ctx, params, state, x_BLD, dy_BLD, wrap=lambda f: f):
    y_BLD, aux = wrap(nnx.merge(graphdef, params, state))(x_BLD, ctx)
    loss = jnp.sum(y_BLD.astype(jnp.float32) * dy_BLD)
    loss += sum(w * aux["losses"][name] for name, w in WEIGHTS.items())
    return loss, (y_BLD, aux)


@functools.lru_cache
def outputs(case, dtype="float32"):
    """(y_BLD, aux, gradients of params, gradient of x)."""
    graphdef, params, state, x_BLD, dy_BLD, ctx = inputs(case, dtype)
    loss = functools.partial(loss_of, graphdef)
    run = jax.value_and_grad(loss, argnums=(1, 3), has_aux=True)
    (_, (y_BLD, aux)), grads = jax.jit(run)(ctx, params, state, x_BLD, dy_BLD)
    return y_BLD, aux, *grads


def truth(case, x_TD, params):
    """`oracle.moe` of a case."""
    moe, capacity = case.moe, None
    if moe.capacity_factor is not None:
        slots = len(x_TD) * moe.router.slots(moe.num_choices())
        capacity = expert_capacity(moe.capacity_factor, slots, moe.num_choices())
    return oracle.moe(
        moe,
        x_TD,
        params,
        shape=case.shape,
        valid_T=np.arange(len(x_TD)) % case.shape[1] < case.shape[1] - case.num_padding,
        token_T=np.arange(len(x_TD)),
        state={
            name: value
            for name, value in (("bias_E", case.bias), ("stored_E", case.stored))
            if value is not None
        },
        capacity=capacity,
    )


def flat(tree, path=()):
    """{path: leaf} of nested dicts."""
    out = {}
    for name, value in tree.items():
        inner = flat(value, (*path, name)) if isinstance(value, dict) else None
        out |= {(*path, name): value} if inner is None else inner
    return out


def nested(leaves):
    """The inverse of `flat`."""
    tree = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


cases = pytest.mark.parametrize(
    "name",
    thorough_but_for(
        CASES,
        *("odd sizes, padding, shared", "all padding", "capacity"),
        *("top-p, capacity, zero", "expert choice", "hash, biases"),
        later=("one expert", "k = E", "idle expert"),
    ),
)


@cases
def test_values_losses_and_counts_are_those_of_the_loop(name):
    case = CASES[name]
    _, params, _, x_BLD, _, _ = inputs(case)
    y_BLD, aux, *_ = outputs(case)
    expected = truth(case, x_BLD.reshape(-1, D), params)
    assert_close(y_BLD.reshape(-1, D), expected["y_TD"], "float32")
    np.testing.assert_array_equal(aux["load"], expected["load_E"])
    assert float(aux["stats"]["num_kept"]) == expected["num_kept"]
    for name in WEIGHTS:
        assert_close(aux["losses"][name], expected[name], "float32", name)


@cases
def test_gradients_are_those_of_the_loop(name):
    case = CASES[name]
    _, params, _, x_BLD, dy_BLD, _ = inputs(case)
    *_, dparams, dx_BLD = outputs(case)
    dy_TD = np.asarray(dy_BLD, np.float64).reshape(-1, D)
    load_E = truth(case, x_BLD.reshape(-1, D), params)["load_E"]

    def true_loss(arguments):
        own = {k: v for k, v in arguments.items() if k != "x"}
        result = truth(case, arguments["x"], nested(own))
        np.testing.assert_array_equal(result["load_E"], load_E)
        total = np.sum(result["y_TD"] * dy_TD)
        return total + sum(w * result[name] for name, w in WEIGHTS.items())

    gradients = flat(dparams) | {"x": dx_BLD.reshape(-1, D)}
    arguments = flat(params) | {"x": x_BLD.reshape(-1, D)}
    rng = np.random.default_rng(2)
    for leaf, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        slope = oracle.slope(true_loss, arguments, leaf, direction)
        assert_close(np.sum(gradient * direction), slope, "difference", str(leaf))


@pytest.mark.thorough
def test_bfloat16_is_near_float32():
    """The router stays float32, so the same experts are chosen (x is rounded first)."""
    case = CASES["odd sizes, padding, shared"]
    graphdef, params, state, x_BLD, _, ctx = inputs(case, "bfloat16")
    y_BLD, aux, *_ = outputs(case, "bfloat16")
    expected = truth(case, np.asarray(x_BLD, np.float64).reshape(-1, D), params)
    assert y_BLD.dtype == jnp.bfloat16
    assert_close(y_BLD.reshape(-1, D), expected["y_TD"], "bfloat16")
    np.testing.assert_array_equal(aux["load"], expected["load_E"])
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(aux))


def test_padding_may_hold_anything():
    """It is not routed, not counted, and its values reach no other token or weight."""
    case = CASES["odd sizes, padding, shared"]
    graphdef, params, state, x_BLD, dy_BLD, ctx = inputs(case)
    poisoned = jnp.where(ctx.valid_BL[..., None], x_BLD, 1e4)
    dy_BLD = jnp.where(ctx.valid_BL[..., None], dy_BLD, 0.0)
    loss = functools.partial(loss_of, graphdef)
    run = jax.jit(jax.value_and_grad(loss, argnums=(1,), has_aux=True))
    (_, (y, aux)), grads = run(ctx, params, state, x_BLD, dy_BLD)
    (_, (y_p, aux_p)), grads_p = run(ctx, params, state, poisoned, dy_BLD)
    np.testing.assert_array_equal(y[:, :5], y_p[:, :5])
    for name, value in aux["losses"].items():
        assert_close(aux_p["losses"][name], value, "order", name)
    np.testing.assert_array_equal(aux["load"], aux_p["load"])
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_p), strict=True):
        assert_close(b, a, "order")


@pytest.mark.thorough
def test_counts_are_not_doubled_by_rematerialisation():
    case = CASES["capacity"]
    graphdef, params, state, x_BLD, dy_BLD, ctx = inputs(case)
    y_BLD, aux, *grads = outputs(case)
    loss = functools.partial(loss_of, graphdef, wrap=jax.checkpoint)
    run = jax.value_and_grad(loss, argnums=(1, 3), has_aux=True)
    (_, (y_remat, aux_remat)), grads_remat = jax.jit(run)(
        ctx, params, state, x_BLD, dy_BLD
    )
    jax.tree.map(np.testing.assert_array_equal, aux_remat, aux)
    np.testing.assert_array_equal(y_remat, y_BLD)
    jax.tree.map(lambda a, b: assert_close(a, b, "order"), tuple(grads), grads_remat)


def test_aux_has_the_keys_of_the_contract():
    aux = outputs(CASES["capacity"])[1]
    assert aux.keys() == {"losses", "load", "stats"}
    assert aux["losses"].keys() == WEIGHTS.keys()


# Properties.


def run_layer(moe, params, x_BLD, ctx, state=None):
    graphdef, _, own_state = split_module(moe.make(D, nnx.Rngs(params=0)))
    run = jax.jit(lambda p, s, x: nnx.merge(graphdef, p, s)(x, ctx))
    return run(params, own_state if state is None else state, x_BLD)


def fresh(moe):
    return split_module(moe.make(D, nnx.Rngs(params=0)))[1]


X_BLD = jax.random.normal(jax.random.key(3), (2, 5, D))
CTX = context(2, 5, compute=XLA)


@pytest.mark.thorough
def test_ample_capacity_is_dropless():
    for router in (TopK(k=2, init_std=0.7), TopP(p=0.5, k_max=3, init_std=0.7)):
        dropless = other(router)
        ample = dataclasses.replace(dropless, capacity_factor=4.0)
        params = fresh(dropless)
        y_BLD, aux = run_layer(dropless, params, X_BLD, CTX)
        y_ample_BLD, aux_ample = run_layer(ample, params, X_BLD, CTX)
        np.testing.assert_array_equal(y_ample_BLD, y_BLD)
        jax.tree.map(np.testing.assert_array_equal, aux_ample, aux)


@pytest.mark.thorough
def test_identical_experts_are_one_dense_feed_forward():
    """k copies with gates that sum to 1: the weights of the choice cancel."""
    moe = other(TopK(k=3, init_std=0.7))
    params = fresh(moe)
    same = {k: jnp.broadcast_to(v[:1], v.shape) for k, v in params["experts"].items()}
    y_BLD, _ = run_layer(moe, params | {"experts": same}, X_BLD, CTX)
    dense = {
        "w_in_D2F": same["w_in_ED2F"][0],
        "w_out_FD": same["w_out_EFD"][0],
    }
    graphdef, _, state = split_module(Dense(hidden=3).make(D, nnx.Rngs(params=0)))
    expected_BLD, _ = nnx.merge(graphdef, dense, state)(X_BLD, CTX)
    assert_close(y_BLD, expected_BLD, "float32")


def test_uniform_routing_has_a_balance_loss_of_one():
    """Zero router weights and a balanced assignment."""
    for k in (1, 2):
        moe = other(Forced(k=k), num_experts=5)
        zero = jax.tree.map(jnp.zeros_like, fresh(moe))
        _, aux = run_layer(moe, zero, X_BLD, CTX)
        for name in ("load_balance", "sequence_balance"):
            assert_close(aux["losses"][name], 1.0, "float32", name)
        assert_close(aux["losses"]["entropy"], np.log(5), "float32")
        assert_close(aux["losses"]["importance"], 0.0, "float32")


def test_permuting_experts_with_their_router_changes_nothing():
    moe = other(TopP(p=0.5, k_max=3, init_std=0.7))
    params = fresh(moe)
    order_E = np.array([2, 0, 3, 1])
    moved = {
        "router": {"w_DE": params["router"]["w_DE"][:, order_E]},
        "experts": {k: v[order_E] for k, v in params["experts"].items()},
    }
    y_BLD, aux = run_layer(moe, params, X_BLD, CTX)
    moved_BLD, moved_aux = run_layer(moe, moved, X_BLD, CTX)
    assert_close(moved_BLD, y_BLD, "order")
    np.testing.assert_array_equal(moved_aux["load"], aux["load"][order_E])


def test_permuting_tokens_permutes_outputs():
    moe = other(TopP(p=0.5, k_max=3, init_std=0.7))
    params = fresh(moe)
    order_T = np.random.default_rng(0).permutation(10)
    y_BLD, _ = run_layer(moe, params, X_BLD, CTX)
    moved_BLD = X_BLD.reshape(10, D)[order_T].reshape(X_BLD.shape)
    moved_y_BLD, _ = run_layer(moe, params, moved_BLD, CTX)
    expected_TD = y_BLD.reshape(10, D)[order_T]
    assert_close(moved_y_BLD.reshape(10, D), expected_TD, "order")


@pytest.mark.thorough
def test_split_experts_keep_parameters_and_work():
    moe = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=6))
    fine = split_experts(moe, 3)
    assert (fine.num_experts, fine.router.k, fine.experts.hidden) == (12, 6, 2)
    sizes = [sum(a.size for a in fresh(m)["experts"].values()) for m in (moe, fine)]
    assert sizes[0] == sizes[1]
    with pytest.raises(ValueError, match=r"parts=4, hidden=6"):
        split_experts(moe, 4)
    with pytest.raises(ValueError, match="TopP cannot choose parts of experts"):
        split_experts(other(TopP(p=0.5, k_max=2)), 3)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (
            other(TopK(k=2), Dense(hidden=1)),
            r"experts = 'Dense': must be an experts",
        ),
        (other(TopK(k=2), TopK(k=2)), r"experts = 'TopK': must be an experts config"),
        (other(Groups(num=2, keep=1)), r"router = 'Groups': must be a router config"),
        (other(TopK(k=2), shared=Glu(hidden=1)), r"shared = 'Glu': must be a feed"),
        (other(TopK(k=2), shared=other(TopK(k=2))), r"shared = 'MoE': must be a dense"),
        (other(TopK(k=2), num_experts=0), r"num_experts = 0: must be at least 1"),
        (other(TopK(k=2), capacity_factor=0.0), r"capacity_factor = 0.0: must be abo"),
        (other(Glu(hidden=1)), r"router = 'Glu': must be a router config such as TopK"),
        (other(TopK(k=2), zero=Zero()), r"zero = 0: must be at least one expert"),
        (other(TopK(k=2), zero=Zero(null=-1)), r"zero.null = -1: must be >= 0"),
        (other(TopK(k=2), shared_gate=True), r"shared_gate = True: must be False wit"),
        (
            other(TopK(k=6), zero=Zero(null=1)),
            r"k = 6: must be at most num_experts = 5",
        ),
    ],
    ids=str,
)
def test_refusals(moe, message):
    with pytest.raises(ConfigError, match=message):
        check(moe, "config.ffn")
