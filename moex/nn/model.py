"""The depth of every model: segments of blocks and the last norm.

Each kind of model adds an embedding before and a head after them: `lm.py`,
`series.py`.

B batch · L length · D model width
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from moex.config.base import MOST, Config, require
from moex.nn.context import fold_key
from moex.nn.contract import AttentionConfig
from moex.nn.extra_keys import with_extra_keys
from moex.nn.norm import RMSNorm
from moex.nn.projection import AdapterConfig, Projector
from moex.nn.stack import Segment, peak_of
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class Model(Config, abc.ABC):
    """The base of all models: width, attention, and the layers in their order.

    Attributes:
      SIZE: the name of the field with the number of outputs per token; where the field
        is None, the data fills it in.
    """

    SIZE: ClassVar[str]

    dim: int  # model width D, >= 1
    attention: AttentionConfig  # for every block whose segment does not name its own
    layers: tuple[Segment, ...]  # at least one segment
    norm_eps: float = 1e-6  # added to mean squares, > 0
    # Trainable parts added to the model, which stays fixed; None: all of it is trained.
    adapter: AdapterConfig | None = None

    def validate(self, path):
        require(self.dim >= 1, f"{path}.dim", self.dim, "at least 1")
        require(len(self.layers) >= 1, f"{path}.layers", self.layers, "not empty")
        layers, most = self.num_layers(), MOST["repeat"]
        require(layers <= most, f"{path}.layers", layers, f"at most {most:,} blocks")
        require(self.norm_eps > 0, f"{path}.norm_eps", self.norm_eps, "above 0")
        self.attention.validate_dim(self.dim, f"{path}.attention")
        for i, segment in enumerate(self.layers):
            segment.validate_dim(self.dim, f"{path}.layers[{i}]")

    @abc.abstractmethod
    def make(self, rngs) -> "Layers":
        """Make the module, with fresh parameters."""

    def num_layers(self) -> int:
        return sum(s.repeat * len(s.pattern) for s in self.layers)

    @property
    def num_outputs(self) -> int:
        """The number of outputs for each token."""
        return getattr(self, self.SIZE)

    @abc.abstractmethod
    def about(self) -> str:
        """The words about input and output in a table, such as "vocabulary 256"."""

    def used_again(self) -> tuple[str, ...]:
        """Names of parameters outside the layers that multiply a token twice."""
        return ()


class Layers(Projector):
    """Parameters: the segments, the last norm. Subclasses add their own before it."""

    def __init__(self, cfg: Model, rngs):
        D = cfg.dim
        self.segments = nnx.List(
            s.make(cfg.attention, D, rngs, norm_eps=cfg.norm_eps) for s in cfg.layers
        )
        blocks = [s.repeat * len(s.pattern) for s in cfg.layers]
        self.first_blocks = tuple(sum(blocks[:i]) for i in range(len(blocks)))
        self.norm = RMSNorm(D, rngs, axis="embed", eps=cfg.norm_eps)

    def run(self, x_BLD, ctx, caches=None):
        """Run all segments and the last norm.

        Args:
          x_BLD: embedded tokens.
          ctx: `Context`.
          caches: from `LM.init_cache`, one per segment; None: there are none.

        Returns:
          (x_BLD, aux, caches), aux mirroring the module path:
          aux["segments"]["0"]["blocks"]["1"]["ffn"]. Where the model is steered,
          aux["peak"] is the greatest absolute number in the residual stream.
        """
        x_BLD = constrain(x_BLD.astype(ctx.compute.dtype), "batch", "length", None)
        ctx = with_extra_keys(self.adapters, ctx)
        aux, new_caches = {}, []
        caches = [None] * len(self.segments) if caches is None else caches
        for i, (segment, cache) in enumerate(zip(self.segments, caches, strict=True)):
            own = dataclasses.replace(_inside(ctx, i), depth=self.first_blocks[i])
            x_BLD, aux[str(i)], cache = segment(x_BLD, own, cache)
            new_caches.append(cache)
        told: dict[str, Any] = {"segments": aux}
        if ctx.steer is not None:
            peaks = [jnp.max(own.pop("peak")) for own in aux.values() if "peak" in own]
            last = peak_of(x_BLD, ctx.valid_BL)
            told["peak"] = jnp.max(jnp.stack([*peaks, last]))
        return self.norm(x_BLD), told, new_caches


def _inside(ctx, i):
    """The context of segment `i`, with its own random key."""
    own = ctx.inside("segments").inside(str(i))
    return dataclasses.replace(own, key=fold_key(ctx.key, i))
