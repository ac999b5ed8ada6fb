"""The Hopper kernels: interpreted, against float64 loops, and lowered for an H100.

Interpret mode runs warpgroups, barriers and TMA copies as they are written, and memory
never written is NaN there. It knows nothing of registers and layouts, and WGMMA is not
asynchronous; lowering checks layouts and shared memory.

Legend: T tokens, K slots per token or contraction, D model width, F expert hidden
width, E experts, M rows, N columns or sorted rows, G groups.
"""

import dataclasses
import math
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import make_plan, mosaic_tiles
from kernels_pallas.grouped_glu import mosaic as glu
from kernels_pallas.grouped_glu.compose import Kernels, compose
from kernels_pallas.grouped_matmul import mosaic
from kernels_pallas.grouped_matmul.mosaic import Tiling
from kernels_pallas.grouped_matmul.shapes import REAL
from kernels_pallas.implementations import Request
from tests.marks import slow, thorough_but_for

OLD = jax.__version_info__ < (0, 11)  # the interpreter of JAX 0.10 lacks some parts
INTERPRET = mosaic_tiles.interpreter()
SMALL = Tiling(m=128, n=128, k=64, stages=2)
H100 = AbstractMesh(
    (1,),
    ("x",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    ),
)

# One rounding of a result of order 30 to bfloat16 is 2**-4.
ROUNDING = 2.0**-8


@pytest.fixture(scope="module", autouse=True)
def interpreter_of_jax_0_10():
    """Adds to the interpreter of JAX 0.10 what it lacks: see each part."""
    if not OLD:
        yield
        return
    from jax._src.interpreters import mlir
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.state.types import TransposeTransform

    # Layouts are of registers: nothing to interpret.
    mlir.register_lowering(core.layout_cast_p, lambda ctx, x, **_: [x])

    # It compiles the kernel again for every warpgroup and call.
    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *arguments):
        with lock:
            if jaxpr not in compiled:
                traced = jax.jit(lambda *a: jax.core.eval_jaxpr(jaxpr, consts, *a))
                compiled[jaxpr] = traced.lower(*arguments).compile()
        compiled[jaxpr](*arguments)

    # It has no transposed operands of WGMMA.
    wgmma, numpy = gpu_callbacks.wgmma, gpu_callbacks.np

    class Transposed:
        def matmul(self, a, b, dtype):
            return numpy.matmul(a, b.T, dtype=dtype)

        def __getattr__(self, name):
            return getattr(numpy, name)

    def wgmma_with_transposes(*, b_transforms, **rest):
        kept = tuple(t for t in b_transforms if not isinstance(t, TransposeTransform))
        if len(kept) == len(b_transforms):
            return wgmma(b_transforms=b_transforms, **rest)
        with lock:
            gpu_callbacks.np = Transposed()
            try:
                return wgmma(b_transforms=kept, **rest)
            finally:
                gpu_callbacks.np = numpy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", run)
        patch.setattr(gpu_callbacks, "wgmma", wgmma_with_transposes)
        yield


def bounds_of(first, sizes):
    return np.cumsum([first, *sizes]).astype(np.int32)


# (first row, group sizes) of 300 rows in tiles of 128.
CASES = {
    "head, ragged, tail": (20, (0, 100, 1, 0, 130, 3)),
    "no rows": (0, (0, 0, 0, 0, 0, 0)),
    "all rows in one": (0, (0, 0, 300, 0, 0, 0)),
    "full tiles": (0, (128, 0, 128, 0, 44, 0)),
    "single rows at the end": (294, (1, 1, 1, 1, 1, 1)),
}


def draw(M=300, K=128, N=192, G=6, seed=0):
    rng = np.random.default_rng(seed)
    lhs_MK = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
    return lhs_MK, jnp.asarray(rng.normal(size=(G, K, N)), jnp.bfloat16)


def oracle(lhs_MK, rhs_GKN, bounds):
    lhs_MK, rhs_GKN = np.asarray(lhs_MK, np.float64), np.asarray(rhs_GKN, np.float64)
    out_MN = np.zeros((lhs_MK.shape[0], rhs_GKN.shape[2]))
    for g, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        out_MN[first:last] = lhs_MK[first:last] @ rhs_GKN[g]
    return out_MN


