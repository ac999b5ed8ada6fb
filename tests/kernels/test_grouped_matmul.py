"""grouped_matmul: every implementation against a float64 loop, values and gradients.

Legend: M rows, K contraction, N columns, G groups.
"""

import re
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from kernels_pallas import grouped_matmul
from kernels_pallas.cpu_tiles import tile_sizes
from kernels_pallas.grouped_matmul.api import WEIGHT_DTYPES
from tests.backends import backends
from tests.marks import thorough_but_for

K, N = 5, 7

# (M, group sizes); the sum may be less than M.
CASES = {
    "one group": (19, (19,)),
    "prime, empty groups, tail": (37, (0, 11, 1, 0, 17)),
    "all rows in one group": (79, (0, 0, 79, 0, 0)),
    "full and remainder tiles": (79, (66, 3, 0, 1, 8)),
    "no rows in any group": (23, (0, 0, 0)),
    "fewer rows than groups": (3, (0, 1, 0, 0, 2, 0, 0, 0)),
}

# float32: sums of at most 79 products of order one. bfloat16: one rounding of the
# result, 2**-8 relative, and one of the cotangent.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

# Compiling is nearly all the time these tests take; half of it is LLVM optimising.
QUICK = {"xla_backend_optimization_level": 0}

implementations = pytest.mark.parametrize("implementation", backends())


@pytest.fixture(autouse=True)
def strict_promotion():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def oracle(lhs_MK, rhs_GKN, dout_MN, sizes):
    """(out_MN, dlhs_MK, drhs_GKN) row by row in float64."""
    lhs_MK, rhs_GKN, dout_MN = (
        np.asarray(a, np.float64) for a in (lhs_MK, rhs_GKN, dout_MN)
    )
    out_MN = np.zeros(dout_MN.shape)
    dlhs_MK, drhs_GKN = np.zeros(lhs_MK.shape), np.zeros(rhs_GKN.shape)
    row = 0
    for g, size in enumerate(sizes):
        for _ in range(size):
            out_MN[row] = lhs_MK[row] @ rhs_GKN[g]
            dlhs_MK[row] = rhs_GKN[g] @ dout_MN[row]
            drhs_GKN[g] += np.outer(lhs_MK[row], dout_MN[row])
            row += 1
    return out_MN, dlhs_MK, drhs_GKN


def draw(case, dtype="float32"):
    """(lhs_MK, rhs_GKN, dout_MN, group_sizes_G) with exact values of `dtype`."""
    num_rows, sizes = CASES[case]
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    shapes = ((num_rows, K), (len(sizes), K, N), (num_rows, N))
    arrays = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return *arrays, jnp.asarray(sizes, jnp.int32)


@partial(
    jax.jit,
    static_argnames=("transpose_rhs", "implementation"),
    compiler_options=QUICK,
)
def value_and_gradients(lhs_MK, rhs_GKN, dout_MN, sizes_G, **options):
    out_MN, pull = jax.vjp(
        lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes_G, **options), lhs_MK, rhs_GKN
    )
    return out_MN, *pull(dout_MN.astype(out_MN.dtype))


def check(actual, expected, dtype="float32"):
    for a, b in zip(actual, expected, strict=True):
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype] * scale, rtol=0
        )


