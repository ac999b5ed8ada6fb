"""grouped_glu in C for CPUs: see native/experts.c.

Legend: T tokens, K slots per token, N sorted rows, D model width, F expert hidden
width, C pre-activation columns (2F), E experts.
"""

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.native.library import call, weight_pieces


def forward(x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, save):
    """Run the forward pass: returns `(y_TD, pre-activations [N, C] or None)`."""
    num_rows, dim = plan.order_N.shape[0], x_TD.shape[1]
    shapes = [x_TD.shape, (num_rows, dim)]
    if save:
        shapes.append((num_rows, w_in_EDC.shape[2]))
    inputs = (x_TD, w_in_EDC, w_out_EFD, gate_TK, *_of(plan))
    out = call("moex_experts_forward", shapes, inputs, activation=_number(activation))
    return out[0], out[2] if save else None


def backward(a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, plan, activation, dy_TD):
    """Run the backward pass: returns `(dx_TD, dw_in_EDC, dw_out_EFD, dgate_TK)`."""
    _, F, D = w_out_EFD.shape
    pieces = weight_pieces(3 * D * F)
    shapes = [x_TD.shape, w_in_EDC.shape, w_out_EFD.shape, gate_TK.shape]
    shapes += [(plan.order_N.shape[0], D), (pieces, 3 * D * F)]
    inputs = (a_NC, x_TD, w_in_EDC, w_out_EFD, gate_TK, *_of(plan), dy_TD)
    which = _number(activation)
    out = call("moex_experts_backward", shapes, inputs, pieces, activation=which)
    return tuple(out[:4])


def _of(plan):
    return plan.order_N, plan.bounds, plan.row_TK


def _number(activation) -> int:
    """The number that experts.c has for an activation."""
    return list(ACTIVATIONS).index(activation)
