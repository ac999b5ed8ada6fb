"""A model of numeric series: linear embedding -> segments -> norm -> linear head.

B batch · L length · D model width · N numbers of a token
"""

import dataclasses

import jax.numpy as jnp

from moex.config.base import require
from moex.nn.model import Layers, Model
from moex.nn.param import param
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class SeriesModel(Model):
    """A model whose tokens are vectors of numbers, in and out; depth is in `layers`."""

    SIZE = "numbers"

    numbers: int | None = None  # N of a token, >= 1; None: as many as the data has

    def validate(self, path):
        Model.validate(self, path)
        ok = self.numbers is None or self.numbers >= 1
        allowed = "at least 1, or None for those of the data"
        require(ok, f"{path}.numbers", self.numbers, allowed)

    def make(self, rngs):
        return SeriesLayers(self, rngs)

    def about(self) -> str:
        return f"{self.numbers} numbers a token"


class SeriesLayers(Layers):
    """Parameters: w_in_ND [N, D], those of `Layers`, w_out_DN [D, N]; no biases."""

    def __init__(self, cfg: SeriesModel, rngs):
        D, N = cfg.dim, cfg.numbers
        self.w_in_ND = param(rngs, (N, D), (None, "embed"), fan_in=N)
        super().__init__(cfg, rngs)
        self.w_out_DN = param(rngs, (D, N), ("embed", None), fan_in=D)

    def __call__(self, value_BLN, ctx):
        """Compute the output numbers of each token.

        Args:
          value_BLN: float32 input.
          ctx: `Context`.

        Returns:
          (out_BLN float32, aux), aux as `Layers.run` gives it.
        """
        dtype = ctx.compute.dtype
        x_BLD = value_BLN.astype(dtype) @ self.w_in_ND[...].astype(dtype)
        x_BLD, aux, _ = self.run(x_BLD, ctx)
        w_DN = self.w_out_DN[...].astype(dtype)
        out_BLN = jnp.matmul(x_BLD, w_DN, preferred_element_type=jnp.float32)
        return constrain(out_BLN, "batch", "length", None), aux