@implementations
@pytest.mark.parametrize(
    "case", thorough_but_for(CASES, "prime, empty groups, tail", "no rows in any group")
)
def test_equals_the_loop(case, implementation):
    arguments = draw(case)
    actual = value_and_gradients(*arguments, implementation=implementation)
    check(actual, oracle(*arguments[:3], CASES[case][1]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "dtype, implementation", [(d, name) for d in TOLERANCE for name in backends(d)]
)
def test_transposed_weights(dtype, implementation):
    case = "prime, empty groups, tail"
    lhs_MK, rhs_GKN, dout_MN, sizes_G = draw(case, dtype)
    out, dlhs, drhs = value_and_gradients(
        lhs_MK,
        jnp.swapaxes(rhs_GKN, 1, 2),
        dout_MN,
        sizes_G,
        transpose_rhs=True,
        implementation=implementation,
    )
    assert (out.dtype, dlhs.dtype, drhs.dtype) == (jnp.dtype(dtype),) * 3
    expected = oracle(lhs_MK, rhs_GKN, dout_MN, CASES[case][1])
    check((out, dlhs, jnp.swapaxes(drhs, 1, 2)), expected, dtype)


@implementations
def test_tail_rows_are_zero_even_from_nan(implementation):
    case = "prime, empty groups, tail"
    lhs_MK, rhs_GKN, dout_MN, sizes_G = draw(case)
    kept = int(sizes_G.sum())
    actual = value_and_gradients(
        lhs_MK.at[kept:].set(jnp.nan),
        rhs_GKN,
        dout_MN.at[kept:].set(jnp.nan),
        sizes_G,
        implementation=implementation,
    )
    check(actual, oracle(lhs_MK, rhs_GKN, dout_MN, CASES[case][1]))
    out_MN, dlhs_MK, _ = actual
    assert not np.any(out_MN[kept:]) and not np.any(dlhs_MK[kept:])


@implementations
def test_nan_of_one_group_stays_there(implementation):
    case = "full and remainder tiles"
    lhs_MK, rhs_GKN, dout_MN, sizes_G = draw(case)
    expected = oracle(lhs_MK, rhs_GKN, dout_MN, CASES[case][1])
    poisoned = slice(66, 69)  # the rows of group 1
    actual = value_and_gradients(
        lhs_MK.at[poisoned].set(jnp.nan),
        rhs_GKN,
        dout_MN.at[poisoned].set(jnp.nan),
        sizes_G,
        implementation=implementation,
    )
    healthy = [
        (np.delete(a, poisoned, 0), np.delete(b, poisoned, 0))
        for a, b in zip(actual[:2], expected[:2], strict=True)
    ]
    healthy.append((np.delete(actual[2], 1, 0), np.delete(expected[2], 1, 0)))
    check(*zip(*healthy, strict=True))
    assert np.isnan(actual[2][1]).all()


@implementations
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_group_offset_computes_a_shard(offset, implementation):
    case = "prime, empty groups, tail"
    lhs_MK, rhs_GKN, dout_MN, sizes_G = draw(case)
    mine = slice(offset, offset + 2)
    before, end = int(sizes_G[:offset].sum()), int(sizes_G[: offset + 2].sum())
    other = np.r_[0:before, end : lhs_MK.shape[0]]
    expected = oracle(lhs_MK, rhs_GKN, dout_MN, CASES[case][1])
    out_MN, dlhs_MK, drhs_GKN = value_and_gradients(
        lhs_MK.at[other].set(jnp.nan),
        rhs_GKN[mine],
        dout_MN.at[other].set(jnp.nan),
        sizes_G,
        group_offset=jnp.int32(offset),
        implementation=implementation,
    )
    for actual, whole in ((out_MN, expected[0]), (dlhs_MK, expected[1])):
        check([actual[before:end]], [whole[before:end]])
        assert not np.any(np.asarray(actual)[other])
    check([drhs_GKN], [expected[2][mine]])


@pytest.mark.parametrize("transpose_rhs", thorough_but_for([False, True], False))
@pytest.mark.parametrize(
    "dtype, implementation",
    [(d, name) for d in WEIGHT_DTYPES for name in backends(weights=d)],
)
def test_quantised_weights_are_constants_with_a_scale(
    dtype, transpose_rhs, implementation
):
    case = "prime, empty groups, tail"
    lhs_MK, rhs_GKN, dout_MN, sizes_G = draw(case)
    rhs_GKN = (4 * rhs_GKN).astype(dtype)
    scale_GN = 0.1 + jnp.arange(5 * N, dtype=jnp.float32).reshape(5, N)
    weights = np.asarray(rhs_GKN.astype(jnp.float32)) * np.asarray(scale_GN)[:, None]
    out_MN, pull = jax.vjp(
        lambda lhs: grouped_matmul(
            lhs,
            jnp.swapaxes(rhs_GKN, 1, 2) if transpose_rhs else rhs_GKN,
            sizes_G,
            transpose_rhs=transpose_rhs,
            rhs_scale_GN=scale_GN,
            implementation=implementation,
        ),
        lhs_MK,
    )
    expected = oracle(lhs_MK, weights, dout_MN, CASES[case][1])
    check((out_MN, *pull(dout_MN)), expected[:2])


@pytest.mark.parametrize("implementation", backends("bfloat16"))
def test_sums_in_float32(implementation):
    # 1 + 256 * 2**-8 = 2 exactly; a bfloat16 sum that meets 1 first stays at 1.
    lhs_MK = jnp.full((1, 257), 2.0**-8, jnp.bfloat16).at[0, 0].set(1)
    rhs_GKN = jnp.ones((1, 257, 1), jnp.bfloat16)
    sizes_G = jnp.array([1], jnp.int32)
    out_MN = grouped_matmul(lhs_MK, rhs_GKN, sizes_G, implementation=implementation)
    assert out_MN.dtype == jnp.bfloat16 and out_MN[0, 0] == 2
    out_MN = grouped_matmul(
        lhs_MK * (1 + 2.0**-7),
        rhs_GKN,
        sizes_G,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
    assert out_MN.dtype == jnp.float32 and out_MN[0, 0] == 2 * (1 + 2.0**-7)


@pytest.mark.thorough
def test_gradient_through_scan_and_checkpoint():
    rng = np.random.default_rng(0)
    lhs_MK = jnp.asarray(rng.normal(size=(13, K)), jnp.float32)
    rhs_GKK = jnp.asarray(rng.normal(size=(3, K, K)), jnp.float32)
    sizes_G = jnp.array([4, 0, 7], jnp.int32)

    @partial(jax.jit, static_argnums=(1, 2), compiler_options=QUICK)
    @partial(jax.grad, argnums=0)
    def gradient(rhs_GKK, implementation, wrap):
        def step(carry_MK, _):
            out_MK = grouped_matmul(
                carry_MK, rhs_GKK, sizes_G, implementation=implementation
            )
            return jnp.tanh(out_MK), None

        return jax.lax.scan(wrap(step), lhs_MK, None, length=3)[0].sum()

    expected = gradient(rhs_GKK, "reference", lambda f: f)
    actual = gradient(rhs_GKK, "cpu", jax.checkpoint)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 100, 2048, 8192])
