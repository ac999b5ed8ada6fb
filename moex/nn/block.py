"""One transformer block: attention, then any feed-forward.

B batch · L length · D model width
"""

from flax import nnx

from moex.nn.norm import RMSNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)) (pre-norm).

    The feed-forward is whatever the pattern names: anything with
    `make(dim, rngs)` and `(x_BLD, ctx) -> (y_BLD, aux)`.

    Returns `(x_BLD, aux, cache)`; `aux` sits under "ffn", where the module sits.
    """

    def __init__(self, ffn, attention, dim, rngs, *, norm_eps):
        self.norm_attention = RMSNorm(dim, rngs, axis="embed", eps=norm_eps)
        self.attention = attention.make(dim, rngs)
        self.norm_ffn = RMSNorm(dim, rngs, axis="embed", eps=norm_eps)
        self.ffn = ffn.make(dim, rngs)

    def __call__(self, x_BLD, ctx, cache):
        y_BLD, cache = self.attention(self.norm_attention(x_BLD), ctx, cache)
        h_BLD = x_BLD + y_BLD
        z_BLD, aux = self.ffn(self.norm_ffn(h_BLD), ctx)
        return h_BLD + z_BLD, {"ffn": aux}, cache
