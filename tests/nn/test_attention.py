"""Attention against a float64 loop; masks through gradients; the choice of kernels.

B batch · L length · D model width · H query heads · G key/value heads · A head width
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import attention as kernels
from moex.config.base import ConfigError, check
from moex.nn import attention, attention_blocks
from moex.nn.attention import Attention, attend, choose
from moex.nn.rope import frequencies, rotary
from tests.helpers import context, mesh_of, split_module
from tests.marks import slow, thorough_but_for
from tests.tolerances import assert_close

B, L, D = 2, 9, 8
THETA = 100.0


def arrays(seed=0, L=L, H=4, G=2, A=4, dtype="float32"):
    """(q_BLHA, k_BLGA, v_BLGA)."""
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, A), (B, L, G, A), (B, L, G, A))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


# The second row ends in padding.
SEGMENT = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 2, 2, 0, 0]])
POSITION = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0, 1, 0, 1]])


def loop(q_BLHA, k_BSGA, v_BSGA, segment, position):
    """One query and one head at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q_BLHA, k_BSGA, v_BSGA))
    H, A = q.shape[2:]
    y = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        g = h // (H // k.shape[2])
        seen = [
            j
            for j in range(k.shape[1])
            if segment[b, j] == segment[b, i] and position[b, j] <= position[b, i]
        ]
        score = k[b, seen, g] @ q[b, i, h] / np.sqrt(A)
        weight = np.exp(score - score.max())
        y[b, i, h] = weight / weight.sum() @ v[b, seen, g]
    return y


def run(q_BLHA, k_BSGA, v_BSGA, segment=SEGMENT, position=POSITION, name="einsum"):
    pairs = (jnp.asarray(segment),) * 2, (jnp.asarray(position),) * 2
    return attend(q_BLHA, k_BSGA, v_BSGA, *pairs, implementation=name)


