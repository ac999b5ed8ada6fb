"""The table of what is supported: in the documentation, and true."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import IMPLEMENTATIONS, grouped_glu, make_plan
from kernels_pallas.implementations import INTERPRETED, PALLAS
from kernels_pallas.native import library
from kernels_pallas.support import table

PAGE = pathlib.Path(__file__).parents[2] / "docs/kernels.md"


@pytest.mark.skipif(library.find_compiler() is None, reason="no row of `native`")
def test_the_documentation_has_the_table_of_this_code():
    text = PAGE.read_text()
    there = text.split("<!-- support -->")[1].split("<!-- /support -->")[0].strip()
    assert there == table(), "python -m kernels_pallas.support prints the new one"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [name for name in IMPLEMENTATIONS if name.endswith(INTERPRETED)]
)
def test_interpreted_kernels_run_by_name(name):
    if not PALLAS[name.removesuffix(INTERPRETED)].interpretable:
        pytest.skip("the interpreter of this JAX lacks parts; see test_mosaic.py")
    T, K, D, F, E = 24, 2, 64, 64, 3
    rng = np.random.default_rng(0)
    x, w_in, w_out = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((T, D), (E, D, 2, F), (E, F, D))
    )
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    plan = make_plan(expert_TK, rng.random((T, K)) < 0.8, E)
    gate_TK = jnp.asarray(rng.random((T, K)), jnp.float32)

    def gradients(implementation):
        def loss(x, w_in, w_out, gate_TK):
            y_TD = grouped_glu(
                x, w_in, w_out, gate_TK, plan, implementation=implementation
            )
            return jnp.sum(y_TD.astype(jnp.float32) ** 2) / 1e3

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(x, w_in, w_out, gate_TK)

    expected = jax.tree.leaves(gradients("reference"))
    for a, b in zip(jax.tree.leaves(gradients(name)), expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=3e-2 * np.abs(b).max(), rtol=0)
