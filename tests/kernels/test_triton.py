"""The Triton backend on the CPU: its kernels interpreted, against float64.

What no test here can say is whether they compile (see test_triton_aot.py), or whether
what is compiled is right.

Legend: M rows, K contraction, N columns, G groups; T tokens, K slots per token, D model
width, F expert hidden width, E experts.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import make_plan, triton_tiles
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_glu import triton as glu
from kernels_pallas.grouped_glu import vjp as glu_vjp
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul import triton as matmul
from kernels_pallas.grouped_matmul import vjp as matmul_vjp
from kernels_pallas.grouped_matmul.shapes import REAL, LayerShape
from kernels_pallas.implementations import Request
from kernels_pallas.triton_tiles import Tiling
from tests.marks import thorough_but_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

# No multiple of a tile, nor of anything; several tiles each way.
M, K, N, G = 79, 21, 37, 5
SMALL = Tiling(rows=16, columns=16, depth=16, band=3)

# Bounds of the five groups. Rows before the first and from the last on are of no group.
BOUNDS = {
    "ragged, a tail of one row": (0, 66, 69, 69, 70, 78),
    "empty groups first, last and between": (0, 0, 30, 30, 79, 79),
    "one group has all rows": (0, 0, 0, 79, 79, 79),
    "no rows in any group": (0, 0, 0, 0, 0, 0),
    "shard: begins and ends between": (9, 20, 20, 37, 60, 66),
    "groups of one row": (40, 41, 42, 43, 44, 45),
    "empty, in the middle": (33, 33, 33, 33, 33, 33),
}

# float32: sums of at most 79 products of order one; the gelu of the kernels is within
# 1e-7 of the exact one. bfloat16: one rounding of each result, 2**-8 relative, in
# grouped_glu one more between the matmuls.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}

QUICK = {"xla_backend_optimization_level": 0}  # as in test_grouped_matmul


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def check(actual, expected, dtype="float32"):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype] * scale, rtol=0
        )


# grouped_matmul


def draw(bounds, dtype="float32"):
    """(lhs_MK, rhs_GKN, other_MN) with NaN in the rows of no group."""
    rng = np.random.default_rng(bounds)
    shapes = ((M, K), (G, K, N), (M, N))
    lhs, rhs, other = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    row_M1 = np.arange(M)[:, None]
    real_M1 = (row_M1 >= bounds[0]) & (row_M1 < bounds[-1])
    return jnp.where(real_M1, lhs, jnp.nan), rhs, jnp.where(real_M1, other, jnp.nan)


def oracle(lhs_MK, rhs_GKN, other_MN, bounds):
    """(product, weight product), group by group in float64."""
    lhs, rhs, other = (np.asarray(a, np.float64) for a in (lhs_MK, rhs_GKN, other_MN))
    out_MN, weight_GKN = np.zeros((M, N)), np.zeros((G, K, N))
    for g in range(G):
        mine = slice(bounds[g], bounds[g + 1])
        out_MN[mine] = lhs[mine] @ rhs[g]
        weight_GKN[g] = lhs[mine].T @ other[mine]
    return out_MN, weight_GKN


def kernels(lhs_MK, rhs_GKN, other_MN, bounds, tiling=SMALL):
    """product, with transposed weights, and weight_product, whole and in pieces."""
    run = {"tiling": tiling, "interpret": True}
    turned_GNK = jnp.swapaxes(rhs_GKN, 1, 2)
    dtype, pair = lhs_MK.dtype, (lhs_MK, other_MN)
    in_pieces = run | {"tiling": replace(tiling, cut=20)}
    return (
        matmul.product(lhs_MK, rhs_GKN, bounds, False, dtype, **run),
        matmul.product(lhs_MK, turned_GNK, bounds, True, dtype, **run),
        matmul.weight_product(*pair, bounds, dtype, **run),
        matmul.weight_product(*pair, bounds, dtype, **in_pieces),
    )


quick_kernels = jax.jit(kernels, compiler_options=QUICK)


def compare(bounds, dtype="float32", function=quick_kernels):
    arrays = draw(bounds, dtype)
    actual = function(*arrays, jnp.asarray(bounds, jnp.int32))
    out_MN, weight_GKN = oracle(*arrays, bounds)
    check(actual, (out_MN, out_MN, weight_GKN, weight_GKN), dtype)
    return actual


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_kernels_equal_the_loop(bounds):
    out_MN, turned_MN, *_ = compare(bounds)
    for result in (out_MN, turned_MN):
        assert not np.any(result[: bounds[0]]) and not np.any(result[bounds[-1] :])


@pytest.mark.thorough
@pytest.mark.parametrize("case", list(BOUNDS)[:5:2])
def test_kernels_in_bfloat16(case):
    actual = compare(BOUNDS[case], "bfloat16")
    assert {a.dtype.name for a in actual} == {"bfloat16"}


def test_nan_of_one_group_stays_there():
    bounds = BOUNDS["ragged, a tail of one row"]
    lhs_MK, rhs_GKN, other_MN = draw(bounds)
    out_MN, weight_GKN = oracle(lhs_MK, rhs_GKN, other_MN, bounds)
    poisoned = slice(66, 69)  # the rows of group 1
    actual = quick_kernels(
        lhs_MK.at[poisoned].set(jnp.nan),
        rhs_GKN,
        other_MN.at[poisoned].set(jnp.nan),
        jnp.asarray(bounds, jnp.int32),
    )
    expected = (out_MN, out_MN, weight_GKN, weight_GKN)
    axes = (poisoned, poisoned, 1, 1)
    check(
        [np.delete(a, x, 0) for a, x in zip(actual, axes, strict=True)],
        [np.delete(b, x, 0) for b, x in zip(expected, axes, strict=True)],
    )
    assert np.isnan(actual[2][1]).all() and np.isnan(actual[3][1]).all()


@pytest.mark.thorough
def test_sums_in_float32_with_default_tiles():
    # 1 + 256 * 2**-8 = 2 exactly; a bfloat16 sum that meets 1 first stays at 1.
    lhs_MK = jnp.full((1, 257), 2.0**-8, jnp.bfloat16).at[0, 0].set(1)
    bounds = jnp.array([0, 1], jnp.int32)
    ones = jnp.ones((1, 257, 1), jnp.bfloat16)
    out = matmul.product(lhs_MK, ones, bounds, False, jnp.float32, interpret=True)
    assert out.dtype == jnp.float32 and out[0, 0] == 2
    column_MK, ones = lhs_MK.T, jnp.ones((257, 1), jnp.bfloat16)
    bounds = jnp.array([0, 257], jnp.int32)
    out = matmul.weight_product(column_MK, ones, bounds, jnp.float32, interpret=True)
    assert out.shape == (1, 1, 1) and out[0, 0, 0] == 2


@pytest.mark.thorough
def test_the_vjp_of_the_product():
    bounds = BOUNDS["shard: begins and ends between"]
    lhs_MK, rhs_GKN, dout_MN = draw(bounds)
    run = {"tiling": SMALL, "interpret": True}
    function = matmul_vjp.differentiable(
        partial(matmul.product, **run), partial(matmul.weight_product, **run)
    )

    @partial(jax.jit, compiler_options=QUICK)
    def gradients(lhs_MK, rhs_GNK, dout_MN, bounds):
        def value(lhs_MK, rhs_GNK):
            return function(lhs_MK, rhs_GNK, bounds, True, jnp.dtype("float32"))

        return jax.vjp(value, lhs_MK, rhs_GNK)[1](dout_MN)

    rhs_GNK = jnp.swapaxes(rhs_GKN, 1, 2)
    dlhs_MK, drhs_GNK = gradients(
        lhs_MK, rhs_GNK, dout_MN, jnp.asarray(bounds, jnp.int32)
    )
    _, drhs_GKN = oracle(lhs_MK, rhs_GKN, dout_MN, bounds)
    expected = np.zeros((M, K))
    for g in range(G):
        mine = slice(bounds[g], bounds[g + 1])
        expected[mine] = np.float64(dout_MN[mine]) @ np.float64(rhs_GKN[g]).T
    check((dlhs_MK, jnp.swapaxes(drhs_GNK, 1, 2)), (expected, drhs_GKN))


# Whether the tests above would notice. Each mutation makes one mask useless.
MUTATIONS = {
    "rows of other groups": ("row_mask", lambda row, stop: row >= 0),
    "one row too many": ("row_mask", lambda row, stop: row <= stop),
    "one row too few": ("row_mask", lambda row, stop: row < stop - 1),
    "remainders of K and N": ("edge_mask", lambda index, limit, tile: None),
    "rows of no group": (
        "steps",
        lambda group, size, depth: jnp.int32(math.ceil(size / depth)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_mutants_are_caught(name, mutant, monkeypatch):
    monkeypatch.setattr(triton_tiles, name, mutant)
    jax.clear_caches()
    mutated = jax.jit(lambda *a: kernels(*a), compiler_options=QUICK)
    with pytest.raises(AssertionError):
        compare(BOUNDS["shard: begins and ends between"], function=mutated)
    monkeypatch.undo()
    jax.clear_caches()


def harsh(monkeypatch):
    """What interpreting hides: programs run in any order, and memory is flat.

    The last program goes first, or a store that reaches into the next block would be
    made good by that block. What is read outside of a matrix is NaN.
    """
    place, load = triton_tiles.place, triton_tiles.load

    def backwards(index, num_down, num_across, band):
        return place(num_down * num_across - 1 - index, num_down, num_across, band)

    def poisoned(ref, row, column, row_ok, column_ok):
        inside = (row < ref.shape[0])[:, None] & (column < ref.shape[1])[None, :]
        for axis, ok in enumerate((row_ok, column_ok)):
            if ok is not None:
                inside |= jnp.expand_dims(~ok, 1 - axis)
        tile = load(ref, row, column, row_ok, column_ok)
        return jnp.where(inside, tile, jnp.asarray(jnp.nan, tile.dtype))

    monkeypatch.setattr(triton_tiles, "place", backwards)
    monkeypatch.setattr(triton_tiles, "load", poisoned)
    jax.clear_caches()


@pytest.mark.thorough
def test_kernels_read_inside_and_write_their_own(monkeypatch):
    harsh(monkeypatch)
    harsh_kernels = jax.jit(lambda *a: kernels(*a), compiler_options=QUICK)
    for case in list(BOUNDS)[:5:2]:
        compare(BOUNDS[case], function=harsh_kernels)
    monkeypatch.undo()
    jax.clear_caches()


# grouped_glu

KERNELS = Kernels(
    *(
        partial(kernel, interpret=True, **({"tiling": SMALL} if tiled else {}))
        for kernel, tiled in zip(
            glu.KERNELS, (True, False, True, False, False, False), strict=True
        )
    )
)
SHAPE = LayerShape(tokens=37, k=2, dim=21, hidden=35, num_experts=5)
NUMPY = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu": lambda g, u: g * 0.5 * (1 + np.vectorize(math.erf)(g / 2**0.5)) * u,
    "clamped": lambda g, u: (
        np.minimum(g, 7)
        / (1 + np.exp(-1.702 * np.minimum(g, 7)))
        * (np.clip(u, -7, 7) + 1)
    ),
}


def draw_layer(dtype="float32", keep=0.8, shape=SHAPE):
    T, slots, D, F, E = shape
    rng = np.random.default_rng(11)
    sizes = ((T, D), (E, D, 2, F), (E, F, D))
    x, w_in, w_out = (jnp.asarray(rng.normal(size=s), dtype) for s in sizes)
    gate_TK = jnp.asarray(rng.random((T, slots)), jnp.float32)
    dy_TD = jnp.asarray(rng.normal(size=(T, D)), dtype)
    expert_TK = np.stack([rng.permutation(E)[:slots] for _ in range(T)])
    keep_TK = rng.random((T, slots)) < keep
    keep_TK[3] = False  # a token of no expert holds NaN
    x, dy_TD = x.at[3].set(jnp.nan), dy_TD.at[3].set(jnp.nan)
    return x, w_in, w_out, gate_TK, dy_TD, expert_TK.astype(np.int32), keep_TK


def oracle_layer(x, w_in, w_out, gate, dy, expert_TK, keep_TK, activation):
    """(y, dx, dw_in, dw_out, dgate), slot by slot in float64."""
    x, w_in, w_out, gate, dy = (
        np.asarray(a, float) for a in (x, w_in, w_out, gate, dy)
    )
    act, tiny = NUMPY[activation], 1e-6
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    dw_in, dw_out = np.zeros_like(w_in), np.zeros_like(w_out)
    for t, j in np.argwhere(keep_TK):
        e = expert_TK[t, j]
        g_F, u_F = x[t] @ w_in[e, :, 0], x[t] @ w_in[e, :, 1]
        h_F, dh_F = act(g_F, u_F), w_out[e] @ dy[t]
        y[t] += gate[t, j] * (h_F @ w_out[e])
        dgate[t, j] = dh_F @ h_F
        slopes = (
            (act(g_F + tiny, u_F) - act(g_F - tiny, u_F)) / (2 * tiny),
            (act(g_F, u_F + tiny) - act(g_F, u_F - tiny)) / (2 * tiny),
        )
        da_2F = gate[t, j] * dh_F * np.stack(slopes)
        dx[t] += np.einsum("dcf,cf->d", w_in[e], da_2F)
        dw_in[e] += np.einsum("d,cf->dcf", x[t], da_2F)
        dw_out[e] += np.outer(gate[t, j] * h_F, dy[t])
    return y, dx, dw_in, dw_out, dgate


def layer(x, w_in, w_out, gate, dy, expert_TK, keep_TK, activation, rows=None):
    """Value and gradients through `compose` and `differentiable`."""
    plan = make_plan(expert_TK, keep_TK, w_in.shape[0])
    function = glu_vjp.differentiable(*compose(KERNELS))
    y_TD, pull = jax.vjp(
        lambda *a: function(*a, plan, activation, rows), x, w_in, w_out, gate
    )
    return y_TD, *pull(dy)


quick_layer = jax.jit(layer, static_argnums=(7, 8), compiler_options=QUICK)


@pytest.mark.parametrize("activation", thorough_but_for(ACTIVATIONS, "silu"))
def test_layer_equals_the_loop(activation):
    for keep in (0.8, 1.0, 0.0) if activation == "silu" else (0.8,):
        case = draw_layer(keep=keep)
        expected = oracle_layer(*case, activation)
        check(quick_layer(*case, activation), expected)


@pytest.mark.thorough
def test_layer_in_bfloat16_with_default_tiles(monkeypatch):
    run = Kernels(*(partial(kernel, interpret=True) for kernel in glu.KERNELS))
    monkeypatch.setattr(f"{__name__}.KERNELS", run)
    case = draw_layer("bfloat16")
    actual = jax.jit(lambda *a: layer(*a, "silu"), compiler_options=QUICK)(*case)
    assert [a.dtype.name for a in actual] == ["bfloat16"] * 4 + ["float32"]
    check(actual, oracle_layer(*case, "silu"), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["one row too many", "remainders of K and N"])
def test_mutants_of_the_layer_are_caught(mutation, monkeypatch):
    name, mutant = MUTATIONS[mutation]
    case = draw_layer()
    expected = oracle_layer(*case, "silu")
    monkeypatch.setattr(triton_tiles, name, mutant)
    jax.clear_caches()
    mutated = jax.jit(lambda *a: layer(*a, "silu"), compiler_options=QUICK)
    with pytest.raises(AssertionError):
        check(mutated(*case), expected)
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.thorough
def test_layer_reads_inside_and_writes_its_own(monkeypatch):
    harsh(monkeypatch)
    case = draw_layer()
    actual = jax.jit(lambda *a: layer(*a, "silu"), compiler_options=QUICK)(*case)
    check(actual, oracle_layer(*case, "silu"))
    monkeypatch.undo()
    jax.clear_caches()


def test_gelu_of_the_kernels():
    gate = jnp.linspace(-9, 9, 4001, dtype=jnp.float32)
    up, dh = jnp.full_like(gate, 1.5), jnp.full_like(gate, 0.75)
    for mine, exact in zip(glu.IN_KERNELS["gelu"], ACTIVATIONS["gelu"], strict=True):
        arguments = (gate, up, dh)[: 2 if mine is glu.IN_KERNELS["gelu"].value else 3]
        for a, b in zip(
            jax.tree.leaves(mine(*arguments)),
            jax.tree.leaves(exact(*arguments)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=3e-6)


# Bookkeeping


@pytest.mark.parametrize("cover", [True, False])
def test_row_blocks_take_every_row_once(cover):
    blocks_of = jax.jit(lambda b: triton_tiles.row_blocks(b, M, 16, cover))
    rng = np.random.default_rng(0)
    random = [np.sort(rng.integers(0, M + 1, G + 1)) for _ in range(40)]
    for bounds in [*BOUNDS.values(), *random]:
        owner_M = np.full(M, -2)
        blocks = blocks_of(jnp.asarray(bounds, jnp.int32))
        for group, start, stop in zip(*(np.asarray(a) for a in blocks), strict=True):
            assert stop - start <= 16 and (owner_M[start:stop] == -2).all()
            owner_M[start:stop] = group
        expected_M = np.searchsorted(bounds, np.arange(M), side="right") - 1
        expected_M[expected_M == G] = -1
        if not cover:
            expected_M[expected_M == -1] = -2
        np.testing.assert_array_equal(owner_M, expected_M)


@pytest.mark.parametrize("cut", [0, 8, 20, 50])
def test_row_chunks_take_every_row_once_and_are_short(cut):
    tiling = replace(SMALL, depth=4, cut=cut)
    chunks_of = jax.jit(lambda b: triton_tiles.row_chunks(b, M, tiling)[0])
    most = jax.eval_shape(
        lambda b: jnp.zeros(triton_tiles.row_chunks(b, M, tiling)[1]),
        jax.ShapeDtypeStruct((G + 1,), jnp.int32),
    ).shape[0]
    rng = np.random.default_rng(0)
    random = [np.sort(rng.integers(0, M + 1, G + 1)) for _ in range(40)]
    for bounds in [*BOUNDS.values(), *random]:
        chunks = [np.asarray(a) for a in chunks_of(jnp.asarray(bounds, jnp.int32))]
        taken_M, seen = np.full(M, -1), []
        for c, (group, start, stop, nth, pieces) in enumerate(
            zip(*chunks, strict=True)
        ):
            if group < 0:
                continue
            assert (taken_M[start:stop] == -1).all()
            taken_M[start:stop] = group
            seen.append((group, nth))
            assert pieces == 1 or c < most
            if cut:
                assert stop - start < 2 * cut + 4
        expected_M = np.searchsorted(bounds, np.arange(M), side="right") - 1
        expected_M[expected_M == G] = -1
        np.testing.assert_array_equal(taken_M, expected_M)
        assert len(set(seen)) == len(seen) and {g for g, _ in seen} == set(range(G))


@pytest.mark.parametrize("band", [1, 3, 8, 100])
def test_programs_cover_the_grid_once(band):
    index = jnp.arange(7 * 5, dtype=jnp.int32)
    down, across = jax.vmap(lambda i: triton_tiles.place(i, 7, 5, band))(index)
    pairs = set(
        zip(np.asarray(down).tolist(), np.asarray(across).tolist(), strict=True)
    )
    assert pairs == {(i, j) for i in range(7) for j in range(5)}


OPERATIONS = ("product", "product_t", "weight", "up", "down_vjp")


def shared_bytes(operation, tiling, dtype):
    operands = tiling.rows + tiling.columns * (2 if operation == "up" else 1)
    return operands * tiling.depth * jnp.dtype(dtype).itemsize * tiling.num_stages


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", matmul.DTYPES)
def test_tilings_fit_the_processor(operation, dtype):
    for T, slots, D, F, E in REAL.values():
        sizes = (T * slots, D, F, E, dtype)
        default = matmul.default_tiling(operation, *sizes)
        found = matmul.candidates(operation, *sizes)
        assert found[0] == default and len(set(found)) == len(found) > 3
        assert shared_bytes(operation, default, dtype) <= 96 * 1024
        for tiling in found:
            assert shared_bytes(operation, tiling, dtype) <= 200 * 1024
            sums = tiling.rows * tiling.columns * (2 if operation == "up" else 1)
            most = 64 if operation == "down_vjp" else 128
            assert sums / (32 * tiling.num_warps) <= most


def test_partial_sums_of_weights_stay_small():
    for T, slots, D, F, E in REAL.values():
        tiling = matmul.default_tiling("weight", T * slots, D, 2 * F, E, "bfloat16")
        pieces = T * slots // tiling.cut if tiling.cut else 0
        assert pieces * D * 2 * F * 4 <= 198 * 2**20


def test_unsupported_says_why():
    request = Request("grouped_matmul", "bfloat16", 5, 7, 3)
    assert matmul.unsupported(request) is None
    assert matmul.unsupported(request._replace(weights="bfloat16")) is None
    assert "float16" in matmul.unsupported(request._replace(dtype="float16"))
    assert "int8" in matmul.unsupported(request._replace(weights="int8"))
