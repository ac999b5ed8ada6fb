"""Experts by domain and layer, and the time that fewer experts save."""

import itertools
import statistics
import time

import jax
import numpy as np

from moex.analysis.record import trace_run
from moex.analysis.trace import Trace
from moex.model.accounting import model_cost
from moex.runs.score import eval_step, run_with_data
from moex.sharding import shard_batch


def by_domain(*, seed, folder, others, run, tokens):
    """Experts of held-out tokens: of all, of each domain and of each layer.

    Padding is not counted: A = mean over layers and tokens of the number of experts.
    """
    del seed
    folder.path.mkdir(parents=True, exist_ok=True)
    file = folder.path / "trace.parquet"
    file.unlink(missing_ok=True)
    trace_run(others[run], others[run].config(), file, tokens=tokens)
    trace = Trace.open(file)
    layers = list(trace.layers)
    count_LD = np.zeros((len(layers), len(trace.domains)))
    tokens_D = np.zeros(len(trace.domains))
    for chunk in trace.chunks(values=()):
        domain_N = chunk.tokens.domain_N
        tokens_D += np.bincount(domain_N, minlength=len(tokens_D))
        for at, layer in enumerate(layers):
            own_N = chunk.layers[layer].keep_NK.sum(axis=1)
            count_LD[at] += np.bincount(domain_N, own_N, minlength=len(tokens_D))
    mean_D = count_LD.mean(axis=0) / tokens_D
    mean_L = count_LD.sum(axis=1) / tokens_D.sum()
    return {
        "all": float(mean_L.mean()),
        **dict(zip(trace.domains, mean_D.tolist(), strict=True)),
        **{f"layer_{i}": float(mean) for i, mean in enumerate(mean_L)},
    }


def forward_time(*, seed, folder, others, run, against, batches=8, rounds=9):
    """Scoring of the same held-out batches by two runs, in turn in one process.

    Returns:
      "time_ratio": of the medians of the rounds; "flops_ratio": of the counted FLOPs,
      with the experts that were really used.
    """
    del seed, folder
    programs = [_scorer(others[name], batches) for name in (run, against)]
    flops = [program() for program in programs]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for program, own in zip(programs, times, strict=True):
            began = time.perf_counter()
            program()
            own.append(time.perf_counter() - began)
    mine, theirs = map(statistics.median, times)
    return {
        "time_ratio": mine / theirs,
        "flops_ratio": flops[0] / flops[1],
        "ms": 1e3 * mine / batches,
    }


def _scorer(folder, batches: int):
    """A function that scores some held-out batches; it returns FLOPs per token."""
    run, program = run_with_data(folder, folder.config())
    step = eval_step(program)
    chosen = list(itertools.islice(program.eval_batches(None), batches))
    state = run.params, run.state
    cost = model_cost(run.cfg.model, run.spec, run.cfg.seq_len)

    def score() -> float:
        with jax.set_mesh(run.mesh):
            sums = None
            for batch in chosen:
                sums = step(*state, shard_batch(batch, run.mesh))
            assert sums is not None
            layers = jax.device_get(program.cfg.task.figures(sums))["layers"]
        return cost.train_flops_at(layers)

    return score
