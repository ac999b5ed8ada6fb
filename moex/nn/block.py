"""One transformer block: attention, then any feed-forward.

B batch · L length · D model width
"""

import jax
from flax import nnx

from moex.nn.contract import check_output
from moex.nn.norm import RMSNorm

# A feed-forward's output y is added to h, the residual stream before the norm, to
# z = norm(h), to both, or to nothing.
RESIDUALS = ("prenorm", "released", "both", "none")


class Block(nnx.Module):
    """h = x + attention(norm(x)), then h + ffn(norm(h)) (pre-norm).

    `residual="released"` is z + ffn(z) with z = norm(h): the block of the released
    Chain-of-Experts code, whose residual stream is replaced by its normalised version.
    "both" is h + z + ffn(z) (that code with the outer residual); "none" is ffn(z).

    The pattern names the feed-forward; the segment or the model names the attention:
    see `nn/contract.py`.

    Returns `(x_BLD, aux, cache)`: that of the feed-forward is under "ffn", the name of
    the module, and the reports of adapters are under "adapters".
    """

    def __init__(self, ffn, attention, dim, rngs, *, norm_eps, residual="prenorm"):
        self.residual = residual
        self.norm_attention = RMSNorm(dim, rngs, axis="embed", eps=norm_eps)
        self.attention = attention.make(dim, rngs)
        self.norm_ffn = RMSNorm(dim, rngs, axis="embed", eps=norm_eps)
        self.ffn = ffn.make(dim, rngs)

    def __call__(self, x_BLD, ctx, cache):
        ctx = ctx.listening()
        with jax.named_scope("attention"):
            y_BLD, cache = self.attention(self.norm_attention(x_BLD), ctx, cache)
        check_output(self.attention, y_BLD, x_BLD)
        h_BLD = x_BLD + y_BLD
        z_BLD = self.norm_ffn(h_BLD)
        y_BLD, aux = self.ffn(z_BLD, ctx.inside("ffn"))
        check_output(self.ffn, y_BLD, z_BLD)
        y_BLD = self.added(h_BLD, z_BLD, y_BLD)
        return y_BLD, {"ffn": aux} | ctx.reports(), cache

    def added(self, h_BLD, z_BLD, y_BLD):
        """The output y of the feed-forward with what `residual` adds to it."""
        if self.residual in ("prenorm", "both"):
            y_BLD = h_BLD + y_BLD
        if self.residual in ("released", "both"):
            y_BLD = z_BLD + y_BLD
        return y_BLD
