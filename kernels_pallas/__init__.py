"""Grouped compute for mixtures of experts: functions on arrays, each with a contract.

This package knows nothing of moex. Its public names:

  Plan, make_plan    which slot goes to which row, sorted by expert
  grouped_matmul     one matmul per group of rows
  grouped_swiglu     gather, expert SwiGLU and weighted combine as one operation
  IMPLEMENTATIONS    the backends and where each one is the default
"""

from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.grouped_swiglu.api import grouped_swiglu
from kernels_pallas.implementations import IMPLEMENTATIONS
from kernels_pallas.plan import Plan, make_plan

__all__ = [
    "IMPLEMENTATIONS",
    "Plan",
    "grouped_matmul",
    "grouped_swiglu",
    "make_plan",
]
