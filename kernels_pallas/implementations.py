"""The table of backends, and how one is chosen.

To add a backend: write `grouped_matmul/<name>.py` and `grouped_swiglu/<name>.py`
and add one entry here; the tests run over this table. `gpu.py` and `tpu.py` beside
the modules imported below are the place for hand-written accelerator kernels.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import jax

from kernels_pallas.grouped_matmul import cpu as matmul_cpu
from kernels_pallas.grouped_matmul import reference as matmul_reference
from kernels_pallas.grouped_matmul import xla as matmul_xla
from kernels_pallas.grouped_swiglu import cpu as swiglu_cpu
from kernels_pallas.grouped_swiglu import reference as swiglu_reference
from kernels_pallas.grouped_swiglu import xla as swiglu_xla


@dataclass(frozen=True)
class Implementation:
    """One backend of both operations; every backend runs on every platform so far.

    Attributes:
      grouped_matmul: (lhs, rhs, group_sizes, transpose_rhs, out_dtype) -> out.
      grouped_swiglu: (x, w_in, w_out, gate, plan) -> y.
      default_on: names from `jax.default_backend()` where None picks it.
      purpose: one line for people.
    """

    grouped_matmul: Callable
    grouped_swiglu: Callable
    default_on: tuple[str, ...]
    purpose: str


IMPLEMENTATIONS = {
    "reference": Implementation(
        matmul_reference.grouped_matmul,
        swiglu_reference.grouped_swiglu,
        default_on=(),
        purpose="the definition: every expert on every row; for tests",
    ),
    "xla": Implementation(
        matmul_xla.grouped_matmul,
        swiglu_xla.grouped_swiglu,
        default_on=("gpu", "cuda", "rocm", "tpu"),
        purpose="lax.ragged_dot_general; the fallback of accelerators",
    ),
    "cpu": Implementation(
        matmul_cpu.grouped_matmul,
        swiglu_cpu.grouped_swiglu,
        default_on=("cpu",),
        purpose="a loop over tiles of one expert's rows",
    ),
}


def choose(name):
    """The Implementation called `name`; None picks the default of the platform."""
    if name is None:
        platform = jax.default_backend()
        for entry in IMPLEMENTATIONS.values():
            if platform in entry.default_on:
                return entry
        return IMPLEMENTATIONS["xla"]
    if name not in IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, IMPLEMENTATIONS))
        near = difflib.get_close_matches(str(name), IMPLEMENTATIONS, n=1, cutoff=0.0)
        raise ValueError(
            f"implementation must be None or one of {allowed}; got {name!r}. "
            f"Did you mean {near[0]!r}?"
        )
    return IMPLEMENTATIONS[name]
