"""Generation with offloaded experts: the same tokens as `model.decode.generate`.

B batch · L length of one call · N most new tokens · V vocabulary · K stop tokens
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moex.model import decode
from moex.model.spec import merged
from moex.nn.stack import peak_of
from moex.offload.executor import Executor
from moex.progress import phase


def generate(
    executor: Executor,
    model_cfg,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens=(),
    visual=None,
    steer=None,
    on_peak=None,
    compute,
) -> list[list[int]]:
    """Continue each prompt; the arguments and the result are those of `generate`.

    Raises:
      ValueError: for arguments outside their range or tokens outside the vocabulary.
    """
    if visual is not None:
        raise ValueError("generate got visual tokens for a model that takes none.")
    sampling = (float(temperature), int(top_k), float(top_p))
    decode.check_request(model_cfg, prompts, max_new_tokens, compute.dtype, sampling)
    prompt_BP, num_padding_B = decode.padded_left(prompts)
    B, P = prompt_BP.shape
    graphdef, *arrays = executor.outer
    begun = functools.partial(
        _begin,
        arrays,
        num_padding_B=num_padding_B,
        graphdef=graphdef,
        slots=P + max_new_tokens - 1,
        compute=compute,
    )
    ended = functools.partial(
        _end,
        arrays,
        key=jax.random.key(seed),
        stop_K=decode.padded_stops(stop_tokens),
        graphdef=graphdef,
        sampling=sampling,
    )
    dtype = jnp.dtype(compute.dtype)
    caches = executor.caches(B, P + max_new_tokens - 1, dtype, model_cfg.dim)
    new_BN = np.zeros((B, max_new_tokens), np.int32)
    num_new_B, stopped_B, token_BL = np.zeros(B, int), np.zeros(B, bool), prompt_BP
    peaks, doing = [], f"writing at most {max_new_tokens:,} tokens"
    with phase(doing, max_new_tokens, "tokens") as at:
        for i in range(max_new_tokens):
            first = np.int32(P + i - 1 if i else 0)
            x_BLD, ctx = begun(token_BL, first, stopped_B=stopped_B)
            x_BLD, told, caches = executor.run(x_BLD, ctx, caches, steer)
            if steer is not None:
                peaks += [peak for _, peak in told if peak is not None]
                peaks = [jnp.max(jnp.stack([*peaks, peak_of(x_BLD, ctx.valid_BL)]))]
            stopped_B, token_BL = ended(x_BLD, ctx, np.int32(i), stopped_B=stopped_B)
            stopped_B, token_BL = np.asarray(stopped_B), np.asarray(token_BL)
            if stopped_B.all():
                break
            new_BN[:, i] = token_BL[:, 0]
            num_new_B += ~stopped_B
            at.add(1)
    if on_peak is not None and peaks:
        on_peak(float(peaks[0]))
    return [row[:n].tolist() for row, n in zip(new_BN, num_new_B, strict=True)]


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "compute"))
def _begin(
    arrays, token_BL, first_slot, *, num_padding_B, stopped_B, graphdef, slots, compute
):
    """The pair (embedded tokens, `Context`)."""
    rest = (slots, num_padding_B, stopped_B, compute)
    ctx = decode.context(token_BL, first_slot, *rest)
    return merged(graphdef, *arrays).embed(ctx).astype(compute.dtype), ctx


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _end(arrays, x_BLD, ctx, i, *, key, stopped_B, stop_K, graphdef, sampling):
    """The pair (rows that have stopped, new tokens [B, 1]) after the last layer."""
    model = merged(graphdef, *arrays)
    logits_BV = model.outputs(model.norm(x_BLD[:, -1:]), ctx)[:, 0]
    own = jax.random.fold_in(key, i)
    return decode.emitted(logits_BV, own, stopped_B, stop_K, sampling)