@pytest.mark.parametrize("num_groups", [1, 8, 512])
def test_tile_sizes_rise_in_steps(num_rows, num_groups):
    sizes = tile_sizes(num_rows, num_groups)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] >= 1 and len(sizes) <= 16
    assert all(size % sizes[0] == 0 for size in sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rhs": jnp.ones((3, 6, 7))}, r"lhs dim 1 with rhs dim 1.*5 from.*6 from"),
        ({"sizes": jnp.ones(4, jnp.int32)}, "4 from group_sizes.*3 from rhs"),
        ({"rhs": jnp.ones((3, 5, 7), jnp.bfloat16)}, "one dtype.*float32.*bfloat16"),
        ({"lhs": jnp.ones(5)}, "rank 2"),
        ({"sizes": jnp.ones(3)}, "int32 group_sizes"),
        ({"sizes": jnp.array([3, -1, 2])}, r">= 0; got \[ 3 -1  2\]"),
        ({"sizes": jnp.array([3, 4, 2])}, r"8 rows; got group_sizes \[3 4 2\] for 9"),
        ({"offset": 1}, r"group_offset in \[0, 0\], for 3 of 3 groups; got 1"),
        ({"scale": jnp.ones((3, 7))}, "rhs_scale needs lhs .* and rhs among"),
    ],
)
def test_errors_name_what_was_given(change, message):
    given = {
        "lhs": jnp.ones((8, 5)),
        "rhs": jnp.ones((3, 5, 7)),
        "sizes": jnp.ones(3, jnp.int32),
    } | change
    options = {
        "group_offset": given.pop("offset", None),
        "rhs_scale_GN": given.pop("scale", None),
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*given.values(), **options)


def test_errors_of_scales_and_shards():
    lhs_MK, rhs_GKN = jnp.ones((8, 5)), jnp.ones((3, 5, 7), jnp.int8)
    sizes_G = jnp.ones(3, jnp.int32)
    with pytest.raises(ValueError, match=r"\(3, 7\); got \(3, 5\)"):
        grouped_matmul(lhs_MK, rhs_GKN, sizes_G, rhs_scale_GN=jnp.ones((3, 5)))
    with pytest.raises(ValueError, match="give rhs_scale with weights among"):
        grouped_matmul(lhs_MK, rhs_GKN, sizes_G)
    with pytest.raises(ValueError, match="of the shard; got 2 from group_sizes"):
        grouped_matmul(lhs_MK, jnp.ones((3, 5, 7)), sizes_G[:2], group_offset=0)


@pytest.mark.parametrize(
    ("sizes", "offset", "message"),
    [
        ((3, -1, 2, 0), 0, "group_sizes >= 0; got .*-1"),
        ((3, 4, 2, 0), 0, "8 rows; got group_sizes .*3 4 2"),
        ((3, 1, 2, 0), 3, r"group_offset in \[0, 2\]; got 3"),
        ((3, 1, 2, 2), 2, None),
    ],
)
def test_checkify_finds_what_a_trace_cannot(sizes, offset, message):
    lhs_MK, rhs_GKN = jnp.ones((8, K)), jnp.ones((2, K, N))

    def loss(lhs_MK, sizes, offset):
        out = grouped_matmul(lhs_MK, rhs_GKN, sizes, group_offset=offset)
        return out.sum()

    run = jax.jit(jax.grad(loss))
    arguments = (lhs_MK, jnp.array(sizes, jnp.int32), jnp.int32(offset))
    run(*arguments)  # nothing is checked, and nothing is paid
    error, _ = jax.jit(checkify.checkify(run, checkify.user_checks))(*arguments)
    assert (error.get() is None) == (message is None)
    assert message is None or re.search(message, error.get())
