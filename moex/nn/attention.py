"""Grouped-query self-attention with rotary positions, and the one function behind it.

`attend` picks the fastest exact implementation for the platform: a flash kernel on
accelerators, blocks of queries on CPU. The mask is always "same segment, not later":
packed documents do not see each other; a decoding cache is only another set of keys.

B batch · L queries · S keys · D model width · H query heads · G key/value heads
· R = H / G · A head width
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from kernels_pallas import matmul
from kernels_pallas.attention import attend_in_c, default_attention
from kernels_pallas.dense import computes_in_c
from moex.config.base import MOST, require, require_choice
from moex.nn.attention_blocks import FLOOR, attend_in_blocks, visible
from moex.nn.contract import AttentionConfig, AttentionModule
from moex.nn.extra_keys import add_extra_keys
from moex.nn.norm import RMSNorm
from moex.nn.param import param
from moex.nn.projection import Projector, project
from moex.nn.rope import Scaling, frequencies, rotary
from moex.sharding import constrain, partition_spec

IMPLEMENTATIONS = ("einsum", "blocks", "native", "cudnn", "splash")


@dataclasses.dataclass(kw_only=True, slots=True)
class Attention(AttentionConfig):
    """Grouped-query attention; `heads` query heads share `kv_heads` key/value heads."""

    takes_extra_keys = True

    heads: int  # query heads H, >= 1
    kv_heads: int | None = None  # key/value heads G, divides heads; None: heads
    head_dim: int | None = None  # width per head, even; None: dim / heads
    rope_theta: float = 10_000.0  # base of the rotary frequencies, > 1
    rope_scaling: Scaling | None = None  # for longer contexts, such as Yarn(...)
    # RMSNorm of queries and keys: True per head (Qwen3), "whole" over all (OLMoE).
    qk_norm: bool | str = False
    norm_eps: float = 1e-6  # added to mean squares by qk_norm, > 0
    bias: bool = False  # biases of all four projections
    clip: float | None = None  # limit of queries, keys and values, > 0 (OLMo)
    window: int | None = None  # keys that a query sees, itself included; None: all
    sinks: bool = False  # a learned logit per head takes weight and gives no value

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
        require(
            self.qk_norm in (False, True, "whole"),
            f"{path}.qk_norm",
            self.qk_norm,
            "False, True or 'whole'",
        )
        require(self.norm_eps > 0, f"{path}.norm_eps", self.norm_eps, "above 0")
        for name in ("clip", "window"):
            value = getattr(self, name)
            require(
                value is None or value > 0, f"{path}.{name}", value, "above 0, or None"
            )

    def validate_dim(self, dim, path):
        require(
            self.head_dim is not None
            or (dim % self.heads == 0 and self.width(dim) % 2 == 0),
            f"{path}.heads",
            self.heads,
            f"so many that dim = {dim} is heads times an even width (or set "
            f"{path}.head_dim)",
        )
        width, most = self.width(dim), MOST["head_dim"]
        allowed = f"enough that a head of dim = {dim} is at most {most:,} wide"
        require(width <= most, f"{path}.heads", self.heads, allowed)

    def score_width(self, dim) -> int:
        return 2 * self.heads * self.width(dim)

    def visible_keys(self, seq_len) -> float:
        return mean_visible(seq_len, self.window)

    def key_width(self, dim) -> int:
        return 2 * (self.kv_heads or self.heads) * self.width(dim)

    def score_heads(self) -> int:
        return self.heads

    def width(self, dim) -> int:
        """The width of one head for a model of width `dim`."""
        return dim // self.heads if self.head_dim is None else self.head_dim

    def make(self, dim, rngs):
        return AttentionLayer(self, dim, rngs)

    def init_cache(self, dim, batch, length, dtype):
        """Make zero keys and values for decoding, each [batch, length, G, A]."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        shape = (batch, length, kv_heads, self.width(dim))
        return {"k_BSGA": jnp.zeros(shape, dtype), "v_BSGA": jnp.zeros(shape, dtype)}


