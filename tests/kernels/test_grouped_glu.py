"""grouped_glu: every implementation against a per-slot float64 loop.

Legend: T tokens, K slots per token, D model width, F expert hidden width, E experts;
2 is the pair of input projections (gate, up).
"""

import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_glu, grouped_swiglu, make_plan
from kernels_pallas.grouped_matmul.shapes import AWKWARD
from tests.backends import backends
from tests.marks import thorough_but_for

# float32: sums of at most 101 products. bfloat16: the activations between the two
# matmuls are rounded as well, 2**-8 relative each.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}

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


def unit(activation, a_F, up_F):
    """(h, dh/da, dh/dup) of one row, in float64 and from the definitions."""
    if activation == "gelu":
        cdf_F = np.array([0.5 * math.erfc(-a / math.sqrt(2)) for a in a_F])
        density_F = np.exp(-0.5 * a_F**2) / math.sqrt(2 * math.pi)
        return a_F * cdf_F * up_F, (cdf_F + a_F * density_F) * up_F, a_F * cdf_F
    slope = 1.0
    inside_F, up_inside_F = np.ones(a_F.shape), np.ones(a_F.shape)
    if activation == "clamped":
        slope, inside_F, up_inside_F = 1.702, a_F <= 7, np.abs(up_F) <= 7
        a_F, up_F = np.minimum(a_F, 7), np.clip(up_F, -7, 7) + 1
    s_F = 1 / (1 + np.exp(-slope * a_F))
    da_F = (s_F + slope * a_F * s_F * (1 - s_F)) * up_F * inside_F
    return a_F * s_F * up_F, da_F, a_F * s_F * up_inside_F


def oracle(
    x_TD, w_in_ED2F, w_out_EFD, gate_TK, dy_TD, expert_TK, keep_TK, activation="silu"
):
    """(y, dx, dw_in, dw_out, dgate), slot by slot in float64."""
    x_TD, w_in_ED2F, w_out_EFD, gate_TK, dy_TD = (
        np.asarray(a, np.float64) for a in (x_TD, w_in_ED2F, w_out_EFD, gate_TK, dy_TD)
    )
    y_TD, dx_TD = np.zeros_like(x_TD), np.zeros_like(x_TD)
    dw_in, dw_out = np.zeros_like(w_in_ED2F), np.zeros_like(w_out_EFD)
    dgate_TK = np.zeros_like(gate_TK)
    for t, j in np.argwhere(keep_TK):
        e, x_D, dy_D = expert_TK[t, j], x_TD[t], dy_TD[t]
        a_F, up_F = x_D @ w_in_ED2F[e, :, 0], x_D @ w_in_ED2F[e, :, 1]
        h_F, slope_a_F, slope_up_F = unit(activation, a_F, up_F)
        y_TD[t] += gate_TK[t, j] * (h_F @ w_out_EFD[e])
        dgate_TK[t, j] = dy_D @ (h_F @ w_out_EFD[e])
        dh_F = gate_TK[t, j] * (w_out_EFD[e] @ dy_D)
        da_F, dup_F = dh_F * slope_a_F, dh_F * slope_up_F
        dx_TD[t] += w_in_ED2F[e, :, 0] @ da_F + w_in_ED2F[e, :, 1] @ dup_F
        dw_in[e] += np.stack([np.outer(x_D, da_F), np.outer(x_D, dup_F)], axis=1)
        dw_out[e] += np.outer(gate_TK[t, j] * h_F, dy_D)
    return y_TD, dx_TD, dw_in, dw_out, dgate_TK


