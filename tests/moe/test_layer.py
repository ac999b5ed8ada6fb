"""The MoE layer against a loop over tokens, at sizes that break things.

B batch · L length · T = B * L tokens · D model width · E experts · F expert width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moex.moe.dispatch import expert_capacity
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.mlp import Dense
from moex.sharding import BATCH_AXES, param_sharding
from tests.helpers import context, mesh_of, split_module
from tests.moe import oracle
from tests.tolerances import assert_close

D = 5
# What the loss of these tests adds up: gradients reach the router by three ways.
WEIGHTS = {"load_balance": 0.3, "router_z": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One layer and one batch; `bias` overrides the initial router bias."""

    moe: MoE
    shape: tuple[int, int] = (3, 7)
    num_padding: int = 0
    bias: tuple[float, ...] | None = None
    kernels: str | None = "xla"

    __hash__ = object.__hash__


def layer(num_experts, k, shared=None, capacity_factor=None, **router):
    router = TopK(k=k, init_std=0.7, **router)
    experts = Glu(hidden=3)
    return MoE(
        num_experts=num_experts,
        router=router,
        experts=experts,
        shared=shared,
        capacity_factor=capacity_factor,
    )


CASES = {
    "odd sizes, padding, shared": Case(
        moe=layer(5, 2, shared=Dense(hidden=4)), num_padding=2, kernels=None
    ),
    "one expert": Case(moe=layer(1, 1)),
    "k = E": Case(moe=layer(3, 3)),
    "one token": Case(moe=layer(7, 2), shape=(1, 1)),
    "sigmoid, raw, scaled": Case(
        moe=layer(4, 2, score="sigmoid", normalize=False, scale=2.5)
    ),
    "idle expert": Case(moe=layer(4, 2, bias_rate=0.1), bias=(0, -9, 0, 0)),
    "all to one": Case(moe=layer(4, 1, bias_rate=0.1), bias=(0, 0, 9, 0)),
    "all padding": Case(moe=layer(4, 2), num_padding=7),
    "capacity": Case(moe=layer(4, 2, capacity_factor=0.6), num_padding=1, kernels=None),
    "capacity of one": Case(
        moe=layer(4, 2, capacity_factor=0.01, bias_rate=0.1), bias=(9, 0, 0, 0)
    ),
}
ON_A_MESH = Case(
    moe=layer(8, 2, shared=Dense(hidden=4), capacity_factor=0.9, bias_rate=0.1),
    shape=(8, 5),
    num_padding=1,
    kernels=None,
)


def inputs(case, dtype="float32"):
    """(graphdef, params, state, x_BLD, dy_BLD, ctx)."""
    graphdef, params, state = split_module(case.moe.make(D, nnx.Rngs(params=0)))
    if case.bias is not None:
        state = {"router": {"bias_E": jnp.array(case.bias, jnp.float32)}}
    x_BLD, dy_BLD = jax.random.normal(jax.random.key(1), (2, *case.shape, D))
    ctx = context(
        *case.shape, num_padding=case.num_padding, dtype=dtype, kernels=case.kernels
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
    router = dataclasses.asdict(case.moe.router) | {"bias_E": case.bias}
    capacity = None
    if case.moe.capacity_factor is not None:
        slots = len(x_TD) * case.moe.router.k
        capacity = expert_capacity(
            case.moe.capacity_factor, slots, case.moe.num_experts
        )
    valid_T = np.arange(len(x_TD)) % case.shape[1] < case.shape[1] - case.num_padding
    return oracle.moe(x_TD, valid_T, params, capacity=capacity, **router)


cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@cases
def test_values_losses_and_counts_are_those_of_the_loop(case):
    _, params, _, x_BLD, _, _ = inputs(case)
    y_BLD, aux, *_ = outputs(case)
    expected = truth(case, x_BLD.reshape(-1, D), params)
    assert_close(y_BLD.reshape(-1, D), expected["y_TD"], "float32")
    np.testing.assert_array_equal(aux["load"], expected["load_E"])
    assert float(aux["stats"]["num_kept"]) == expected["num_kept"]
    for name in WEIGHTS:
        assert_close(aux["losses"][name], expected[name], "float32", name)


@cases
def test_gradients_are_those_of_the_loop(case):
    _, params, _, x_BLD, dy_BLD, _ = inputs(case)
    *_, dparams, dx_BLD = outputs(case)
    dy_TD = np.asarray(dy_BLD, np.float64).reshape(-1, D)
    load_E = truth(case, x_BLD.reshape(-1, D), params)["load_E"]

    def true_loss(arguments):
        moved = {g: {n: arguments[g, n] for n in params[g]} for g in params}
        result = truth(case, arguments["x"], moved)
        np.testing.assert_array_equal(result["load_E"], load_E)
        total = np.sum(result["y_TD"] * dy_TD)
        return total + sum(w * result[name] for name, w in WEIGHTS.items())

    gradients = {(g, n): a for g, group in dparams.items() for n, a in group.items()}
    gradients["x"] = dx_BLD.reshape(-1, D)
    arguments = {(g, n): a for g, group in params.items() for n, a in group.items()}
    arguments["x"] = x_BLD.reshape(-1, D)
    rng = np.random.default_rng(2)
    for leaf, gradient in gradients.items():
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            slope = oracle.slope(true_loss, arguments, leaf, direction)
            assert_close(np.sum(gradient * direction), slope, "difference", leaf)


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


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "expert": 4}, {"fsdp": 4, "tensor": 2}],
    ids=str,
)
def test_sharded_is_unsharded(sizes):
    """Values, losses, counts and gradients, with the default kernels."""
    graphdef, params, state, x_BLD, dy_BLD, ctx = inputs(ON_A_MESH)
    expected = outputs(ON_A_MESH)
    mesh = mesh_of(8, **sizes)
    batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    module = ON_A_MESH.moe.make(D, nnx.Rngs(params=0))
    axes = {
        "/".join(map(str, path)): variable.get_metadata()["axes"]
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }

    def place(path, leaf):
        name = "/".join(key.key for key in path)
        return jax.device_put(leaf, param_sharding(leaf.shape, axes[name], mesh))

    params = jax.tree_util.tree_map_with_path(place, params)
    x_BLD, dy_BLD, ctx = jax.device_put((x_BLD, dy_BLD, ctx), batch)
    loss = functools.partial(loss_of, graphdef)
    run = jax.value_and_grad(loss, argnums=(1, 3), has_aux=True)
    with jax.set_mesh(mesh):
        (_, (y_BLD, aux)), grads = jax.jit(run)(ctx, params, state, x_BLD, dy_BLD)
    np.testing.assert_array_equal(aux["load"], expected[1]["load"])
    assert aux["stats"]["num_kept"] == expected[1]["stats"]["num_kept"]
    assert aux["stats"]["num_kept"] < jnp.sum(aux["load"])
    jax.tree.map(
        lambda a, b: assert_close(a, b, "order"), (y_BLD, aux, *grads), expected
    )


def test_aux_has_the_keys_of_the_contract():
    aux = outputs(CASES["capacity"])[1]
    assert aux.keys() == {"losses", "load", "stats"}
    assert aux["losses"].keys() == WEIGHTS.keys()
