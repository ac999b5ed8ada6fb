"""Which implementations of the grouped kernels a test runs over."""

from kernels_pallas.device import platform
from kernels_pallas.implementations import INTERPRETED, Request, able


def backends(dtype="float32", weights=None) -> list[str]:
    """Names of what computes small, odd sizes of these dtypes right here, compiled."""
    request = Request("grouped_matmul", dtype, 5, 7, 3, None, weights)
    names = able(request, platform())
    return [name for name in names if not name.endswith(INTERPRETED)]