def draw(shape, dtype="float32", keep=0.8, to_one=False):
    """Arrays and a random assignment without repeats, with the values of `dtype`."""
    T, K, D, F, E = shape
    rng = np.random.default_rng(zlib.crc32(repr((shape, keep, to_one)).encode()))
    sizes = ((T, D), (E, D, 2, F), (E, F, D))
    x, w_in, w_out = (jnp.asarray(rng.normal(size=s), dtype) for s in sizes)
    gate_TK = jnp.asarray(rng.random((T, K)), jnp.float32)
    dy_TD = jnp.asarray(rng.normal(size=(T, D)), dtype)
    expert_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    if to_one:
        expert_TK = np.tile(np.arange(K, dtype=np.int32), (T, 1))
    keep_TK = rng.random((T, K)) < keep
    return x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK


@partial(
    jax.jit,
    static_argnames=("implementation", "activation", "buffer_rows"),
    compiler_options=QUICK,
)
def value_and_gradients(
    x, w_in, w_out, gate, dy, expert_TK, keep_TK, implementation=None, **options
):
    plan = make_plan(expert_TK, keep_TK, w_in.shape[0])
    y_TD, pull = jax.vjp(
        lambda *a: grouped_glu(*a, plan, implementation=implementation, **options),
        x,
        w_in,
        w_out,
        gate,
    )
    return y_TD, *pull(dy)


def check(actual, expected, dtype="float32"):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype] * scale, rtol=0
        )


@implementations
@pytest.mark.parametrize(
    "name", thorough_but_for(AWKWARD, "prime", "one_token", later=["small", "k_is_e"])
)
def test_equals_the_loop(name, implementation):
    # One test for all routings of a shape, which is one compilation. With all to
    # one set, "full_tiles" fills a tile of 64 and has 37 more rows.
    for routing in (
        {"keep": 0.8},
        {"keep": 1.0},
        {"keep": 0.0},
        {"keep": 1.0, "to_one": True},
    ):
        case = draw(AWKWARD[name], **routing)
        check(value_and_gradients(*case, implementation), oracle(*case))


@pytest.mark.thorough
@implementations
@pytest.mark.parametrize("activation", ["gelu", "clamped"])
def test_other_activations(activation, implementation):
    x, *rest = draw(AWKWARD["small"])
    case = (4 * x, *rest)  # far enough to be clamped
    actual = value_and_gradients(*case, implementation, activation=activation)
    assert np.any(np.abs(np.einsum("td,edgf->tegf", case[0], case[1])) > 7)
    check(actual, oracle(*case, activation=activation))


@implementations
@pytest.mark.parametrize("buffer_rows", thorough_but_for([1, 13], 13))
def test_small_buffers_change_nothing(buffer_rows, implementation):
    # 14 slots, of which all, some or none are kept: they fit and overflow.
    for routing in ({"keep": 1.0}, {"keep": 0.6}, {"keep": 0.0}):
        case = draw(AWKWARD["small"], **routing)
        actual = value_and_gradients(*case, implementation, buffer_rows=buffer_rows)
        check(actual, oracle(*case))


def test_buffers_bound_what_is_kept():
    shape = AWKWARD["small"]._replace(tokens=64, k=4, dim=16, hidden=64)
    x, w_in, w_out, gate_TK, _, expert_TK, keep_TK = draw(shape, keep=0.3)
    plan = make_plan(expert_TK, keep_TK, shape.num_experts)

    def kept(buffer_rows):
        run = partial(grouped_swiglu, plan=plan, buffer_rows=buffer_rows)
        pull = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], x, w_in, w_out, gate_TK)
        leaves = jax.tree.leaves(pull)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    row_bytes = 2 * shape.hidden * 4
    assert kept(None) - kept(128) >= 0.9 * 128 * row_bytes


@pytest.mark.parametrize("implementation", backends("bfloat16"))
def test_bfloat16(implementation):
    case = draw(AWKWARD["small"], "bfloat16")
    actual = value_and_gradients(*case, implementation)
    assert [a.dtype.name for a in actual] == ["bfloat16"] * 4 + ["float32"]
    check(actual, oracle(*case), "bfloat16")


