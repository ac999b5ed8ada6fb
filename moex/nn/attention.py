"""Grouped-query self-attention with rotary positions, and the one function behind it.

`attend` picks the fastest exact implementation for the platform: a flash kernel on
accelerators, blocks of queries on CPU. The mask is always "same segment, not later":
packed documents do not see each other; a decoding cache is only another set of keys.

B batch · L queries · S keys · D model width · H query heads · G key/value heads
· R = H / G · A head width
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from kernels_pallas.device import platform
from moex.config import Config, require, require_choice
from moex.nn.attention_blocks import FLOOR, attend_in_blocks, visible
from moex.nn.norm import RMSNorm
from moex.nn.param import param
from moex.sharding import constrain, partition_spec

IMPLEMENTATIONS = ("einsum", "blocks", "cudnn", "splash")


@dataclasses.dataclass(kw_only=True, slots=True)
class Attention(Config):
    """Grouped-query attention; `heads` query heads share `kv_heads` key/value heads."""

    heads: int  # query heads H, >= 1
    kv_heads: int | None = None  # key/value heads G, divides heads; None: heads
    head_dim: int | None = None  # width per head, even; None: dim / heads
    rope_theta: float = 10_000.0  # base of the rotary frequencies, > 1
    qk_norm: bool = False  # RMSNorm of queries and keys per head (Qwen3, OLMoE)

    def validate(self, path):
        require(self.heads >= 1, f"{path}.heads", self.heads, "at least 1")
        kv = self.heads if self.kv_heads is None else self.kv_heads
        require(
            kv >= 1 and self.heads % kv == 0,
            f"{path}.kv_heads",
            self.kv_heads,
            f"a divisor of heads = {self.heads}",
        )
        require(
            self.head_dim is None or (self.head_dim >= 2 and self.head_dim % 2 == 0),
            f"{path}.head_dim",
            self.head_dim,
            "an even number >= 2, or None for dim / heads",
        )
        require(self.rope_theta > 1, f"{path}.rope_theta", self.rope_theta, "above 1")

    def width(self, dim) -> int:
        """Width of one head for a model of width `dim`."""
        return dim // self.heads if self.head_dim is None else self.head_dim

    def make(self, dim, rngs):
        return AttentionLayer(self, dim, rngs)

    def init_cache(self, dim, batch, length, dtype):
        """Zero keys and values for decoding, each [batch, length, G, A]."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        shape = (batch, length, kv_heads, self.width(dim))
        return {"k_BSGA": jnp.zeros(shape, dtype), "v_BSGA": jnp.zeros(shape, dtype)}


class AttentionLayer(nnx.Module):
    """softmax(q k^T / sqrt(A) + mask) v with rotary q and k.

    Parameters: w_q_DGRA [D, G, R, A], w_kv_D2GA [D, 2, G, A], w_out_GRAD [G, R, A, D].

    Source: Ainslie et al. 2023, arXiv:2305.13245; rotary positions: Su et al. 2021,
    arXiv:2104.09864, in the half-split layout of Llama.
    """

    def __init__(self, cfg, dim, rngs):
        A = cfg.width(dim)
        G = cfg.heads if cfg.kv_heads is None else cfg.kv_heads
        R = cfg.heads // G
        self.rope_theta = cfg.rope_theta
        self.w_q_DGRA = param(
            rngs,
            (dim, G, R, A),
            ("embed", "heads", None, "head_dim"),
            fan_in=dim,
            matrix=((0,), (1, 2, 3)),
        )
        self.w_kv_D2GA = param(
            rngs,
            (dim, 2, G, A),
            ("embed", None, "heads", "head_dim"),
            fan_in=dim,
            matrix=((0,), (2, 3)),
        )
        self.w_out_GRAD = param(
            rngs,
            (G, R, A, dim),
            ("heads", None, "head_dim", "embed"),
            fan_in=G * R * A,
            matrix=((0, 1, 2), (3,)),
        )
        self.norm_q = RMSNorm(A, rngs) if cfg.qk_norm else None
        self.norm_k = RMSNorm(A, rngs) if cfg.qk_norm else None

    def __call__(self, x_BLD, ctx, cache):
        """Returns `(y_BLD, cache)`; `cache` is None outside decoding."""
        dtype = x_BLD.dtype
        B, L, _ = x_BLD.shape
        _, G, R, A = self.w_q_DGRA[...].shape
        q = jnp.einsum("bld,dgra->blgra", x_BLD, self.w_q_DGRA[...].astype(dtype))
        kv = jnp.einsum("bld,dcga->blcga", x_BLD, self.w_kv_D2GA[...].astype(dtype))
        q_BLHA = constrain(q.reshape(B, L, G * R, A), "batch", "length", "heads", None)
        # A split, whose gradient is one concatenation; that of slices is padding twice.
        k, v = (jnp.squeeze(part, 2) for part in jnp.split(kv, 2, axis=2))
        if self.norm_q is not None and self.norm_k is not None:
            q_BLHA, k = self.norm_q(q_BLHA), self.norm_k(k)
        q_BLHA = rotary(q_BLHA, ctx.position_BL, self.rope_theta)
        k = rotary(k, ctx.position_BL, self.rope_theta)
        # Where sequences are split every device needs all keys of its rows.
        k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
        if cache is None:
            key_segment, key_position = ctx.segment_BL, ctx.position_BL
        else:
            update = functools.partial(
                jax.lax.dynamic_update_slice_in_dim,
                start_index=ctx.cache_index,
                axis=1,
            )
            k = update(cache["k_BSGA"], k.astype(cache["k_BSGA"].dtype))
            v = update(cache["v_BSGA"], v.astype(cache["v_BSGA"].dtype))
            cache = {"k_BSGA": k, "v_BSGA": v}
            key_segment, key_position = ctx.key_segment_BS, ctx.key_position_BS
        segments = (ctx.segment_BL, key_segment)
        positions = (ctx.position_BL, key_position)
        name = choose(ctx.attention, q_BLHA, cached=cache is not None)
        y_BLHA = attend(q_BLHA, k, v, segments, positions, implementation=name)
        y = y_BLHA.reshape(B, L, G, R, A)
        y = jnp.einsum("blgra,grad->bld", y, self.w_out_GRAD[...].astype(dtype))
        return y, cache


