"""grouped_glu: signature, contract and validation; the backends are in this folder.

Legend: T tokens, K slots per token, N sorted rows (T*K), D model width, F expert
hidden width, E experts; 2 is the pair of input projections (gate, up).
"""

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.grouped_matmul.api import DTYPES
from kernels_pallas.implementations import Request, choose


def grouped_glu(
    x_TD,
    w_in_ED2F,
    w_out_EFD,
    gate_TK,
    plan,
    *,
    activation="silu",
    buffer_rows=None,
    implementation=None,
):
    """Pass tokens through their experts: gather, gated unit and weighted sum in one.

    y_t = sum over kept slots j of token t, with expert e, of
          gate_tj * act(x_t @ w_in[e, :, 0], x_t @ w_in[e, :, 1]) @ w_out[e]

    Sums are float32. A slot that the plan does not keep contributes nothing and
    has a zero gate gradient, whatever its gate holds; a kept slot with a gate of
    exactly 0 has the true gradient. A NaN stays with the tokens and experts it meets.
    The backward pass keeps the pre-activations and the inputs, nothing else.

    Args:
      x_TD: float32 or bfloat16 [T, D].
      w_in_ED2F: [E, D, 2, F] of the same dtype; [:, :, 0] is the gate projection
        and [:, :, 1] the up projection.
      w_out_EFD: [E, F, D] of the same dtype.
      gate_TK: float32[T, K], the weight of each slot.
      plan: Plan of the T*K slots over E experts.
      activation: act, a key of ACTIVATIONS; "silu" is SwiGLU.
      buffer_rows: sorted rows that buffers are made for, >= 1; None: all N. With more
        kept slots than that the result is the same, and the pre-activations are
        computed again in the backward pass. It helps if few slots are kept.
      implementation: see `implementations.choose`.

    Returns:
      y_TD in the dtype of `x_TD`. Gradients come in the dtype of each input.

    Raises:
      ValueError: on an unknown activation, an implementation that cannot do this, or
        shapes or dtypes that do not fit.
    """
    _validate_ranks(x_TD, w_in_ED2F, w_out_EFD, gate_TK)
    _validate_sizes(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan)
    _validate_dtypes(x_TD, w_in_ED2F, w_out_EFD, gate_TK)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"grouped_glu needs an activation among {', '.join(ACTIVATIONS)}; got "
            f"{activation!r}."
        )
    if buffer_rows is not None and buffer_rows < 1:
        raise ValueError(f"grouped_glu needs buffer_rows >= 1; got {buffer_rows}.")
    E, F, D = w_out_EFD.shape
    request = Request("grouped_glu", x_TD.dtype.name, D, 2 * F, E, activation)
    chosen = choose(implementation, request)
    return chosen.grouped_glu(
        x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation, buffer_rows
    )


def grouped_swiglu(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, **options):
    """Call `grouped_glu` with silu(gate) * up."""
    return grouped_glu(
        x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan, activation="silu", **options
    )


def _validate_ranks(x_TD, w_in_ED2F, w_out_EFD, gate_TK):
    ranks = (x_TD.ndim, w_in_ED2F.ndim, w_out_EFD.ndim, gate_TK.ndim)
    if ranks != (2, 4, 3, 2) or w_in_ED2F.shape[2] != 2:
        raise ValueError(
            "grouped_glu needs x [T, D], w_in [E, D, 2, F], w_out [E, F, D] and "
            f"gate [T, K]; got x {x_TD.shape}, w_in {w_in_ED2F.shape}, w_out "
            f"{w_out_EFD.shape} and gate {gate_TK.shape}."
        )


def _validate_sizes(x_TD, w_in_ED2F, w_out_EFD, gate_TK, plan):
    arrays = {
        "x": x_TD.shape,
        "w_in": w_in_ED2F.shape,
        "w_out": w_out_EFD.shape,
        "gate": gate_TK.shape,
        "plan.row": plan.row_TK.shape,
        "plan.group_sizes": plan.group_sizes_E.shape,
    }
    equal_dims = (
        ("model width", ("x", 1), ("w_in", 1)),
        ("model width", ("x", 1), ("w_out", 2)),
        ("hidden width", ("w_in", 3), ("w_out", 1)),
        ("number of experts", ("w_in", 0), ("w_out", 0)),
        ("number of experts", ("w_in", 0), ("plan.group_sizes", 0)),
        ("number of tokens", ("x", 0), ("gate", 0)),
        ("number of tokens", ("gate", 0), ("plan.row", 0)),
        ("number of slots per token", ("gate", 1), ("plan.row", 1)),
    )
    for what, (a, i), (b, j) in equal_dims:
        if arrays[a][i] != arrays[b][j]:
            raise ValueError(
                f"grouped_glu needs one {what} in {a} dim {i} and {b} dim {j}; "
                f"got {arrays[a][i]} from {a} {arrays[a]} and {arrays[b][j]} from "
                f"{b} {arrays[b]}."
            )


def _validate_dtypes(x_TD, w_in_ED2F, w_out_EFD, gate_TK):
    dtypes = {x_TD.dtype.name, w_in_ED2F.dtype.name, w_out_EFD.dtype.name}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise ValueError(
            f"grouped_glu needs x, w_in and w_out of one dtype among {DTYPES}; got "
            f"x {x_TD.dtype}, w_in {w_in_ED2F.dtype} and w_out {w_out_EFD.dtype}. "
            "Cast the weights to the dtype of x."
        )
    if gate_TK.dtype.name != "float32":
        raise ValueError(f"grouped_glu needs float32 gates; got {gate_TK.dtype}.")
