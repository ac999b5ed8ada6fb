"""A table of what each implementation can do: `python -m kernels_pallas.support`.

The code itself answers (`implementations.why_not`), so that the table in the
documentation, which a test compares with this one, cannot be wrong for long.
"""

from kernels_pallas.grouped_matmul.api import DTYPES, WEIGHT_DTYPES
from kernels_pallas.implementations import (
    IMPLEMENTATIONS,
    INTERPRETED,
    PLATFORMS,
    Request,
    why_not,
)

# K, N, G of a layer that suits all kernels, and of one whose sizes do not fit tiles.
EVEN, ODD = (1024, 2048, 8), (1000, 2000, 7)


def table() -> str:
    """The Markdown table: one row for each implementation and dtype.

    A cell says for which passes there is a kernel on that platform: F forward, B
    backward (with constant weights, only the gradient of the tokens).
    """
    head = ["implementation", "tokens", "weights"]
    head += [f"{op} on {where}" for op in ("matmul", "glu") for where in PLATFORMS]
    head += ["any size"]
    lines = [head, ["---"] * len(head)]
    for name in (n for n in IMPLEMENTATIONS if not n.endswith(INTERPRETED)):
        for dtype in DTYPES:
            for weights in (dtype, "int8, float8"):
                cells = [_cell(name, "grouped_matmul", dtype, weights, p)
                         for p in PLATFORMS]  # fmt: skip
                cells += [_cell(name, "grouped_glu", dtype, weights, p)
                          for p in PLATFORMS]  # fmt: skip
                if any(cells):
                    any_size = "yes" if _takes(name, dtype, ODD) else "no"
                    lines.append([f"`{name}`", dtype, weights, *cells, any_size])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(name, operation, dtype, weights, where) -> str:
    K, N, G = EVEN
    if weights == dtype:
        request = Request(operation, dtype, K, N, G, "silu", dtype)
        return "F B" if why_not(name, request, where) is None else ""
    if operation == "grouped_glu":
        return ""
    requests = (Request(operation, dtype, K, N, G, None, w) for w in WEIGHT_DTYPES)
    able = all(why_not(name, request, where) is None for request in requests)
    return "F B" if able else ""


def _takes(name, dtype, sizes) -> bool:
    K, N, G = sizes
    where = IMPLEMENTATIONS[name].platforms[0]
    request = Request("grouped_glu", dtype, K, N, G, "silu", dtype)
    return why_not(name, request, where) is None


if __name__ == "__main__":
    print(table())
