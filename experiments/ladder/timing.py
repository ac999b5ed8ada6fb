"""Times of training steps, side by side in one process."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moex.sharding import shard_batch
from moex.train.job import make_job


def step_times(configs: Sequence[Any], rounds: int = 15) -> list[float]:
    """The median time of a training step of each of some configs, in milliseconds.

    Their steps are run in turn; the first of each is not counted.
    """
    runs = [steps(make_job(cfg, log=lambda *_: None)) for cfg in configs]
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 1):
        for run, own in zip(runs, times, strict=True):
            began = time.perf_counter()
            next(run)
            if i:
                own.append(1e3 * (time.perf_counter() - began))
    return list(map(statistics.median, times))


def steps(job) -> Iterator[None]:
    """Train a job, one step for each item."""
    state, key = job.init_state(), jax.random.key(0)
    program, batches = job.train_step(), job.batches(0)
    for i in itertools.count():
        batch = shard_batch(next(batches), job.mesh)
        with jax.set_mesh(job.mesh):
            state, metrics = program(state, np.int32(i), key, batch)
        jax.block_until_ready((state, metrics))
        yield
