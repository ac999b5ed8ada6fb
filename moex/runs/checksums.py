"""Checksums of arrays, computed on the devices: the same for any mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def _bits(x) -> jax.Array:
    """The bit pattern of an array as uint32, same shape."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _checksum(x) -> jax.Array:
    """Compute uint32[2] from the bits and places of all elements.

    Sums of integers do not depend on order or sharding. The first sum weighs each
    element by an odd number, so that changing any single element always shows; the
    second mixes value and place, so that changes cannot cancel by design.
    """
    bits = _bits(x)
    # Each dimension on its own: a flat copy would be whole on every device.
    place = jnp.zeros((), jnp.uint32)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) % 2**32)
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        place = place + along * stride
    weighted = bits * (2 * place + 1)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    # With both sums in one reduction XLA keeps no intermediate array in memory.
    sums = jax.lax.reduce(
        (weighted, mixed ^ (mixed >> 16)),
        (jnp.uint32(0), jnp.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(x.ndim)),
    )
    return jnp.stack(sums)


@jax.jit
def _checksums(tree):
    return jax.tree.map(_checksum, tree)


def checksums(tree) -> dict[str, str]:
    """Compute `{path: 16 hex digits}` of all arrays; the sharding does not matter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path): "".join(f"{int(v):08x}" for v in np.asarray(pair))
        for path, pair in leaves
    }


@jax.jit
def _finite(tree):
    leaves = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(a)) for a in leaves]))


def all_finite(tree) -> bool:
    """Whether every number of a tree of arrays is finite."""
    return bool(_finite(tree))