@partial(jax.jit, static_argnames=("transpose_rhs", "dtype", "tiling", "every_row"))
def product(lhs_MK, rhs_GKN, bounds, transpose_rhs, dtype, tiling, every_row=True):
    return mosaic.product(
        lhs_MK,
        rhs_GKN,
        bounds,
        transpose_rhs,
        dtype,
        tiling=tiling,
        interpret=INTERPRET,
        every_row=every_row,
    )


def check_product(case, transpose_rhs=False, dtype="bfloat16", tiling=SMALL):
    lhs_MK, rhs_GKN = draw()
    bounds = bounds_of(*CASES[case])
    expected = oracle(lhs_MK, rhs_GKN, bounds)
    lhs_MK = lhs_MK.at[: bounds[0]].set(jnp.nan).at[bounds[-1] :].set(jnp.nan)
    if transpose_rhs:
        rhs_GKN = jnp.swapaxes(rhs_GKN, 1, 2)
    out_MN = product(lhs_MK, rhs_GKN, bounds, transpose_rhs, dtype, tiling)
    assert out_MN.dtype == dtype
    tolerance = ROUNDING if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(
        np.asarray(out_MN, np.float64), expected, rtol=tolerance, atol=1e-4
    )
    kept = slice(bounds[0], bounds[-1])
    assert not np.any(np.delete(np.asarray(out_MN, np.float32), kept, 0))


@pytest.mark.parametrize("case", thorough_but_for(CASES, "head, ragged, tail"))
def test_product_equals_the_loop(case):
    check_product(case)


@pytest.mark.thorough
def test_product_with_transposed_weights_into_float32():
    check_product("head, ragged, tail", transpose_rhs=True, dtype="float32")


@pytest.mark.thorough
def test_tiles_of_128_rows_a_warpgroup_and_three_blocks(monkeypatch):
    monkeypatch.setattr(mosaic_tiles, "num_cores", lambda interpret: 3)
    check_product("head, ragged, tail", tiling=Tiling(m=256, n=64, k=128, stages=2))


@pytest.mark.thorough
def test_fewer_rows_than_a_tile():
    lhs_MK, rhs_GKN = draw(M=9, K=64, N=64, G=3)
    bounds = bounds_of(1, (3, 0, 4))
    out_MN = product(lhs_MK, rhs_GKN, bounds, False, "float32", Tiling(n=64, stages=2))
    np.testing.assert_allclose(out_MN, oracle(lhs_MK, rhs_GKN, bounds), atol=1e-4)


@pytest.mark.thorough
def test_nan_of_one_group_stays_there():
    lhs_MK, rhs_GKN = draw()
    bounds = bounds_of(*CASES["head, ragged, tail"])
    poisoned = slice(bounds[1], bounds[2])
    expected = oracle(lhs_MK, rhs_GKN, bounds)
    lhs_MK = lhs_MK.at[poisoned].set(jnp.nan)
    out_MN = np.asarray(
        product(lhs_MK, rhs_GKN, bounds, False, "bfloat16", SMALL), np.float64
    )
    assert np.isnan(out_MN[poisoned]).all()
    np.testing.assert_allclose(
        np.delete(out_MN, poisoned, 0),
        np.delete(expected, poisoned, 0),
        rtol=ROUNDING,
        atol=1e-4,
    )


@pytest.mark.thorough
def test_the_checks_see_rows_of_the_next_group_stored(monkeypatch):
    def rows_of_the_tile(row, stop, column, num_columns):
        return jnp.where(column < num_columns, jnp.clip(300 - row, 0, 64), 0 * stop)

    # One block would go through the tiles in order and write each row right at last.
    monkeypatch.setattr(mosaic_tiles, "num_cores", lambda interpret: 3)
    monkeypatch.setattr(mosaic_tiles, "rows_to_store", rows_of_the_tile)
    product.clear_cache()
    with pytest.raises(AssertionError):
        check_product("head, ragged, tail")
    product.clear_cache()


