"""The choice of the quickest attention, and the one in C: native/attention.c.

B batch · L length · H query heads · G key/value heads · A head width
"""

import jax
import jax.numpy as jnp

from kernels_pallas.dense import computes_in_c
from kernels_pallas.device import platform
from kernels_pallas.native import library


def default_attention(dtype, L: int, A: int, cached: bool, implementation) -> str:
    """The quickest exact attention: "cudnn", "splash", "native", "blocks" or "einsum".

    Args:
      dtype: dtype of queries, keys and values.
      L, A: queries in a row, and the width of a head.
      cached: whether the keys are those of a cache.
      implementation: implementation of matmuls; it says whether C is wanted.
    """
    backend = platform()
    half_precision = dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN's flash kernel takes 16-bit inputs and head widths up to 128, in eights.
    if backend == "gpu" and half_precision and A <= 128 and A % 8 == 0:
        return "cudnn"
    # The TPU kernel wants whole 128-wide blocks and has no cache of another length.
    parts = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    if backend == "tpu" and not cached and L % (128 * parts) == 0 and A % 128 == 0:
        return "splash"
    # If devices split the sequence, blocks of queries would lie across devices.
    if backend != "cpu" or cached or parts > 1:
        return "einsum"
    return "native" if computes_in_c(dtype, implementation) else "blocks"


@jax.custom_vjp
def attend_in_c(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL):
    """Compute softmax attention within segments, not to later positions, on one CPU.

    No array of the size L x L is kept for the backward pass.

    Args:
      q_BLHA, k_BLGA, v_BLGA: float32 queries, keys and values; G divides H. Values may
        have a width of their own.
      segment_BL, position_BL: int32; positions rise along the row inside a segment.

    Returns:
      float32 [B, L, H, width of the values].

    Raises:
      ValueError: on other dtypes, on keys that are not those of the queries' own rows,
        and on shapes that do not fit, which C would read as if they did.
    """
    return _forward(q_BLHA, k_BLGA, v_BLGA, segment_BL, position_BL)[0]


def _forward(q, k, v, segment, position):
    B, L, H, A = q.shape
    if k.shape[1] != L:
        raise ValueError(
            "attention in C needs the keys of the queries' own rows; got "
            f"{L} queries and {k.shape[1]} keys."
        )
    G, arrays = k.shape[2], (q, k, v, segment, position)
    wanted = (q.shape, (B, L, G, A), (B, L, G, v.shape[-1]), (B, L), (B, L))
    found = tuple(a.shape for a in arrays)
    if found != wanted or H % G:
        raise ValueError(
            f"attention in C: shapes {found} are not those of q_BLHA, k_BLGA, v_BLGA, "
            "segment_BL and position_BL with G that divides H."
        )
    shapes = [(B, L, H, v.shape[-1]), (B, H, L)]
    y, norm_BHL = library.call("moex_attention_forward", shapes, arrays)
    return y, (*arrays, y, norm_BHL)


def _backward(saved, dy):
    *arrays, y, norm_BHL = saved
    mean_BLH = jnp.sum(y * dy, axis=-1)  # weighted mean of the weights' gradients
    shapes = [a.shape for a in arrays[:3]]
    inputs = (*arrays, norm_BHL, dy, mean_BLH)
    return *library.call("moex_attention_backward", shapes, inputs), None, None


attend_in_c.defvjp(_forward, _backward)
