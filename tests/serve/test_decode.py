"""Cached generation against the full forward pass, and the sampling rule by hand.

B batch · L length · V vocabulary
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.native import library
from moex.adapters.lora import LoRA
from moex.model import decode
from moex.model.decode import generate, sample
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.zero import Zero
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import VOCAB, XLA, built, context, split_module, tiny_lm, tiny_moe
from tests.marks import thorough, thorough_but_for
from tests.tolerances import assert_close

PROMPT_LENGTHS = (1, 5, 16)
NEW = 6
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "compute": XLA}
MODELS = {
    "dense": tiny_lm(
        Segment(pattern=(Dense(hidden=24),), repeat=2),
        attention=Attention(heads=2),
        tied_embeddings=True,
    ),
    "moe, grouped queries, qk norm": tiny_lm(),
    "two kinds of experts, biases, zero-computation experts": tiny_lm(
        Segment(
            pattern=(
                tiny_moe(experts=Glu(hidden=8, bias=True), zero=Zero(null=1, copy=1)),
                tiny_moe(
                    5,
                    experts=Latent(hidden=8, latent=4, group=2),
                    stored_experts=3,
                    shared=None,
                ),
            ),
            repeat=2,
        )
    ),
    "adapters": tiny_lm(
        adapter=LoRA(rank=2, alpha=2.0, targets=("attention", "experts", "w_embed"))
    ),
}


QUICK_MODEL = "two kinds of experts, biases, zero-computation experts"


@pytest.fixture(scope="module", params=thorough_but_for(MODELS, QUICK_MODEL))
def model(request):
    """(cfg, arguments of `generate` that come first, prompts, their greedy ends)."""
    cfg = MODELS[request.param]
    spec, params, state = built(cfg)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in PROMPT_LENGTHS]
    args = (spec, cfg, params, state)
    return args, prompts, generate(*args, prompts, **GREEDY)


def test_greedy_is_the_argmax_of_the_full_forward(model):
    (spec, _, params, state), prompts, ends = model
    rows = [p + e for p, e in zip(prompts, ends, strict=True)]
    token_BL = jnp.array([r + [0] * (32 - len(r)) for r in rows], jnp.int32)
    length_B1 = jnp.array([[len(r)] for r in rows])
    position_BL = jnp.broadcast_to(jnp.arange(32)[None], token_BL.shape)
    ctx = context(
        *token_BL.shape,
        token_BL=token_BL,
        segment_BL=(position_BL < length_B1).astype(jnp.int32),
        compute=XLA,
    )
    run = jax.jit(lambda params, state: spec.merge(params, state)(ctx)[0])
    best_BL = np.argmax(run(params, state), axis=-1)
    for prompt, end, best_L in zip(prompts, ends, best_BL, strict=True):
        assert len(end) == NEW
        assert end == best_L[len(prompt) - 1 :][:NEW].tolist()


@pytest.mark.thorough
def test_a_row_does_not_see_the_rest_of_its_batch(model):
    args, prompts, ends = model
    alone = generate(*args, prompts[1:2], **GREEDY)
    assert alone == ends[1:2]


@pytest.mark.parametrize(
    "places",
    [pytest.param([(1, 2)], marks=pytest.mark.thorough), [(1, 2), (0, 4)]],
)
def test_a_stopped_row_ends_before_a_stop_token_and_changes_no_other(model, places):
    args, prompts, ends = model
    stops = [ends[row][i] for row, i in places]
    programs = decode._generate._cache_size()
    stopped = generate(*args, prompts, **GREEDY, stop_tokens=stops)
    assert decode._generate._cache_size() == programs
    cut = [list(itertools.takewhile(lambda t: t not in stops, end)) for end in ends]
    assert stopped == cut
    assert sum(len(end) < NEW for end in cut) >= len(places)


def test_layers_are_scanned_whatever_training_did(model):
    args, prompts, ends = model
    programs = decode._generate._cache_size()
    unrolled = Compute(kernels="xla", scan_layers=False)
    assert generate(*args, prompts, **GREEDY | {"compute": unrolled}) == ends
    assert decode._generate._cache_size() == programs


def test_sampling_depends_on_the_seed_alone():
    cfg = MODELS["dense"]
    spec, params, state = built(cfg)

    def run(seed):
        return generate(
            *(spec, cfg, params, state, [[1, 2], [3]]),
            max_new_tokens=8,
            temperature=1.5,
            top_k=20,
            top_p=0.95,
            seed=seed,
        )

    assert run(0) == run(0) != run(1)


def test_a_step_copies_no_expert_that_it_does_not_use():
    """The scan over layers would copy a slice [E, ...] of every weight."""
    E, F = 11, 13  # no other array has these sizes
    moe = tiny_moe(E, experts=Glu(hidden=F), shared=None)
    cfg = tiny_lm(Segment(pattern=(moe,), repeat=2))
    spec, params, state = built(cfg)

    def shapes(length, compute=XLA):
        """Shapes of what one layer gets, in a call with `length` tokens per row."""
        cache = cfg.init_cache(1, 4, jnp.float32)
        ctx = dataclasses.replace(
            context(1, length, mode="decode", compute=compute),
            key_segment_BS=jnp.ones((1, 4), jnp.int32),
            key_position_BS=jnp.arange(4)[None],
            cache_index=jnp.int32(0),
        )

        def run(params, ctx, cache):
            return spec.merge(params, state).decode(ctx, cache)

        jaxpr = jax.make_jaxpr(run)(params, ctx, cache)
        return {
            var.aval.shape
            for scan in jaxpr.eqns
            if scan.primitive.name == "scan"
            for var in scan.params["jaxpr"].jaxpr.invars
        }

    weight = (E, F, 16)
    assert weight in shapes(2)  # many tokens use all experts
    assert weight not in shapes(1)
    if library.why_not() is None:
        # Other layers cost nothing there.
        assert weight not in shapes(2, Compute(kernels="native"))


LATENT = LatentAttention(heads=2, kv_latent=6, nope_dim=4, rope_dim=4, v_dim=6)


@pytest.mark.parametrize(
    "attention",
    [Attention(heads=4, kv_heads=2), thorough(LATENT)],
)
def test_a_prompt_is_what_its_tokens_are_one_by_one(attention):
    """Logits of the last token and the cache, of rows with padding on the left."""
    cfg = tiny_lm(Segment(pattern=(tiny_moe(),), repeat=2), attention=attention)
    spec, params, state = built(cfg)
    P, slots = 40, 43  # rows enough for products in C
    token_BP = np.random.default_rng(0).integers(0, cfg.vocab, (2, P)).astype(np.int32)
    padding_B = np.array([0, 13], np.int32)

    @jax.jit
    def run(cache, token_BL, first):
        stopped_B, compute = jnp.zeros(2, bool), Compute()
        ctx = decode.context(token_BL, first, slots, padding_B, stopped_B, compute)
        return spec.merge(params, state).decode(ctx, cache)

    empty = cfg.init_cache(2, slots, jnp.float32)
    whole_BV, _, whole = run(empty, token_BP, jnp.int32(0))
    cache = empty
    for i in range(P):
        one_BV, _, cache = run(cache, token_BP[:, i : i + 1], jnp.int32(i))
    assert_close(whole_BV, one_BV, "step")
    real_BS = (np.arange(slots) >= padding_B[:, None]) & (np.arange(slots) < P)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cache), strict=True):
        assert_close(a[:, real_BS], b[:, real_BS], "step")
        assert not np.any(a[:, :, P:])  # slots of tokens to come


@pytest.mark.thorough
def test_capacity_drops_nothing_while_decoding():
    """Else a continuation would depend on the other prompts of its batch."""
    crowded = tiny_moe(router=TopK(k=1, init_std=0.0), capacity_factor=0.1, shared=None)
    graphdef, params, state = split_module(crowded.make(16, nnx.Rngs(params=0)))
    x_BLD = jnp.ones((6, 1, 16))

    def kept(mode):
        ctx = context(6, 1, mode=mode, compute=XLA)
        run = jax.jit(lambda p: nnx.merge(graphdef, p, state)(x_BLD, ctx))
        return float(run(params)[1]["stats"]["num_kept"])

    assert kept("train") == 1
    assert kept("decode") == 6


# Probabilities by hand: 0.5, 0.25, 0.15, 0.1 at tokens 2, 0, 3, 1.
LOGITS = np.log(np.array([0.25, 0.1, 0.5, 0.15], np.float32))


@pytest.mark.parametrize(
    ("settings", "reachable"),
    [
        ((0.0, 0, 1.0), {2}),
        ((1.0, 0, 1.0), {0, 1, 2, 3}),
        ((1.0, 2, 1.0), {2, 0}),
        ((1.0, 99, 1.0), {0, 1, 2, 3}),
        ((1.0, 1, 1.0), {2}),
        ((1.0, 0, 0.49), {2}),  # never empty
        ((1.0, 0, 0.51), {2, 0}),
        ((1.0, 0, 0.76), {2, 0, 3}),
        # Among the first three the probabilities are 5/9, 2.5/9 and 1.5/9.
        ((1.0, 3, 0.8), {2, 0}),
        # A low temperature sharpens before top-p looks: 0.25 / 0.345 = 0.72.
        ((0.5, 0, 0.7), {2}),
        ((1e-20, 0, 1.0), {2}),
        # Less than float32 holds, and more.
        *(((t, 0, 1.0), {2}) for t in (2e-38, 1e-38, 1e-45, 1e-300, 5e-324)),
        ((1e-300, 3, 0.8), {2}),
        *(((t, 0, 1.0), {0, 1, 2, 3}) for t in (1e30, 1e39, 1e300)),
        ((1e300, 2, 1.0), {2, 0}),
        *(((1.0, 0, p), {2}) for p in (1e-30, 1e-46, 1e-300, 5e-324)),
        ((1.0, 0, 1 - 1e-16), {0, 1, 2, 3}),
        ((1.0, 10**12, 1.0), {0, 1, 2, 3}),
    ],
)
def test_sample_reaches_exactly(settings, reachable):
    logits_BV = jnp.tile(LOGITS, (2000, 1))
    token_B = sample(logits_BV, jax.random.key(0), *settings)
    assert token_B.dtype == jnp.int32
    assert set(token_B.tolist()) == reachable


def test_sample_frequencies_follow_the_kept_probabilities():
    logits_BV = jnp.tile(LOGITS, (20_000, 1))
    token_B = sample(logits_BV, jax.random.key(1), 1.0, 3, 1.0)
    share_V = np.bincount(token_B, minlength=4) / 20_000
    # Three standard errors of a share near one half: 3 * sqrt(0.25 / 20000) = 0.011.
    np.testing.assert_allclose(share_V, [2.5 / 9, 0, 5 / 9, 1.5 / 9], atol=0.011)


def test_ties_go_to_the_lowest_token():
    equal_BV = jnp.zeros((500, 5))
    assert set(sample(equal_BV, jax.random.key(0), 0.0).tolist()) == {0}
    assert set(sample(equal_BV, jax.random.key(0), 1.0, 2).tolist()) == {0, 1}
    assert set(sample(equal_BV, jax.random.key(0), 1.0, 0, 0.5).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1, VOCAB]], {}, rf"tokens in \[0, {VOCAB}\).*got {VOCAB} in prompts\[0\]"),
        ([[-1]], {}, "got -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1; got 0"),
        ([[1]], {"max_new_tokens": 10**7}, "<= 131,072; got 10,000,000"),
        ([[1] * 120_000], {}, r"1 prompts of up to 131,072 tokens and 2 .* GiB"),
        (
            [[1]] * 10**6,
            {"max_new_tokens": 10**5},
            "1000000 prompts of up to 16 tokens",
        ),
        ([[1]], {"temperature": -0.1}, "temperature >= 0; got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature >= 0; got nan"),
        ([[1]], {"top_k": -1}, "top_k >= 0; got -1"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1; got 0.0"),
        ([[1]], {"top_p": 1.1}, "0 < top_p <= 1; got 1.1"),
        ([[1]], {"top_p": float("nan")}, "0 < top_p <= 1; got nan"),
        ([[1]], {"temperature": float("inf")}, "temperature >= 0; got inf"),
    ],
)
def test_wrong_arguments(prompts, change, message):
    cfg = MODELS["dense"]
    with pytest.raises(ValueError, match=message):
        generate(None, cfg, {}, {}, prompts, **{"max_new_tokens": 2} | change)
