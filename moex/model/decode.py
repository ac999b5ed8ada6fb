"""Generation with a cache of keys and values: prefill, then one token at a time.

Prompts of different lengths are padded on the left, so that all rows write the same
slot of the cache. Slot s of a row with p slots of padding holds position s - p; every
mask follows from p and from how many slots are filled.

B batch · L length of one call · P padded prompt length · S slots of the cache
· N most new tokens · V vocabulary · K stop tokens
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.dense import computes_in_c
from kernels_pallas.device import platform
from moex.model.accounting import device_bytes, num_bytes
from moex.model.spec import merged
from moex.nn.context import Compute, Context
from moex.nn.contract import StackReader
from moex.nn.lm import LM
from moex.nn.lowered import BlockWeight
from moex.progress import phase

# Prompts are padded to a power of two of at least this many tokens, so that a session
# of many prompts compiles few programs.
SHORTEST_PROMPT = 16
FEWEST_STOPS = 8  # so many stop tokens, or fewer, are one program
MOST_NEW = 2**17  # the most new tokens of one call
COLDEST, HOTTEST = 2.0**-126, 2.0**127  # the range that float32 can divide by


def generate(
    spec,
    model_cfg: LM,
    params,
    state,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    visual=None,
    steer: dict | None = None,
    on_peak: Callable[[float], None] | None = None,
    compute: Compute = Compute(),
) -> list[list[int]]:
    """The continuation of each prompt.

    A row does not see the other rows, but shares the random numbers with them; a row
    that has stopped is treated as padding. The result depends on the arguments only.

    Args:
      spec: `ModelSpec` of `model_cfg`.
      model_cfg: the config that `spec` was made from, for the shape of the cache.
      params, state: arrays of the model, on any mesh.
      prompts: at least one prompt of at least one token.
      max_new_tokens: N >= 1, tokens after which every row ends.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: sample among the k most likely tokens; 0: among all.
      top_p: sample among the fewest tokens whose probability reaches this, in (0, 1].
      seed: seed of the random numbers.
      stop_tokens: a row ends before any of these.
      visual: float32 [B, M, C], tokens of the vision encoder that a model with visual
        tokens was adapted to; None: there are none.
      steer: `Context.steer`: which experts are used, and how much; None: as trained.
      on_peak: called with the greatest absolute number in the residual stream of the
        steered model.
      compute: how to compute; the cache has its dtype, and layers are always scanned.

    Returns:
      New tokens per prompt, without the one that it stopped at.

    Raises:
      ValueError: for arguments outside their range or tokens outside the vocabulary.
    """
    sampling = (float(temperature), int(top_k), float(top_p))
    check_request(model_cfg, prompts, max_new_tokens, compute.dtype, sampling)
    _check_visual(model_cfg, len(prompts), visual)
    prompt_BP, num_padding_B = padded_left(prompts)
    # The last token is not fed back, so it needs no slot.
    slots = prompt_BP.shape[1] + max_new_tokens - 1
    with phase(f"writing at most {max_new_tokens:,} tokens"):
        new_BN, num_new_B, peak, _ = _generate(
            params,
            state,
            model_cfg.init_cache(len(prompts), slots, jnp.dtype(compute.dtype)),
            prompt_BP,
            num_padding_B,
            jax.random.key(seed),
            padded_stops(stop_tokens),
            visual,
            steer,
            graphdef=spec.graphdef,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            compute=dataclasses.replace(compute, scan_layers=True),
        )
        new_BN, num_new_B = np.asarray(new_BN), np.asarray(num_new_B)
    if on_peak is not None and peak is not None:
        on_peak(float(peak))
    return [row[:n].tolist() for row, n in zip(new_BN, num_new_B, strict=True)]


def sample(logits_BV, key, temperature, top_k=0, top_p=1.0) -> jax.Array:
    """Sample one token per row, int32[B].

    Top-k is applied first, then top-p to the rest of the distribution: it keeps the
    fewest tokens whose probability reaches `top_p`, at least one. Ties go to the lowest
    token. A temperature too small for float32 is 0; one too large makes all alike.

    Args:
      logits_BV: float32[B, V].
      key: random key; not used at temperature 0.
      temperature, top_k, top_p: Python numbers, as in `generate`.
    """
    if temperature < COLDEST:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # With the maximum at 0 a small temperature cannot overflow.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / min(temperature, HOTTEST)
    V = logits_BV.shape[-1]
    num_sorted = min(top_k or V, V)
    if num_sorted == V and top_p == 1.0:
        return jax.random.categorical(key, logits_BV).astype(jnp.int32)
    # From here on the second axis is in falling order of probability.
    logits_BK, token_BK = jax.lax.top_k(logits_BV, num_sorted)
    if top_p < 1.0:  # at 1 a float32 sum could reach it before the last token
        probs_BK = jax.nn.softmax(logits_BK, axis=-1)
        before_BK = jnp.cumsum(probs_BK, axis=-1) - probs_BK
        keep_BK = (before_BK < top_p).at[:, 0].set(True)  # a tiny top_p is 0 here
        logits_BK = jnp.where(keep_BK, logits_BK, -jnp.inf)
    choice_B1 = jax.random.categorical(key, logits_BK)[:, None]
    return jnp.take_along_axis(token_BK, choice_B1, axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(
    jax.jit,
    static_argnames=(
        "graphdef",
        "sampling",
        "max_new_tokens",
        "compute",
    ),
    donate_argnames="cache",
)
def _generate(
    params,
    state,
    cache,
    prompt_BP,
    num_padding_B,
    key,
    stop_K,
    visual_BMC,
    steer,
    *,
    graphdef,
    sampling,
    max_new_tokens,
    compute,
):
    """Returns (new_BN, num_new_B, greatest residual or None, cache).

    The cache is there only so that it can be donated.
    """
    B, P = prompt_BP.shape
    N = max_new_tokens
    slots = P + N - 1
    model = merged(graphdef, params, state)
    cast_experts(model, compute)
    graphdef, arrays = nnx.split(model, graph=False)

    def run(token_BL, first_slot, stopped_B, cache):
        """Run `token_BL` into slots from `first_slot` on; return next-token logits."""
        ctx = context(token_BL, first_slot, slots, num_padding_B, stopped_B, compute)
        ctx = dataclasses.replace(ctx, visual_BMC=visual_BMC, steer=steer)
        model = nnx.merge(graphdef, arrays)
        logits_BV, aux, cache = model.decode(ctx, cache)
        return logits_BV, aux.get("peak"), cache

    def emit(i, logits_BV, stopped_B, new_BN):
        own = jax.random.fold_in(key, i)
        stopped_B, token_B1 = emitted(logits_BV, own, stopped_B, stop_K, sampling)
        new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, token_B1, i, axis=1)
        return stopped_B, new_BN

    def unfinished(carry):
        i, stopped_B, *_ = carry
        return (i < N) & ~jnp.all(stopped_B)

    def step(carry):
        i, stopped_B, num_new_B, new_BN, most, cache = carry
        token_B1 = jax.lax.dynamic_slice_in_dim(new_BN, i - 1, 1, axis=1)
        logits_BV, peak, cache = run(token_B1, P + i - 1, stopped_B, cache)
        most = None if most is None else jnp.maximum(most, peak)
        stopped_B, new_BN = emit(i, logits_BV, stopped_B, new_BN)
        return i + 1, stopped_B, num_new_B + ~stopped_B, new_BN, most, cache

    stopped_B = jnp.zeros(B, bool)
    logits_BV, most, cache = run(prompt_BP, jnp.int32(0), stopped_B, cache)
    stopped_B, new_BN = emit(0, logits_BV, stopped_B, jnp.zeros((B, N), jnp.int32))
    num_new_B = (~stopped_B).astype(jnp.int32)
    carry = (jnp.int32(1), stopped_B, num_new_B, new_BN, most, cache)
    *_, num_new_B, new_BN, most, cache = jax.lax.while_loop(unfinished, step, carry)
    return new_BN, num_new_B, most, cache


def emitted(logits_BV, key, stopped_B, stop_K, sampling):
    """The pair (rows that have stopped, the new tokens [B, 1]; 0 in those rows)."""
    token_B = sample(logits_BV, key, *sampling)
    stopped_B = stopped_B | jnp.any(token_B[:, None] == stop_K[None], axis=1)
    return stopped_B, jnp.where(stopped_B, 0, token_B)[:, None]


def padded_stops(tokens: Collection[int]) -> np.ndarray:
    """Stop tokens, and -1 up to a power of two: few sizes, so few programs."""
    found = sorted({int(token) for token in tokens})
    most = max(FEWEST_STOPS, 1 << max(len(found) - 1, 0).bit_length())
    return np.array(found + [-1] * (most - len(found)), np.int32)


def cast_experts(model, compute: Compute) -> None:
    """Cast experts to the compute dtype once, instead of again for every token.

    Weights in fewer bytes that C reads stay as they are.
    """
    kept = computes_in_c(np.dtype(np.float32), compute.kernels)
    for _, module in nnx.iter_modules(model, graph=False):
        if isinstance(module, StackReader):
            for weight in jax.tree.leaves(module, is_leaf=_is_whole):
                if not isinstance(weight, nnx.Param):
                    continue
                if not (kept and weight[...].dtype == jnp.bfloat16):
                    weight.set_value(weight[...].astype(compute.dtype))


def _is_whole(leaf) -> bool:
    """Tell whether the walk ends here: at a parameter, or a whole weight of blocks."""
    return isinstance(leaf, (nnx.Param, BlockWeight))


def context(token_BL, first_slot, slots, num_padding_B, stopped_B, compute) -> Context:
    """The `Context` of tokens that go to the slots from `first_slot` on.

    Key segments are 1 for tokens, 0 for padding and -1 for slots not yet filled, which
    therefore match no query. The queries of a stopped row count as padding. A prompt
    needs no keys but its own.
    """
    L = token_BL.shape[1]
    slot_1S = jnp.arange(slots, dtype=jnp.int32)[None]
    key_position_BS = slot_1S - num_padding_B[:, None]
    key_segment_BS = jnp.where(
        slot_1S < first_slot + L, (key_position_BS >= 0).astype(jnp.int32), -1
    )
    key_position_BS = jnp.maximum(key_position_BS, 0)
    window = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=first_slot, slice_size=L, axis=1
    )
    is_prompt = L > 1
    return Context(
        segment_BL=jnp.where(stopped_B[:, None], 0, window(key_segment_BS)),
        position_BL=window(key_position_BS),
        token_BL=token_BL,
        key_segment_BS=None if is_prompt else key_segment_BS,
        key_position_BS=None if is_prompt else key_position_BS,
        cache_index=first_slot,
        mode="decode",
        compute=compute,
    )


def padded_left(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The pair (prompts as int32[B, P] with padding on the left, its length[B])."""
    P = padded_prompt(prompts)
    prompt_BP = np.zeros((len(prompts), P), np.int32)
    for row, prompt in zip(prompt_BP, prompts, strict=True):
        row[P - len(prompt) :] = prompt
    return prompt_BP, np.array([P - len(prompt) for prompt in prompts], np.int32)


