"""The table of backends, and how one is chosen.

To add a backend: write `grouped_matmul/<name>.py` and `grouped_glu/<name>.py` and add
one entry to IMPLEMENTATIONS; the tests and the table in the documentation run over it.
"""

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from kernels_pallas.grouped_glu import cpu as glu_cpu
from kernels_pallas.grouped_glu import reference as glu_reference
from kernels_pallas.grouped_glu import vjp as glu_vjp
from kernels_pallas.grouped_glu import xla as glu_xla
from kernels_pallas.grouped_matmul import cpu as matmul_cpu
from kernels_pallas.grouped_matmul import reference as matmul_reference
from kernels_pallas.grouped_matmul import vjp as matmul_vjp
from kernels_pallas.grouped_matmul import xla as matmul_xla

PLATFORMS = ("cpu", "gpu", "tpu")
INTERPRETED = "_interpret"  # ends the names of kernels run by Pallas' interpreters


class ImplementationFallback(UserWarning):
    """The first choice cannot do what is asked for, and another one does it."""


class Request(NamedTuple):
    """What decides whether an implementation can do something.

    K and N are those of the forward matmul; of grouped_glu, of its first one.
    """

    operation: str  # "grouped_matmul" or "grouped_glu"
    dtype: str  # of tokens
    K: int
    N: int
    G: int
    activation: str | None = None
    weights: str | None = None  # dtype; None: that of tokens


def _anything(request: Request) -> str | None:
    del request
    return None


@dataclass(frozen=True)
class Implementation:
    """One backend of both operations.

    Attributes:
      grouped_matmul: (lhs, rhs, bounds, transpose_rhs, out_dtype) -> out.
      grouped_glu: (x, w_in, w_out, gate, plan, activation, buffer_rows) -> y.
      platforms: where it runs.
      purpose: one line for people.
      unsupported: (Request) -> why it cannot do that, or None.
    """

    grouped_matmul: Callable
    grouped_glu: Callable
    platforms: tuple[str, ...]
    purpose: str
    unsupported: Callable[[Request], str | None] = _anything


def _made_of(matmul, glu, **options) -> Implementation:
    """An Implementation of two modules that hold forward and backward passes."""
    return Implementation(
        matmul_vjp.differentiable(matmul.product, matmul.weight_product),
        glu_vjp.differentiable(glu.forward, glu.backward),
        **options,
    )


IMPLEMENTATIONS = {
    "reference": Implementation(
        matmul_vjp.differentiable(
            matmul_reference.product, matmul_reference.weight_product
        ),
        glu_reference.grouped_glu,
        platforms=PLATFORMS,
        purpose="the definition: every expert on every row; for tests",
    ),
    "xla": _made_of(
        matmul_xla,
        glu_xla,
        platforms=PLATFORMS,
        purpose="lax.ragged_dot_general; the fallback of accelerators",
    ),
    "cpu": _made_of(
        matmul_cpu,
        glu_cpu,
        platforms=PLATFORMS,
        purpose="a loop over tiles of one expert's rows",
    ),
}

# What None means on each platform: the first that can do what is asked for.
DEFAULTS = {"cpu": ("cpu",), "gpu": ("xla",), "tpu": ("xla",)}


def choose(name: str | None, request: Request) -> Implementation:
    """The Implementation to use.

    Args:
      name: a key of IMPLEMENTATIONS; or several, separated by commas, of which the
        first that can do it is taken, with a warning if it is not the first of all;
        or None, which means DEFAULTS of the platform.
      request: what it has to do.

    Raises:
      ValueError: if a name is unknown, or none of those named can do it.
    """
    here = platform()
    names = DEFAULTS.get(here, ("xla",)) if name is None else split_names(name)
    refusals: list[str] = []
    for candidate in names:
        reason = why_not(candidate, request, here)
        if reason is None:
            if refusals:
                warnings.warn(
                    f"kernels: {'; '.join(refusals)}. Using {candidate!r}.",
                    ImplementationFallback,
                    stacklevel=4,
                )
            return IMPLEMENTATIONS[candidate]
        refusals.append(f"{candidate!r} cannot do {request.operation}: {reason}")
    able = [n for n in IMPLEMENTATIONS if why_not(n, request, here) is None]
    raise ValueError(
        f"{'; '.join(refusals)}. These can: {', '.join(map(repr, able))}. "
        "Several names with commas between them allow a fallback."
    )


def split_names(names: str) -> tuple[str, ...]:
    """The names in a comma-separated list; raises ValueError if one is unknown."""
    parts = tuple(part.strip() for part in str(names).split(","))
    for part in parts:
        if part not in IMPLEMENTATIONS:
            allowed = ", ".join(map(repr, IMPLEMENTATIONS))
            near = difflib.get_close_matches(part, IMPLEMENTATIONS, n=1, cutoff=0.0)
            raise ValueError(
                f"implementation must be None or one of {allowed}; got {part!r}. "
                f"Did you mean {near[0]!r}?"
            )
    return parts


def why_not(name: str, request: Request, where: str) -> str | None:
    """Why an implementation cannot do something on a platform; None if it can."""
    entry = IMPLEMENTATIONS[name]
    if where not in entry.platforms:
        return f"it runs on {' and '.join(entry.platforms)}, not on {where}"
    return entry.unsupported(request)


def runnable() -> list[str]:
    """Names of the implementations that run, and not only interpreted, right here."""
    return [
        name
        for name, entry in IMPLEMENTATIONS.items()
        if platform() in entry.platforms and not name.endswith(INTERPRETED)
    ]


def platform() -> str:
    """The platform traced for: of the mesh in use, else of this process.

    A mesh of devices that are described and not there (ahead-of-time compilation)
    counts too. JAX's trace caches know of the mesh, so a cached trace is never of
    another platform.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The kind of device traced for, such as "NVIDIA H100 80GB HBM3" or "TPU v5e"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