class AttentionLayer(AttentionModule, Projector):
    """softmax(q k^T / sqrt(A) + mask) v with rotary q and k.

    Parameters: w_q_DGRA [D, G, R, A], w_kv_D2GA [D, 2, G, A], w_out_GRAD [G, R, A, D];
    with biases bias_q_GRA, bias_kv_2GA and bias_out_D; with sinks sink_GR.

    Source: Ainslie et al. 2023, arXiv:2305.13245; sinks: Xiao et al. 2023,
    arXiv:2309.17453, as learned logits in GPT-OSS, arXiv:2508.10925.
    """

    PROJECTED = ("w_q_DGRA", "w_kv_D2GA", "w_out_GRAD")

    def __init__(self, cfg, dim, rngs):
        A = cfg.width(dim)
        G = cfg.heads if cfg.kv_heads is None else cfg.kv_heads
        R = cfg.heads // G
        self.rope = frequencies(A, cfg.rope_theta, cfg.rope_scaling)
        self.clip, self.window = cfg.clip, cfg.window
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
        self.whole_norm = cfg.qk_norm == "whole"
        widths = (G * R * A, G * A) if self.whole_norm else (A, A)
        # Assign each once: nnx fixes at the first time whether it holds arrays.
        self.norm_q, self.norm_k = (
            RMSNorm(width, rngs, eps=cfg.norm_eps) if cfg.qk_norm else None
            for width in widths
        )
        self.bias_q_GRA = _zeros(rngs, (G, R, A), ("heads", None, None), cfg.bias)
        self.bias_kv_2GA = _zeros(rngs, (2, G, A), (None, "heads", None), cfg.bias)
        self.bias_out_D = _zeros(rngs, (dim,), ("embed",), cfg.bias)
        self.sink_GR = _zeros(rngs, (G, R), ("heads", None), cfg.sinks)

    def _queries(self, x_BLD, ctx):
        """Compute queries [B, L, H, A], not rotated."""
        B, L, _ = x_BLD.shape
        *_, G, R, A = self.w_q_DGRA.shape
        q = project(self, "w_q_DGRA", x_BLD, ctx)
        if self.bias_q_GRA is not None:
            q += self.bias_q_GRA[...].astype(q.dtype)[None, None]
        q_BLHA = constrain(q.reshape(B, L, G * R, A), "batch", "length", "heads", None)
        return self._clipped(self._normed(q_BLHA, self.norm_q))

    def _keys_and_values(self, x_BLD, ctx):
        """Compute keys and values [B, L, G, A], not rotated."""
        k, v = self._products(x_BLD, ctx)
        if self.bias_kv_2GA is not None:
            bias_k, bias_v = self.bias_kv_2GA[...].astype(k.dtype)[:, None, None]
            k, v = k + bias_k, v + bias_v
        return self._clipped(self._normed(k, self.norm_k)), self._clipped(v)

    def _normed(self, x_BLHA, norm):
        if norm is None:
            return x_BLHA
        if self.whole_norm:
            return norm(x_BLHA.reshape(*x_BLHA.shape[:2], -1)).reshape(x_BLHA.shape)
        return norm(x_BLHA)

    def _clipped(self, x):
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)

    def _products(self, x_BLD, ctx):
        """Compute keys and values [B, L, G, A], without biases."""
        # The gradient of a split is one concatenation; that of slices is padding twice.
        # In C we split the weights, which are smaller than the product; but not in a
        # scan over layers, which would save both halves for the backward pass.
        how, adapted = ctx.compute, "w_kv_D2GA" in self.adapters
        in_c = computes_in_c(x_BLD.dtype, how.kernels)
        if in_c and not how.scan_layers and not adapted:
            w_D2GA = self.w_kv_D2GA[...].astype(x_BLD.dtype)
            w_k, w_v = (jnp.squeeze(w, 1) for w in jnp.split(w_D2GA, 2, axis=1))
            return tuple(
                matmul(x_BLD, w, implementation=how.kernels) for w in (w_k, w_v)
            )
        kv = project(self, "w_kv_D2GA", x_BLD, ctx)
        return tuple(jnp.squeeze(part, 2) for part in jnp.split(kv, 2, axis=2))

    def __call__(self, x_BLD, ctx, cache):
        """Returns `(y_BLD, cache)`; `cache` is None outside decoding."""
        dtype = x_BLD.dtype
        B, L, _ = x_BLD.shape
        *_, G, R, A = self.w_q_DGRA.shape
        q_BLHA = rotary(self._queries(x_BLD, ctx), ctx.position_BL, *self.rope)
        k, v = self._keys_and_values(x_BLD, ctx)
        k = rotary(k, ctx.position_BL, *self.rope)
        # Where sequences are split, every device needs all keys of its rows.
        k, v = (constrain(a, "batch", None, "heads", None) for a in (k, v))
        if cache is not None:
            cache = extend(cache, {"k_BSGA": k, "v_BSGA": v}, ctx.cache_index)
        cached = ctx.key_segment_BS is not None
        if cache is not None and cached:
            k, v = cache["k_BSGA"], cache["v_BSGA"]
        plain = self.window is None and self.sink_GR is None
        how = ctx.compute
        name = choose(
            how.attention, q_BLHA, cached=cached, plain=plain, kernels=how.kernels
        )
        sink_H = None if self.sink_GR is None else self.sink_GR[...].reshape(-1)
        y_BLHA = attend(
            q_BLHA,
            k,
            v,
            *key_places(ctx),
            implementation=name,
            window=self.window,
            sink_H=sink_H,
        )
        y_BLHA, cache = add_extra_keys(
            y_BLHA, q_BLHA, self._keys_and_values, A**-0.5, ctx, cache
        )
        y_BLGRA = y_BLHA.reshape(B, L, G, R, A)
        y = project(self, "w_out_GRAD", y_BLGRA, ctx, contract=3)
        if self.bias_out_D is not None:
            y += self.bias_out_D[...].astype(dtype)[None, None]
        return y, cache