@pytest.mark.thorough
@pytest.mark.parametrize("every_row", [False, True])
def test_visits_cover_each_row_once(every_row):
    visits_of = jax.jit(mosaic_tiles.plan_visits, static_argnums=(1, 2, 3))
    place_of = jax.jit(mosaic_tiles.place_of_rows, static_argnums=(1, 2))
    rng = np.random.default_rng(0)
    M, G, tile = 61, 9, 8
    for _ in range(25):
        cuts = rng.integers(0, M + 1, G + 1)
        if rng.random() < 0.5:  # many empty groups
            cuts = rng.choice(cuts[:3], G + 1)
        bounds = np.sort(cuts).astype(np.int32)
        visits = jax.device_get(visits_of(bounds, M, tile, every_row))
        group_M, place_M = np.full(M, -2), np.full(M, -1)
        for v in range(visits.total[0]):
            start, stop = visits.start_V[v], visits.stop_V[v]
            rows = np.arange(start, min(stop, start + tile))
            assert rows.size and np.all(group_M[rows] == -2)
            group_M[rows] = visits.group_V[v]
            place_M[rows] = v * tile + rows - start
        row_M = np.arange(M)
        expected_M = np.searchsorted(bounds[1:], row_M, side="right")
        none_M = (row_M < bounds[0]) | (row_M >= bounds[-1])
        np.testing.assert_array_equal(
            group_M, np.where(none_M, -1 if every_row else -2, expected_M)
        )
        if not every_row:
            np.testing.assert_array_equal(
                place_of(bounds, M, tile)[~none_M], place_M[~none_M]
            )


def glu_oracle(x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK, activation):
    """(y, dx, dw_in, dw_out, dgate), slot by slot in float64."""
    x, w_in, w_out, gate_TK, dy = (
        np.asarray(a, np.float64) for a in (x, w_in, w_out, gate_TK, dy)
    )
    y, dx = np.zeros_like(x), np.zeros_like(x)
    dw_in, dw_out, dgate_TK = (np.zeros_like(a) for a in (w_in, w_out, gate_TK))
    for t, j in np.argwhere(keep_TK):
        e, gate = expert_TK[t, j], gate_TK[t, j]
        a_F, b_F = np.split(x[t] @ w_in[e], 2)
        h_F, slope_a_F, slope_b_F = numpy_activation(activation, a_F, b_F)
        y[t] += gate * (h_F @ w_out[e])
        dh_F = w_out[e] @ dy[t]
        dgate_TK[t, j] = dh_F @ h_F
        da_C = gate * np.concatenate([dh_F * slope_a_F, dh_F * slope_b_F])
        dx[t] += w_in[e] @ da_C
        dw_in[e] += np.outer(x[t], da_C)
        dw_out[e] += gate * np.outer(h_F, dy[t])
    return y, dx, dw_in, dw_out, dgate_TK


def numpy_activation(name, a, b):
    """(h, dh/da, dh/db) in float64."""
    if name == "gelu":
        erf = np.vectorize(math.erf)(a / np.sqrt(2))
        cdf, density = (1 + erf) / 2, np.exp(-(a**2) / 2) / np.sqrt(2 * np.pi)
        return a * cdf * b, (cdf + a * density) * b, a * cdf
    slope, limit, one = (1.702, 7.0, 1) if name == "clamped" else (1.0, np.inf, 0)
    inside_a, inside_b = a <= limit, np.abs(b) <= limit
    a, b = np.minimum(a, limit), np.clip(b, -limit, limit) + one
    sigmoid = 1 / (1 + np.exp(-slope * a))
    da = sigmoid + slope * a * sigmoid * (1 - sigmoid)
    return a * sigmoid * b, inside_a * da * b, inside_b * a * sigmoid


def draw_layer(T=90, K=2, D=64, F=192, E=5, keep=0.8):
    """No token goes to expert 2, and one slot only to expert 3."""
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16) for _ in range(2))
    w_in = jnp.asarray(rng.normal(size=(E, D, 2 * F)) / 4, jnp.bfloat16)
    w_out = jnp.asarray(rng.normal(size=(E, F, D)) / 8, jnp.bfloat16)
    expert_TK = np.array([0, 1, 4])[
        np.stack([rng.permutation(3)[:K] for _ in range(T)])
    ]
    keep_TK = rng.random((T, K)) < keep
    expert_TK[7, 0], keep_TK[7, 0], keep_TK[3] = 3, True, False
    gate_TK = jnp.asarray(rng.random((T, K)), jnp.float32).at[7, 0].set(0)
    return x, w_in, w_out, gate_TK, dy, expert_TK.astype(np.int32), keep_TK