def padded_prompt(prompts: list[list[int]]) -> int:
    """The padded length P of prompts."""
    return max(SHORTEST_PROMPT, 1 << (max(map(len, prompts)) - 1).bit_length())


def check_request(
    model_cfg: LM,
    prompts: list[list[int]],
    max_new_tokens: int,
    dtype: str,
    sampling: tuple[float, int, float] = (1.0, 0, 1.0),
) -> None:
    """Refuse arguments that `generate` would refuse, before anything is computed.

    Args:
      sampling: temperature, top_k and top_p.

    Raises:
      ValueError: if `generate` would raise it.
    """
    _check(prompts, model_cfg.vocab, max_new_tokens, *sampling)
    P = padded_prompt(prompts)
    _check_memory(model_cfg, len(prompts), P, max_new_tokens, dtype)


def _check(prompts, vocab, max_new_tokens, temperature, top_k, top_p):
    if not prompts:
        raise ValueError("generate needs at least one prompt; got an empty list.")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"generate needs at least one token per prompt; prompts[{i}] is empty. "
                "Start it with the document token."
            )
        for token in prompt:
            if not 0 <= operator.index(token) < vocab:
                raise ValueError(
                    f"generate needs tokens in [0, {vocab}), the vocabulary of the "
                    f"model; got {token} in prompts[{i}]. Was it encoded by the "
                    "tokenizer of the run?"
                )
    if max_new_tokens < 1:
        raise ValueError(f"generate needs max_new_tokens >= 1; got {max_new_tokens}.")
    if max_new_tokens > MOST_NEW:
        raise ValueError(
            f"generate needs max_new_tokens <= {MOST_NEW:,}; got {max_new_tokens:,}."
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"generate needs a finite temperature >= 0; got {temperature}. 0 takes "
            "the most likely token."
        )
    if top_k < 0:
        raise ValueError(f"generate needs top_k >= 0; got {top_k}. 0 turns it off.")
    if not 0 < top_p <= 1:
        raise ValueError(
            f"generate needs 0 < top_p <= 1; got {top_p}. 1 keeps every token."
        )