@implementations
def test_kept_slot_with_gate_zero_has_its_gate_gradient(implementation):
    x, w_in, w_out, gate_TK, *rest = draw(AWKWARD["small"], keep=0.7)
    case = (x, w_in, w_out, jnp.zeros_like(gate_TK), *rest)
    keep_TK = case[-1]
    actual = value_and_gradients(*case, implementation)
    check(actual, oracle(*case))
    assert np.all(np.asarray(actual[4])[keep_TK] != 0)


@implementations
def test_nan_in_what_is_not_kept_is_not_seen(implementation):
    x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK = draw(AWKWARD["small"])
    keep_TK[3] = False  # a token without any slot
    expert_TK[3] = 99  # and with ids that no expert has
    keep_TK[5, 0] = False
    expected = oracle(x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK)
    actual = value_and_gradients(
        x.at[3].set(jnp.nan),
        w_in,
        w_out,
        gate_TK.at[5, 0].set(jnp.nan).at[3].set(jnp.nan),
        dy_TD.at[3].set(jnp.nan),
        expert_TK,
        keep_TK,
        implementation,
    )
    check(actual, expected)


@implementations
def test_nan_of_one_token_stays_with_its_experts(implementation):
    x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK = draw(
        AWKWARD["small"], keep=1.0
    )
    expected = oracle(x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK)
    actual = value_and_gradients(
        x.at[0].set(jnp.nan),
        w_in,
        w_out,
        gate_TK,
        dy_TD.at[0].set(jnp.nan),
        expert_TK,
        keep_TK,
        implementation,
    )
    axis_of = ([0], [0], expert_TK[0], expert_TK[0], [0])  # tokens or experts
    healthy = [
        (np.delete(a, poisoned, 0), np.delete(b, poisoned, 0))
        for a, b, poisoned in zip(actual, expected, axis_of, strict=True)
    ]
    check(*zip(*healthy, strict=True))
    assert np.isnan(actual[2][expert_TK[0]]).all()


def test_reads_the_plan_and_not_the_identity_of_experts():
    # The same function after the experts are renamed, weights and ids alike.
    x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK = draw(AWKWARD["small"])
    name_E = np.array([3, 0, 1, 2], np.int32)
    first = value_and_gradients(x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK)
    back_E = np.argsort(name_E)
    second = value_and_gradients(
        x, w_in[back_E], w_out[back_E], gate_TK, dy_TD, name_E[expert_TK], keep_TK
    )
    for i in (0, 1, 4):
        np.testing.assert_allclose(first[i], second[i], atol=1e-5)


@pytest.mark.thorough
def test_gradient_through_scan_and_checkpoint():
    x, w_in, w_out, gate_TK, _, expert_TK, keep_TK = draw(AWKWARD["k_is_e"])

    def loss(weights, implementation, wrap):
        def step(x_TD, _):
            plan = make_plan(expert_TK, keep_TK, 3)
            y_TD = grouped_swiglu(
                x_TD, *weights, gate_TK, plan, implementation=implementation
            )
            return x_TD + 0.1 * y_TD, None

        return jnp.sum(jax.lax.scan(wrap(step), x, None, length=3)[0] ** 2)

    def gradient(implementation, wrap):
        jit = partial(jax.jit, compiler_options=QUICK)
        return jit(jax.grad(lambda w: loss(w, implementation, wrap)))((w_in, w_out))

    expected = gradient("reference", lambda f: f)
    for a, b in zip(gradient("cpu", jax.checkpoint), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_under_a_mesh_with_auto_axes():
    devices = jax.devices()
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), auto, devices=devices)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shape = AWKWARD["small"]._replace(tokens=5 * len(devices))
    x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK = draw(shape)
    expected = oracle(x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK)
    sharded = jax.device_put((x, gate_TK, dy_TD, expert_TK, keep_TK), rows)
    x, gate_TK, dy_TD, expert_TK, keep_TK = sharded
    with jax.set_mesh(mesh):
        actual = value_and_gradients(x, w_in, w_out, gate_TK, dy_TD, expert_TK, keep_TK)
    check(actual, expected)


