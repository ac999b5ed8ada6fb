"""Grouped compute for mixtures of experts: functions on arrays, each with a contract.

This package knows nothing of moex. Its public names:

  Plan, make_plan    say which slot goes to which row, sorted by expert
  dispatch, combine  move rows into that order and back, by gathers alone
  grouped_matmul     one matmul per group of rows
  matmul             one matmul of all rows
  grouped_glu        gather, gated expert and weighted combine as one operation
  grouped_swiglu     the same with silu
  Lowered            numbers in bfloat16, int8 or int4, as C reads them
  lowered_matmul     grouped_matmul with such weights, on one CPU
  ACTIVATIONS        the activations of grouped_glu
  IMPLEMENTATIONS    the backends
"""

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.dense import matmul
from kernels_pallas.grouped_glu.api import grouped_glu, grouped_swiglu
from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.implementations import IMPLEMENTATIONS
from kernels_pallas.lowered import Lowered, lowered_matmul
from kernels_pallas.permute import combine, dispatch
from kernels_pallas.plan import Plan, make_plan

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "Lowered",
    "Plan",
    "combine",
    "dispatch",
    "grouped_glu",
    "grouped_matmul",
    "grouped_swiglu",
    "lowered_matmul",
    "make_plan",
    "matmul",
]