def _check_visual(model_cfg: LM, batch: int, visual) -> None:
    if visual is None:
        return
    adapter = model_cfg.adapter
    shape, _ = ({} if adapter is None else adapter.fields()).get("visual", (None, ""))
    if shape is None:
        raise ValueError("generate got visual tokens for a model that takes none.")
    if np.shape(visual) != (batch, *shape):
        raise ValueError(
            f"generate needs visual tokens of shape {[batch, *shape]}; got "
            f"{list(np.shape(visual))}."
        )


def _check_memory(model_cfg: LM, batch: int, prompt: int, new: int, dtype: str) -> None:
    """Refuse a request whose cache and prefill scores of one layer cannot fit.

    A GPU never holds all the scores at once, but all of the mask, one byte per pair.
    """
    slots = prompt + new - 1
    cache = jax.eval_shape(lambda: model_cfg.init_cache(batch, slots, jnp.dtype(dtype)))
    pair = 1 if platform() == "gpu" else 4 * model_cfg.attention.score_heads()
    needed = num_bytes(cache) + batch * prompt**2 * pair
    room = device_bytes(jax.local_devices()[:1])
    if needed > room:
        raise ValueError(
            f"generate needs at least {needed / 2**30:,.1f} GiB for {batch} prompts of "
            f"up to {prompt:,} tokens and {new:,} new ones; there are "
            f"{room / 2**30:,.1f} GiB. Give shorter or fewer prompts, or fewer new "
            "tokens."
        )