@partial(jax.jit, static_argnames=("activation", "tiling"))
def layer(x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK, activation, tiling):
    forward, backward = compose(
        Kernels(
            partial(glu.up, tiling=tiling, interpret=INTERPRET),
            partial(glu.down, interpret=INTERPRET),
            partial(glu.down_vjp, tiling=tiling, interpret=INTERPRET),
            partial(glu.dx, interpret=INTERPRET),
            partial(glu.dw_in, interpret=INTERPRET),
            partial(glu.dw_out, interpret=INTERPRET),
        )
    )
    plan = make_plan(expert_TK, keep_TK, w_in.shape[0])
    inputs = (x, w_in, w_out, gate_TK, plan, activation)
    y, a = forward(*inputs, True)
    return y, *backward(a, *inputs, dy)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("activation", "F", "n"),
    [("silu", 192, 128), slow("gelu", 64, 64), slow("clamped", 64, 64)],
)
def test_layer_equals_the_loop(activation, F, n):
    x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK = draw_layer(F=F)
    expected = glu_oracle(x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK, activation)
    actual = layer(
        # Token 3 has no slot that is kept, and is not seen.
        x.at[3].set(jnp.nan),
        w_in,
        w_out,
        gate_TK.at[3].set(jnp.nan),
        dy.at[3].set(jnp.nan),
        expert_TK,
        keep_TK,
        activation,
        Tiling(m=128, n=n, k=64, stages=2),
    )
    for a, b in zip(actual, expected, strict=True):
        # a and h are rounded on the way: some parts in 2**8 of sums of order max.
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=2 * ROUNDING * np.abs(b).max(), rtol=0
        )
    assert actual[4].dtype == jnp.float32
    assert actual[4][7, 0] != 0  # kept with a gate of zero


@pytest.mark.thorough
def test_layer_nan_of_one_token_stays_with_its_experts():
    case = draw_layer(F=64)
    x, w_in, w_out, gate_TK, dy, expert_TK, keep_TK = case
    expected = glu_oracle(*case, "gelu")
    actual = layer(
        x.at[7].set(jnp.nan),
        w_in,
        w_out,
        gate_TK,
        dy.at[7].set(jnp.nan),
        expert_TK,
        keep_TK,
        "gelu",
        Tiling(m=128, n=64, k=64, stages=2),
    )
    met = expert_TK[7][keep_TK[7]]
    for a, b, poisoned in zip(actual, expected, (7, 7, met, met, 7), strict=True):
        a = np.delete(np.asarray(a, np.float64), poisoned, 0)
        b = np.delete(b, poisoned, 0)
        np.testing.assert_allclose(a, b, atol=2 * ROUNDING * np.abs(b).max(), rtol=0)
    assert np.isnan(np.asarray(actual[2][met], np.float32)).all()


@pytest.mark.skipif(OLD, reason="the interpreter of JAX 0.10 sees no such races")
def test_no_buffer_is_reused_before_it_was_read():
    # A race raises. The values alone did not show a ring that nobody waits for.
    racing = dataclasses.replace(INTERPRET, detect_races=True)
    x_TD, w_out = draw(M=150, K=256, N=64, G=6)  # four steps and two stages
    w_out = jnp.swapaxes(w_out, 1, 2)
    _, _, dweight_N = glu.down_vjp(
        x_TD,
        w_out,
        jnp.ones((150, 128), jnp.bfloat16),
        jnp.ones(150, jnp.float32),
        jnp.arange(150, dtype=jnp.int32),
        bounds_of(0, (0, 130, 1, 0, 9, 3)),
        "silu",
        tiling=Tiling(m=128, n=64, k=64, stages=2),
        interpret=racing,
    )
    assert np.isfinite(np.asarray(dweight_N[:143])).all()


