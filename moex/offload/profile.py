"""The three curves of this machine: how long experts take, here and there.

K experts of a token · D model width
"""

import itertools
import time

import jax
import numpy as np

from moex.nn.context import Compute, Context
from moex.offload.block import ROWS, run_block
from moex.offload.cache import Loads
from moex.offload.costs import Costs
from moex.offload.executor import Executor
from moex.offload.host import HostExperts

REPEATS = 15


def profile(
    executor: Executor, width: int, compute: Compute, host: HostExperts | None = None
) -> Costs:
    """Measure the costs of the first layer with experts, for one token.

    Seconds, each the shortest of `REPEATS`: other work of the machine only adds. Slots
    are empty afterwards, and nothing is counted.

    Args:
      executor: of the model.
      width: D of the model.
      compute: how it computes.
      host: measures its curve too.
    """
    step = next(step for step in executor.steps if step.routed is not None)
    own = step.routed
    assert own is not None
    x_BLD = jax.random.normal(jax.random.key(0), (1, 1, width)).astype(compute.dtype)
    ctx = Context.of(x_BLD, mode="eval", compute=compute)

    def run(slot_E):
        going = executor.first_pass(own, x_BLD) | {"slot_E": slot_E}
        told = run_block(
            *(step.arrays, own.slots.by_item(), x_BLD, ctx, step.place_2, None),
            *(None, going),
            graphdef=step.graphdef,
            module=own.module,
        )[-1]
        return told, np.asarray(told["flags_R3E"])

    nobody_E = np.full(own.layer.experts, -1, np.int32)
    told, flags_R3E = run(nobody_E)
    needed = np.flatnonzero(flags_R3E[0, ROWS])
    here_E = nobody_E.copy()
    here_E[needed] = np.arange(len(needed)) % own.slots.cache.slots
    none, some = (_seconds(lambda e=e: run(e)) for e in (nobody_E, here_E))
    device = max(some - none, 0.0) / max(len(needed), 1)

    numbers = itertools.count()

    def move():
        expert = next(numbers) % own.layer.experts
        own.slots.fill(own.place, Loads((), ((expert, 0),), (), ()))

    found = {"device": device, "move": _seconds(move), "layer": none, "again": none}
    if host is not None:
        part = told["slots"][0]
        ids = [int(e) for e in needed]
        one = _seconds(lambda: host.sums(own, part, ids[:1]))
        every = _seconds(lambda: host.sums(own, part, ids))
        row = (every - one) / (len(ids) - 1) if len(ids) > 1 else one
        row = max(row, 0.0)
        found |= {"cpu_row": row, "cpu_first": max(one - row, 0.0)}
    executor.forget()
    return Costs(**{name: float(value) for name, value in found.items()})


def _seconds(call) -> float:
    """The shortest time of a call, after one that compiles."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return min(times[1:])
