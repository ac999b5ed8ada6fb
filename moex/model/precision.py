"""The dtype of matmuls, as `config.precision` names it."""

from kernels_pallas.device import platform

PRECISIONS = ("auto", "float32", "bfloat16")


def compute_dtype(cfg) -> str:
    """The dtype of matmuls: bfloat16 on accelerators, float32 on CPU, unless set."""
    if cfg.precision != "auto":
        return cfg.precision
    return "float32" if platform() == "cpu" else "bfloat16"
