"""Measurements of decoding with offloaded experts: times, and which experts it used.

S steps: the prompt is the first one · L layers with routers · E experts, the most
"""

import dataclasses

import numpy as np

from moex.nn.context import Compute
from moex.offload.decode import generate
from moex.offload.executor import Executor


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of an executor on a set of prompts.

    Attributes:
      tokens: the new tokens of each prompt.
      seconds_S: of each step, for all layers.
      rows_SLE: int32, tokens that used each expert in each step; those of the rounds of
        a chain are added up.
      hits, misses, bytes: of all steps; misses were loaded when they were asked for.
      prefetched: loaded before.
      waited: seconds for what was loaded when it was asked for.
    """

    tokens: list[list[int]]
    seconds_S: np.ndarray
    rows_SLE: np.ndarray
    hits: int
    misses: int
    prefetched: int
    bytes: int
    waited: float


def measure(
    executor: Executor,
    model_cfg,
    prompts: list[list[int]],
    max_new_tokens: int,
    compute: Compute,
    repeats: int = 1,
) -> Measured:
    """Write with empty slots, after a first time that compiles all programs.

    Args:
      executor: of the model.
      model_cfg: its config.
      prompts: tokens.
      max_new_tokens: of each prompt, which are written greedily.
      compute: how to compute.
      repeats: runs, of which each step has its shortest time.
    """
    how: dict = {"max_new_tokens": max_new_tokens, "temperature": 0, "compute": compute}
    generate(executor, model_cfg, prompts, **how)
    executor.passes = []
    seconds = []
    for _ in range(repeats):
        executor.forget()
        tokens = generate(executor, model_cfg, prompts, **how)
        seconds.append([own.seconds for own in executor.passes])
    rows = [own.rows_LE for own in executor.passes]
    executor.passes = None
    counts = [slots.cache.statistics for slots in executor.slots]
    return Measured(
        tokens=tokens,
        seconds_S=np.min(seconds, axis=0),
        rows_SLE=np.stack(rows),
        hits=sum(int(own.hits_L.sum()) for own in counts),
        misses=sum(int(own.misses_L.sum()) for own in counts),
        prefetched=sum(int(own.prefetched_L.sum()) for own in counts),
        bytes=sum(int(own.bytes_L.sum()) for own in counts),
        waited=sum(slots.seconds for slots in executor.slots),
    )
