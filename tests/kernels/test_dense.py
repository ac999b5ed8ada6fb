"""Dense projections: the same numbers whichever way they are computed.

B batch · L length · D model width · H heads · A head width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import matmul
from kernels_pallas.dense import computes_in_c
from kernels_pallas.device import platform
from kernels_pallas.native import library

needs_c = pytest.mark.skipif(
    platform() != "cpu" or library.find_compiler() is None, reason="no C compiler"
)
FLOAT32 = jnp.dtype("float32")


def normal(*shape):
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def value_and_pull(f, *arrays):
    def run(*arrays):
        y, pull = jax.vjp(f, *arrays)
        return y, *pull(jnp.cos(y))

    return jax.jit(run)(*arrays)


def check(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), rtol=0)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(
    "contract, inner, outer",
    [(1, (20,), (2, 3, 5)), (2, (4, 5), (7,)), (1, (4,), (8, 9))],
)
def test_it_is_a_product_over_the_inner_axes(implementation, contract, inner, outer):
    x, w = normal(2, 150, *inner), normal(*inner, *outer)
    actual = value_and_pull(
        lambda x, w: matmul(x, w, contract=contract, implementation=implementation),
        x,
        w,
    )
    check(actual, value_and_pull(lambda x, w: jnp.tensordot(x, w, contract), x, w))


@needs_c
def test_it_is_c_on_one_cpu_in_float32_alone():
    assert computes_in_c(FLOAT32, None) and computes_in_c(FLOAT32, "native,cpu")
    assert not computes_in_c(FLOAT32, "cpu") and not computes_in_c(
        jnp.dtype("bfloat16"), None
    )
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert not computes_in_c(FLOAT32, None)


@needs_c
def test_a_scan_over_layers_keeps_no_copy_of_weights():
    x, w = normal(1, 40, 24), normal(5, 24, 24)

    def run(x, w):
        return jax.lax.scan(lambda x, w: (matmul(x, w), None), x, w)[0]

    pull = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], x, w)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    assert kept < 2 * w.size + 5 * x.size