def test_saves_the_pre_activations_and_no_other_large_array():
    shape = AWKWARD["small"]._replace(tokens=128, dim=16, hidden=64)
    x, w_in, w_out, gate_TK, _, expert_TK, keep_TK = draw(shape)
    plan = make_plan(expert_TK, keep_TK, shape.num_experts)
    inputs = (x, w_in, w_out, gate_TK)
    _, pull = jax.vjp(lambda *a: grouped_swiglu(*a, plan), *inputs)
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    padded_rows = shape.tokens * shape.k + 15 * shape.num_experts
    pre_activations = padded_rows * 2 * shape.hidden * 4
    bookkeeping = sum(leaf.nbytes for leaf in jax.tree.leaves(plan)) + 64
    allowed = sum(a.nbytes for a in inputs) + pre_activations + bookkeeping
    assert saved <= allowed


def test_what_is_kept_is_flat_in_granularity():
    """At equal K * F: one expert of 64 is four of 16, but for the plan and gates."""

    def kept(K, F):
        T, D, E = 256, 32, 8
        structs = (
            jax.ShapeDtypeStruct((T, D), "bfloat16"),
            jax.ShapeDtypeStruct((E // 4 * K, D, 2, F), "bfloat16"),
            jax.ShapeDtypeStruct((E // 4 * K, F, D), "bfloat16"),
            jax.ShapeDtypeStruct((T, K), "float32"),
            jax.ShapeDtypeStruct((T, K), "int32"),
        )

        def residuals(x, w_in, w_out, gate, expert_TK):
            keep = jnp.ones(expert_TK.shape, bool)
            plan = make_plan(expert_TK, keep, w_in.shape[0])
            run = partial(grouped_glu, plan=plan, implementation="xla")
            return jax.vjp(run, x, w_in, w_out, gate)[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals, *structs))
        sizes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        slots, experts = T * K, E // 4 * K
        weights = 3 * experts * D * F * 2
        return sizes - weights - slots * (4 + 4 + 4) - (experts + 1) * 4, T * D * 2

    fine, inputs = kept(4, 16)
    coarse, _ = kept(1, 64)
    assert fine == coarse == inputs + 256 * 64 * 2 * 2


@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (0, jnp.ones((37, 6)), "model width.*6 from x.*5 from w_in"),
        (0, jnp.ones((36, 5)), "number of tokens.*36 from x.*37 from gate"),
        (1, jnp.ones((5, 5, 7)), r"w_in \[E, D, 2, F\]"),
        (1, jnp.ones((6, 5, 2, 7)), "number of experts.*6 from w_in.*5 from w_out"),
        (2, jnp.ones((5, 8, 5)), "hidden width.*7 from w_in.*8 from w_out"),
        (2, jnp.ones((5, 7, 5), jnp.bfloat16), "one dtype.*bfloat16"),
        (3, jnp.ones((37, 3)), "slots per token.*3 from gate.*2 from plan.row"),
        (3, jnp.ones((37, 2), jnp.bfloat16), "float32 gates"),
    ],
)
def test_errors_name_what_was_given(index, replacement, message):
    *arrays, _, expert_TK, keep_TK = draw(AWKWARD["prime"])
    arrays[index] = replacement
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(*arrays, make_plan(expert_TK, keep_TK, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation among silu, gelu, clamped; got 'relu'"),
        ({"buffer_rows": 0}, "buffer_rows >= 1; got 0"),
    ],
)
def test_errors_of_options(options, message):
    *arrays, _, expert_TK, keep_TK = draw(AWKWARD["prime"])
    with pytest.raises(ValueError, match=message):
        grouped_glu(*arrays, make_plan(expert_TK, keep_TK, 5), **options)