def rotary(x_BLHA, position_BL, theta):
    """Rotate pairs (i, i + A/2) of the last axis by position * theta^(-2i/A)."""
    half = x_BLHA.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position_BL11 = position_BL[:, :, None, None].astype(jnp.float32)
    angle = position_BL11 * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    y = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return y.astype(x_BLHA.dtype)


def choose(name, q_BLHA, *, cached) -> str:
    """The implementation to run: `name` if given, else the fastest exact one here."""
    if name is not None:
        require_choice("attention", name, IMPLEMENTATIONS)
        return name
    backend = platform()
    L, A = q_BLHA.shape[1], q_BLHA.shape[-1]
    half_precision = q_BLHA.dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN's flash kernel takes 16-bit inputs and head widths up to 128, in eights.
    if backend == "gpu" and half_precision and A <= 128 and A % 8 == 0:
        return "cudnn"
    # The TPU kernel wants whole 128-wide blocks and has no cache of another length.
    parts = jax.sharding.get_abstract_mesh().shape.get("seq", 1)
    if backend == "tpu" and not cached and L % (128 * parts) == 0 and A % 128 == 0:
        return "splash"
    # Blocks of queries would lie across devices where these split the sequence.
    blocks = backend == "cpu" and not cached and parts == 1
    return "blocks" if blocks else "einsum"


def attend(q_BLHA, k_BSGA, v_BSGA, segments, positions, *, implementation):
    """Exact softmax attention within segments, not to later positions.

    Args:
      q_BLHA: queries; k_BSGA, v_BSGA: keys and values, G divides H.
      segments: int32 (queries [B, L], keys [B, S]).
      positions: int32 (queries [B, L], keys [B, S]) inside the segments. "blocks" and
        "splash" take queries and keys of the same rows, with positions that rise along
        the row inside a segment.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B, L, H, A] in the dtype of q. A query that may see no key gives a finite
      value without meaning.
    """
    if implementation == "splash":
        return _splash(q_BLHA, k_BSGA, v_BSGA, segments)
    if implementation == "blocks":
        return attend_in_blocks(q_BLHA, k_BSGA, v_BSGA, segments[0], positions[0])
    mask_BLS = visible(segments, positions)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BLHA, k_BSGA, v_BSGA, mask=mask_BLS[:, None], implementation="cudnn"
        )
    return _einsum(q_BLHA, k_BSGA, v_BSGA, mask_BLS)


def _einsum(q_BLHA, k_BSGA, v_BSGA, mask_BLS):
    B, L, H, A = q_BLHA.shape
    G = k_BSGA.shape[2]
    q = (q_BLHA * A**-0.5).reshape(B, L, G, H // G, A)
    score = jnp.einsum(
        "blgra,bsga->bgrls", q, k_BSGA, preferred_element_type=jnp.float32
    )
    score = jnp.where(mask_BLS[:, None, None], score, FLOOR)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BSGA.dtype)
    y = jnp.einsum("bgrls,bsga->blgra", weight, v_BSGA)
    return y.reshape(B, L, H, A)


def _splash(q_BLHA, k_BSGA, v_BSGA, segments):
    """The Pallas flash kernel that ships with JAX for TPU; causal within segments.

    Positions rise along the row inside a segment, so "causal in the row and same
    segment" is the mask of `attend`. XLA cannot split a Pallas kernel: on a mesh each
    device takes its rows, heads and queries, and all keys of its rows.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, L, H, A = q_BLHA.shape
    mesh = jax.sharding.get_abstract_mesh()
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((L, L))] * H),
        head_shards=mesh.shape.get("tensor", 1),
        q_seq_shards=mesh.shape.get("seq", 1),
    )

    def run(kernel, q_BLHA, k_BSGA, v_BSGA, segment_BL, segment_BS):
        repeats = q_BLHA.shape[2] // k_BSGA.shape[2]
        q = jnp.swapaxes(q_BLHA * A**-0.5, 1, 2)
        k, v = (
            jnp.repeat(jnp.swapaxes(a, 1, 2), repeats, axis=1) for a in (k_BSGA, v_BSGA)
        )
        ids = kernels.SegmentIds(q=segment_BL, kv=segment_BS)
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v, ids), 1, 2)

    args = (q_BLHA, k_BSGA, v_BSGA, *segments)
    if mesh.empty:
        return run(kernel, *args)
    queries = partition_spec(("batch", "length", "heads"))
    keys = partition_spec(("batch", None, "heads"))
    rows = (partition_spec(("batch", "length")), partition_spec(("batch", None)))
    masks_of = kernel.manual_sharding_spec(
        NamedSharding(mesh, partition_spec(("heads", "length")))
    )
    return jax.shard_map(
        run,
        in_specs=(masks_of, queries, keys, keys, *rows),
        out_specs=queries,
        check_vma=False,  # a Pallas kernel does not say what varies over which axis
    )(kernel, *args)
