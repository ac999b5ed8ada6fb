"""Tiles that were measured: the table in `tilings.json`, one entry per shape.

`python -m benchmarks.tune` writes the table, for the kind of device that it runs on.
What is not in it gets the arithmetic of each backend's `default_tiling`.

Legend: M rows, K contraction, N columns, G groups.
"""

import functools
import json
import math
import pathlib

import jax.numpy as jnp

from kernels_pallas.device import device_kind

PATH = pathlib.Path(__file__).parent / "tilings.json"
FACTOR = 2  # an entry serves mean group sizes up to this many times larger or smaller


@functools.cache
def table() -> dict:
    """`{device kind: {backend: [entry]}}`; read when a kernel is first traced."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def lookup(device, backend, operation, M, K, N, G, dtype) -> dict | None:
    """Fields of the measured tiling for these sizes, or None.

    The matrices must be those measured; rows per group may differ by FACTOR, and the
    nearest entry is taken.

    Args:
      device: kind, as JAX calls it.
      backend: key of IMPLEMENTATIONS.
      operation: as the backend's `default_tiling` calls it.
      M, K, N, G: sizes.
      dtype: of the operands.
    """
    best, distance = None, math.log(FACTOR) + 1e-9
    for entry in table().get(device, {}).get(backend, []):
        here = (operation, K, N, str(dtype))
        if (entry["operation"], entry["K"], entry["N"], entry["dtype"]) != here:
            continue
        far = abs(math.log((M / G) / (entry["M"] / entry["G"])))
        if far <= distance:
            best, distance = entry["tiling"], far
    return best


def measured_or(backend, tiling_type, default_tiling):
    """A backend's `default_tiling`, but for sizes that were measured on this device."""

    def tiling_for(operation, M, K, N, G, dtype):
        sizes = (operation, M, K, N, G, jnp.dtype(dtype))
        found = lookup(device_kind(), backend, *sizes)
        return default_tiling(*sizes) if found is None else tiling_type(**found)

    return tiling_for