def lower(function, *arguments):
    with jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def layer_calls(shape, tilings, activation="silu"):
    """(function, arguments) of each kernel of a layer, by operation."""
    T, K, D, F, E = shape
    N, array = T * K, jax.ShapeDtypeStruct
    x_TD = array((T, D), jnp.bfloat16)
    w_in, w_out = (
        array((E, D, 2 * F), jnp.bfloat16),
        array((E, F, D), jnp.bfloat16),
    )
    h_NF, a_NC = array((N, F), jnp.bfloat16), array((N, 2 * F), jnp.bfloat16)
    token_N, weight_N = array((N,), jnp.int32), array((N,), jnp.float32)
    bounds = array((E + 1,), jnp.int32)
    return {
        "up": (
            lambda *a: glu.up(*a, activation, True, tiling=tilings["up"]),
            (x_TD, w_in, token_N, bounds),
        ),
        "down_vjp": (
            lambda *a: glu.down_vjp(*a, activation, tiling=tilings["down_vjp"]),
            (x_TD, w_out, a_NC, weight_N, token_N, bounds),
        ),
        "product": (
            lambda *a: mosaic.product(
                *a, False, jnp.bfloat16, tiling=tilings["product"]
            ),
            (h_NF, w_out, bounds),
        ),
        "product_t": (
            lambda *a: mosaic.product(
                *a, True, jnp.float32, tiling=tilings["product_t"]
            ),
            (a_NC, w_in, bounds),
        ),
    }


KERNELS = ("up", "down_vjp", "product", "product_t")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "activation"),
    [("H1", "silu"), slow("H8", "gelu"), slow("H9", "clamped")],
)
def test_lowers_for_an_h100(name, activation):
    defaults = dict.fromkeys(KERNELS)
    for call, arguments in layer_calls(REAL[name], defaults, activation).values():
        assert "mosaic_gpu" in lower(call, *arguments)


@pytest.mark.slow
def test_the_largest_tilings_fit_in_shared_memory():
    shape = REAL["H2"]
    sizes = (shape.tokens * shape.k, shape.dim, shape.hidden, shape.num_experts)
    largest = {}
    for operation in KERNELS:
        tilings = mosaic.candidates(operation, *sizes, jnp.bfloat16)
        for tiling in tilings:
            mosaic.check_tiling(tiling, operation, shape.dim, shape.hidden)
        largest[operation] = max(
            tilings, key=lambda t, o=operation: mosaic.shared_bytes(t, o)
        )
    for function, arguments in layer_calls(shape, largest).values():
        lower(function, *arguments)


@pytest.mark.parametrize("name", REAL)
def test_default_tilings_are_candidates_that_fit(name):
    T, K, D, F, E = REAL[name]
    for operation in KERNELS:
        sizes = (T * K, D, F, E, jnp.bfloat16)
        tiling = mosaic.default_tiling(operation, *sizes)
        mosaic.check_tiling(tiling, operation, D, F)
        assert mosaic.candidates(operation, *sizes)[0] == tiling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 512}, "n one of 64, up to 256"),
        ({"m": 64}, "m a multiple of 128"),
        ({"k": 96}, "k a multiple of 64"),
        ({"stages": 1}, "two stages"),
        ({"stages": 9}, "bytes of shared memory.*takes"),
    ],
)
def test_a_tiling_that_does_not_fit_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        mosaic.check_tiling(Tiling()._replace(**change), "product", 1024, 1024)


def test_unsupported_says_why():
    able = Request("grouped_glu", "bfloat16", 1536, 512, 128, "silu")
    assert mosaic.unsupported(able) is None
    assert "float32" in mosaic.unsupported(able._replace(dtype="float32"))
    assert "int8" in mosaic.unsupported(able._replace(weights="int8"))
    assert "1536 x 96" in mosaic.unsupported(able._replace(N=192))
    assert "100 x" in mosaic.unsupported(able._replace(K=100))
    with jax.sharding.use_abstract_mesh(H100):
        assert mosaic.unsupported(able) is None
    blackwell = AbstractDevice(device_kind="NVIDIA B200", num_cores=148, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=blackwell)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "Hopper" in mosaic.unsupported(able)
