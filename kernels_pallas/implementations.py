"""The table of backends, and how one is chosen.

To add a backend: write `grouped_matmul/<name>.py` and `grouped_glu/<name>.py` and add
one entry to IMPLEMENTATIONS; the tests and the table in the documentation run over it.
"""

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import jax

from kernels_pallas import mosaic_tiles
from kernels_pallas.device import platform
from kernels_pallas.grouped_glu import compose
from kernels_pallas.grouped_glu import cpu as glu_cpu
from kernels_pallas.grouped_glu import mosaic as glu_mosaic
from kernels_pallas.grouped_glu import native as glu_native
from kernels_pallas.grouped_glu import reference as glu_reference
from kernels_pallas.grouped_glu import tpu as glu_tpu
from kernels_pallas.grouped_glu import triton as glu_triton
from kernels_pallas.grouped_glu import vjp as glu_vjp
from kernels_pallas.grouped_glu import xla as glu_xla
from kernels_pallas.grouped_matmul import cpu as matmul_cpu
from kernels_pallas.grouped_matmul import mosaic as matmul_mosaic
from kernels_pallas.grouped_matmul import native as matmul_native
from kernels_pallas.grouped_matmul import reference as matmul_reference
from kernels_pallas.grouped_matmul import tpu as matmul_tpu
from kernels_pallas.grouped_matmul import triton as matmul_triton
from kernels_pallas.grouped_matmul import vjp as matmul_vjp
from kernels_pallas.grouped_matmul import xla as matmul_xla

PLATFORMS = ("cpu", "gpu", "tpu")
INTERPRETED = "_interpret"  # ends the names of kernels run by Pallas' interpreters


class ImplementationFallback(UserWarning):
    """Warns that another implementation than the first choice does the work."""


class Request(NamedTuple):
    """The facts that decide whether an implementation can do something.

    K and N are those of the forward matmul; for grouped_glu, those of its first matmul.
    """

    operation: str  # "grouped_matmul" or "grouped_glu"
    dtype: str  # dtype of tokens
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
      platforms: the platforms that it runs on.
      purpose: one line for people.
      unsupported: (Request) -> the reason why it cannot do that, or None.
    """

    grouped_matmul: Callable
    grouped_glu: Callable
    platforms: tuple[str, ...]
    purpose: str
    unsupported: Callable[[Request], str | None] = _anything


def _made_of(matmul, glu, **options) -> Implementation:
    """Make an Implementation of two modules that hold forward and backward passes."""
    return Implementation(
        matmul_vjp.differentiable(matmul.product, matmul.weight_product),
        glu_vjp.differentiable(glu.forward, glu.backward),
        **options,
    )


class Pallas(NamedTuple):
    """A backend of Pallas kernels, whose functions take `interpret`."""

    matmul: ModuleType
    glu: ModuleType
    platform: str
    purpose: str
    interpreter: Callable = lambda: True  # the value of `interpret` without the device
    interpretable: bool = True  # whether the installed JAX can interpret it


PALLAS = {
    "triton": Pallas(
        matmul_triton,
        glu_triton,
        "gpu",
        "NVIDIA GPUs from Ampere on; rows gathered inside the kernels",
    ),
    "mosaic": Pallas(
        matmul_mosaic,
        glu_mosaic,
        "gpu",
        "NVIDIA Hopper: TMA and WGMMA; weight gradients by Triton",
        mosaic_tiles.interpreter,
        interpretable=jax.__version_info__ >= (0, 11),
    ),
    "tpu": Pallas(matmul_tpu, glu_tpu, "tpu", "TPUs: prefetched group metadata"),
}


def _interpreted(backend: Pallas) -> Implementation:
    """Make a backend run by Pallas' interpreter: slow, and on any platform."""

    def here(function):
        return lambda *args: function(*args, interpret=backend.interpreter())

    def unsupported(request):
        if not backend.interpretable:
            return f"JAX {jax.__version__} cannot interpret it; later versions can"
        return backend.matmul.unsupported(request)

    kernels = compose.Kernels(*(here(kernel) for kernel in backend.glu.KERNELS))
    return Implementation(
        matmul_vjp.differentiable(
            here(backend.matmul.product), here(backend.matmul.weight_product)
        ),
        glu_vjp.differentiable(*compose.compose(kernels)),
        platforms=PLATFORMS,
        purpose="the same, interpreted, to debug a kernel on a laptop",
        unsupported=unsupported,
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
    "native": _made_of(
        matmul_native,
        glu_native,
        platforms=("cpu",),
        purpose="C, compiled on first use: whole experts a block of rows at a time",
        unsupported=matmul_native.unsupported,
    ),
}
for _name, _backend in PALLAS.items():
    IMPLEMENTATIONS[_name] = _made_of(
        _backend.matmul,
        _backend.glu,
        platforms=(_backend.platform,),
        purpose=_backend.purpose,
        unsupported=_backend.matmul.unsupported,
    )
for _name, _backend in PALLAS.items():
    IMPLEMENTATIONS[_name + INTERPRETED] = _interpreted(_backend)

# The meaning of None on each platform: the first of these that can do what is asked.
# Until both are timed, GPUs get the one of their backends that runs on more of them.
DEFAULTS = {
    "cpu": ("native", "cpu"),
    "gpu": ("triton", "xla"),
    "tpu": ("tpu", "xla"),
}


def default_names(request: Request, where: str) -> tuple[str, ...]:
    """The names that None stands for; "native" only for the dtypes that it takes."""
    names = DEFAULTS.get(where, ("xla",))
    if matmul_native.takes(request):
        return names
    return tuple(name for name in names if name != "native")


def choose(name: str | None, request: Request) -> Implementation:
    """The Implementation to use.

    Args:
      name: a key of IMPLEMENTATIONS; or several, separated by commas: the first that
        can do it is taken, with a warning if it is not the first in the list; or None,
        which means DEFAULTS of the platform.
      request: what it has to do.

    Raises:
      ValueError: if a name is unknown, or none of those named can do it.
    """
    here = platform()
    names = default_names(request, here) if name is None else split_names(name)
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
    others = ", ".join(map(repr, able(request, here)))
    raise ValueError(
        f"{'; '.join(refusals)}. These can: {others}. "
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
    """The reason why an implementation cannot do something here; None if it can."""
    entry = IMPLEMENTATIONS[name]
    if where not in entry.platforms:
        return f"it runs on {' and '.join(entry.platforms)}, not on {where}"
    return entry.unsupported(request)


def able(request: Request, where: str) -> list[str]:
    """The names of all implementations that can do something on a platform."""
    return [name for name in IMPLEMENTATIONS if why_not(name, request, where) is None]
