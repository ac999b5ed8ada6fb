"""Measurements of decoding with offloaded experts: times, and which experts it used.

S steps: the prompt is the first one · L layers with routers · E experts, the most
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np

from moex.nn.context import Compute
from moex.offload.decode import generate
from moex.offload.executor import Executor
from moex.offload.record import Pass, Turn


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of an executor on a set of prompts.

    Attributes:
      tokens: the new tokens of each prompt.
      seconds_S: of each step, for all layers.
      rows_SLE: int32, tokens that used each expert in each step; those of the rounds of
        a chain are added up.
      score_SLE: float32, mean scores of the routers in each step.
      turns: of each step.
      hits, misses, bytes: of all steps; misses were loaded when they were asked for.
      prefetched: loaded before.
      waited: seconds for what was loaded when it was asked for.
    """

    tokens: list[list[int]]
    seconds_S: np.ndarray
    rows_SLE: np.ndarray
    score_SLE: np.ndarray
    turns: list[list[Turn]]
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
    temperature: float = 0.0,
    most_seconds: float = math.inf,
) -> Measured:
    """Write with empty slots, after a first time that compiles all programs.

    Args:
      executor: of the model.
      model_cfg: its config.
      prompts: tokens.
      max_new_tokens: of each prompt.
      compute: how to compute.
      repeats: runs, of which each step, turn and move has its shortest time.
      temperature: of writing; 0: greedily.
      most_seconds: no further repetition begins after so long.
    """
    how: dict = {"max_new_tokens": max_new_tokens, "compute": compute}
    how["temperature"] = temperature
    generate(executor, model_cfg, prompts, **how)
    executor.passes = []
    runs: list[list[Pass]] = []
    end = time.perf_counter() + most_seconds
    while len(runs) < repeats and (not runs or time.perf_counter() < end):
        executor.forget()
        tokens = generate(executor, model_cfg, prompts, **how)
        runs.append(executor.passes)
    executor.passes = None
    counts = [slots.cache.statistics for slots in executor.slots]
    return Measured(
        tokens=tokens,
        seconds_S=np.min([[own.seconds for own in run] for run in runs], axis=0),
        rows_SLE=np.stack([own.rows_LE for own in runs[-1]]),
        score_SLE=np.stack([own.score_LE for own in runs[-1]]),
        turns=shortest([[own.turns for own in run] for run in runs]),
        hits=sum(int(own.hits_L.sum()) for own in counts),
        misses=sum(int(own.misses_L.sum()) for own in counts),
        prefetched=sum(int(own.prefetched_L.sum()) for own in counts),
        bytes=sum(int(own.bytes_L.sum()) for own in counts),
        waited=sum(slots.seconds for slots in executor.slots),
    )


def shortest(runs: Sequence[list[list[Turn]]]) -> list[list[Turn]]:
    """The turns of each step of equal runs, with their shortest times."""
    return [
        [
            same[0]._replace(
                seconds=min(turn.seconds for turn in same),
                moving=min(turn.moving for turn in same),
            )
            for same in zip(*steps, strict=True)
        ]
        for steps in zip(*runs, strict=True)
    ]
