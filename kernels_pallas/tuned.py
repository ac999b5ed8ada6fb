"""Tiles that were measured: the table in `tilings.json`, one entry per shape.

`python -m benchmarks.tune` writes the table, for the kind of device that it runs on.
Sizes that are not in it get the `default_tiling` of each backend, which is arithmetic.

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
    """The table `{device kind: {backend: [entry]}}`; read at the first trace."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def lookup(device, backend, operation, M, K, N, G, dtype) -> dict | None:
    """The fields of the measured tiling for these sizes, or None.

    The matrices must have the sizes measured; rows per group may differ by FACTOR, and
    the nearest entry is taken.

    Args:
      device: the kind of device, as JAX calls it.
      backend: key of IMPLEMENTATIONS.
      operation: name of the operation, as in the backend's `default_tiling`.
      M, K, N, G: sizes.
      dtype: dtype of the operands.
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
    """Make `tiling_for`: `default_tiling`, except for sizes measured on this device."""

    def tiling_for(operation, M, K, N, G, dtype):
        sizes = (operation, M, K, N, G, jnp.dtype(dtype))
        found = lookup(device_kind(), backend, *sizes)
        return default_tiling(*sizes) if found is None else tiling_type(**found)

    return tiling_for
