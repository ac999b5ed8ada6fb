"""Quantile balancing: the bias of each expert from a histogram of all tokens of a step.

A token's margin for an expert, r = cutoff - score, is the bias from which on the token
would choose it: the cutoff is the (k+1)-th best biased score of the token. So the bias
with which k / E of the tokens choose an expert is the k / E quantile of its margins.
Quantiles of parts of a batch do not average to that of the whole, but counts add up:
every margin is counted in one of `BINS` bins, as an integer, so that neither the mesh
nor the number of microbatches can change the result.

Source: Kimi K3's report, arXiv:2607.24653, section 2.3.3 and appendices C and D.

T tokens · E experts · B bins · ... leading dims (layers)
"""

import jax
import jax.numpy as jnp

from moex.sharding import sum_over_rows

# 16 KiB of counters per expert and layer. The report has 1000 bins, others 10,000.
BINS = 4096
BLOCK = 64  # bins that are looked through at once

# How far a margin can be from the bias that made its cutoff: scores lie in [0, SPAN].
# Roots of softplus have no bound: 4 is the score of a logit of 16. Margins outside of
# the bins count in the outermost one, and the bins of the next step begin further out.
SPAN = {"softmax": 1.0, "sigmoid": 1.0, "sqrt_softplus": 4.0}


def bins_of(bias_E, span) -> tuple[jax.Array, jax.Array]:
    """The place of a step's bins, over [min b - span, max b + span], float32[..., 1].

    The width is a power of two, at most 2 (max b - min b + 2 span) / (B - 2), and bins
    begin at multiples of it: calculations with them are exact in float32.

    Returns:
      (number of the first bin, counted from 0 in widths; width of a bin).
    """
    low = jnp.min(bias_E, axis=-1, keepdims=True) - span
    high = jnp.max(bias_E, axis=-1, keepdims=True) + span
    _, exponent = jnp.frexp((high - low) / (BINS - 2))
    width = jnp.ldexp(jnp.ones_like(low), exponent)
    return jnp.floor(low / width), width


def margin_counts(cutoff_T, score_TE, valid_T, bias_E, span) -> jax.Array:
    """Count the margins of the valid tokens of all devices in bins, int32[E, B].

    Args:
      cutoff_T: the (k+1)-th best biased score of each token.
      score_TE: scores without the bias, in [0, span].
      valid_T: bool, False at padding.
      bias_E: the bias of this step.
      span: span of the score, from `SPAN`.
    """
    first, width = bins_of(bias_E, span)

    def count(cutoff_T, score_TE, valid_T):
        E = score_TE.shape[1]
        margin_TE = cutoff_T[:, None] - score_TE
        bin_TE = jnp.floor(margin_TE / width[None]) - first[None]
        bin_TE = jnp.clip(bin_TE, 0, BINS - 1).astype(jnp.int32)
        at_TE = bin_TE + BINS * jnp.arange(E)[None]
        one_TE = jnp.broadcast_to(valid_T[:, None].astype(jnp.int32), at_TE.shape)
        # A scatter into one flat array takes a fifth of the router's time on a CPU
        # (4096 tokens of width 512, 64 experts); a sort of every column takes 20 times
        # as long.
        counts = jnp.zeros(E * BINS, jnp.int32)
        counts = counts.at[at_TE.reshape(-1)].add(one_TE.reshape(-1))
        return counts.reshape(E, BINS)

    stopped = jax.lax.stop_gradient((cutoff_T, score_TE))
    return sum_over_rows(count, *stopped, valid_T)


def quantiles(count_EB, k) -> tuple[jax.Array, int]:
    """The k / E quantile of each expert's margins, counted from the first bin.

    It is the smallest margin which k / E of all margins do not exceed. The margins of a
    bin are taken as evenly spread over it: the error is at most one width.

    Args:
      count_EB: int32[..., E, B]; up to 2**31 - 1 tokens.
      k: slots per token.

    Returns:
      (int32[..., E], parts of a width in which it is measured).
    """
    E = count_EB.shape[-2]
    tokens_E = jnp.sum(count_EB, axis=-1)
    # The rank, ceil(k tokens / E), in parts: the product may not fit in an int32.
    rank_E = k * (tokens_E // E) + (k * (tokens_E % E) + E - 1) // E
    # Find the block of bins, then the bin: one sum over all bins, not a running one.
    count_EXY = count_EB.reshape(*count_EB.shape[:-1], -1, BLOCK)
    block_E, rank_E = reached(jnp.sum(count_EXY, axis=-1), rank_E)
    count_EY = jnp.take_along_axis(count_EXY, block_E[..., None, None], axis=-2)[
        ..., 0, :
    ]
    bin_E, rank_E = reached(count_EY, rank_E)
    here_E = jnp.take_along_axis(count_EY, bin_E[..., None], axis=-1)[..., 0]
    # The most parts for which the sum over all experts still fits in an int32.
    parts = 2 ** max(0, min(12, 32 - BINS.bit_length() - E.bit_length()))
    within_E = (rank_E.astype(jnp.float32) - 0.5) / here_E.astype(jnp.float32)
    part_E = jnp.clip(jnp.floor(within_E * parts), 0, parts - 1).astype(jnp.int32)
    return (block_E * BLOCK + bin_E) * parts + part_E, parts


def reached(count_EX, rank_E) -> tuple[jax.Array, jax.Array]:
    """The place where the running sum of counts reaches a rank, and the rank in it.

    Args:
      count_EX: int32[..., E, X].
      rank_E: int32[..., E], from 1 to the sum of the counts.
    """
    upto_EX = jnp.cumsum(count_EX, axis=-1)
    at_E = jnp.sum(upto_EX < rank_E[..., None], axis=-1, dtype=jnp.int32)
    before_E = jnp.take_along_axis(
        upto_EX - count_EX, at_E[..., None], axis=-1, mode="clip"
    )
    return at_E, rank_E - before_E[..., 0]


def balancing_bias(count_EB, bias_E, k, span) -> jax.Array:
    """The bias of the next step, float32[..., E], mean 0; without tokens `bias_E`.

    Args:
      count_EB: sums of `margin_counts` over the microbatches of the step.
      bias_E: the bias with which they were made.
      k: slots per token.
      span: span of the score, from `SPAN`.
    """
    E = bias_E.shape[-1]
    place_E, parts = quantiles(count_EB, k)
    _, width = bins_of(bias_E, span)
    # The sum of integers is the same in any order.
    centred_E = E * place_E - jnp.sum(place_E, axis=-1, keepdims=True)
    moved_E = centred_E.astype(jnp.float32) / E * (width / parts)
    return jnp.where(
        jnp.sum(count_EB[..., 0, :], axis=-1)[..., None] > 0, moved_E, bias_E
    )