@pytest.fixture(params=[4, 3, 9], ids=lambda rows: f"blocks of {rows}")
def block_rows(request, monkeypatch):
    """Rows per block; 9 is one block, and 4 leaves a last one of a single row."""
    monkeypatch.setattr(attention_blocks, "MIN_ROWS", request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_einsum_is_the_loop(dtype):
    q, k, v = arrays(dtype=dtype)
    y = run(q, k, v)
    assert y.dtype == q.dtype
    assert_close(y, loop(q, k, v, SEGMENT, POSITION), dtype)


@pytest.mark.parametrize("dtype", thorough_but_for(["float32", "bfloat16"], "float32"))
def test_blocks_are_the_loop(dtype, block_rows):
    q, k, v = arrays(dtype=dtype)
    y = run(q, k, v, name="blocks")
    assert y.dtype == q.dtype
    assert_close(y, loop(q, k, v, SEGMENT, POSITION), dtype)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@pytest.mark.parametrize(
    "G", [2, *(pytest.param(G, marks=pytest.mark.slow) for G in (1, 4))]
)
def test_gradients_of_blocks_are_those_of_the_einsum(dtype, G, block_rows):
    q, k, v = arrays(G=G, dtype=dtype)
    dy = arrays(seed=1, dtype=dtype)[0]

    def gradients(name, dtype):
        qkv = (a.astype(dtype) for a in (q, k, v))
        _, pull = jax.vjp(lambda *a: run(*a, name=name), *qkv)
        return pull(dy.astype(dtype))

    for a, b in zip(
        gradients("blocks", dtype), gradients("einsum", "float32"), strict=True
    ):
        assert a.dtype == dtype
        assert_close(a, b, "step" if dtype == "float32" else dtype)


def test_blocks_are_what_they_say(block_rows):
    parts = attention_blocks._blocks(L)
    assert [row for part in parts for row in range(L)[part]] == list(range(L))
    assert len(parts) == -(-L // attention_blocks.MIN_ROWS)


def test_blocks_refuse_a_cache():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="4 queries and 9 keys"):
        run(q[:, :4], k, v, name="blocks")


@pytest.mark.thorough
def test_blocks_keep_nothing_of_the_size_of_the_scores():
    """What the backward pass of 512 rows is given, in bytes over the inputs'."""
    q, k, v = arrays(L=512, H=2, G=2)
    rows = np.arange(512, dtype=np.int32)[None].repeat(B, 0)
    inputs = sum(a.nbytes for a in (q, k, v))
    kept = {}
    for name in ("einsum", "blocks"):
        _, pull = jax.vjp(
            lambda *a, name=name: run(*a, np.ones_like(rows), rows, name), q, k, v
        )
        kept[name] = sum(a.nbytes for a in jax.tree.leaves(pull)) / inputs
    assert kept["blocks"] < 2 < 20 < kept["einsum"]


def test_large_scores_and_queries_without_keys_stay_finite():
    q, k, v = arrays()
    segments = (jnp.asarray(SEGMENT), jnp.full_like(SEGMENT, -1))
    positions = (jnp.asarray(POSITION),) * 2
    y = attend(1e4 * q, k, v, segments, positions, implementation="einsum")
    assert jnp.all(jnp.isfinite(y))


@pytest.mark.parametrize("name", ["einsum", "blocks"])
def test_a_query_sees_its_own_document_up_to_itself_and_nothing_else(name, monkeypatch):
    """Through the gradient: which keys and values move output (b, i)?"""
    monkeypatch.setattr(attention_blocks, "MIN_ROWS", 4)
    q, k, v = arrays()
    f = jax.jit(lambda k, v: jnp.sum(run(q, k, v, name=name) ** 2, axis=(2, 3)))
    for gradient in jax.jacrev(f, argnums=(0, 1))(k, v):
        moves = np.any(np.asarray(gradient) != 0, axis=(4, 5))
        for b, i, c, j in np.ndindex(*moves.shape):
            seen = (
                b == c
                and SEGMENT[b, i] == SEGMENT[b, j]
                and POSITION[b, i] >= POSITION[b, j]
            )
            assert seen or not moves[b, i, c, j]
            # A lone key has weight 1 whatever it is, so only its value counts.
            if seen and POSITION[b, i] > 0:
                assert moves[b, i, c, j]


def test_grouped_queries_are_repeated_heads():
    q, k, v = arrays(H=6, G=3)
    repeated = (jnp.repeat(a, 2, axis=2) for a in (k, v))
    assert_close(run(q, k, v), run(q, *repeated), "order")


def test_rotary_keeps_norms_and_position_zero():
    x, _, _ = arrays()
    zero = jnp.zeros((B, L), jnp.int32)
    assert_close(rotary(x, zero, *frequencies(x.shape[-1], THETA)), x, "float32")
    y = rotary(x, jnp.asarray(POSITION), *frequencies(x.shape[-1], THETA))
    norms = (jnp.linalg.norm(a, axis=-1) for a in (x, y))
    assert_close(*norms, "float32")


def test_rotary_by_hand():
    # A = 4: angles position * (1, 1/10) for theta 100; pairs are (0, 2) and (1, 3).
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    y = rotary(x, jnp.array([[2]]), *frequencies(x.shape[-1], THETA))[0, 0, 0]
    expected = [np.cos(2.0), -np.sin(0.2), np.sin(2.0), np.cos(0.2)]
    assert_close(y, expected, "float32")


def test_rotary_scores_depend_on_the_distance_alone():
    q, k, _ = arrays(H=2, G=2)
    position = jnp.asarray(POSITION)

    def scores(shift):
        rotated = (
            rotary(a, position + shift, *frequencies(a.shape[-1], THETA))
            for a in (q, k)
        )
        return jnp.einsum("blha,bsha->bhls", *rotated)

    assert_close(scores(1000), scores(0), "step")  # angles of 1000 round to 6e-5


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_gradient_is_causal_and_documents_are_isolated(qk_norm):
    """The whole layer, with projections and rotary: d output / d input."""
    cfg = Attention(heads=4, kv_heads=2, qk_norm=qk_norm)
    graphdef, params, state = split_module(cfg.make(D, nnx.Rngs(params=0)))
    assert ("norm_q" in params) == qk_norm
    ctx = context(1, L, segment_BL=SEGMENT[:1], position_BL=POSITION[:1])
    x_LD = jax.random.normal(jax.random.key(1), (L, D))

    def run(x_LD):
        layer = nnx.merge(graphdef, params, state)
        return jnp.sum(layer(x_LD[None], ctx, None)[0][0], axis=-1)

    moves_LL = np.any(np.asarray(jax.jit(jax.jacrev(run))(x_LD)) != 0, axis=-1)
    same_LL = SEGMENT[0][:, None] == SEGMENT[0][None]
    np.testing.assert_array_equal(moves_LL, np.tril(same_LL))


def test_layer_shapes_and_explicit_head_width():
    cfg = Attention(heads=4, kv_heads=2, head_dim=6)
    layer = cfg.make(D, nnx.Rngs(params=0))
    assert layer.w_q_DGRA[...].shape == (D, 2, 2, 6)
    assert layer.w_kv_D2GA[...].shape == (D, 2, 2, 6)
    x = jax.ShapeDtypeStruct((B, L, D), jnp.bfloat16)
    y, cache = jax.eval_shape(lambda x: layer(x, context(B, L), None), x)
    assert (y.shape, y.dtype, cache) == (x.shape, x.dtype, None)


@pytest.mark.parametrize(
    ("backend", "dtype", "L", "A", "cached", "expected"),
    [
        ("cpu", "bfloat16", 128, 128, False, "blocks"),
        ("cpu", "float32", 128, 64, False, "native"),
        ("cpu", "float32", 1, 64, True, "einsum"),
        ("gpu", "bfloat16", 100, 64, False, "cudnn"),
        ("gpu", "bfloat16", 1, 64, True, "cudnn"),
        ("gpu", "float32", 128, 64, False, "einsum"),
        ("gpu", "bfloat16", 128, 256, False, "einsum"),
        ("gpu", "float16", 128, 20, False, "einsum"),
        ("tpu", "float32", 256, 128, False, "splash"),
        ("tpu", "bfloat16", 256, 128, True, "einsum"),
        ("tpu", "bfloat16", 130, 128, False, "einsum"),
        ("tpu", "bfloat16", 128, 64, False, "einsum"),
    ],
)
def test_choice_by_platform(monkeypatch, backend, dtype, L, A, cached, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # Whether or not this machine has a C compiler.
    c = backend == "cpu" and dtype == "float32"
    monkeypatch.setattr(kernels, "computes_in_c", lambda *_: c)
    q = jax.ShapeDtypeStruct((1, L, 2, A), dtype)
    assert choose(None, q, cached=cached) == expected
    assert choose("einsum", q, cached=cached) == "einsum"


def test_unknown_implementation():
    with pytest.raises(ConfigError, match="Did you mean 'splash'"):
        choose("splahs", jnp.zeros((1, 1, 1, 2)), cached=False)


def test_splash_lowers_for_tpu_with_gradient():
    """Ahead of time, without a TPU: the kernel takes our shapes and segments."""
    q, k, v = (
        jax.ShapeDtypeStruct((1, 128, heads, 128), jnp.bfloat16) for heads in (2, 1, 1)
    )
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(q, k, v, segment, position):
        pairs = (segment, segment), (position, position)
        y = attend(q, k, v, *pairs, implementation="splash")
        return jnp.sum(y.astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    lowered = step.trace(q, k, v, ids, ids).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.fixture
def interpreted_splash(monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )

    make = kernel.make_splash_mha
    monkeypatch.setattr(
        kernel, "make_splash_mha", lambda *a, **k: make(*a, **k, interpret=True)
    )


@pytest.mark.thorough
def test_splash_is_the_mask_of_attend(interpreted_splash):
    """The kernel itself, interpreted on CPU, against the einsum."""
    q, k, v = arrays(L=128, H=2, G=1, A=128)
    segment = np.repeat([[1, 2, 3], [1, 1, 0]], [50, 50, 28], axis=1).astype(np.int32)
    position = np.arange(128)[None] - np.repeat([[0, 50, 100]] * 2, [50, 50, 28], 1)
    position[1, :100] = np.arange(100)
    args = (jnp.asarray(segment),) * 2, (jnp.asarray(position, jnp.int32),) * 2
    y = attend(q, k, v, *args, implementation="splash")
    assert_close(y, attend(q, k, v, *args, implementation="einsum"), "step")


@pytest.mark.thorough
def test_splash_on_a_mesh_is_the_same(interpreted_splash):
    """Split over rows, heads and queries; keys of a later device's queries too."""
    q, k, v = arrays(L=256, H=4, G=2, A=128)
    segment = np.repeat([[1, 2], [1, 0]], [100, 156], axis=1).astype(np.int32)
    position = np.where(np.arange(256) < 100, np.arange(256), np.arange(256) - 100)
    position = jnp.asarray(np.stack([position] * 2), jnp.int32)
    args = (jnp.asarray(segment),) * 2, (position,) * 2

    def run(name):
        return jax.jit(lambda q, k, v: attend(q, k, v, *args, implementation=name))

    expected = run("einsum")(q, k, v)
    with jax.set_mesh(mesh_of(8, data=2, seq=2, tensor=2)):
        y = run("splash")(q, k, v)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 128, 2, 128)}
    assert_close(y[0], expected[0], "step")
    assert_close(y[1, :100], expected[1, :100], "step")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 0}, "heads = 0: must be at least 1"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads = 3: must be a divisor of heads = 4"),
        ({"heads": 4, "head_dim": 5}, "head_dim = 5: must be an even number"),
        ({"heads": 4, "rope_theta": 1.0}, "rope_theta = 1.0: must be above 1"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(Attention(**fields), "config.model.attention")


def test_the_implementations_are_these():
    assert attention.IMPLEMENTATIONS == (
        "einsum",
        "blocks",
        "native",
        "cudnn",
        "splash",
    )
