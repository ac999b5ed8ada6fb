"""grouped_glu made of a backend's six kernels; accelerator backends share this.

Forward: up projections with the activation, down projection, weighted combine.
Backward: the cotangent through the down projection with the activation's gradient,
two weight gradients, the cotangent through the up projections, combine. The only
array kept between the two is the pre-activations `a`.

Legend: T tokens, K slots per token, N sorted rows, D model width, F expert hidden
width, C pre-activation columns (2F: gate half, then up half), E experts. `bounds` is
int32[E + 1]: rows bounds[e] to bounds[e + 1] are those of expert e.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from kernels_pallas.permute import slot_values, sum_rows, take


class Kernels(NamedTuple):
    """The functions of a backend; row indices `token_N` are in bounds, sums float32.

    Rows past `bounds[-1]` are unspecified in every input and output, and may hold NaN:
    they never reach another row or a weight gradient. `a` and `da` may have any layout
    that the backend's own functions agree on.

    up(x_TD, w_in_EDC, token_N, bounds, activation, save) -> (a or None, h_NF)
      a = x_TD[token_N] @ w_in of the row's expert; h = activation of its halves
    down(h_NF, w_out_EFD, bounds) -> y_ND
    down_vjp(dy_TD, w_out_EFD, a, weight_N, token_N, bounds, activation)
        -> (da, weighted_NF, dweight_N)
      with dh = dy_TD[token_N] @ w_out.T of the row's expert: da is the gradient of
      sum(weight * dh * h) with respect to a, weighted_NF = weight * h, and
      dweight_N = sum(dh * h) in float32
    dx(da, w_in_EDC, bounds) -> dx_ND
    dw_in(x_TD, da, token_N, bounds, dtype) -> dw_in_EDC
    dw_out(weighted_NF, dy_TD, token_N, bounds, dtype) -> dw_out_EFD
    """

    up: Callable
    down: Callable
    down_vjp: Callable
    dx: Callable
    dw_in: Callable
    dw_out: Callable


def compose(kernels: Kernels):
    """Make `(forward, backward)` as `vjp.differentiable` wants them."""

    def forward(x_TD, w_in_EDC, w_out_EFD, weight_TK, plan, activation, save):
        a, h_NF = kernels.up(
            x_TD, w_in_EDC, plan.token_N, plan.bounds, activation, save
        )
        y_ND = kernels.down(h_NF, w_out_EFD, plan.bounds)
        with jax.named_scope("combine"):
            return sum_rows(y_ND, plan, weight_TK), a

    def backward(a, x_TD, w_in_EDC, w_out_EFD, weight_TK, plan, activation, dy_TD):
        token_N, bounds = plan.token_N, plan.bounds
        weight_N = take(weight_TK.reshape(-1), plan.order_N)
        da, weighted_NF, dweight_N = kernels.down_vjp(
            dy_TD, w_out_EFD, a, weight_N, token_N, bounds, activation
        )
        dx_ND = kernels.dx(da, w_in_EDC, bounds)
        with jax.named_scope("dispatch"):
            dx_TD = sum_rows(dx_ND, plan)
        with jax.named_scope("combine"):
            dweight_TK = slot_values(dweight_N, plan)
        return (
            dx_TD,
            kernels.dw_in(x_TD, da, token_N, bounds, w_in_EDC.dtype),
            kernels.dw_out(weighted_NF, dy_TD, token_N, bounds, w_out_EFD.dtype),
            dweight_TK,
        )

    return forward, backward
