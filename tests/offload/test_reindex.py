"""Sequences that change their batch go on as if they had stayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.model import decode
from moex.nn.attention import Attention
from moex.nn.mla import LatentAttention
from moex.nn.stack import Segment
from moex.offload.reindex import exchanged, rows_of
from tests.helpers import XLA, built, tiny_lm, tiny_moe
from tests.marks import thorough_but_for

LATENT = LatentAttention(heads=2, kv_latent=6, nope_dim=4, rope_dim=4, v_dim=6)
SLOTS, PROMPT = 14, 5


ATTENTIONS = {"heads": Attention(heads=4, kv_heads=2), "latent": LATENT}


@pytest.mark.parametrize("name", thorough_but_for(ATTENTIONS, "latent"))
def test_tokens_after_an_exchange_are_those_without_one(name):
    cfg = tiny_lm(
        Segment(pattern=(tiny_moe(shared=None),), repeat=2), attention=ATTENTIONS[name]
    )
    spec, params, state = built(cfg)
    rng = np.random.default_rng(0)
    prompt_BP = rng.integers(0, cfg.vocab, (4, PROMPT)).astype(np.int32)
    padding_B = np.array([0, 2, 1, 0], np.int32)

    @jax.jit
    def run(cache, token_BL, first, padding_B):
        stopped_B = jnp.zeros(len(token_BL), bool)
        ctx = decode.context(token_BL, first, SLOTS, padding_B, stopped_B, XLA)
        logits_BV, _, cache = spec.merge(params, state).decode(ctx, cache)
        return jnp.argmax(logits_BV, 1).astype(jnp.int32), cache

    def begin(rows):
        empty = cfg.init_cache(len(rows), SLOTS, jnp.float32)
        return run(empty, prompt_BP[rows], jnp.int32(0), padding_B[rows])

    def go_on(token_B, cache, rows, first, steps):
        found = [token_B]
        for i in range(steps):
            token_B, cache = run(
                cache, token_B[:, None], jnp.int32(first + i), padding_B[rows]
            )
            found.append(token_B)
        return np.stack(found, 1), cache

    halves = np.array([0, 1]), np.array([2, 3])
    plain = [go_on(*begin(rows), rows, PROMPT, 8)[0] for rows in halves]
    want_BN = np.concatenate(plain)
    begun = [go_on(*begin(rows), rows, PROMPT, 3) for rows in halves]
    written_BN = np.concatenate([tokens for tokens, _ in begun])
    new = np.array([1, 3]), np.array([2, 0])
    caches = exchanged(begun[0][1], begun[1][1], *new)
    for rows, cache in zip(new, caches, strict=True):
        last_B = jnp.asarray(written_BN[rows, -1])
        after_BN, _ = go_on(last_B, cache, rows, PROMPT + 3, 5)
        np.testing.assert_array_equal(after_BN, want_BN[rows, 3:])
    assert len(np.unique(want_BN[:, 3:], axis=0)) == 4  # else no row could be mistaken


def test_rows_are_taken_from_every_array():
    cache = [{"k_BSGA": jnp.arange(12.0).reshape(2, 3, 2)}, (jnp.ones((1, 3)),)]
    taken = rows_of(cache, [2, 0, 2])
    np.testing.assert_array_equal(taken[0]["k_BSGA"][1, :, 0], [10, 6, 10])
    assert taken[1][0].shape == (1, 3)


def test_caches_of_other_sizes_are_not_mixed():
    one, two = ({"k_BSGA": jnp.zeros((1, 2, slots))} for slots in (4, 5))
    with pytest.raises(ValueError, match="differ in layers, slots or widths"):
        exchanged(one, two, [0, 1], [2, 3])
