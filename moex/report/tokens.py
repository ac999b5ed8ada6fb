"""Which tokens go to which expert: a table for each layer of a trace.

E experts · R token ids of an expert
"""

import numpy as np

from moex.analysis.summary import Analysis, LayerAnalysis
from moex.model.layers import shown
from moex.report.page import Note, Section, Table, token

MOST_ROWS = 2048  # experts in all tables together
NO_BREAK = "\u00a0"
MOST_TOKENS = 8  # tokens of an expert that are shown
HEAD = ("expert", "load", "specialisation", "tokens: share of their occurrences")


def section(found: Analysis) -> Section:
    """The tables, most specialised experts first."""
    each = max(4, MOST_ROWS // len(found.layers))
    tables: list = [table(found, name, each) for name in found.layers]
    if found.num_ids == 0:
        why = "no token is frequent enough in" if found.vocabulary else "no ids are in"
        tables = [Note(f"No data: {why} the trace.")]
    about = (
        f"Of {found.num_ids:,} frequent token ids: those that go to an expert most "
        "often. Specialisation: mean share of a token's occurrences that come to the "
        "expert, over its slots (vocabulary specialisation, OLMoE); 1: its tokens go "
        "nowhere else. ␣ is a space, ⏎ a line break."
    )
    return Section("Tokens", tables, about)


def table(found: Analysis, name: str, most: int) -> Table:
    """The experts of one layer."""
    layer = found.layers[name]
    count = len(layer.load_E)
    order = np.argsort(-np.nan_to_num(layer.vocabulary_E, nan=-1.0), kind="stable")
    uniform = layer.load_E.sum() / max(found.num_tokens, 1) / count
    left = f"; the {most} most specialised of {count}" if count > most else ""
    return Table(
        HEAD,
        [_row(found, layer, int(e)) for e in order[:most]],
        words=(3,),
        title=f"layer {shown(name)} ({uniform:.3g} if routing were uniform{left})",
    )


def _row(found: Analysis, layer: LayerAnalysis, expert: int) -> tuple[str, ...]:
    load = layer.load_E[expert] / max(layer.load_E.sum(), 1) * len(layer.load_E)
    special = layer.vocabulary_E[expert]
    shown_tokens = [
        f"{token(found.vocabulary[i], 24)}{NO_BREAK}{100 * share:.0f}{NO_BREAK}%"
        for i, share in zip(layer.id_ER[expert], layer.share_ER[expert], strict=True)
        if i >= 0
    ]
    number = "–" if np.isnan(special) else f"{special:.3f}"
    zero = " (zero)" if expert >= layer.info.num_experts else ""
    words = " · ".join(shown_tokens[:MOST_TOKENS]) or "–"
    return f"{expert}{zero}", f"{load:.2f}", number, words
