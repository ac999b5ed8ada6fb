"""Scores given continuations: token lists in, log-probabilities out.

Rows have a few lengths, powers of two, and each length has its own number of rows, so
few programs are compiled. The length of a pair alone decides which one scores it.

B batch · L length of a row
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moex.model.decode import SHORTEST_PROMPT
from moex.model.spec import merged
from moex.progress import phase
from moex.runs.open import LoadedRun
from moex.runs.program import eval_batch_size
from moex.sharding import batch_shards, shard_batch
from moex.tasks.lm import token_losses


def continuation_scores(
    run: LoadedRun,
    pairs: list[tuple[list[int], list[int]]],
    steer: dict | None = None,
) -> list[tuple[float, bool]]:
    """Score how likely each continuation is after its context.

    If context and continuation together are longer than seq_len + 1, the first tokens
    are cut. Expert capacity drops nothing here, as in generation.

    Args:
      run: the model; rows are at most `run.cfg.seq_len` long.
      pairs: (context, at least one token; continuation, at most seq_len tokens).
      steer: `Context.steer`.

    Returns:
      Per pair the sum of log-probabilities in nats, and whether every token of the
      continuation is the most likely one.

    Raises:
      ValueError: for an empty context or a continuation that is too long.
    """
    seq_len = run.cfg.seq_len
    groups = collections.defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        if not context or len(continuation) > seq_len:
            raise ValueError(
                f"a pair needs a context, and a continuation of at most {seq_len} "
                f"tokens; pair {i} has {len(context)} and {len(continuation)} tokens."
            )
        length = min(len(context) + len(continuation) - 1, seq_len)
        groups[padded_length(length, seq_len, run.mesh.shape["seq"])].append(i)
    compute = run.compute(train=False)
    scores = [(0.0, True)] * len(pairs)
    scoring = phase("scoring continuations", len(pairs), "continuations")
    with jax.set_mesh(run.mesh), scoring as at:
        for L, members in groups.items():
            for some in chunks(members, _num_rows(run, L)):
                batch = _batch([pairs[i] for i in some], _num_rows(run, L), L)
                batch = shard_batch(batch, run.mesh)
                # In mode "eval" a capacity would let rows of a batch change each other.
                task = run.cfg.task
                ctx = task.context(batch, mode="decode", compute=compute, steer=steer)
                sum_B, greedy_B = _scores(
                    *(run.params, run.state, ctx, batch["targets"], batch["scored"]),
                    graphdef=run.spec.graphdef,
                )
                found = np.asarray(sum_B).tolist(), np.asarray(greedy_B).tolist()
                for i, *score in zip(some, *found, strict=False):
                    scores[i] = tuple(score)
                at.add(len(some))
    return scores


@functools.partial(jax.jit, static_argnames="graphdef")
def _scores(params, state, ctx, target_BL, scored_BL, *, graphdef):
    """Sum log-probabilities, float32[B]; whether all tokens are likeliest, bool[B]."""
    model = merged(graphdef, params, state)
    logits_BLV, _ = model(ctx)
    nll_BL, _ = token_losses(logits_BLV, target_BL)
    best_BL = jnp.argmax(logits_BLV, axis=-1) == target_BL
    return (
        -jnp.sum(jnp.where(scored_BL, nll_BL, 0.0), axis=1),
        jnp.all(best_BL | ~scored_BL, axis=1),
    )


def padded_length(length: int, seq_len: int, parts: int = 1) -> int:
    """Round up to a power of two, from SHORTEST_PROMPT to seq_len, for `parts`."""
    padded = max(SHORTEST_PROMPT, 1 << max(length - 1, 0).bit_length())
    return min(-(-padded // parts) * parts, seq_len)


def _num_rows(run: LoadedRun, length: int) -> int:
    """The number of rows of this length that have the tokens of an evaluation step."""
    shards = batch_shards(run.mesh)
    rows = eval_batch_size(run.cfg) * run.cfg.seq_len // length
    return -(-rows // shards) * shards


def chunks(members: list, size: int):
    """Split a list into lists of at most `size`, in order."""
    return (members[i : i + size] for i in range(0, len(members), size))


def _batch(pairs, B: int, L: int) -> dict:
    """Make arrays [B, L] of at most B pairs; the rest of rows and batch is padding."""
    token_BL, target_BL, segment_BL = np.zeros((3, B, L), np.int32)
    scored_BL = np.zeros((B, L), bool)
    for b, (context, continuation) in enumerate(pairs):
        tokens = [*context, *continuation][-(L + 1) :]
        n = len(tokens) - 1
        token_BL[b, :n], target_BL[b, :n] = tokens[:-1], tokens[1:]
        segment_BL[b, :n] = 1
        scored_BL[b, n - len(continuation) : n] = True
    position_BL = np.arange(L, dtype=np.int32)[None] * segment_BL
    batch = {"tokens": token_BL, "segment": segment_BL, "position": position_BL}
    return batch | {"targets": target_BL, "scored": scored_BL}
