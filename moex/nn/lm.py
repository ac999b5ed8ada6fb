"""The language model: embed -> segments -> norm -> logits.

B batch · L length · S cache length · D model width · V vocabulary
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.device import platform
from moex.config import MOST, Config, require
from moex.nn.context import fold_key
from moex.nn.norm import RMSNorm
from moex.nn.param import param
from moex.nn.project import in_c, project
from moex.nn.stack import Segment, require_attention
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class LM(Config):
    """A decoder-only transformer; depth and its variety are in `layers`."""

    dim: int  # model width D, >= 1
    attention: Config  # of every block whose segment does not name its own
    layers: tuple[Segment, ...]  # at least one segment
    vocab: int | None = None  # vocabulary V, >= 2; None: that of the tokenizer
    tied_embeddings: bool = False  # one matrix for input and output
    scale_embeddings: bool = True  # rows of the input times sqrt(dim)
    norm_eps: float = 1e-6  # added to mean squares, > 0

    def validate(self, path):
        require(self.dim >= 1, f"{path}.dim", self.dim, "at least 1")
        require(len(self.layers) >= 1, f"{path}.layers", self.layers, "not empty")
        layers, most = self.num_layers(), MOST["repeat"]
        require(layers <= most, f"{path}.layers", layers, f"at most {most:,} blocks")
        require(self.norm_eps > 0, f"{path}.norm_eps", self.norm_eps, "above 0")
        require(
            self.vocab is None or self.vocab >= 2,
            f"{path}.vocab",
            self.vocab,
            "at least 2, or None for the vocabulary of the tokenizer",
        )
        require_attention(self.attention, f"{path}.attention")
        attention: Any = self.attention
        attention.validate_dim(self.dim, f"{path}.attention")
        for i, segment in enumerate(self.layers):
            segment.validate_dim(self.dim, f"{path}.layers[{i}]")

    def make(self, rngs):
        return LanguageModel(self, rngs)

    def num_layers(self) -> int:
        return sum(s.repeat * len(s.pattern) for s in self.layers)

    def init_cache(self, batch, length, dtype):
        """Decoding cache for `LanguageModel.decode`, one entry per segment."""
        return [
            s.init_cache(self.attention, self.dim, batch, length, dtype)
            for s in self.layers
        ]


class LanguageModel(nnx.Module):
    """Parameters: w_embed_VD [V, D], the segments, the last norm, w_logits_DV."""

    def __init__(self, cfg, rngs):
        D, V = cfg.dim, cfg.vocab
        self.scale_embeddings = cfg.scale_embeddings
        self.w_embed_VD = param(rngs, (V, D), ("vocab", "embed"), std=D**-0.5)
        self.segments = nnx.List(
            s.make(cfg.attention, D, rngs, norm_eps=cfg.norm_eps) for s in cfg.layers
        )
        blocks = [s.repeat * len(s.pattern) for s in cfg.layers]
        self.first_blocks = tuple(sum(blocks[:i]) for i in range(len(blocks)))
        self.norm = RMSNorm(D, rngs, axis="embed", eps=cfg.norm_eps)
        self.w_logits_DV = (
            None
            if cfg.tied_embeddings
            else param(rngs, (D, V), ("embed", "vocab"), fan_in=D)
        )

    def __call__(self, ctx):
        """Logits for training and scoring.

        Args:
          ctx: `Context`; its tokens are the input.

        Returns:
          (logits_BLV float32, aux), aux mirroring the module path:
          aux["segments"]["0"]["blocks"]["1"]["ffn"].
        """
        logits_BLV, aux, _ = self._run(ctx, [None] * len(self.segments))
        return logits_BLV, aux

    def decode(self, ctx, cache):
        """Returns (logits_BLV, cache) with this call's keys and values written."""
        logits_BLV, _, cache = self._run(ctx, cache)
        return logits_BLV, cache

    def _run(self, ctx, caches):
        dtype = ctx.compute_dtype
        # sqrt(D) brings the rows to unit scale; the tied matrix keeps logits small.
        x_BLD = self.w_embed_VD[...].at[ctx.token_BL].get(mode="clip")
        if self.scale_embeddings:
            x_BLD = x_BLD * x_BLD.shape[-1] ** 0.5
        x_BLD = x_BLD.astype(dtype)
        x_BLD = constrain(x_BLD, "batch", "length", None)
        aux, new_caches = {}, []
        for i, (segment, cache) in enumerate(zip(self.segments, caches, strict=True)):
            own = dataclasses.replace(_inside(ctx, i), depth=self.first_blocks[i])
            x_BLD, aux[str(i)], cache = segment(x_BLD, own, cache)
            new_caches.append(cache)
        x_BLD = self.norm(x_BLD)
        if self.w_logits_DV is None:
            w_DV = self.w_embed_VD[...].T
        else:
            w_DV = self.w_logits_DV[...]
        logits_BLV = logits(x_BLD, w_DV.astype(dtype), ctx)
        logits_BLV = constrain(logits_BLV, "batch", "length", "vocab")
        return logits_BLV, {"segments": aux}, new_caches


def _inside(ctx, i):
    """The context of segment `i`: its own random key, its part of a replay."""
    key = fold_key(ctx.key, i)
    forced = None if ctx.forced is None else ctx.forced["segments"].get(str(i))
    return dataclasses.replace(ctx, key=key, forced=forced)


def logits(x_BLD, w_DV, ctx):
    """float32[B, L, V]: the product, with a quick weight gradient on a CPU.

    Where there is no C: XLA:CPU makes one dot of two transposed operands of that
    gradient, at a third of the speed of one whose first operand was transposed before
    (2 cores, JAX 0.10.2: [2048, 256] and [2048, 8192], 23 and 73 GFLOP/s).
    """
    if in_c(x_BLD.dtype, ctx.kernels):
        return project(x_BLD, w_DV, ctx)
    if platform() == "cpu" and x_BLD.dtype == jnp.float32:
        return _logits_on_cpu(x_BLD, w_DV)
    return _product(x_BLD, w_DV)


def _product(x_BLD, w_DV):
    return jnp.einsum("bld,dv->blv", x_BLD, w_DV, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _logits_on_cpu(x_BLD, w_DV):
    return _product(x_BLD, w_DV)


def _logits_forward(x_BLD, w_DV):
    return _product(x_BLD, w_DV), (x_BLD, w_DV)


def _logits_backward(saved, dlogits_BLV):
    x_BLD, w_DV = saved
    D, V = w_DV.shape
    dlogits_TV = dlogits_BLV.reshape(-1, V)
    x_DT = jax.lax.optimization_barrier(x_BLD.reshape(-1, D).T)
    return (dlogits_TV @ w_DV.T).reshape(x_BLD.shape), x_DT @ dlogits_TV


_logits_on_cpu.defvjp(_logits_forward, _logits_backward)
