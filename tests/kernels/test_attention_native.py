"""Attention in C beside a float64 softmax and the einsum's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention import attend_in_c
from kernels_pallas.device import platform
from kernels_pallas.native import library
from moex.nn.attention import attend

pytestmark = pytest.mark.skipif(
    platform() != "cpu" or library.why_not() is not None, reason="no C compiler"
)


def arrays(B, L, H, G, A, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((H, A), (G, A), (G, A), (H, A))
    return [rng.normal(size=(B, L, *s)).astype(np.float32) for s in sizes]


def packed(B, L, seed):
    """(segment, position) of documents of random lengths, with padding at the end."""
    rng = np.random.default_rng(seed)
    segment, position = np.zeros((2, B, L), np.int32)
    for b in range(B):
        start, number = 0, 1
        end = rng.integers(1, L + 1)
        while start < end:
            stop = min(start + rng.integers(1, L + 1), end)
            segment[b, start:stop] = number
            position[b, start:stop] = np.arange(stop - start)
            start, number = stop, number + 1
    return segment, position


def in_float64(q, k, v, segment, position):
    """(y, log-normaliser) of every query by itself; 0 at padding."""
    B, L, H, A = q.shape
    R = H // k.shape[2]
    y = np.zeros((B, L, H, A))
    for b in range(B):
        for i in np.flatnonzero(segment[b]):
            same = segment[b] == segment[b, i]
            seen = np.flatnonzero(same & (position[b] <= position[b, i]))
            for h in range(H):
                keys, values = (a[b, seen, h // R].astype(np.float64) for a in (k, v))
                score = keys @ q[b, i, h].astype(np.float64) / A**0.5
                weight = np.exp(score - score.max())
                y[b, i, h] = weight @ values / weight.sum()
    return y


def gradients(f, q, k, v, dy):
    return jax.jit(lambda *a: jax.vjp(f, *a)[1](jnp.asarray(dy)))(q, k, v)


@settings(max_examples=20, deadline=None)
@given(
    L=st.integers(1, 140),
    R=st.integers(1, 3),
    A=st.sampled_from([2, 8, 24, 64]),
    seed=st.integers(0, 999),
)
def test_it_is_the_softmax_within_segments(L, R, A, seed):
    q, k, v, _ = arrays(2, L, 2 * R, 2, A, seed)
    segment, position = packed(2, L, seed)
    got = np.asarray(jax.jit(attend_in_c)(q, k, v, segment, position))
    assert np.isfinite(got).all()
    valid = segment[..., None, None] > 0
    wanted = in_float64(q, k, v, segment, position)
    np.testing.assert_allclose(got * valid, wanted, atol=3e-6)


@pytest.mark.parametrize(
    ("L", "H", "G", "A"),
    [(1, 2, 2, 8), (63, 2, 1, 24), (300, 4, 2, 16), (570, 3, 1, 8)],
)
def test_its_gradients_are_those_of_the_einsum(L, H, G, A):
    q, k, v, dy = arrays(2, L, H, G, A, seed=L)
    segment, position = packed(2, L, seed=L)
    dy = dy * (segment > 0)[..., None, None]
    places = ((segment, segment), (position, position))

    def plain(q, k, v):
        return attend(q, k, v, *places, implementation="einsum")

    def native(q, k, v):
        return attend_in_c(q, k, v, segment, position)

    for got, wanted in zip(
        gradients(native, q, k, v, dy), gradients(plain, q, k, v, dy), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-4)


def test_blocks_of_few_queries_change_nothing():
    """A row so long that its scores come in many blocks of one panel."""
    L = 9000
    q, k, v, _ = arrays(1, L, 1, 1, 4)
    segment = np.ones((1, L), np.int32)
    position = np.arange(L, dtype=np.int32)[None]
    got = np.asarray(jax.jit(attend_in_c)(q, k, v, segment, position))[0, :, 0]
    for i in (0, 63, 64, 4321, L - 1):
        score = k[0, : i + 1, 0].astype(np.float64) @ q[0, i, 0] / 2
        weight = np.exp(score - score.max())
        wanted = weight @ v[0, : i + 1, 0] / weight.sum()
        np.testing.assert_allclose(got[i], wanted, atol=3e-6)


def test_large_scores_neither_overflow_nor_hide_what_is_not_a_number():
    q, k, v, _ = arrays(1, 40, 1, 1, 8)
    segment, position = np.ones((1, 40), np.int32), np.arange(40, dtype=np.int32)[None]
    sharp = attend_in_c(1e4 * q, k, v, segment, position)
    wanted = in_float64(1e4 * q, k, v, segment, position)
    np.testing.assert_allclose(sharp, wanted, atol=1e-3)
    k[0, 7, 0, 0] = np.nan
    y = np.asarray(attend_in_c(q, k, v, segment, position))[0, :, 0]
    assert np.isfinite(y[:7]).all() and np.isnan(y[7:]).all()


def test_nothing_of_the_size_of_the_scores_is_kept():
    L = 512
    q, k, v, _ = arrays(1, L, 1, 1, 4)
    segment, position = np.ones((1, L), np.int32), np.arange(L, dtype=np.int32)[None]

    def pull(*a):
        return jax.vjp(lambda *b: attend_in_c(*b, segment, position), *a)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, q, k, v))
    assert sum(leaf.size for leaf in kept) < 20 * L


def test_values_may_have_a_width_of_their_own():
    q, k, v, _ = arrays(2, 90, 4, 2, 8)
    wide = np.concatenate([v, 2 * v, v[..., :4]], axis=-1)
    segment, position = packed(2, 90, seed=5)
    narrow = attend_in_c(q, k, v, segment, position)
    got, pull = jax.vjp(lambda v: attend_in_c(q, k, v, segment, position), wide)
    np.testing.assert_allclose(got[..., :8], narrow, atol=1e-6)
    np.testing.assert_allclose(got[..., 8:16], 2 * narrow, atol=2e-6)
    (dv,) = pull(jnp.ones_like(got))
    np.testing.assert_allclose(dv[..., :1] + 0 * dv, dv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["k", "v", "segment", "heads"])
def test_shapes_that_do_not_fit_are_refused(change):
    q, k, v, _ = arrays(1, 8, 4, 2, 4)
    segment = position = np.ones((1, 8), np.int32)
    k = k[..., :2] if change == "k" else k
    v = v[:, :, :1] if change == "v" else v
    segment = segment[:, :4] if change == "segment" else segment
    q = q[:, :, :3] if change == "heads" else q
    with pytest.raises(ValueError, match="shapes .* are not those of q_BLHA"):
        attend_in_c(q, k, v, segment, position)


def test_keys_of_a_cache_and_other_dtypes_are_refused():
    q, k, v, _ = arrays(1, 8, 1, 1, 4)
    places = np.ones((2, 1, 4), np.int32)
    with pytest.raises(ValueError, match="queries' own rows; got 4 queries and 8 keys"):
        attend_in_c(q[:, :4], k, v, *places)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    with pytest.raises(ValueError, match="float32 and int32"):
        attend_in_c(*map(jnp.asarray, half), *np.ones((2, 1, 8), np.int32))
