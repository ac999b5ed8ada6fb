"""Muon's orthogonalisation of stacked matrices in C, for CPUs: native/orthogonalise.c.

Legend: S and I batch, R rows, C columns: matrix (s, i) is x[s, :, i, :].
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.native import library


def orthogonalise(x_SRIC, coefficients, steps: int, eps: float):
    """Iterate Newton-Schulz on every matrix: X <- a X + (b A + c A A) X, A = X X^T.

    X begins as the matrix over its Frobenius norm plus `eps`. A and A A are symmetric,
    and only half of each is computed.

    Args:
      x_SRIC: float32.
      coefficients: (a, b, c).
      steps: iterations, >= 0.
      eps: number added to the norm.

    Returns:
      float32 [S, R, I, C].

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """
    inputs = (x_SRIC, jnp.asarray(coefficients, jnp.float32))
    scalars = {"steps": np.int32(steps), "eps": np.float32(eps)}
    (y_SRIC,) = library.call("moex_orthogonalise", [x_SRIC.shape], inputs, **scalars)
    return y_SRIC
