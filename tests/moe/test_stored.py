"""Experts that share weights: nothing is copied, and every way to run agrees.

`test_layer.py` checks values and gradients against the loop over tokens,
`tests/test_sharded.py` training steps on meshes.

B batch · L length · D model width · E experts · G sets of weights
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.moe.routing import Routing
from moex.moe.stored import to_stored
from moex.nn.context import Compute
from moex.nn.stack import Segment
from moex.sharding import MeshConfig
from tests.helpers import XLA, context, split_module, tiny_lm
from tests.marks import slow, thorough

B, L, D, E, G = 4, 8, 16, 8, 4
MAP = (0, 3, 1, 1, 2, 0, 3, 2)
MOE = MoE(
    num_experts=E,
    stored_experts=G,
    router=TopK(k=2, init_std=0.5, bias_rate=0.01),
    experts=Glu(hidden=8),
)
KINDS = {
    "top-k": MOE,
    "chain": Chain(moe=MOE, iterations=2),
    "expert choice": dataclasses.replace(MOE, router=ExpertChoice(k=2.0, init_std=0.5)),
}
X_BLD = jax.random.normal(jax.random.key(1), (B, L, D))
DY_BLD = jax.random.normal(jax.random.key(2), (B, L, D))


def made(ffn):
    """(graphdef, params, state) with the map of these tests."""
    graphdef, params, state = split_module(ffn.make(D, nnx.Rngs(params=0)))
    return graphdef, params, state | {"stored_E": jnp.array(MAP, jnp.int32)}


def copied(params, state):
    """The same with a copy of its weights for each expert."""
    experts = {name: a[jnp.array(MAP)] for name, a in params["experts"].items()}
    state = {name: a for name, a in state.items() if name != "stored_E"}
    return params | {"experts": experts}, state


def run(graphdef, params, state, compute=XLA, mesh=None):
    """(y_BLD, aux, gradients of the parameters)."""
    ctx = context(B, L, num_padding=1, compute=compute)

    def loss(params, x_BLD):
        y_BLD, aux = nnx.merge(graphdef, params, state)(x_BLD, ctx)
        y_BLD = jnp.where(ctx.valid_BL[..., None], y_BLD.astype(jnp.float32), 0.0)
        return jnp.sum(y_BLD * DY_BLD), (y_BLD, aux)

    step, x_BLD = jax.jit(jax.grad(loss, has_aux=True)), X_BLD.astype(compute.dtype)
    if mesh is None:
        grads, (y_BLD, aux) = step(params, x_BLD)
    else:
        with jax.set_mesh(mesh):
            grads, (y_BLD, aux) = step(params, x_BLD)
    return y_BLD, aux, grads


def assert_near(found, expected, rtol=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["top-k", slow("chain")])
def test_it_computes_what_copies_of_the_weights_do(kind):
    graphdef, params, state = made(KINDS[kind])
    y_BLD, aux, grads = run(graphdef, params, state)
    alone = dataclasses.replace(MOE, stored_experts=None)
    whole = alone if kind == "top-k" else Chain(moe=alone, iterations=2)
    whole, *_ = split_module(whole.make(D, nnx.Rngs(params=0)))
    expected_BLD, figures, full = run(whole, *copied(params, state))
    assert_near(y_BLD, expected_BLD)
    np.testing.assert_array_equal(aux["load"], figures["load"])
    assert aux["load"].shape[-1] == E
    for name, gradient in grads["experts"].items():
        wanted = np.zeros(gradient.shape)  # members of a group are one tensor
        np.add.at(wanted, list(MAP), full["experts"][name])
        assert_near(gradient, wanted)


@pytest.mark.thorough
def test_slots_that_meet_in_one_set_become_one():
    routing = Routing(
        expert_TK=jnp.array([[0, 3, 1], [2, 4, 5], [1, 2, 0]]),
        gate_TK=jnp.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.4, 0.4, 0.2]]),
        keep_TK=jnp.array(
            [[True, True, True], [True, True, False], [False, True, True]]
        ),
        logits_TE=jnp.zeros((3, 6)),
        probs_TE=jnp.zeros((3, 6)),
    )
    stored_E = jnp.array([1, 1, 0, 1, 0, 2])
    few = to_stored(routing, stored_E, 3)
    np.testing.assert_array_equal(few.keep_TK, [[1, 0, 0], [1, 0, 0], [0, 1, 1]])
    kept = np.where(few.keep_TK, few.expert_TK, -1)
    np.testing.assert_array_equal(kept, [[1, -1, -1], [0, -1, -1], [-1, 0, 1]])
    np.testing.assert_allclose(few.gate_TK, [[1, 0, 0], [0.9, 0, 0], [0, 0.4, 0.2]])
    dense = to_stored(routing, jnp.minimum(stored_E, 1), 2)
    np.testing.assert_allclose(dense.gate_TK, [[0, 1], [0.9, 0], [0.4, 0.2]])
    np.testing.assert_array_equal(dense.keep_TK, [[0, 1], [1, 0], [1, 1]])


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_the_kernels_in_c_compute_the_same(dtype):
    graphdef, params, state = made(MOE)
    y_BLD, *_ = run(graphdef, params, state, Compute(dtype=dtype))
    expected_BLD, *_ = run(graphdef, params, state)
    assert_near(y_BLD, expected_BLD, 1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize(
    ("kind", "exchange"),
    [
        ("top-k", "all_to_all"),
        thorough("top-k", "gather"),
        *(slow("chain", "all_to_all"), slow("expert choice", "gather")),
    ],
)
def test_eight_devices_compute_the_same(kind, exchange):
    graphdef, params, state = made(KINDS[kind])
    y_BLD, _, grads = run(graphdef, params, state)
    how = Compute(kernels="xla", exchange=exchange)
    mesh = MeshConfig(data=2, expert=4).make()
    found_BLD, _, found = run(graphdef, params, state, how, mesh)
    assert_near(found_BLD, y_BLD)
    jax.tree.map(assert_near, found, grads)


def test_a_mesh_must_divide_the_sets_of_weights():
    cfg = tiny_lm(Segment(pattern=(MOE,)))
    with pytest.raises(ConfigError, match="stored_experts; its shape is"):
        model_spec(cfg, MeshConfig(expert=8, data=1).make())


def test_costs_count_the_weights_that_are_stored():
    layers = (MOE, dataclasses.replace(MOE, stored_experts=None))
    few, full = (
        model_cost(cfg, model_spec(cfg), 16)
        for cfg in (tiny_lm(Segment(pattern=(layer,))) for layer in layers)
    )
    assert few.total["experts"] * E == full.total["experts"] * G
    assert few.active["experts"] == full.active["experts"]
    assert few.train_flops == full.train_flops


@pytest.mark.parametrize("count", [0, 9])
def test_more_sets_than_experts_or_none_are_refused(count):
    cfg = tiny_lm(Segment(pattern=(dataclasses.replace(MOE, stored_experts=count),)))
    with pytest.raises(ConfigError, match=f"stored_experts = {count}: must be from 1"):
        check(cfg, "config.model")
