"""Narrow: a whole feed-forward in a smaller width.

B batch · L length · D model width · Z latent width
"""

import dataclasses

from moex.config.base import require
from moex.nn.context import Context
from moex.nn.contract import FeedForward, FeedForwardConfig
from moex.nn.param import param


@dataclasses.dataclass(kw_only=True, slots=True)
class Narrow(FeedForwardConfig):
    """`inner` between one projection to `latent` and one back, for every token.

    Tokens are dispatched in the latent width, so traffic falls by latent / dim.
    """

    latent: int  # width Z of the inner layer, 1 <= latent <= model width
    inner: FeedForwardConfig  # a feed-forward: MoE, Chain, Dense, ...

    def validate(self, path):
        require(self.latent >= 1, f"{path}.latent", self.latent, "at least 1")

    def validate_dim(self, dim, path):
        require(
            self.latent <= dim,
            f"{path}.latent",
            self.latent,
            f"at most the model width, {dim}",
        )
        self.inner.validate_dim(self.latent, f"{path}.inner")

    def validate_repeat(self, repeat, path):
        self.inner.validate_repeat(repeat, f"{path}.inner")

    def param_use(self, name, experts_per_token=None) -> tuple[float, float]:
        if name.startswith("inner/"):
            return self.inner.param_use(name.removeprefix("inner/"), experts_per_token)
        return 1.0, 1.0

    def wraps(self, dim):
        return "inner", self.inner, self.latent

    def describe(self):
        return f"Narrow({self.latent}, {self.inner.describe()})"

    def make(self, dim, rngs):
        return NarrowLayer(self, dim, rngs)


class NarrowLayer(FeedForward):
    """y = inner(x W_down) W_up; router and shared expert see the latent tokens.

    Parameters: w_down_DZ [D, Z], w_up_ZD [Z, D].

    Source: the latent dispatch of LatentMoE, arXiv:2601.18089 (known to us from
    secondary sources; there the router sees the full width).
    """

    def __init__(self, cfg, dim, rngs):
        Z = cfg.latent
        self.w_down_DZ = param(
            rngs, (dim, Z), ("embed", "latent"), fan_in=dim, matrix=((0,), (1,))
        )
        self.inner = cfg.inner.make(Z, rngs)
        self.w_up_ZD = param(
            rngs, (Z, dim), ("latent", "embed"), fan_in=Z, matrix=((0,), (1,))
        )

    def __call__(self, x_BLD, ctx=None):
        ctx = Context.of(x_BLD) if ctx is None else ctx
        dtype = x_BLD.dtype
        z_BLZ = x_BLD @ self.w_down_DZ[...].astype(dtype)
        y_BLZ, aux = self.inner(z_BLZ, ctx.inside("inner"))
        y_BLD = y_BLZ @ self.w_up_ZD[...].astype(dtype)
        return y_BLD, {"inner": aux} if aux else {}
