"""Gated activations and their gradients, elementwise and in float32.

They are plain jnp on equal shapes, so that kernels can call them on tiles.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The sigmoid's slope, and the limit of both halves, as in GPT-OSS.
CLAMP_SLOPE, CLAMP_LIMIT = 1.702, 7.0


class Activation(NamedTuple):
    """A pair: `value(gate, up) -> h`; `vjp(gate, up, dh) -> (h, dgate, dup)`."""

    value: Callable
    vjp: Callable


def silu_glu(gate, up):
    """Compute silu(gate) * up (SwiGLU; Shazeer 2020, arXiv:2002.05202, equation 6)."""
    return gate * jax.nn.sigmoid(gate) * up


def silu_glu_vjp(gate, up, dh):
    """Return `(silu_glu(gate, up), dgate, dup)`."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu


def gelu_glu(gate, up):
    """Compute gelu(gate) * up, with the exact gelu (GEGLU; same paper, equation 6)."""
    return gate * _normal_cdf(gate) * up


def gelu_glu_vjp(gate, up, dh):
    """Return `(gelu_glu(gate, up), dgate, dup)`."""
    cdf = _normal_cdf(gate)
    density = np.float32((2 * np.pi) ** -0.5) * jnp.exp(-0.5 * gate * gate)
    gelu = gate * cdf
    return gelu * up, dh * up * (cdf + gate * density), dh * gelu


def clamped_glu(gate, up):
    """Compute g sigmoid(1.702 g) (u + 1), g <= 7 and |u| <= 7 (GPT-OSS, model code)."""
    gate = jnp.minimum(gate, CLAMP_LIMIT)
    up = jnp.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * jax.nn.sigmoid(CLAMP_SLOPE * gate) * (up + 1)


def clamped_glu_vjp(gate, up, dh):
    """Return `(clamped_glu(gate, up), dgate, dup)`; no gradient past the limits."""
    g = jnp.minimum(gate, CLAMP_LIMIT)
    u = jnp.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
    sigmoid = jax.nn.sigmoid(CLAMP_SLOPE * g)
    slope = sigmoid + CLAMP_SLOPE * g * sigmoid * (1 - sigmoid)
    dgate = jnp.where(gate <= CLAMP_LIMIT, dh * (u + 1) * slope, 0)
    dup = jnp.where(jnp.abs(up) <= CLAMP_LIMIT, dh * g * sigmoid, 0)
    return g * sigmoid * (u + 1), dgate, dup


def _normal_cdf(x):
    return 0.5 * (1 + lax.erf(x * np.float32(0.5**0.5)))


ACTIVATIONS = {
    "silu": Activation(silu_glu, silu_glu_vjp),
    "gelu": Activation(gelu_glu, gelu_glu_vjp),
    "clamped": Activation(clamped_glu, clamped_glu_vjp),
}
