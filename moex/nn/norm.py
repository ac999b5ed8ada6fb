"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from moex.nn.param import param


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis.

    It is computed in float32 for any dtype of x, and returned in the dtype of x.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """

    def __init__(self, dim, rngs, *, axis=None, eps=1e-6):
        self.eps = eps
        self.scale_D = param(rngs, (dim,), (axis,), value=1.0)

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        scale = self.scale_D[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(x.dtype)
