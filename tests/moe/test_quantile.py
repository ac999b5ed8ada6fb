"""Quantile balancing against float64 loops; on meshes: `train/test_quantile_step.py`.

T tokens · E experts · B bins
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, ConfigWarning, check
from moex.moe.balance import QuantileBias, bias_rule
from moex.moe.quantile import BINS, balancing_bias, bins_of, margin_counts, quantiles
from moex.moe.routers.topk import Groups, TopK
from tests.helpers import context
from tests.marks import thorough

COUNTS = jax.jit(margin_counts, static_argnums=4)
QUANTILES = jax.jit(lambda count_EB, k: quantiles(count_EB, k), static_argnums=1)
BALANCING = jax.jit(balancing_bias, static_argnums=(2, 3))


def bits(array) -> bytes:
    return np.asarray(array).tobytes()


def skewed(T, E, seed=0):
    """(sigmoid scores [T, E] with favourites, a bias [E]), float32."""
    rng = np.random.default_rng(seed)
    logit_TE = rng.normal(size=(T, E)) + 2 * rng.normal(size=E)
    bias_E = 0.3 * rng.normal(size=E)
    return (
        (1 / (1 + np.exp(-logit_TE))).astype(np.float32),
        (bias_E - bias_E.mean()).astype(np.float32),
    )


def margins(score_TE, bias_E, k):
    """float64 margins by a loop over tokens, and the cutoffs as float32."""
    margin_TE, cutoff_T = np.empty(score_TE.shape), np.empty(len(score_TE), np.float32)
    for t, score_E in enumerate(score_TE):
        cutoff_T[t] = sorted(score_E + bias_E)[-k - 1]
        margin_TE[t] = np.float64(cutoff_T[t]) - score_E
    return margin_TE, cutoff_T


@pytest.mark.parametrize("span", [1.0, 4.0])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.4, 30.0])
def test_bins_reach_over_every_margin(span, spread):
    rng = np.random.default_rng(0)
    for _ in range(20):
        bias_E = (spread * rng.normal(size=8)).astype(np.float32)
        first, width = (float(a[0]) for a in bins_of(jnp.array(bias_E), span))
        low, high = bias_E.min() - span, bias_E.max() + span
        assert first * width <= low and high < (first + BINS) * width
        assert np.log2(width) % 1 == 0
        assert width <= 2 * (high - low) / (BINS - 2)


@pytest.mark.thorough
@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (333, 8, 2), (333, 8, 7)])
def test_a_quantile_is_within_a_bin_of_the_exact_one(T, E, k):
    score_TE, bias_E = skewed(T, E, seed=T)
    margin_TE, cutoff_T = margins(score_TE, bias_E, k)
    valid_T = np.random.default_rng(1).random(T) < 0.8
    valid_T[0] = True
    count_EB = COUNTS(cutoff_T, score_TE, valid_T, jnp.array(bias_E), 1.0)
    assert count_EB.dtype == jnp.int32
    assert np.all(np.sum(count_EB, axis=1) == valid_T.sum())
    first, width = bins_of(jnp.array(bias_E), 1.0)
    place_E, parts = QUANTILES(count_EB, k)
    actual_E = (np.float64(place_E) / parts + float(first[0])) * float(width[0])
    real_TE = margin_TE[valid_T]
    exact_E = np.quantile(real_TE, k / E, axis=0, method="inverted_cdf")
    assert np.max(abs(actual_E - exact_E)) <= width[0]
    bias_next_E = BALANCING(count_EB, jnp.array(bias_E), k, 1.0)
    wanted_E = exact_E - exact_E.mean()
    assert np.max(abs(bias_next_E - wanted_E)) <= 2 * width[0]
    assert abs(np.mean(np.float64(bias_next_E))) < 1e-6


def test_the_rank_is_exact_up_to_two_billion_tokens():
    """k tokens / E would not fit: 6 * 2147483647."""
    E, k, tokens = 12, 6, 2**31 - 1
    rank = -(-k * tokens // E)
    count_EB = np.zeros((E, BINS), np.int32)
    count_EB[:, 10], count_EB[:, 20] = rank, tokens - rank
    count_EB[1, 10:12] = rank - 1, 1
    place_E, parts = QUANTILES(jnp.array(count_EB), k)
    assert (np.asarray(place_E) // parts).tolist() == [10, 11] + [10] * 10


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_counts_of_parts_add_up_and_their_quantiles_do_not(parts):
    score_TE, bias_E = skewed(240, 8)
    score_TE = score_TE[np.argsort(score_TE[:, 0])]  # parts of different kinds
    _, cutoff_T = margins(score_TE, bias_E, 2)

    def counts(pick):
        valid_T = jnp.ones(len(cutoff_T[pick]), bool)
        return COUNTS(cutoff_T[pick], score_TE[pick], valid_T, bias_E, 1.0)

    each = [counts(slice(i, i + 240 // parts)) for i in range(0, 240, 240 // parts)]
    whole = BALANCING(counts(slice(None)), bias_E, 2, 1.0)
    assert bits(BALANCING(sum(each), bias_E, 2, 1.0)) == bits(whole)
    mean_E = np.mean([BALANCING(c, bias_E, 2, 1.0) for c in each], axis=0)
    assert np.max(abs(mean_E - whole)) > 0.02


def test_the_rule_by_hand():
    """Margins of expert 0 all in bin 8, of expert 1 in bin 2; a bin is 1/1024 wide."""
    count_EB = jnp.zeros((2, BINS), jnp.int32).at[[0, 1], [8, 2]].set(5)
    stats, bias_E = {"margin_EB": count_EB}, jnp.array([0.25, -0.25])
    rule = jax.jit(QuantileBias(1.0, 1, 1.0))
    np.testing.assert_allclose(rule(bias_E, stats, 0), [3 / 1024, -3 / 1024])
    half = jax.jit(QuantileBias(0.5, 1, 1.0))(bias_E, stats, 0)
    np.testing.assert_allclose(half, [0.125 + 1.5 / 1024, -0.125 - 1.5 / 1024])
    stacked = rule(jnp.stack([bias_E] * 3), {"margin_EB": jnp.stack([count_EB] * 3)}, 0)
    assert bits(stacked[1]) == bits(rule(bias_E, stats, 0))
    nothing = {"margin_EB": jnp.zeros_like(count_EB)}
    assert bits(rule(bias_E, nothing, 0)) == bits(bias_E)


def quantile_router(k=2, **fields):
    defaults = {"score": "sigmoid", "bias_rule": "quantile", "bias_rate": 1.0}
    return TopK(**{"k": k, "init_std": 0.7} | defaults | fields)


def summed(cfg, num_experts, **fields):
    """{name: shape} of what the router reports for its state."""
    module = nnx.eval_shape(lambda: cfg.make(6, num_experts, nnx.Rngs(params=0)))
    graphdef, arrays = nnx.split(module)

    def route(arrays):
        x_TD = jnp.zeros((12, 6))
        return nnx.merge(graphdef, arrays)(x_TD, context(1, 12, **fields)).sums

    return {k: v.shape for k, v in jax.eval_shape(route, arrays).items()}


def test_all_experts_and_other_than_training_count_nothing():
    assert summed(quantile_router(), 4) == {"margin_EB": (4, BINS)}
    assert summed(quantile_router(k=4), 4) == {}
    for mode in ("eval", "decode"):
        assert summed(quantile_router(), 4, mode=mode) == {}
    rule = bias_rule("quantile", 1.0, 4, "sigmoid")
    bias_E = jnp.arange(4.0)
    assert rule(bias_E, {"load_E": jnp.ones(4)}, 0) is bias_E


PADDING = 100  # tokens at the end of a batch, of another kind


def exact_path(cfg, w_DE, batches):
    """Max load / mean load - 1 of each step, all in float64 with exact quantiles."""
    bias_E, found = np.zeros(w_DE.shape[1]), []
    scores = {
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True),
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }
    for x_TD in batches:
        score_TE = scores[cfg.score](np.float64(x_TD[:-PADDING]) @ w_DE)
        order_TE = np.argsort(-(score_TE + bias_E), axis=1)
        load_E = np.bincount(order_TE[:, : cfg.k].ravel(), minlength=len(bias_E))
        found.append(load_E.max() / load_E.mean() - 1)
        margin_TE, _ = margins(score_TE, bias_E, cfg.k)
        next_E = np.quantile(
            margin_TE, cfg.k / len(bias_E), axis=0, method="inverted_cdf"
        )
        next_E -= next_E.mean()
        bias_E = cfg.bias_rate * next_E + (1 - cfg.bias_rate) * bias_E
    return np.array(found)


def path(cfg, module, batches):
    """The same of the router and its rule."""
    rule = module.bias_E.get_metadata()["rule"]
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    bias_E, found = module.bias_E[...], []

    @jax.jit
    def step(bias_E, x_TD):
        moved = jax.tree.map(lambda _: bias_E, state)
        ctx = context(1, len(x_TD), num_padding=PADDING)
        routing = nnx.merge(graphdef, params, moved)(x_TD, ctx)
        return rule(bias_E, routing.sums, 0), routing.expert_TK

    for x_TD in batches:
        bias_E, expert_TK = map(np.asarray, step(bias_E, x_TD))
        load_E = np.bincount(expert_TK[:-PADDING].ravel(), minlength=len(bias_E))
        found.append(load_E.max() / load_E.mean() - 1)
    return np.array(found)


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({}, 0.15),
        thorough({"score": "softmax"}, 0.15),
        ({"score": "sqrt_softplus", "bias_rate": 0.5}, 0.3),
        ({"groups": Groups(num=4, keep=2, score="top2")}, 0.6),
    ],
    ids=str,
)
def test_a_router_with_favourites_is_balanced_as_by_exact_quantiles(fields, last):
    cfg = quantile_router(**fields)
    module = cfg.make(6, 8, nnx.Rngs(params=0))
    rng = np.random.default_rng(0)
    mean_D = 1.5 * rng.normal(size=6)
    batches = (rng.normal(size=(12, 2048, 6)) + mean_D).astype(np.float32)
    batches[:, -PADDING:] = -5 * mean_D
    found = path(cfg, module, batches)
    assert found[0] > 0.9
    assert np.mean(found[-3:]) < last, found
    if cfg.groups is None:
        exact = exact_path(cfg, np.float64(module.w_DE[...]), batches)
        assert np.max(abs(found - exact)) < 0.06, (found, exact)


@pytest.mark.parametrize("rate", [1.5, 7.0])
def test_a_quantile_rate_above_one_is_refused(rate):
    with pytest.raises(ConfigError, match=rf"bias_rate = {rate}: must be at most 1"):
        check(quantile_router(bias_rate=rate), "router")


def test_a_quantile_rule_that_never_moves_is_cautioned():
    with pytest.warns(ConfigWarning, match=r"router.bias_rate = 0: .*set 1.0"):
        check(quantile_router(bias_rate=0.0), "router")
