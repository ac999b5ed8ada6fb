"""Windows, sinks, rotary extensions and latent attention against float64 loops.

Packed documents and padding, which no fixture of transformers has (`tests/interop` has
the whole families).

B batch · L length · D model width · H query heads · G key/value heads · A head width
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.nn.attention import Attention, attend, choose, mean_visible
from moex.nn.context import Context
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.rope import Linear, Llama3, Yarn, frequencies, rotary
from moex.nn.stack import Segment
from tests.helpers import split_module, tiny_lm
from tests.marks import thorough_but_for
from tests.nn.test_attention import POSITION, SEGMENT, arrays
from tests.tolerances import assert_close

B, L, D = 2, 9, 16


def ctx(**fields):

    return Context(
        segment_BL=jnp.asarray(SEGMENT),
        position_BL=jnp.asarray(POSITION),
        token_BL=jnp.zeros((B, L), jnp.int32),
        **fields,
    )


def mixed(q, k, v, *, scale, window=None, sink=None):
    """Attention, one query and one head at a time; q and k are rotated already."""
    H = q.shape[2]
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        g = h // (H // k.shape[2])
        seen = [
            j
            for j in range(k.shape[1])
            if SEGMENT[b, j] == SEGMENT[b, i]
            and 0 <= POSITION[b, i] - POSITION[b, j] < (window or 1000)
        ]
        score = scale * (k[b, seen, g] @ q[b, i, h])
        weight = np.exp(score)
        total = weight.sum() + (0 if sink is None else math.exp(sink[h]))
        y[b, i, h] = weight / total @ v[b, seen, g]
    return y


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("width", [4, 6])
def test_windows_sinks_and_wide_values(window, sinks, width):
    q, k, _ = (np.asarray(a) for a in arrays())
    v = np.random.default_rng(5).normal(size=(*k.shape[:3], width))
    sink = np.array([0.5, -1.0, 2.0, 0.0]) if sinks else None
    pairs = (jnp.asarray(SEGMENT),) * 2, (jnp.asarray(POSITION),) * 2
    y = attend(
        *(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v, jnp.float32)),
        *pairs,
        implementation="einsum",
        scale=0.3,
        window=window,
        sink_H=None if sink is None else jnp.asarray(sink, jnp.float32),
    )
    want = mixed(
        *(np.float64(a) for a in (q, k, v)), scale=0.3, window=window, sink=sink
    )
    assert_close(y, want, "float32")


def turned(x_BLHA, theta, scaling=None, interleaved=False):
    """Pairs turned one by one, as complex numbers in float64."""
    half = x_BLHA.shape[-1] // 2
    frequency, magnitude = frequencies(2 * half, theta, scaling)
    pairs = (
        x_BLHA[..., ::2] + 1j * x_BLHA[..., 1::2]
        if interleaved
        else x_BLHA[..., :half] + 1j * x_BLHA[..., half:]
    )
    angle = POSITION[:, :, None, None] * np.float64(frequency)
    pairs = pairs * np.exp(1j * angle) * magnitude
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved):
    x, scaling = np.asarray(arrays()[0]), Yarn(factor=4.0, original=16)
    rope = frequencies(x.shape[-1], 100.0, scaling)
    y = rotary(jnp.asarray(x), jnp.asarray(POSITION), *rope, interleaved)
    assert_close(y, turned(np.float64(x), 100.0, scaling, interleaved), "float32")


def test_frequencies_of_extensions():
    """By hand, and the ends: quick pairs stay, slow ones are divided by the factor."""
    plain, _ = frequencies(8, 10_000.0)
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    halved, magnitude = frequencies(8, 10_000.0, Linear(factor=2.0))
    np.testing.assert_allclose(halved, np.array(plain) / 2, rtol=1e-6)
    assert magnitude == 1
    # Turns within 1000 tokens: 159, 15.9, 1.59, 0.159; between 1 and 4 both are mixed.
    llama, _ = frequencies(8, 10_000.0, Llama3(factor=8.0, original=1000))
    kept = (1000 * 0.01 / (2 * math.pi) - 1) / 3
    third = 0.01 * (kept + (1 - kept) / 8)
    np.testing.assert_allclose(llama, [1, 0.1, third, 0.001 / 8], rtol=1e-6)
    yarn, magnitude = frequencies(64, 10_000.0, Yarn(factor=40.0, original=4096))
    plain, _ = frequencies(64, 10_000.0)
    assert magnitude == pytest.approx(0.1 * math.log(40) + 1)
    np.testing.assert_allclose(yarn[:10], plain[:10], rtol=1e-6)
    np.testing.assert_allclose(yarn[-8:], np.array(plain[-8:]) / 40, rtol=1e-6)
    assert np.all(np.diff(yarn) < 0)


@pytest.mark.thorough
@pytest.mark.parametrize("whole", [True, "whole"])
def test_layer_with_everything(whole):
    """Biases, norms of both kinds, clip, window and sinks in one layer."""
    cfg = Attention(
        heads=4,
        kv_heads=2,
        qk_norm=whole,
        bias=True,
        clip=0.8,
        window=2,
        sinks=True,
        rope_scaling=Linear(factor=2.0),
    )
    layer = cfg.make(D, nnx.Rngs(params=0))
    graphdef, params, state = split_module(layer)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype("float32"), params)
    x = rng.normal(size=(B, L, D)).astype("float32")
    y, _ = nnx.merge(graphdef, params, state)(jnp.asarray(x), ctx(), None)
    p = jax.tree.map(np.float64, params)
    q = np.einsum("bld,dgra->blgra", x, p["w_q_DGRA"]) + p["bias_q_GRA"]
    kv = np.einsum("bld,dcga->blcga", x, p["w_kv_D2GA"]) + p["bias_kv_2GA"]
    q, k, v = q.reshape(B, L, 4, 4), kv[:, :, 0], kv[:, :, 1]

    def norm(a, scale):
        flat = a.reshape(B, L, -1) if whole == "whole" else a
        flat = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + 1e-6)
        return (flat * scale).reshape(a.shape)

    q, k = norm(q, p["norm_q"]["scale_D"]), norm(k, p["norm_k"]["scale_D"])
    q, k, v = (np.clip(a, -0.8, 0.8) for a in (q, k, v))
    rope = (10_000.0, Linear(factor=2.0))
    mix = mixed(
        *(turned(q, *rope), turned(k, *rope), v),
        scale=0.5,
        window=2,
        sink=p["sink_GR"].reshape(-1),
    )
    mix = mix.reshape(B, L, 2, 2, 4)
    want = np.einsum("blgra,grad->bld", mix, p["w_out_GRAD"]) + p["bias_out_D"]
    assert_close(y, want, "float32")


LATENT = LatentAttention(
    heads=2,
    kv_latent=6,
    nope_dim=4,
    rope_dim=4,
    v_dim=5,
    score_scale=1.3,
    rope_scaling=Yarn(factor=4.0, original=16),
)


def latent(q_latent):
    cfg = LatentAttention(**{f: getattr(LATENT, f) for f in LATENT.__slots__})
    cfg.q_latent = q_latent
    graphdef, params, state = split_module(cfg.make(D, nnx.Rngs(params=0)))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
    return cfg, nnx.merge(graphdef, params, state), jax.tree.map(np.float64, params), x


@pytest.mark.parametrize("q_latent", thorough_but_for([None, 7], 7))
def test_latent_attention_is_its_equations(q_latent):
    cfg, layer, p, x = latent(q_latent)
    y, _ = layer(x, ctx(), None)
    x = np.float64(x)

    def norm(a, scale):
        return a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + 1e-6) * scale

    if q_latent is None:
        q = np.einsum("bld,dhc->blhc", x, p["w_q_DHC"])
    else:
        latent_q = norm(x @ p["w_qa_DQ"], p["norm_q"]["scale_D"])
        q = np.einsum("blq,qhc->blhc", latent_q, p["w_qb_QHC"])
    c = x @ p["w_kva_DC"]
    kv = np.einsum(
        "blz,zhc->blhc", norm(c[..., :6], p["norm_kv"]["scale_D"]), p["w_kvb_ZHC"]
    )
    rope = (10_000.0, cfg.rope_scaling, True)
    q = np.concatenate([q[..., :4], turned(q[..., 4:], *rope)], axis=-1)
    k_rope = turned(c[:, :, None, 6:], *rope).repeat(2, axis=2)
    k = np.concatenate([kv[..., :4], k_rope], axis=-1)
    mix = mixed(q, k, kv[..., 4:], scale=1.3 / math.sqrt(8))
    assert_close(y, np.einsum("blhv,hvd->bld", mix, p["w_out_HVD"]), "float32")


@pytest.mark.thorough
def test_one_token_with_latents_as_keys_is_the_same_as_grown_keys():
    """The step of decoding never grows the keys of the cache."""
    cfg, layer, _, x = latent(None)
    segment = jnp.ones((B, L), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(L), (B, L))

    def step(start, length, cache):
        some = slice(start, start + length)

        own = Context(
            segment_BL=segment[:, some],
            position_BL=position[:, some],
            token_BL=segment[:, some],
            key_segment_BS=jnp.where(position < start + length, 1, -1),
            key_position_BS=position,
            cache_index=jnp.int32(start),
            mode="decode",
        )
        return layer(x[:, some], own, cache)

    empty = cfg.init_cache(D, B, L, jnp.float32)
    assert {a.shape[-1] for a in jax.tree.leaves(empty)} == {6, 4}
    whole, _ = step(0, L, empty)
    y, cache = step(0, L - 2, empty)
    for i in (L - 2, L - 1):
        one, cache = step(i, 1, cache)
        y = jnp.concatenate([y, one], axis=1)
    assert_close(y, whole, "float32")


def test_only_the_einsum_does_windows():
    q = jnp.zeros((1, 4, 2, 4))
    assert choose(None, q, cached=False, plain=False) == "einsum"
    with pytest.raises(ConfigError, match="'blocks': must be one of 'einsum'"):
        choose("blocks", q, cached=False, plain=False)


def test_mean_visible():
    """A triangle; with a window a smaller one and a band."""
    assert mean_visible(8) == mean_visible(8, 8) == 4
    assert mean_visible(8, 2) == (2 + 6 * 2) / 8


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Attention(heads=2, qk_norm="all"), "qk_norm = 'all': must be False, True or"),
        (Attention(heads=2, window=0), "window = 0: must be above 0"),
        (Attention(heads=2, clip=-1.0), "clip = -1.0: must be above 0"),
        (
            Attention(heads=2, rope_scaling=Yarn(factor=0.5, original=9)),
            "rope_scaling.factor = 0.5: must be >= 1",
        ),
        (
            LatentAttention(heads=2, kv_latent=0, nope_dim=4, rope_dim=4, v_dim=4),
            "kv_latent = 0: must be at least 1",
        ),
        (
            LatentAttention(heads=2, kv_latent=4, nope_dim=4, rope_dim=3, v_dim=4),
            "rope_dim = 3: must be an even number",
        ),
    ],
)
def test_refusals(cfg, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny_lm(Segment(pattern=(Dense(hidden=8),)), attention=cfg), "config")


def test_a_segment_names_an_attention_for_each_block():
    own = (Attention(heads=2, window=3),)
    segment = Segment(pattern=(Dense(hidden=8), Dense(hidden=8)), attention=own)
    with pytest.raises(ConfigError, match="one attention for each of the 2 blocks"):
        check(tiny_lm(segment), "config")
    segment = Segment(pattern=(Dense(hidden=8),), attention=(Dense(hidden=8),))
    with pytest.raises(ConfigError, match="'Dense': must be an attention config"):
        check(tiny_lm(segment), "config")
