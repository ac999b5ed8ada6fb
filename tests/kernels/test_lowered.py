"""Products with weights in bfloat16, int8 and int4, in C, against float64.

Legend: M rows, G groups, K inner dim, N columns, S scales of a column.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import Lowered, device, lowered_matmul
from kernels_pallas.lowered import LEVELS, words
from kernels_pallas.native import library
from tests.kernels.test_native import in_a_process
from tests.marks import thorough_but_for

pytestmark = pytest.mark.skipif(
    device.platform() != "cpu" or library.find_compiler() is None,
    reason="no C compiler",
)
KINDS = ("bfloat16", "int8", "int4")
# (M, K, N, numbers of a block, sizes of groups)
CASES = {
    "one row": (1, 96, 64, 16, (1,)),
    "empty groups and a row of none": (5, 64, 70, 32, (0, 1, 0, 3, 0)),
    "few rows and many": (60, 512, 130, 32, (17, 3, 0, 16, 20)),
    "many blocks of rows": (700, 320, 77, 32, (690, 4)),
    "several slabs": (9, 2048, 333, 32, (7, 2)),
    "one column": (3, 32, 1, 16, (3,)),
    "a block of all rows": (2, 48, 33, 48, (1, 1)),
    "no rows": (4, 32, 20, 16, (0, 0)),
}
ODD = {  # not for int4, whose blocks are of whole words
    "odd blocks": (5, 171, 49, 57, (2, 1, 1)),
    "blocks of one": (4, 67, 49, 1, (2, 1, 1)),
}


def weight_of(kind, G, K, N, block, seed=0, scales="bfloat16"):
    rng = np.random.default_rng(seed)
    if kind == "bfloat16":
        return Lowered(jnp.asarray(rng.normal(size=(G, K, N)), jnp.bfloat16))
    if kind == "int8":
        values = jnp.asarray(rng.integers(-127, 128, (G, K, N)), jnp.int8)
    else:
        values = words(jnp.asarray(rng.integers(0, 16, (G, K, N))), 1)
    size = (G, K // block, N)
    return Lowered(values, jnp.asarray(rng.random(size) + 0.1, scales))


def rows_of(M, K, sizes, seed=1):
    x_MK = np.random.default_rng(seed).normal(size=(M, K))
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return jnp.asarray(x_MK, jnp.float32), jnp.asarray(bounds, jnp.int32)


def wanted(x_MK, weight, bounds):
    """The product, number by number as the format says, in float64."""
    values = np.asarray(weight.values)
    if values.dtype == np.int32:
        bits = [(values.astype(np.int64) >> 4 * i) & 15 for i in range(8)]
        G, _, N = values.shape
        values = np.array(LEVELS)[np.stack(bits, axis=2).reshape(G, -1, N)]
    w = values.astype(np.float64)
    if weight.scales is not None:
        scales = np.asarray(weight.scales.astype(jnp.float32), np.float64)
        w = w * np.repeat(scales, w.shape[1] // scales.shape[1], axis=1)
    y_MN = np.zeros((len(x_MK), w.shape[2]))
    for g, own in enumerate(w):
        rows = slice(int(bounds[g]), int(bounds[g + 1]))
        y_MN[rows] = np.asarray(x_MK, np.float64)[rows] @ own
    return y_MN


@pytest.mark.parametrize("scales", thorough_but_for(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("kind", thorough_but_for(KINDS, "int8", "int4"))
@pytest.mark.parametrize(
    "case",
    thorough_but_for(
        [*CASES, *ODD], "empty groups and a row of none", "several slabs", "odd blocks"
    ),
)
def test_the_product_is_that_of_float64(case, kind, scales):
    if kind == "int4" and case in ODD:
        pytest.skip("a block of int4 has whole words")
    M, K, N, block, sizes = (CASES | ODD)[case]
    weight = weight_of(kind, len(sizes), K, N, block, scales=scales)
    assert weight.shape == (len(sizes), K, N)
    x_MK, bounds = rows_of(M, K, sizes)
    y_MN = lowered_matmul(x_MK, weight, bounds)
    want = wanted(x_MK, weight, bounds)
    np.testing.assert_allclose(y_MN, want, rtol=0, atol=2e-6 * abs(want).max() + 1e-30)
    np.testing.assert_array_equal(y_MN[sum(sizes) :], 0)
    np.testing.assert_array_equal(y_MN, lowered_matmul(x_MK, weight, bounds))
    raised = np.asarray(weight.raised(), np.float64)
    dense = wanted(x_MK, Lowered(raised), bounds)
    np.testing.assert_allclose(dense, want, rtol=0, atol=1e-6 * abs(want).max() + 1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stay_in_their_row(kind):
    sizes = (2, 30)
    weight = weight_of(kind, 2, 64, 40, 32)
    x_MK, bounds = rows_of(32, 64, sizes)
    clean = lowered_matmul(x_MK, weight, bounds)
    y_MN = lowered_matmul(x_MK.at[1, 3].set(np.nan).at[9].set(np.inf), weight, bounds)
    bad = np.zeros(32, bool)
    bad[[1, 9]] = True
    assert not np.isfinite(y_MN[bad]).any()
    np.testing.assert_array_equal(y_MN[~bad], clean[~bad])


@pytest.mark.parametrize("scale", [1e-30, 3e38 / 127])
def test_extreme_scales(scale):
    weight = weight_of("int8", 1, 64, 24, 32)
    weight = Lowered(weight.values, jnp.full((1, 2, 24), scale, jnp.bfloat16))
    x_MK, bounds = rows_of(3, 64, (3,))
    x_MK *= 1e-4
    y_MN, want = lowered_matmul(x_MK, weight, bounds), wanted(x_MK, weight, bounds)
    np.testing.assert_allclose(y_MN, want, rtol=0, atol=2e-6 * abs(want).max())


@pytest.mark.parametrize("bounds", [(0, 9, 4), (-3, 2, 2), (5, 1, 99), (8, 8, 8)])
def test_bounds_that_are_wrong_touch_nothing_else(bounds):
    weight = weight_of("int8", 2, 32, 50, 16)
    x_MK, _ = rows_of(8, 32, (4, 4))
    y_MN = lowered_matmul(x_MK, weight, jnp.asarray(bounds, jnp.int32))
    assert np.isfinite(y_MN).all()


def test_rows_of_another_type_are_refused():
    weight = weight_of("int8", 1, 32, 24, 16)
    x_MK, bounds = rows_of(3, 32, (3,))
    with pytest.raises(ValueError, match="needs float32 rows and int32 bounds"):
        lowered_matmul(x_MK.astype(jnp.bfloat16), weight, bounds)


@pytest.mark.thorough
def test_many_at_once_under_vmap_and_in_a_scan():
    weight = weight_of("int4", 3, 256, 90, 32)
    x_BMK = jnp.stack([rows_of(6, 256, (1, 2, 3), seed)[0] for seed in range(4)])
    bounds = jnp.asarray([0, 1, 3, 6], jnp.int32)
    one = jnp.stack([lowered_matmul(x, weight, bounds) for x in x_BMK])
    mapped = jax.jit(jax.vmap(lambda x: lowered_matmul(x, weight, bounds)))(x_BMK)
    _, scanned = jax.lax.scan(
        lambda c, x: (c, lowered_matmul(x, weight, bounds)), 0, x_BMK
    )
    np.testing.assert_array_equal(mapped, one)
    np.testing.assert_array_equal(scanned, one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_rows(kind):
    weight = weight_of(kind, 2, 64, 40, 32)
    x_MK, bounds = rows_of(9, 64, (3, 5))
    dy_MN = jnp.asarray(np.random.default_rng(2).normal(size=(9, 40)), jnp.float32)
    _, pull = jax.vjp(lambda x: lowered_matmul(x, weight, bounds), x_MK)
    raised = np.asarray(weight.raised(), np.float64)
    turned = Lowered(np.swapaxes(raised, 1, 2))
    want = wanted(dy_MN, turned, bounds)
    np.testing.assert_allclose(pull(dy_MN)[0], want, rtol=0, atol=3e-6 * want.max())


def test_a_dense_matmul_over_several_dims():
    """w_out of attention: [G, R, A, D], in blocks along A."""
    rng = np.random.default_rng(3)
    weight = Lowered(
        jnp.asarray(rng.integers(-127, 128, (2, 3, 32, 20)), jnp.int8),
        jnp.asarray(rng.random((2, 3, 2, 20)), jnp.bfloat16),
    )
    x = jnp.asarray(rng.normal(size=(4, 2, 3, 32)), jnp.float32)
    y = lowered_matmul(x.reshape(4, -1), weight.matrices(0, 3), jnp.array([0, 4]))
    want = jnp.einsum("bgra,grad->bd", x, weight.raised())
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * float(abs(want).max()))


def test_shapes_that_do_not_fit_are_refused():
    weight = weight_of("int8", 2, 64, 40, 32)
    x_MK, bounds = rows_of(9, 32, (3, 5))
    with pytest.raises(ValueError, match=r"rows \[M, K\].*got \(9, 32\)"):
        lowered_matmul(x_MK, weight, bounds)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx -mno-avx2 -mno-avx512f"])
def test_narrower_vectors(tmp_path, flags):
    code = """
from tests.kernels.test_lowered import *
for kind in KINDS:
    for M, K, N, block, sizes in CASES.values():
        weight = weight_of(kind, len(sizes), K, N, block)
        x, bounds = rows_of(M, K, sizes)
        want = wanted(x, weight, bounds)
        got = lowered_matmul(x, weight, bounds)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * abs(want).max())
print("equal")
"""
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    own = {"XDG_CACHE_HOME": str(tmp_path), "CC": f"cc {flags}", "PYTHONPATH": path}
    done = in_a_process(code, **own)
    assert done.stdout == "equal\n", done
