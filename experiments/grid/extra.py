"""The grid as one table: routers down, experts across, rounds in a cell."""

from experiments.grid.config import EXPERTS, ROUNDS, ROUTERS
from moex.experiment.page import markdown, written
from moex.experiment.results import NotDone, Results


def markdown_lines(results: Results, size: str) -> list[str]:
    """Held-out loss of one round / of two rounds, nats per token."""
    del size
    rows = [["router", *EXPERTS]]
    for router in ROUTERS:
        rows.append([router, *(_cell(results, router, name) for name in EXPERTS)])
    head = "Held-out loss, nats per token, of one round / of a chain of two:"
    return [head, "", *markdown(rows), ""]


def _cell(results: Results, router: str, experts: str) -> str:
    cells = []
    for rounds in ROUNDS:
        try:
            found = results.mean(f"{router}_{experts}_{rounds}", "nll")
        except NotDone:
            cells.append("–")
        else:
            cells.append(written(found, "{:.3f}"))
    return " / ".join(cells)
