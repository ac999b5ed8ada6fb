"""The TPU backend without a TPU: interpreted against float64 loops, and lowered.

Legend: M rows, K contraction, N columns, G groups; T tokens, D model width, F expert
hidden width, E experts.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import make_plan, tpu_rows
from kernels_pallas.grouped_glu import tpu as glu_tpu
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_glu.vjp import differentiable as differentiable_glu
from kernels_pallas.grouped_matmul import tpu as matmul_tpu
from kernels_pallas.grouped_matmul.shapes import REAL, LayerShape
from kernels_pallas.grouped_matmul.tpu import Tiling, product, weight_product
from kernels_pallas.grouped_matmul.vjp import differentiable
from kernels_pallas.implementations import Request
from tests.marks import slow, thorough_but_for

# float32: sums of at most 300 products of order one. bfloat16: one rounding of the
# result, 2**-8 relative; of grouped_glu also those between the matmuls.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "bfloat16 glu": 3e-2}

QUICK = {"xla_backend_optimization_level": 0}

# No tile of 16 by 8 by 8 divides any of them.
M, K, N, G = 83, 13, 21, 6
TILING = Tiling(16, 8, 8)

BOUNDS = {
    "ragged": (0, 14, 15, 42, 56, 70, 83),
    "empty at both ends and in the middle, a tail": (0, 0, 11, 12, 12, 66, 66),
    "a shard": (5, 21, 22, 22, 40, 83, 83),
    "a shard with a tail": (37, 37, 40, 60, 61, 61, 70),
    "all in one": (0, 0, 83, 83, 83, 83, 83),
    "none, at the start": (0,) * 7,
    "none, inside": (30,) * 7,
    "none, at the end": (83,) * 7,
    "one row each": (3, 4, 5, 6, 7, 8, 9),
    "on the edges of tiles": (16, 32, 32, 48, 64, 64, 80),
}


@pytest.fixture(autouse=True)
def strict_promotion():
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


def draw(bounds, dtype="float32"):
    """(lhs_MK, rhs_GKN, rhs_MN); rows of no group hold NaN."""
    rng = np.random.default_rng(sum(bounds))
    lhs, rhs, dout = (rng.normal(size=s) for s in ((M, K), (G, K, N), (M, N)))
    nobody = (np.arange(M) < bounds[0]) | (np.arange(M) >= bounds[-1])
    lhs[nobody], dout[nobody] = np.nan, np.nan
    return [jnp.asarray(a, dtype) for a in (lhs, rhs, dout)]


def oracle(lhs_MK, rhs_GKN, rhs_MN, bounds):
    """(product, weight product) group by group in float64."""
    lhs, rhs, dout = (np.asarray(a, np.float64) for a in (lhs_MK, rhs_GKN, rhs_MN))
    out, weight = np.zeros(dout.shape), np.zeros(rhs.shape)
    for g in range(G):
        for row in range(bounds[g], bounds[g + 1]):
            out[row] = lhs[row] @ rhs[g]
            weight[g] += np.outer(lhs[row], dout[row])
    return out, out, weight


def three(lhs_MK, rhs_GKN, rhs_MN, bounds, tiling=TILING, interpret=True):
    """(product, with transposed weights, weight product), interpreted."""
    options = {"tiling": tiling, "interpret": interpret}
    dtype = lhs_MK.dtype
    return (
        product(lhs_MK, rhs_GKN, bounds, False, dtype, **options),
        product(lhs_MK, rhs_GKN.swapaxes(1, 2), bounds, True, dtype, **options),
        weight_product(lhs_MK, rhs_MN, bounds, dtype, **options),
    )


compiled_three = jax.jit(three, static_argnums=(4, 5), compiler_options=QUICK)


def check(actual, expected, kind):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, np.nanmax(np.abs(b)))
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[kind] * scale, rtol=0
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", BOUNDS)
def test_products_equal_the_loop(case, dtype):
    bounds = BOUNDS[case]
    arrays = draw(bounds, dtype)
    actual = compiled_three(*arrays, jnp.asarray(bounds, jnp.int32))
    check(actual, oracle(*arrays, bounds), dtype)
    assert all(a.dtype == dtype for a in actual)


@pytest.mark.thorough
@pytest.mark.parametrize("tiling", [None, Tiling(32, 13, 8), Tiling(8, 16, 32)])
def test_products_with_other_tilings(tiling):
    for case in ("empty at both ends and in the middle, a tail", "a shard with a tail"):
        bounds = BOUNDS[case]
        arrays = draw(bounds)
        actual = compiled_three(*arrays, jnp.asarray(bounds, jnp.int32), tiling)
        check(actual, oracle(*arrays, bounds), "float32")


@pytest.mark.slow
def test_products_in_simulated_memory():
    # The other interpreter: separate memories, copies, NaN where nothing was written.
    bounds = BOUNDS["a shard with a tail"]
    arrays = draw(bounds)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    array = jnp.asarray(bounds, jnp.int32)
    actual = three(*arrays, array, Tiling(32, 8, 16), interpret)
    check(actual, oracle(*arrays, bounds), "float32")


def test_nan_of_one_group_stays_there():
    bounds = BOUNDS["ragged"]
    lhs, rhs, dout = draw(bounds)
    theirs = slice(bounds[2], bounds[3])
    lhs, dout = lhs.at[theirs].set(jnp.nan), dout.at[theirs].set(jnp.nan)
    expected = oracle(lhs, rhs, dout, bounds)
    assert np.isnan(expected[0]).any(1).sum() == bounds[3] - bounds[2]
    assert np.isnan(expected[2]).any((1, 2)).sum() == 1
    actual = compiled_three(lhs, rhs, dout, jnp.asarray(bounds, jnp.int32))
    check(actual, expected, "float32")


@pytest.mark.thorough
def test_sums_in_float32():
    # 1 + 256 * 2**-8 = 2 exactly; a bfloat16 sum that meets 1 first stays at 1.
    lhs_MK = jnp.full((1, 257), 2.0**-8, jnp.bfloat16).at[0, 0].set(1)
    rhs_GKN = jnp.ones((1, 257, 1), jnp.bfloat16)
    bounds = jnp.array([0, 1], jnp.int32)
    tiling = Tiling(1, 128, 1)
    out = product(
        lhs_MK, rhs_GKN, bounds, False, jnp.float32, tiling=tiling, interpret=True
    )
    assert out.dtype == jnp.float32 and out[0, 0] == 2
    out = weight_product(
        lhs_MK.T,
        jnp.ones((257, 1), jnp.bfloat16),
        jnp.array([0, 257], jnp.int32),
        jnp.float32,
        tiling=Tiling(128, 1, 1),
        interpret=True,
    )
    assert out.dtype == jnp.float32 and out[0, 0, 0] == 2


@pytest.mark.parametrize("options", [{}, {"rest": True}, {"empty": True}])
def test_visits_are_those_of_a_loop(options):
    rng = np.random.default_rng(0)
    make = jax.jit(partial(tpu_rows.make_visits, num_rows=M, tile_m=16, **options))
    drawn = [np.sort(rng.integers(0, M + 1, G + 1)) for _ in range(60)]
    for bounds in [*BOUNDS.values(), *drawn]:
        visits = make(jnp.asarray(bounds, jnp.int32))
        edges = [0, *bounds, M]
        expected = []
        for segment in range(G + 2):
            begin, end = edges[segment], edges[segment + 1]
            is_group = 0 < segment <= G
            if begin < end and (is_group or options.get("rest")):
                tiles = range(begin // 16, -(-end // 16))
                expected += [(segment, tile) for tile in tiles]
            elif is_group and options.get("empty"):
                expected.append((segment, min(begin // 16, -(-M // 16) - 1)))
        total = int(visits.total_1[0])
        actual = list(
            zip(visits.segment_V.tolist(), visits.tile_V.tolist(), strict=True)
        )
        assert actual[:total] == expected
        assert len(set(actual[max(total - 1, 0) :])) == 1  # padding repeats
        assert min(visits.source_V) >= 0 and max(visits.source_V) <= M // 16
        for (segment, tile), source in zip(expected, visits.source_V, strict=False):
            if bounds[0] <= edges[segment] < edges[segment + 1] <= bounds[-1]:
                assert source == tile


def everywhere(visits, v, tile_m, axis=0):
    return jnp.ones((tile_m, 1) if axis == 0 else (1, tile_m), bool)


MUTATIONS = {
    "rows_of": (everywhere, (0, 1, 2)),
    "inside": (lambda size, tile, index, shape, axis: jnp.ones(shape, bool), (0, 1)),
    "make_visits, no rest": (
        lambda *args, f=tpu_rows.make_visits, **options: f(
            *args, **{**options, "rest": False}
        ),
        (0, 1),
    ),
    "make_visits, no empty": (
        lambda *args, f=tpu_rows.make_visits, **options: f(
            *args, **{**options, "empty": False}
        ),
        (2,),
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_loop_notices_when_a_mask_is_missing(name, monkeypatch):
    replacement, wrong = MUTATIONS[name]
    monkeypatch.setattr(tpu_rows, name.split(",")[0], replacement)
    bounds = BOUNDS["empty at both ends and in the middle, a tail"]
    arrays = draw(bounds)
    mutated = jax.jit(lambda *a: three(*a), compiler_options=QUICK)
    actual = mutated(*arrays, jnp.asarray(bounds, jnp.int32))
    expected = oracle(*arrays, bounds)
    check_only(actual, expected, wrong, "float32")


def check_only(actual, expected, wrong, kind):
    """Those in `wrong` differ, and the others do not."""
    for i, pair in enumerate(zip(actual, expected, strict=True)):
        if i in wrong:
            with pytest.raises(AssertionError):
                check(pair[:1], pair[1:], kind)
        else:
            check(pair[:1], pair[1:], kind)


@pytest.mark.thorough
def test_gradient_of_products():
    bounds = BOUNDS["a shard with a tail"]
    lhs, rhs, dout = draw(bounds)
    options = {"tiling": TILING, "interpret": True}
    run = differentiable(
        partial(product, **options), partial(weight_product, **options)
    )

    @partial(jax.jit, compiler_options=QUICK)
    def value_and_gradients(lhs, rhs, dout, bounds):
        out, pull = jax.vjp(lambda a, b: run(a, b, bounds, False, lhs.dtype), lhs, rhs)
        return out, *pull(dout)

    out, drhs = (oracle(lhs, rhs, dout, bounds)[i] for i in (0, 2))
    dlhs = np.zeros((M, K))
    for g in range(G):
        rows = slice(bounds[g], bounds[g + 1])
        dlhs[rows] = np.asarray(dout, np.float64)[rows] @ np.asarray(rhs[g]).T
    actual = value_and_gradients(lhs, rhs, dout, jnp.asarray(bounds, jnp.int32))
    check(actual, (out, dlhs, drhs), "float32")


# grouped_glu


ACTIVATIONS = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu": lambda g, u: g * 0.5 * (1 + np.vectorize(math.erf)(g / 2**0.5)) * u,
    "clamped": lambda g, u: (
        np.minimum(g, 7)
        / (1 + np.exp(-1.702 * np.minimum(g, 7)))
        * (np.clip(u, -7, 7) + 1)
    ),
}

# (shape, activation, dtype, tilings by kernel). The first has default tiles and halves
# that are copied apart; the second several tiles of everything, and halves by offset;
# the third tiles that stick out of both halves.
GLU_CASES = {
    "prime": (LayerShape(37, 2, 5, 7, 5), "silu", "float32", {}),
    "aligned": (
        LayerShape(150, 2, 9, 256, 3),
        "clamped",
        "float32",
        {
            "up": Tiling(128, 4, 128),
            "down": Tiling(256, 128, 8),
            "down_vjp": Tiling(128, 4, 128),
            "dx": Tiling(128, 128, 8),
            "dw_in": Tiling(128, 8, 128),
            "dw_out": Tiling(256, 128, 8),
        },
    ),
    "ragged": (
        LayerShape(70, 2, 8, 200, 3),
        "gelu",
        "bfloat16",
        {
            "up": Tiling(128, 8, 128),
            "down": Tiling(128, 128, 8),
            "down_vjp": Tiling(256, 8, 128),
            "dx": Tiling(128, 128, 8),
            "dw_in": Tiling(256, 8, 128),
        },
    ),
}

ROUTINGS = {
    "most kept": {"keep": 0.8},
    "all kept": {"keep": 1.0},
    "none kept": {"keep": 0.0},
    "all to the same": {"keep": 1.0, "to_one": True},
}


def draw_layer(shape, dtype, keep=0.8, to_one=False):
    T, K, D, F, E = shape
    rng = np.random.default_rng(T)
    sizes = ((T, D), (E, D, 2, F), (E, F, D))
    x, w_in, w_out = (jnp.asarray(rng.normal(size=s), dtype) for s in sizes)
    gate_TK = jnp.asarray(rng.random((T, K)), jnp.float32)
    dy_TD = jnp.asarray(rng.normal(size=(T, D)), dtype)
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    if to_one:
        expert_TK = np.tile(np.arange(K, dtype=np.int32), (T, 1))
    return x, w_in, w_out, gate_TK, dy_TD, expert_TK, rng.random((T, K)) < keep


def layer_oracle(x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK, activation):
    """(y, dx, dw_in, dw_out, dgate) slot by slot in float64.

    Derivatives of the activation are central differences, good to 1e-9.
    """
    x, w_in, w_out, gate_TK, dy = (
        np.asarray(a, np.float64) for a in (x, w_in, w_out, gate_TK, dy)
    )
    act, step = ACTIVATIONS[activation], 1e-6
    grads = [np.zeros_like(a) for a in (x, x, w_in, w_out, gate_TK)]
    y, dx, dw_in, dw_out, dgate_TK = grads
    for t, j in np.argwhere(keep_TK):
        e = expert_TK[t, j]
        g_F, u_F = x[t] @ w_in[e, :, 0], x[t] @ w_in[e, :, 1]
        h_F, dh_F = act(g_F, u_F), w_out[e] @ dy[t]
        y[t] += gate_TK[t, j] * (h_F @ w_out[e])
        dgate_TK[t, j] = dh_F @ h_F
        slope_F = gate_TK[t, j] * dh_F / (2 * step)
        dg_F = slope_F * (act(g_F + step, u_F) - act(g_F - step, u_F))
        du_F = slope_F * (act(g_F, u_F + step) - act(g_F, u_F - step))
        dx[t] += w_in[e, :, 0] @ dg_F + w_in[e, :, 1] @ du_F
        dw_in[e] += np.stack([np.outer(x[t], dg_F), np.outer(x[t], du_F)], axis=1)
        dw_out[e] += np.outer(gate_TK[t, j] * h_F, dy[t])
    return grads


def layer(tilings, activation):
    """A jitted function of `draw_layer`'s arrays: value and gradients, interpreted."""
    kernels = Kernels(
        *(
            partial(kernel, tiling=tilings.get(name), interpret=True)
            for name, kernel in glu_tpu.KERNELS._asdict().items()
        )
    )
    run = differentiable_glu(*compose(kernels))

    def value_and_gradients(x, w_in, w_out, gate, dy, expert_TK, keep_TK):
        plan = make_plan(expert_TK, keep_TK, w_in.shape[0])
        y, pull = jax.vjp(
            lambda *a: run(*a, plan, activation, None), x, w_in, w_out, gate
        )
        return y, *pull(dy)

    return jax.jit(value_and_gradients, compiler_options=QUICK)


