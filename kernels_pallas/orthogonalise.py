"""Muon's step of stacked matrices in C, for CPUs: native/orthogonalise.c.

Legend: S and I batch, R rows, C columns: matrix (s, i) is x[s, :, i, :].
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.native import library


def orthogonalised_momentum(
    g_SRIC, momentum_SRIC, weights, coefficients, steps: int, eps: float
):
    """Move the momentum by a gradient, and orthogonalise what the step follows.

    The momentum becomes w0 M + w1 G, and X = w2 M + w3 G of the new one. X over its
    Frobenius norm plus `eps` is iterated by Newton and Schulz:
    X <- a X + (b A + c A A) X, A = X X^T. A and A A are symmetric, and only half of
    each is computed.

    Args:
      g_SRIC, momentum_SRIC: float32, G and M.
      weights: (w0, w1, w2, w3).
      coefficients: (a, b, c).
      steps: iterations, >= 0.
      eps: number added to the norm.

    Returns:
      (X, new momentum), float32 [S, R, I, C].

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """
    numbers = [jnp.asarray(n, jnp.float32) for n in (weights, coefficients)]
    shapes = [g_SRIC.shape, g_SRIC.shape]
    inputs = (g_SRIC, momentum_SRIC, *numbers)
    scalars = {"steps": np.int32(steps), "eps": np.float32(eps)}
    return library.call("moex_orthogonalise", shapes, inputs, **scalars)
