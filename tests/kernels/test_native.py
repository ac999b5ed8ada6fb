"""The C code of the CPU: sizes past one block and one piece, and how it is compiled.

What it shares with the other implementations is in test_grouped_{matmul,glu}.py.

Legend: T tokens, K slots per token, D model width, F expert hidden width, E experts.
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device, grouped_glu, grouped_matmul, make_plan
from kernels_pallas.native import library
from tests.marks import slow, thorough_but_for

pytestmark = pytest.mark.skipif(
    device.platform() != "cpu" or library.find_compiler() is None,
    reason="no C compiler",
)

# More than a block of 320 rows in a piece; sums over 128 at a time, columns by 64.
T, K, D, F, E = 1500, 2, 171, 49, 5


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # larger pieces


ROUTINGS = {
    "random": lambda rng: np.stack([rng.permutation(E)[:K] for _ in range(T)]),
    "two experts": lambda rng: np.tile([1, 3], (T, 1)),
    "one has all first slots": lambda rng: np.stack(
        [np.full(T, 2), rng.choice([0, 4], T)], axis=1
    ),
}


def gradients(function, arrays, dy):
    @jax.jit
    def run(arrays, dy):
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(dy)

    return run(arrays, dy)


@pytest.mark.parametrize("routing", thorough_but_for(ROUTINGS, "random"))
@pytest.mark.parametrize("activation", ["silu", "gelu", "clamped"])
def test_whole_experts_of_many_blocks(routing, activation):
    rng = np.random.default_rng(0)
    sizes = ((T, D), (E, D, 2, F), (E, F, D), (T, D))
    x, w_in, w_out, dy = (jnp.asarray(rng.normal(size=s) / 8, "float32") for s in sizes)
    gate = jnp.asarray(rng.random((T, K)), jnp.float32)
    expert_TK = ROUTINGS[routing](rng).astype(np.int32)
    plan = make_plan(jnp.asarray(expert_TK), rng.random((T, K)) < 0.9, E)

    def outputs(implementation):
        def run(*arrays):
            options = {"activation": activation, "implementation": implementation}
            return grouped_glu(*arrays, plan, **options)

        return gradients(run, (x, w_in, w_out, gate), dy)

    first = outputs("native")
    for a, b, again in zip(first, outputs("reference"), outputs("native"), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=3e-6 * scale, rtol=0)
        np.testing.assert_array_equal(a, again)  # whichever thread had which piece


@pytest.mark.parametrize(
    "sizes", [(2700, 0, 3, 90), (1, 319, 1320, 641), (0, 0, 0, 2900), (2800,)]
)
@pytest.mark.parametrize("transposed", thorough_but_for([False, True], False))
def test_grouped_matmul_of_many_blocks(sizes, transposed):
    rng = np.random.default_rng(1)
    M, K, N = 3000, 230, 167
    lhs, dout = (jnp.asarray(rng.normal(size=s), "float32") for s in ((M, K), (M, N)))
    shape = (len(sizes), N, K) if transposed else (len(sizes), K, N)
    rhs = jnp.asarray(rng.normal(size=shape), "float32")

    def outputs(implementation):
        def run(lhs, rhs):
            options = {"transpose_rhs": transposed, "implementation": implementation}
            return grouped_matmul(lhs, rhs, jnp.array(sizes), **options)

        return gradients(run, (lhs, rhs), dout)

    for a, b in zip(outputs("native"), outputs("reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize(
    "sizes", thorough_but_for([(9, 0), (-1, 3), (3, -1), (1_000_000, 2)], (9, 0))
)
def test_group_sizes_that_are_wrong_touch_nothing_else(sizes):
    # Nothing checks them inside of jit: numbers without a meaning, and no crash.
    lhs, rhs = jnp.ones((8, 5)), jnp.ones((2, 5, 7))

    def loss(lhs, rhs, sizes):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes, implementation="native"))

    for _ in range(20):
        value, pull = jax.jit(jax.value_and_grad(loss, (0, 1)))(
            lhs, rhs, jnp.array(sizes)
        )
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in pull)


def test_several_at_a_time_and_under_vmap():
    # Layers that need nothing of each other run at once, on the threads of one pool.
    rng = np.random.default_rng(2)
    lhs = jnp.asarray(rng.normal(size=(8, 600, 40)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=(4, 40, 33)), jnp.float32)
    sizes = jnp.array([100, 0, 450, 50])

    def run(lhs, implementation="native"):
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    expected = jax.lax.map(lambda a: run(a, "reference"), lhs)
    apart = jnp.stack(jax.jit(lambda lhs: [run(a) for a in lhs])(lhs))
    for actual in (apart, jax.jit(jax.vmap(run))(lhs)):
        np.testing.assert_allclose(actual, expected, atol=3e-5, rtol=0)


def in_a_process(code, **environment):
    run = [sys.executable, "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(run, env=environment, capture_output=True, text=True)


ASK = "from kernels_pallas.native import library; print(library.why_not())"


@pytest.mark.thorough
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86"
)
@pytest.mark.parametrize(
    "flags", [slow("-mno-avx512f"), "-mno-avx -mno-avx2 -mno-avx512f"]
)
def test_narrower_vectors(tmp_path, flags):
    code = """
import jax, jax.numpy as jnp, numpy as np
from kernels_pallas import grouped_glu, make_plan
rng = np.random.default_rng(0)
T, K, D, F, E = 90, 2, 45, 37, 3
sizes = ((T, D), (E, D, 2, F), (E, F, D))
arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in sizes]
arrays.append(jnp.asarray(rng.random((T, K)), jnp.float32))
expert = jnp.asarray([rng.permutation(E)[:K] for _ in range(T)])
plan = make_plan(expert, rng.random((T, K)) < 0.9, E)
def loss(arrays, name):
    return jnp.sum(grouped_glu(*arrays, plan, implementation=name) ** 2)
pull = jax.jit(jax.grad(loss), static_argnums=1)
for a, b in zip(pull(arrays, "native"), pull(arrays, "reference")):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)
print("equal")
"""
    done = in_a_process(code, XDG_CACHE_HOME=str(tmp_path), CC=f"cc {flags}")
    assert done.stdout == "equal\n", done


@pytest.mark.thorough
@pytest.mark.parametrize(
    "environment, said",
    [
        (
            {"CC": "no-such-compiler"},
            "no-such-compiler could not compile the C files",
        ),
        slow({"CC": "cc -DBLOCK=256"}, "could not compile the C files: .*error"),
        ({"CC": "", "PATH": ""}, "it needs a C compiler: .*pip install ziglang"),
    ],
)
def test_what_is_said_without_a_compiler(tmp_path, environment, said):
    if not environment["CC"] and importlib.util.find_spec("ziglang"):
        pytest.skip("the package ziglang is one")
    done = in_a_process(ASK, XDG_CACHE_HOME=str(tmp_path), **environment)
    assert re.search(said, done.stdout), done