@pytest.mark.parametrize("name", thorough_but_for(GLU_CASES, "prime"))
def test_layer_equals_the_loop(name):
    shape, activation, dtype, tilings = GLU_CASES[name]
    run = layer(tilings, activation)
    kind = "bfloat16 glu" if dtype == "bfloat16" else dtype
    for routing in ROUTINGS.values():
        arrays = draw_layer(shape, dtype, **routing)
        check(run(*arrays), layer_oracle(*arrays, activation), kind)

    # What is not kept is not seen; a kept slot with a gate of 0 has its gradient.
    x, w_in, w_out, gate, dy, expert_TK, keep_TK = draw_layer(shape, dtype)
    keep_TK[3], keep_TK[5, 0] = False, False
    gate = gate.at[7:].set(0)
    expected = layer_oracle(x, w_in, w_out, gate, dy, expert_TK, keep_TK, activation)
    expert_TK[3] = 99
    x, dy = x.at[3].set(jnp.nan), dy.at[3].set(jnp.nan)
    gate = gate.at[3].set(jnp.nan).at[5, 0].set(jnp.nan)
    actual = run(x, w_in, w_out, gate, dy, expert_TK, keep_TK)
    check(actual, expected, kind)
    assert np.all(np.asarray(actual[4])[keep_TK] != 0)

    # A NaN stays with its token and with the experts it meets.
    x, w_in, w_out, gate, dy, expert_TK, keep_TK = draw_layer(shape, dtype, keep=1.0)
    expert_TK[:] = expert_TK % 2
    expert_TK[0] = 2
    expected = layer_oracle(x, w_in, w_out, gate, dy, expert_TK, keep_TK, activation)
    actual = run(x.at[0].set(jnp.nan), w_in, w_out, gate, dy, expert_TK, keep_TK)
    healthy = [
        (np.delete(a, i, 0), np.delete(b, i, 0))
        for a, b, i in zip(actual, expected, (0, 0, 2, 2, 0), strict=True)
    ]
    check(*zip(*healthy, strict=True), kind)
    assert np.isnan(np.asarray(actual[2], np.float64)[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "wrong"), [("rows_of", (0, 1, 2, 3, 4)), ("inside", (0, 1, 4))]
)
def test_the_layer_notices_when_a_mask_is_missing(mask, wrong, monkeypatch):
    # Without "inside", F sticks out of tiles: in y, in dx, and in the sums of rows.
    monkeypatch.setattr(tpu_rows, mask, MUTATIONS[mask][0])
    shape, activation, dtype, tilings = GLU_CASES["ragged"]
    arrays = draw_layer(shape, dtype)
    actual = layer(tilings, activation)(*arrays)
    check_only(actual, layer_oracle(*arrays, activation), wrong, "bfloat16 glu")


