"""The curves of this machine: how long experts take, here and there.

They are measured in use: the executor writes a warm-up, so that weights come from
memory, layers attend to keys and values, and the host does what it does after each
layer. HybriMoE (arXiv:2504.05897) calibrates in a warm-up too.

K experts of a token · D model width
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from moex.nn.context import Compute
from moex.offload.costs import Costs
from moex.offload.executor import Executor
from moex.offload.host import HostExperts
from moex.offload.measure import measure
from moex.offload.record import Turn

TOKENS, REPEATS = 8, 12  # of the warm-up
MOST_SECONDS = 20.0  # no repetition begins after so long


def profile(
    executor: Executor, model, compute: Compute, host: HostExperts | None = None
) -> Costs:
    """Measure the costs of a layer with experts, for one token.

    Slots are empty afterwards, and nothing is counted.

    Args:
      executor: of the model; nobody else computes experts for it yet.
      model: its config.
      compute: how it computes.
      host: measures its curve too.
    """
    costs = fitted(warm_up(executor, model, compute))
    if host is None:
        return costs
    first, row = _host_curve(executor, host, compute.dtype)
    return dataclasses.replace(costs, cpu_first=first, cpu_row=row)


def warm_up(
    executor: Executor, model, compute: Compute, repeats: int = REPEATS
) -> list[list[Turn]]:
    """Write some tokens of the model's own, with empty slots at first.

    Other work of the machine only adds to times: the shortest of the repetitions count.

    Returns:
      The turns of each step.
    """
    ahead, executor.ahead = executor.ahead, None
    how: dict = {"repeats": repeats, "temperature": 1.0, "most_seconds": MOST_SECONDS}
    found = measure(executor, model, [[0]], TOKENS, compute, **how)
    executor.ahead = ahead
    executor.forget()
    return found.turns


def fitted(steps: Sequence[Sequence[Turn]]) -> Costs:
    """The costs that come closest to the times of a record, none of them below 0.

    A turn takes `layer` or `again`, and `device` for each expert that it computes.
    Turns that find no expert, one or several of them tell these apart.
    """
    turns = [turn for step in steps for turn in step]
    parts = np.array([(t.first, not t.first, t.experts) for t in turns], float)
    layer, again, device = nnls(parts, np.array([t.seconds for t in turns]))[0].tolist()
    moves = sum(turn.moves for turn in turns)
    move = sum(turn.moving for turn in turns) / max(moves, 1)
    return Costs(device=device, move=move, layer=layer, again=again)


def _host_curve(executor: Executor, host: HostExperts, dtype):
    """Seconds of the host for one token: (once, for each expert).

    Experts of all layers take turns, so that their weights come from memory.
    """
    every = [step.routed for step in executor.steps if step.routed is not None]
    layers = [own for own in every if own.slots is every[0].slots]
    most, calls = min(own.layer.experts for own in layers), itertools.count()
    x_TD = np.random.default_rng(0).normal(size=layers[0].sizes(np.zeros((1, 1)))[1:])
    part = {
        "x_TD": x_TD.astype(dtype),
        "expert_TK": np.arange(most)[None],
        "gate_TK": np.ones((1, most), np.float32),
        "keep_TK": np.ones((1, most), bool),
    }

    def seconds(count: int) -> float:
        times = []
        for i in range(REPEATS + 1):
            own = layers[i % len(layers)]
            ids = [next(calls) % most for _ in range(count)]
            begin = time.perf_counter()
            host.submit(own, part, ids).result()
            times.append(time.perf_counter() - begin)
        return min(times[1:])  # the first one compiles

    few = min(4, most)
    one = seconds(1)
    row = max((seconds(few) - one) / (few - 1), 0.0) if few > 1 else one
    return max(one - row, 0.0), row
