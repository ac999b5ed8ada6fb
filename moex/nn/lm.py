"""The language model: embed -> segments -> norm -> logits.

B batch · L length · S cache length · D model width · V vocabulary
"""

import dataclasses

import jax.numpy as jnp

from kernels_pallas import matmul
from moex.config.base import require
from moex.nn.model import Layers, Model
from moex.nn.param import param
from moex.nn.projection import look_up, project
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class LM(Model):
    """A decoder-only transformer; depth and its variety are in `layers`."""

    SIZE = "vocab"

    vocab: int | None = None  # vocabulary V, >= 2; None: that of the tokenizer
    tied_embeddings: bool = False  # one matrix for input and output
    scale_embeddings: bool = True  # rows of the input times sqrt(dim)

    def validate(self, path):
        Model.validate(self, path)
        require(
            self.vocab is None or self.vocab >= 2,
            f"{path}.vocab",
            self.vocab,
            "at least 2, or None for the vocabulary of the tokenizer",
        )

    def make(self, rngs):
        return LanguageModel(self, rngs)

    def about(self) -> str:
        return f"vocabulary {self.vocab}"

    def used_again(self) -> tuple[str, ...]:
        return ("w_embed_VD",) if self.tied_embeddings else ()

    def init_cache(self, batch, length, dtype):
        """Make the cache for `LanguageModel.decode`, one entry per segment."""
        return [
            s.init_cache(self.attention, self.dim, batch, length, dtype)
            for s in self.layers
        ]


class LanguageModel(Layers):
    """Parameters: w_embed_VD [V, D], those of `Layers`, w_logits_DV."""

    PROJECTED = ("w_embed_VD", "w_logits_DV")
    READ_WHOLE = ("w_embed_VD",)

    def __init__(self, cfg: LM, rngs):
        D, V = cfg.dim, cfg.vocab
        self.scale_embeddings = cfg.scale_embeddings
        self.w_embed_VD = param(rngs, (V, D), ("vocab", "embed"), std=D**-0.5)
        super().__init__(cfg, rngs)
        self.w_logits_DV = (
            None
            if cfg.tied_embeddings
            else param(rngs, (D, V), ("embed", "vocab"), fan_in=D)
        )

    def __call__(self, ctx):
        """Compute logits for training and scoring.

        Args:
          ctx: `Context`; its tokens are the input.

        Returns:
          (logits_BLV float32, aux), aux as `Layers.run` gives it, with the reports of
          the adapters of its own matrices.
        """
        ctx = ctx.listening()
        x_BLD, aux, _ = self.run(self.embed(ctx), ctx)
        return self.outputs(x_BLD, ctx), aux | ctx.reports()

    def decode(self, ctx, cache):
        """Compute logits of the last tokens only, and the cache for later calls.

        Returns:
          (logits_BV float32, aux, cache with this call's keys and values written).
        """
        x_BLD, aux, cache = self.run(self.embed(ctx), ctx, cache)
        return self.outputs(x_BLD[:, -1:], ctx)[:, 0], aux, cache

    def embed(self, ctx):
        """Look up the tokens of the context: the input of `run`."""
        # sqrt(D) brings the rows to unit scale; the tied matrix keeps logits small.
        x_BLD = look_up(self, "w_embed_VD", ctx.token_BL, ctx)
        if self.scale_embeddings:
            x_BLD = x_BLD * x_BLD.shape[-1] ** 0.5
        return x_BLD

    def outputs(self, x_BLD, ctx):
        """Compute logits from the output of the layers, which `run` has normalised."""
        if self.w_logits_DV is not None:
            f32 = jnp.float32
            logits_BLV = project(self, "w_logits_DV", x_BLD, ctx, out_dtype=f32)
        else:
            logits_BLV = matmul(
                x_BLD,
                self.w_embed_VD[...].T.astype(x_BLD.dtype),
                implementation=ctx.compute.kernels,
                out_dtype=jnp.float32,
            )
        return constrain(logits_BLV, "batch", "length", "vocab")
