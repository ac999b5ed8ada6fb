"""Exact causal attention in blocks of queries: the path of CPUs without C.

A block of queries meets only the keys up to its own end, so that about half of the
masked products are never computed, and nothing of size L x L outlives its block: the
backward pass computes the weights again from the log-normalisers (Dao et al. 2022,
arXiv:2205.14135, without tiling over keys). Matmuls are written so that no operand of
the size of the scores is transposed, which XLA:CPU does by a copy. It takes less than
half the time of a plain einsum, forward and backward (`benchmarks/attention.py`).

B batch · L length · H query heads · G key/value heads · R = H / G · A head width
· N queries of one block · S keys up to its end
"""

import jax
import jax.numpy as jnp

MAX_BLOCKS = 8  # each is traced by itself: more would save less than their compilation
MIN_ROWS = 64  # smaller blocks make smaller and slower matmuls
FLOOR = -1e30  # a row with no visible key stays free of NaN


@jax.custom_vjp
def attend_in_blocks(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL):
    """Compute softmax attention within segments, not to later positions.

    Args:
      q_BLHA, k_BLGA, v_BLGA: queries, keys and values, G divides H.
      segment_BL, position_BL: int32; positions rise along the row inside a segment, so
        that no query sees a key that stands behind it in the row.

    Returns:
      [B, L, H, A] in the dtype of q.

    Raises:
      ValueError: if there are more keys than queries, or fewer, as in decoding.
    """
    return _forward(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL)[0]


def _forward(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL):
    if q_BLHA.shape[1] != k_BLGA.shape[1]:
        raise ValueError(
            "attention in blocks needs the keys of the queries' own rows; got "
            f"{q_BLHA.shape[1]} queries and {k_BLGA.shape[1]} keys."
        )
    q, k, v = _heads_first(q_BLHA, k_BLGA, v_BLGA)
    masks = (segment_BL, position_BL)
    parts, norms = [], []
    for rows in _blocks(q_BLHA.shape[1]):
        score = _scores(q, k, rows, masks)
        top = jnp.max(score, axis=-1, keepdims=True)
        weight = jnp.exp(score - top)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        y = _matmul(weight.astype(v.dtype), v[:, :, : rows.stop]) / total
        parts.append(y.astype(q.dtype))
        norms.append(top + jnp.log(total))
    y_BLHA = _heads_last(parts)
    return y_BLHA, (q_BLHA, k_BLGA, v_BLGA, *masks, y_BLHA, norms)


def _backward(saved, dy_BLHA):
    q_BLHA, k_BLGA, v_BLGA, *masks, y_BLHA, norms = saved
    q, k, v = _heads_first(q_BLHA, k_BLGA, v_BLGA)
    G = k.shape[1]
    dy, y = _grouped(dy_BLHA, G), _grouped(y_BLHA, G)
    dq = []
    dk = dv = jnp.zeros(jnp.swapaxes(k, 2, 3).shape, jnp.float32)  # as `_sum_rows`
    # The sum over keys of weight * dweight equals the sum over A of dy * y.
    mean = jnp.sum(_float(dy) * _float(y), axis=-1, keepdims=True)
    for rows, norm in zip(_blocks(q_BLHA.shape[1]), norms, strict=True):
        seen, behind = rows.stop, q_BLHA.shape[1] - rows.stop
        weight = jnp.exp(_scores(q, k, rows, masks) - norm)
        dy_N = dy[:, :, :, rows]
        dweight = _matmul(dy_N, v[:, :, :seen], transpose=True)
        dscore = (weight * (dweight - mean[:, :, :, rows])).astype(q.dtype)
        dq.append(_matmul(dscore, k[:, :, :seen]).astype(q.dtype))
        pad = ((0, 0), (0, 0), (0, 0), (0, behind))
        dk += jnp.pad(_sum_rows(q[:, :, :, rows], dscore), pad)
        dv += jnp.pad(_sum_rows(dy_N, weight.astype(v.dtype)), pad)
    scale = q_BLHA.shape[-1] ** -0.5  # q here is scaled already, so dk is too
    dk_BLGA = jnp.transpose(dk, (0, 3, 1, 2)).astype(k.dtype)
    dv_BLGA = jnp.transpose(dv, (0, 3, 1, 2)).astype(v.dtype)
    gradients = (_heads_last(dq) * scale, dk_BLGA, dv_BLGA)
    # Else XLA joins the transposes and whatever comes next into one slow loop.
    return *jax.lax.optimization_barrier(gradients), None, None


attend_in_blocks.defvjp(_forward, _backward)


def visible(segments, positions):
    """Whether each key is in the query's segment and not later, bool[B, N, S].

    Both arguments are int32 pairs (queries [B, N], keys [B, S]).
    """
    return (segments[0][:, :, None] == segments[1][:, None, :]) & (
        positions[0][:, :, None] >= positions[1][:, None, :]
    )


def _blocks(length):
    """Cut the rows into slices, in order."""
    rows = max(MIN_ROWS, -(-length // MAX_BLOCKS))
    return [slice(i, min(i + rows, length)) for i in range(0, length, rows)]


def _heads_first(q_BLHA, k_BLGA, v_BLGA):
    """Return (scaled q [B, G, R, L, A], k [B, G, L, A], v [B, G, L, A])."""
    scale = q_BLHA.shape[-1] ** -0.5
    q = _grouped(q_BLHA * scale, k_BLGA.shape[2])
    return q, jnp.swapaxes(k_BLGA, 1, 2), jnp.swapaxes(v_BLGA, 1, 2)


def _grouped(x_BLHA, G):
    """Group the heads and move them to the front: [B, G, R, L, A]."""
    B, L, H, A = x_BLHA.shape
    return jnp.transpose(x_BLHA.reshape(B, L, G, H // G, A), (0, 2, 3, 1, 4))


def _heads_last(parts):
    """Join the blocks' [B, G, R, N, A] to [B, L, H, A]."""
    x = jnp.concatenate(parts, axis=3)
    B, G, R, L, A = x.shape
    return jnp.transpose(x, (0, 3, 1, 2, 4)).reshape(B, L, G * R, A)


def _scores(q, k, rows, masks):
    """Compute the masked scores, float32[B, G, R, N, S]."""
    keys = slice(0, rows.stop)
    mask_BNS = visible(*((of_BL[:, rows], of_BL[:, keys]) for of_BL in masks))
    score = _matmul(q[:, :, :, rows], k[:, :, keys], transpose=True)
    return jnp.where(mask_BNS[:, None, None], score, FLOOR)


def _matmul(x_BGRNC, w_BGSA, *, transpose=False):
    """Multiply x @ w, or x @ w.T, for every group; float32 sums and result."""
    B, G, R, N, C = x_BGRNC.shape
    w = jnp.swapaxes(w_BGSA, 2, 3) if transpose else w_BGSA
    x = x_BGRNC.reshape(B, G, R * N, C)
    y = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return y.reshape(B, G, R, N, -1)


def _sum_rows(x_BGRNA, y_BGRNS):
    """Multiply x.T @ y over all rows of a group, float32[B, G, A, S]."""
    B, G, R, N, A = x_BGRNA.shape
    S = y_BGRNS.shape[-1]
    x = jnp.swapaxes(x_BGRNA.reshape(B, G, R * N, A), 2, 3)
    y = y_BGRNS.reshape(B, G, R * N, S)
    # The barrier keeps XLA from transposing y, the larger one, instead.
    x = jax.lax.optimization_barrier(x)
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _float(x):
    return x.astype(jnp.float32)
