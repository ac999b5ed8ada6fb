"""The experts contract: the definition against a loop, the fused form against it.

T tokens · N routed rows · D model width · E experts · K slots per token
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import make_plan
from moex.moe.dispatch import combine, dispatch
from moex.moe.experts.glu import Glu
from tests.helpers import context, split_module
from tests.moe import oracle
from tests.tolerances import assert_close

# Each config with the float64 function of one row: (x_D, *weights of one expert).
EXPERTS = {"glu": (Glu(hidden=3), oracle.glu)}
T, K, D, E = 9, 2, 5, 4

experts = pytest.mark.parametrize("name", EXPERTS)


@pytest.fixture(scope="module")
def inputs():
    """Tokens, gates and a plan with an idle expert and some slots not kept."""
    rng = np.random.default_rng(0)
    expert_TK = np.array([rng.choice(E - 1, K, replace=False) for _ in range(T)])
    keep_TK = rng.random((T, K)) < 0.8
    return {
        "x_TD": rng.normal(size=(T, D)),
        "gate_TK": np.where(keep_TK, rng.random((T, K)), 0),
        "dy_TD": rng.normal(size=(T, D)),
        "expert_TK": expert_TK,
        "keep_TK": keep_TK,
        "plan": make_plan(jnp.asarray(expert_TK), jnp.asarray(keep_TK), E),
    }


def by_definition(module, x_TD, gate_TK, plan, ctx):
    y_ND = module(dispatch(x_TD, plan), plan.group_sizes_E, ctx)
    return combine(y_ND, gate_TK, plan)


def fused(module, x_TD, gate_TK, plan, ctx):
    return module.fused(x_TD, gate_TK, plan, ctx)


@functools.lru_cache
def outputs(name, form, dtype, inputs):
    """(y_TD, gradients of {params, x_TD, gate_TK}, params)."""
    inputs = dict(inputs)
    cfg, _ = EXPERTS[name]
    graphdef, params, state = split_module(cfg.make(D, E, nnx.Rngs(params=0)))
    x_TD = jnp.asarray(inputs["x_TD"], dtype)
    gate_TK = jnp.asarray(inputs["gate_TK"], jnp.float32)
    dy_TD = jnp.asarray(inputs["dy_TD"], jnp.float32)

    def loss(params, x_TD, gate_TK):
        module = nnx.merge(graphdef, params, state)
        y_TD = form(module, x_TD, gate_TK, inputs["plan"], context(1, T, dtype=dtype))
        assert y_TD.dtype == x_TD.dtype
        return jnp.sum(dy_TD * y_TD.astype(jnp.float32)), y_TD

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, y_TD), gradients = run(params, x_TD, gate_TK)
    named = dict(zip(("params", "x_TD", "gate_TK"), gradients, strict=True))
    return y_TD, named.pop("params") | named, params


class ByIdentity(dict):
    """A dict that a cache can hold."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture(scope="module")
def run(inputs):
    held = ByIdentity(inputs)
    return lambda name, form, dtype="float32": outputs(name, form, dtype, held)


@experts
@pytest.mark.parametrize("form", [by_definition, fused])
def test_values_and_gradients_are_those_of_the_loop(name, form, inputs, run):
    y_TD, gradients, params = run(name, form)
    one = EXPERTS[name][1]

    def true_y(arguments):
        y_TD = np.zeros((T, D))
        for t, j in np.argwhere(inputs["keep_TK"]):
            e = inputs["expert_TK"][t, j]
            weights = [np.asarray(arguments[k], np.float64)[e] for k in params]
            row_D = one(np.asarray(arguments["x_TD"])[t], *weights)
            y_TD[t] += np.asarray(arguments["gate_TK"])[t, j] * row_D
        return y_TD

    arguments = params | {k: inputs[k] for k in ("x_TD", "gate_TK")}
    assert_close(y_TD, true_y(arguments), "float32")

    def true_loss(arguments):
        return np.sum(inputs["dy_TD"] * true_y(arguments))

    rng = np.random.default_rng(1)
    for leaf, gradient in gradients.items():
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            slope = oracle.slope(
                lambda a: np.sum(inputs["dy_TD"] * true_y(a)),
                arguments,
                leaf,
                direction,
            )
            assert_close(np.sum(gradient * direction), slope, "difference", leaf)
    for leaf in params:
        assert jnp.all(gradients[leaf][E - 1] == 0), "an idle expert has no gradient"


@experts
@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_fused_is_the_definition(name, dtype, kind, run):
    y_TD, gradients, _ = run(name, by_definition, dtype)
    fused_y_TD, fused_gradients, _ = run(name, fused, dtype)
    assert_close(fused_y_TD, y_TD, kind)
    for leaf, gradient in gradients.items():
        assert fused_gradients[leaf].dtype == gradient.dtype
        assert_close(fused_gradients[leaf], gradient, kind, leaf)


@experts
def test_bfloat16_is_near_float32(name, run):
    for form in (by_definition, fused):
        assert_close(run(name, form, "bfloat16")[0], run(name, form)[0], "bfloat16")


@experts
def test_rows_past_the_groups_are_zero(name):
    cfg, _ = EXPERTS[name]
    module = cfg.make(D, E, nnx.Rngs(params=0))
    sizes_E = jnp.array([1, 0, 2, 0], jnp.int32)
    y_ND = module(jnp.full((5, D), 1.0).at[3:].set(jnp.nan), sizes_E, context(1, 5))
    assert jnp.all(y_ND[3:] == 0)
    assert jnp.all(jnp.isfinite(y_ND))
    np.testing.assert_array_equal(y_ND[1], y_ND[2])


@experts
def test_permuting_experts_changes_nothing(name, inputs, run):
    """Weights and assignment move together; sums over a token's slots stay in order."""
    cfg, _ = EXPERTS[name]
    graphdef, params, state = split_module(cfg.make(D, E, nnx.Rngs(params=0)))
    order_E = np.array([2, 0, 3, 1])
    renamed_TK = jnp.asarray(np.argsort(order_E)[inputs["expert_TK"]])
    moved = nnx.merge(graphdef, {k: v[order_E] for k, v in params.items()}, state)
    y_TD = fused(
        moved,
        jnp.asarray(inputs["x_TD"], jnp.float32),
        jnp.asarray(inputs["gate_TK"], jnp.float32),
        make_plan(renamed_TK, jnp.asarray(inputs["keep_TK"]), E),
        context(1, T),
    )
    assert_close(y_TD, run(name, fused)[0], "order")
