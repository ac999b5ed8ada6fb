"""Muon of moex beside `optax.contrib.muon`, and beside float64 matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from kernels_pallas.device import platform
from kernels_pallas.native import library
from kernels_pallas.orthogonalise import orthogonalised_momentum
from moex.model import muon
from moex.model.optim import Muon

NATIVE = pytest.mark.skipif(
    platform() != "cpu" or library.why_not() is not None, reason="no C compiler"
)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DIMS = {
    "in": MuonDimensionNumbers(reduction_axis=(-3,), output_axis=(-1,)),
    "out": MuonDimensionNumbers(reduction_axis=(-2,), output_axis=(-1,)),
    "heads": MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,)),
    "turned": MuonDimensionNumbers(reduction_axis=(-1,), output_axis=(-2,)),
    "embed": None,
}
SHAPES = {
    "in": (2, 3, 16, 2, 24),
    "out": (2, 3, 24, 16),
    "heads": (4, 3, 8, 20),
    "turned": (3, 10, 18),
    "embed": (30, 16),
}


def dims_of(params):
    """`DIMS` in the shape of a tree, which may be masked."""
    return {
        name: leaf if isinstance(leaf, optax.MaskedNode) else DIMS[name]
        for name, leaf in params.items()
    }


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    pairs = zip(SHAPES.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape) for (name, shape), key in pairs}


def pair(kernels):
    """(moex's Muon, optax's) of the same settings."""
    cfg = Muon(momentum=0.9, ns_steps=3)
    rates = lambda step: 0.1 / (1 + step), lambda step: 0.01 / (1 + step)  # noqa: E731
    ours = muon.muon(*rates, cfg, 0.1, dims_of, kernels)
    theirs = optax.contrib.muon(
        rates[0],
        beta=0.9,
        ns_steps=3,
        weight_decay=0.1,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_learning_rate=rates[1],
        muon_weight_dimension_numbers=dims_of,
    )
    return ours, theirs


@pytest.mark.parametrize(
    "kernels",
    [pytest.param("native", marks=[NATIVE, pytest.mark.thorough]), "cpu"],
)
def test_muon_equals_optax_over_steps_in_updates_and_state(kernels):
    ours, theirs = pair(kernels)
    params = tree(0)
    states = ours.init(params), theirs.init(params)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for step in range(3):
        grads = tree(step + 1)
        mine, first = jax.jit(ours.update)(grads, states[0], params)
        its, second = jax.jit(theirs.update)(grads, states[1], params)
        states = first, second
        for got, wanted in zip(
            jax.tree.leaves((mine, first)), jax.tree.leaves((its, second)), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.thorough
@NATIVE
def test_a_matrix_too_large_for_one_thread_is_left_to_optax(monkeypatch):
    monkeypatch.setattr(muon, "LARGEST", 100)
    monkeypatch.setattr(muon, "orthogonalised_momentum", None)  # it is not called
    ours, theirs = pair("native")
    params, grads = tree(0), tree(1)
    mine, _ = ours.update(grads, ours.init(params), params)
    its, _ = theirs.update(grads, theirs.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, mine, its)


def orthogonalise(x_SRIC, steps=5):
    """Orthogonalise matrices without momentum."""
    alone = (0, 1, 0, 1)
    args = jnp.zeros_like(x_SRIC), alone, COEFFICIENTS, steps, 1e-8
    return orthogonalised_momentum(x_SRIC, *args)[0]


def in_float64(x_RC, steps, eps=1e-8):
    """The iteration as it is written, in double precision."""
    a, b, c = COEFFICIENTS
    x = np.asarray(x_RC, np.float64)
    x = x / (np.linalg.norm(x) + eps)
    for _ in range(steps):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x


@pytest.mark.thorough
@NATIVE
@settings(max_examples=25, deadline=None)
@given(
    S=st.integers(1, 3),
    R=st.integers(1, 150),
    inner=st.integers(1, 2),
    C=st.integers(1, 150),
    steps=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_every_matrix_is_orthogonalised_as_in_float64(S, R, inner, C, steps, seed):
    x = np.random.default_rng(seed).normal(size=(S, R, inner, C)).astype(np.float32)
    got = np.asarray(orthogonalise(jnp.asarray(x), steps))
    for s in range(S):
        for i in range(inner):
            wanted = in_float64(x[s, :, i], steps)
            np.testing.assert_allclose(got[s, :, i], wanted, atol=2e-4)


@NATIVE
@pytest.mark.parametrize("shape", [(2, 9, 3, 40), (1, 40, 1, 9)])
def test_the_momentum_moves_and_the_step_follows_it(shape):
    g, old = jax.random.normal(jax.random.key(0), (2, *shape))
    w = (0.9, 0.1, 0.7, 0.3)
    x, new = orthogonalised_momentum(g, old, w, COEFFICIENTS, 4, 1e-8)
    np.testing.assert_allclose(new, 0.9 * old + 0.1 * g, rtol=1e-6, atol=1e-6)
    wanted = orthogonalise(0.7 * new + 0.3 * g, 4)
    np.testing.assert_allclose(x, wanted, atol=2e-5)


@NATIVE
def test_zeros_stay_zeros_and_nan_is_not_hidden():
    zeros = jnp.zeros((1, 8, 1, 8))
    np.testing.assert_array_equal(orthogonalise(zeros), zeros)
    broken = zeros.at[0, 3, 0, 3].set(jnp.nan)
    assert jnp.isnan(orthogonalise(broken)).any()


@NATIVE
def test_singular_values_come_near_one():
    x = jax.random.normal(jax.random.key(3), (1, 128, 1, 128))
    y = orthogonalise(x)[0, :, 0]
    values = np.linalg.svd(np.asarray(y), compute_uv=False)
    assert np.quantile(values, 0.05) > 0.5 and values.max() < 1.3


def test_a_training_step_of_the_shipped_config_uses_muon_in_c_where_it_can(monkeypatch):
    """`kernels = "auto"` of a run config reaches the optimizer as "choose"."""
    from moex.configs import quickstart
    from moex.model.spec import model_spec
    from moex.runs.program import mesh_here
    from moex.train.job import Training

    cfg = quickstart.get_config()
    cfg.model.vocab = 300
    asked = []
    monkeypatch.setattr(muon, "computes_in_c", lambda _, kernels: asked.append(kernels))
    spec = model_spec(cfg.model)
    training = Training(cfg=cfg, mesh=mesh_here(cfg), spec=spec)
    jax.eval_shape(
        lambda g: training.tx.update(g, training.tx.init(g), g), training.spec.params
    )
    assert asked == [None]
