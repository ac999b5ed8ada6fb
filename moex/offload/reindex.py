"""Decoding caches whose rows are sequences: other rows, or rows of two batches.

The token scheduler (`tokens.py`) moves sequences between two batches; their keys and
values go with them.
"""

import jax
import jax.numpy as jnp

BATCH = 1  # the axis of sequences; before it are the copies of a segment's layers


def rows_of(cache, rows):
    """The cache of some sequences of a batch, in their order; any may come again.

    Args:
      cache: from `LM.init_cache`, or any tree of arrays with the batch second.
      rows: int32[B].
    """
    rows = jnp.asarray(rows, jnp.int32)
    return jax.tree.map(lambda a: jnp.take(a, rows, axis=BATCH), cache)


def exchanged(one, two, first, second):
    """The caches of two batches after their sequences were divided anew.

    Args:
      one, two: caches of as many slots, filled as far as each other.
      first, second: the sequences of each new batch, as `divide` gives them: those of
        `two` are numbered after those of `one`.

    Returns:
      (cache of `first`, cache of `second`).

    Raises:
      ValueError: if the caches differ in more than the number of sequences.
    """
    shapes = [
        jax.tree.map(lambda a: (*a.shape[:BATCH], *a.shape[BATCH + 1 :]), cache)
        for cache in (one, two)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError("the two caches differ in layers, slots or widths")
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], BATCH), one, two)
    return rows_of(both, first), rows_of(both, second)
