"""grouped_matmul in C for CPUs: see native/experts.c.

Legend: M rows, K contraction, N columns, G groups. `bounds` is int32[G + 1]: rows
bounds[g] to bounds[g + 1] are those of group g.
"""

from kernels_pallas.native import library


def takes(request) -> bool:
    """Whether tokens and weights have the dtype that the C code computes in."""
    return {request.dtype, request.weights or request.dtype} == {"float32"}


def unsupported(request) -> str | None:
    """The reason why the C code cannot do a `Request`, or None."""
    if not takes(request):
        return "it takes float32 tokens and weights alone"
    return library.why_not()


def product(lhs_MK, rhs_GKN, bounds, transpose_rhs, out_dtype):
    """Multiply rows by the matrix of their group; rows of no group are zero."""
    shape = (lhs_MK.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2])
    inputs = (lhs_MK, rhs_GKN, bounds)
    (out_MN,) = library.call("moex_product", [shape], inputs, transposed=transpose_rhs)
    return out_MN.astype(out_dtype)


def weight_product(lhs_MK, rhs_MN, bounds, out_dtype):
    """Sum the outer products of the rows of each group, [G, K, N]."""
    shape = (bounds.shape[0] - 1, lhs_MK.shape[1], rhs_MN.shape[1])
    inputs = (lhs_MK, rhs_MN, bounds)
    (out_GKN,) = library.call("moex_weight_product", [shape], inputs)
    return out_GKN.astype(out_dtype)