def _zeros(rngs, shape, axes, wanted) -> nnx.Param | None:
    return param(rngs, shape, axes, value=0.0) if wanted else None


def mean_visible(seq_len, window=None) -> float:
    """The mean number of keys that a query may see; seq_len / 2 without a window."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return (window**2 / 2 + (seq_len - window) * window) / seq_len


def extend(cache: dict, new: dict, index) -> dict:
    """Write `new` into a cache at `index` of each array's second axis."""
    return cache | {
        name: jax.lax.dynamic_update_slice_in_dim(
            cache[name], array.astype(cache[name].dtype), start_index=index, axis=1
        )
        for name, array in new.items()
    }


def key_places(ctx):
    """Return (segments, positions), each int32 (queries [B, L], keys [B, S])."""
    if ctx.key_segment_BS is None:
        pairs = (ctx.segment_BL, ctx.segment_BL), (ctx.position_BL, ctx.position_BL)
    else:
        pairs = (
            (ctx.segment_BL, ctx.key_segment_BS),
            (ctx.position_BL, ctx.key_position_BS),
        )
    return pairs


def choose(name, q_BLHA, *, cached, plain=True, kernels=None) -> str:
    """The implementation to run: `name` if given, else the fastest exact one here.

    Args:
      name: one of `IMPLEMENTATIONS`, or None.
      q_BLHA: queries.
      cached: whether the keys are those of a cache.
      plain: no window, no sinks, values as wide as keys; else only "einsum" serves.
      kernels: name of the matmul implementation, or None: says whether C is wanted.

    Raises:
      ConfigError: for a name that does not exist, or that cannot do this.
    """
    if name is not None:
        require_choice("attention", name, IMPLEMENTATIONS if plain else ("einsum",))
        return name
    if not plain:
        return "einsum"
    L, A = q_BLHA.shape[1], q_BLHA.shape[-1]
    return default_attention(q_BLHA.dtype, L, A, cached, kernels)


def attend(
    q_BLHA,
    k_BSGA,
    v_BSGA,
    segments,
    positions,
    *,
    implementation,
    scale=None,
    window=None,
    sink_H=None,
):
    """Exact softmax attention within segments, not to later positions.

    Args:
      q_BLHA: queries; k_BSGA, v_BSGA: keys and values, G divides H; with "einsum"
        values may have a width of their own.
      segments: int32 (queries [B, L], keys [B, S]).
      positions: int32 (queries [B, L], keys [B, S]) inside the segments. "blocks",
        "native" and "splash" take queries and keys of the same rows, with positions
        that rise along the row inside a segment.
      implementation: one of `IMPLEMENTATIONS`; "native" is C for one CPU, float32.
      scale: factor on the scores; None: A^-0.5. Only "einsum" takes this and the rest.
      window: keys that a query sees, its own included; None: all before it.
      sink_H: logit of each head that takes weight and gives no value; None: none.

    Returns:
      [B, L, H, A] in the dtype of q. A query that may see no key gives a finite
      value without meaning.
    """
    if implementation == "splash":
        return _splash(q_BLHA, k_BSGA, v_BSGA, segments)
    if implementation in ("blocks", "native"):
        by_rows = attend_in_c if implementation == "native" else attend_in_blocks
        return by_rows(q_BLHA, k_BSGA, v_BSGA, segments[0], positions[0])
    mask_BLS = visible(segments, positions)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BLHA, k_BSGA, v_BSGA, mask=mask_BLS[:, None], implementation="cudnn"
        )
    if window is not None:
        query, key = positions
        mask_BLS &= query[:, :, None] - key[:, None, :] < window
    return _einsum(q_BLHA, k_BSGA, v_BSGA, mask_BLS, scale, sink_H)


def _einsum(q_BLHA, k_BSGA, v_BSGA, mask_BLS, scale=None, sink_H=None):
    B, L, H, A = q_BLHA.shape
    G = k_BSGA.shape[2]
    scale = A**-0.5 if scale is None else scale
    q = (q_BLHA * scale).reshape(B, L, G, H // G, A)
    score = jnp.einsum(
        "blgra,bsga->bgrls", q, k_BSGA, preferred_element_type=jnp.float32
    )
    score = jnp.where(mask_BLS[:, None, None], score, FLOOR)
    if sink_H is not None:
        sink = sink_H.astype(jnp.float32).reshape(1, G, H // G, 1, 1)
        sink = jnp.broadcast_to(sink, (*score.shape[:-1], 1))
        score = jnp.concatenate([score, sink], axis=-1)
    weight = jax.nn.softmax(score, axis=-1)
    weight = weight[..., : mask_BLS.shape[-1]].astype(v_BSGA.dtype)
    y = jnp.einsum("bgrls,bsga->blgra", weight, v_BSGA)
    return y.reshape(B, L, H, -1)


def _splash(q_BLHA, k_BSGA, v_BSGA, segments):
    """Run the Pallas flash kernel that ships with JAX for TPU; causal in segments.

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
