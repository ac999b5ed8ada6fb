"""Multi-head latent attention: keys and values are made from a small latent per token.

A decoding cache holds the latent and one rotated key that all heads share. A step of
one token never makes keys and values of the cache: their matrices are applied to the
query and to the mixed latents instead (the "absorbed" form, equal by associativity).

B batch · L queries · S keys · D model width · H heads · Z key/value latent width
· N key width without position · P key width with position · V value width · Q query
latent width
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import require
from moex.nn.attention import attend, choose, extend, key_places, mean_visible
from moex.nn.contract import AttentionConfig, AttentionModule
from moex.nn.extra_keys import add_extra_keys
from moex.nn.norm import RMSNorm
from moex.nn.param import param
from moex.nn.projection import Projector, project
from moex.nn.rope import Scaling, frequencies, rotary
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class LatentAttention(AttentionConfig):
    """Multi-head latent attention of DeepSeek-V2 and V3."""

    takes_extra_keys = True

    heads: int  # H, >= 1
    kv_latent: int  # width Z of the latent of keys and values, >= 1
    q_latent: int | None = None  # width Q of the latent of queries; None: no latent
    nope_dim: int  # width N per head of queries and keys without position, >= 1
    rope_dim: int  # width P per head of queries and keys with position, even
    v_dim: int  # width V per head of values, >= 1
    rope_theta: float = 10_000.0  # base of the rotary frequencies, > 1
    rope_scaling: Scaling | None = None  # for longer contexts, such as Yarn(...)
    rope_interleaved: bool = True  # pairs (2i, 2i + 1) are rotated, not halves
    score_scale: float = 1.0  # factor on the scores besides 1 / sqrt(N + P), > 0

    def validate(self, path):
        for name in ("heads", "kv_latent", "nope_dim", "v_dim"):
            value = getattr(self, name)
            require(value >= 1, f"{path}.{name}", value, "at least 1")
        require(
            self.q_latent is None or self.q_latent >= 1,
            f"{path}.q_latent",
            self.q_latent,
            "at least 1, or None",
        )
        even = self.rope_dim >= 2 and self.rope_dim % 2 == 0
        require(even, f"{path}.rope_dim", self.rope_dim, "an even number >= 2")
        require(self.rope_theta > 1, f"{path}.rope_theta", self.rope_theta, "above 1")
        require(self.score_scale > 0, f"{path}.score_scale", self.score_scale, "> 0")

    def score_width(self, dim) -> int:
        return self.heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def visible_keys(self, seq_len) -> float:
        return mean_visible(seq_len)

    def key_width(self, dim) -> int:
        return self.score_width(dim)

    def score_heads(self) -> int:
        return self.heads

    def make(self, dim, rngs):
        return LatentAttentionLayer(self, dim, rngs)

    def init_cache(self, dim, batch, length, dtype):
        """Make zero latents [batch, length, Z] and rotated keys [batch, length, P]."""
        return {
            "latent_BSZ": jnp.zeros((batch, length, self.kv_latent), dtype),
            "k_rope_BSP": jnp.zeros((batch, length, self.rope_dim), dtype),
        }


class LatentAttentionLayer(AttentionModule, Projector):
    """c, p = x W_kva; k = [norm(c) W_k, rotate(p)]; v = norm(c) W_v.

    Parameters: w_kva_DC [D, Z + P], norm_kv, w_kvb_ZHC [Z, H, N + V],
    w_out_HVD [H, V, D]; w_q_DHC [D, H, N + P], or w_qa_DQ, norm_q and w_qb_QHC.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C.
    """

    PROJECTED = (
        *("w_q_DHC", "w_qa_DQ", "w_qb_QHC"),
        *("w_kva_DC", "w_kvb_ZHC", "w_out_HVD"),
    )
    READ_WHOLE = ("w_kvb_ZHC",)

    def __init__(self, cfg, dim, rngs):
        H, Z, Q = cfg.heads, cfg.kv_latent, cfg.q_latent
        N, P, V = cfg.nope_dim, cfg.rope_dim, cfg.v_dim
        self.kv_latent, self.nope_dim = Z, N
        rope = frequencies(P, cfg.rope_theta, cfg.rope_scaling)
        self.rope = (*rope, cfg.rope_interleaved)
        self.scale = cfg.score_scale * (N + P) ** -0.5

        def matrix(shape, axes, inputs):
            fan_in = 1
            for i in inputs:
                fan_in *= shape[i]
            outputs = tuple(i for i in range(len(shape)) if i not in inputs)
            return param(rngs, shape, axes, fan_in=fan_in, matrix=(inputs, outputs))

        heads = ("heads", "head_dim")
        # Assign each once: nnx fixes at the first time whether it holds arrays.
        self.w_q_DHC = (
            matrix((dim, H, N + P), ("embed", *heads), (0,)) if Q is None else None
        )
        self.w_qa_DQ = Q and matrix((dim, Q), ("embed", None), (0,))
        self.norm_q = Q and RMSNorm(Q, rngs)
        self.w_qb_QHC = Q and matrix((Q, H, N + P), (None, *heads), (0,))
        self.w_kva_DC = matrix((dim, Z + P), ("embed", None), (0,))
        self.norm_kv = RMSNorm(Z, rngs)
        self.w_kvb_ZHC = matrix((Z, H, N + V), (None, *heads), (0,))
        self.w_out_HVD = matrix((H, V, dim), (*heads, "embed"), (0, 1))

    def __call__(self, x_BLD, ctx, cache):
        """Returns `(y_BLD, cache)`; `cache` is None outside decoding."""
        Z, N, dtype = self.kv_latent, self.nope_dim, x_BLD.dtype
        q_BLHC = self._queries(x_BLD, ctx)
        q_BLHC = constrain(q_BLHC, "batch", "length", "heads", None)
        q_rope = rotary(q_BLHC[..., N:], ctx.position_BL, *self.rope)
        c_BLC = project(self, "w_kva_DC", x_BLD, ctx)
        latent = self.norm_kv(c_BLC[..., :Z])
        k_rope = rotary(c_BLC[:, :, None, Z:], ctx.position_BL, *self.rope)[:, :, 0]
        # Where sequences are split, every device needs all keys of its rows.
        latent, k_rope = (constrain(a, "batch", None, None) for a in (latent, k_rope))
        if cache is not None:
            new = {"latent_BSZ": latent, "k_rope_BSP": k_rope}
            cache = extend(cache, new, ctx.cache_index)
        cached = cache is not None and ctx.key_segment_BS is not None
        if cached:
            latent, k_rope = (cache[n].astype(dtype) for n in new)
        # An adapter may change w_kvb by its input, so nothing can be absorbed then.
        plain = "w_kvb_ZHC" not in self.adapters
        absorbs = cached and x_BLD.shape[1] == 1 and plain
        mix = self._absorbed if absorbs else self._grown
        places = key_places(ctx)
        y_BLHV = mix(q_BLHC[..., :N], q_rope, latent, k_rope, places, ctx)
        q_BLHC = jnp.concatenate([q_BLHC[..., :N], q_rope], axis=-1)
        y_BLHV, cache = add_extra_keys(
            y_BLHV, q_BLHC, self._extra, self.scale, ctx, cache
        )
        return project(self, "w_out_HVD", y_BLHV, ctx, contract=2), cache

    def _queries(self, x_BLD, ctx):
        if self.w_q_DHC is not None:
            return project(self, "w_q_DHC", x_BLD, ctx)
        assert self.w_qa_DQ is not None and self.w_qb_QHC is not None
        assert self.norm_q is not None
        latent = self.norm_q(project(self, "w_qa_DQ", x_BLD, ctx))
        return project(self, "w_qb_QHC", latent, ctx)

    def _grown(self, q_nope, q_rope, latent_BSZ, k_rope_BSP, places, ctx):
        """Make keys and values of every head, then attend as usual."""
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k, v = self._keys_and_values(latent_BSZ, k_rope_BSP, ctx)
        name = choose(ctx.compute.attention, q, cached=True, plain=False)
        return attend(q, k, v, *places, implementation=name, scale=self.scale)

    def _keys_and_values(self, latent_BSZ, k_rope_BSP, ctx):
        N = self.nope_dim
        kv_BSHC = project(self, "w_kvb_ZHC", latent_BSZ, ctx)
        kv_BSHC = constrain(kv_BSHC, "batch", None, "heads", None)
        k_rope = jnp.broadcast_to(
            k_rope_BSP[:, :, None], (*kv_BSHC.shape[:3], k_rope_BSP.shape[-1])
        )
        return jnp.concatenate([kv_BSHC[..., :N], k_rope], axis=-1), kv_BSHC[..., N:]

    def _extra(self, x_BPD, ctx):
        """Compute the keys and values of extra states, not rotated."""
        Z, (frequency, _, interleaved) = self.kv_latent, self.rope
        c_BPC = project(self, "w_kva_DC", x_BPD, ctx)
        # Position 0 turns nothing, but puts the pairs where those of queries are.
        still = jnp.zeros(x_BPD.shape[:2], jnp.int32)
        k_rope = rotary(c_BPC[:, :, None, Z:], still, frequency, 1.0, interleaved)
        latent = self.norm_kv(c_BPC[..., :Z])
        return self._keys_and_values(latent, k_rope[:, :, 0], ctx)

    def _absorbed(self, q_nope, q_rope, latent_BSZ, k_rope_BSP, places, ctx):
        """Attend to one shared key of width Z + P, and mix latents, not values."""
        N = self.nope_dim
        w_kvb = self.w_kvb_ZHC[...].astype(latent_BSZ.dtype)
        q_latent = jnp.einsum("blhn,zhn->blhz", q_nope, w_kvb[..., :N])
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        k_BSC = jnp.concatenate([latent_BSZ, k_rope_BSP], axis=-1)
        name = choose(ctx.compute.attention, q, cached=True, plain=False)
        mixed_BLHZ = attend(
            q,
            k_BSC[:, :, None],
            latent_BSZ[:, :, None],
            *places,
            implementation=name,
            scale=self.scale,
        )
        return jnp.einsum("blhz,zhv->blhv", mixed_BLHZ, w_kvb[..., N:])
