"""Exact causal attention within segments in C, for CPUs: native/attention.c.

B batch · L length · H query heads · G key/value heads · A head width
"""

import jax
import jax.numpy as jnp

from kernels_pallas.native import library


@jax.custom_vjp
def attend_in_c(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL):
    """Softmax attention within segments, not to later positions, on one CPU.

    Nothing of the size L x L is kept for the backward pass.

    Args:
      q_BLHA, k_BLGA, v_BLGA: float32 queries, keys and values; G divides H.
      segment_BL, position_BL: int32; positions rise along the row inside a segment.

    Returns:
      float32 [B, L, H, A].

    Raises:
      ValueError: on other dtypes, or keys that are not those of the queries' own rows.
    """
    return _forward(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL)[0]


def _forward(q, k, v, segment, position):
    B, L, H, A = q.shape
    if k.shape[1] != L:
        raise ValueError(
            "attention in C needs the keys of the queries' own rows; got "
            f"{L} queries and {k.shape[1]} keys."
        )
    arrays = (q, k, v, segment, position)
    shapes = [(B, L, H, A), (B, H, L)]
    y, norm_BHL = library.call("moex_attention_forward", shapes, arrays)
    return y, (*arrays, y, norm_BHL)


def _backward(saved, dy):
    *arrays, y, norm_BHL = saved
    mean_BLH = jnp.sum(y * dy, axis=-1)  # of the weights' gradients under the weights
    shapes = [a.shape for a in arrays[:3]]
    inputs = (*arrays, norm_BHL, dy, mean_BLH)
    return *library.call("moex_attention_backward", shapes, inputs), None, None


attend_in_c.defvjp(_forward, _backward)
