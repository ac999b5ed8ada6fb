"""The dense feed-forward: SwiGLU.

T tokens · B batch · L length · D model width · F hidden width
"""

import dataclasses

import jax

from moex.config.base import require
from moex.nn.context import Context
from moex.nn.contract import FeedForward, FeedForwardConfig
from moex.nn.param import param
from moex.nn.projection import Projector, project


@dataclasses.dataclass(kw_only=True, slots=True)
class Dense(FeedForwardConfig):
    """A dense SwiGLU feed-forward layer; also the shape of a shared expert."""

    hidden: int  # hidden width F, >= 1

    def validate(self, path):
        require(self.hidden >= 1, f"{path}.hidden", self.hidden, "at least 1")

    def make(self, dim, rngs):
        return DenseLayer(self, dim, rngs)


class DenseLayer(FeedForward, Projector):
    """W_out (silu(W_gate x) * W_up x), no biases.

    Parameters: w_in_D2F [D, 2, F] (gate, up), w_out_FD [F, D].

    Source: Shazeer 2020, arXiv:2002.05202, equation 6 (SwiGLU).
    """

    PROJECTED = ("w_in_D2F", "w_out_FD")

    def __init__(self, cfg, dim, rngs):
        F = cfg.hidden
        self.w_in_D2F = param(
            rngs,
            (dim, 2, F),
            ("embed", None, "mlp"),
            fan_in=dim,
            matrix=((0,), (2,)),
        )
        self.w_out_FD = param(
            rngs, (F, dim), ("mlp", "embed"), fan_in=F, matrix=((0,), (1,))
        )

    def __call__(self, x_BLD, ctx=None):
        ctx = Context.of(x_BLD) if ctx is None else ctx
        h_BL2F = project(self, "w_in_D2F", x_BLD, ctx)
        h_BLF = jax.nn.silu(h_BL2F[..., 0, :]) * h_BL2F[..., 1, :]
        return project(self, "w_out_FD", h_BLF, ctx), {}