# Lowering, tilings, refusals

LOWERED = REAL | {
    "unaligned": LayerShape(300, 2, 333, 1100, 6),
    "odd": LayerShape(7, 2, 5, 3, 4),
    "one row": LayerShape(1, 1, 5, 3, 4),
}


def lowered(function, *shapes):
    """The text for a TPU; block rules are checked here and not by interpreters."""
    lowering = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowering.as_text()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "name", ["H1", slow("H4"), slow("H6"), slow("H9"), "unaligned", "odd"]
)
def test_layers_lower_for_tpu(name, dtype):
    T, K, D, F, E = LOWERED[name]
    S = jax.ShapeDtypeStruct
    run = differentiable_glu(glu_tpu.forward, glu_tpu.backward)

    def step(x, w_in, w_out, gate, expert_TK):
        plan = make_plan(expert_TK, expert_TK >= 0, E)
        y, pull = jax.vjp(lambda *a: run(*a, plan, "gelu", None), x, w_in, w_out, gate)
        return y, pull(y)

    text = lowered(
        step,
        S((T, D), dtype),
        S((E, D, 2, F), dtype),
        S((E, F, D), dtype),
        S((T, K), jnp.float32),
        S((T, K), jnp.int32),
    )
    assert text.count("tpu_custom_call") == 6


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["H4", "H9", "unaligned", "one row"])
def test_products_lower_for_tpu(name, dtype):
    T, k, K, N, G = LOWERED[name]
    run = differentiable(product, weight_product)
    S = jax.ShapeDtypeStruct

    def step(lhs, rhs, bounds):
        out, pull = jax.vjp(lambda a, b: run(a, b, bounds, False, dtype), lhs, rhs)
        return out, pull(out)

    text = lowered(
        step, S((T * k, K), dtype), S((G, K, N), dtype), S((G + 1,), jnp.int32)
    )
    assert text.count("tpu_custom_call") == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "operation", ["product", "product_t", "weight", "up", "down_vjp"]
)
def test_tilings_fit(operation, dtype):
    for shape in REAL.values():
        T, k, D, F, E = shape
        for K, N in ((D, F), (F, D)):
            arguments = (operation, T * k, K, N, E, jnp.dtype(dtype))
            found = matmul_tpu.candidates(*arguments)
            assert found[0] == matmul_tpu.default_tiling(*arguments)
            assert len(found) == len(set(found))
            for tiling in found:
                assert matmul_tpu._vmem_bytes(operation, tiling, dtype) <= (
                    tpu_rows.BUDGET_BYTES
                )
                for tile, size in zip(tiling, (T * k, K, N), strict=True):
                    assert tile % 128 == 0 or tile == size
                if operation == "up":
                    assert N % tiling.n == 0


def test_refuses_what_it_cannot_do():
    request = Request("grouped_matmul", "bfloat16", 8, 8, 2, weights="bfloat16")
    assert matmul_tpu.unsupported(request) is None
    assert matmul_tpu.unsupported(request._replace(weights=None)) is None
    assert "int8" in matmul_tpu.unsupported(request._replace(weights="int8"))
    assert "float16" in matmul_tpu.unsupported(request._replace(dtype="float16"))
