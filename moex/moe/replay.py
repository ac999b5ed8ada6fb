"""Replay: run a batch again with the assignment that was recorded.

Record with `Context(collect=True)`, then pass `recorded(aux)` as `Context.forced`.
Gates come from live scores, so gradients reach the routers; what is forced is an input,
so rematerialisation sees the same assignment.
"""


def recorded(aux) -> dict:
    """The assignments in an aux tree, as `Context.forced` wants them.

    Args:
      aux: the aux of a model that ran with `Context(collect=True)`.

    Raises:
      ValueError: if nothing was collected.
    """
    forced = _traces(aux)
    if not forced:
        raise ValueError(
            "there is no trace to replay: record with Context(collect=True), and a "
            "model that has MoE layers."
        )
    return forced


def _traces(aux) -> dict:
    if "load" in aux:
        return aux.get("trace", {})
    found = {k: _traces(v) for k, v in aux.items() if isinstance(v, dict)}
    return {k: v for k, v in found.items() if v}
