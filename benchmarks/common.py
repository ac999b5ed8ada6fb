"""Code that the benchmarks share: interleaved timing, loads, shapes, environment.

T tokens · K slots per token · E experts
"""

import json
import os
import pathlib
import platform
import statistics
import sys
import time

import jax
import numpy as np

from benchmarks.commit import commit
from kernels_pallas.grouped_matmul.shapes import REAL, LayerShape
from moex import allocator

LOADS = {
    "balanced": "W0: every expert has the same number of rows",
    "random": "W1: uniform draws",
    "trained": "W2: popularity log-normal, sigma 0.5, as trained routers show",
    "zipf": "W3: popularity 1 / rank",
    "half": "W4: one expert has one slot of every second token, the rest uniform",
    "one": "W5: one expert has a slot of every token (with K = 1 all rows)",
    "empty": "W6: only K experts, or an eighth of them, have rows, evenly",
    "changing": "W7: another random popularity at every call",
    "two": "all slots of all tokens to the same K experts",
}
NUM_CHANGING = 4  # routings that "changing" goes through


def experts_of(load: str, T: int, K: int, E: int, seed: int = 0) -> np.ndarray:
    """int32[T, K]: different experts for each token, drawn as LOADS says."""
    rng = np.random.default_rng(seed)
    if load == "balanced":
        return (np.arange(T * K, dtype=np.int32) % E).reshape(T, K)
    if load == "two":
        return np.tile(np.arange(K, dtype=np.int32), (T, 1))
    log_popularity = np.zeros(E)
    if load == "trained":
        log_popularity = 0.5 * rng.normal(size=E)
    elif load == "zipf":
        log_popularity = rng.permutation(-np.log(np.arange(1, E + 1)))
    elif load == "changing":
        log_popularity = rng.normal(size=E)
    elif load == "empty":
        log_popularity[rng.permutation(E)[max(K, E // 8) :]] = -np.inf
    # K draws without replacement by the Gumbel trick, in blocks to spare memory.
    expert_TK = np.empty((T, K), np.int32)
    for start in range(0, T, 4096):
        rows = slice(start, min(start + 4096, T))
        score = log_popularity + rng.gumbel(size=(rows.stop - start, E))
        if load == "half":
            score[::2, 0] = np.inf
        elif load == "one":
            score[:, 0] = np.inf
        expert_TK[rows] = np.argpartition(-score, K - 1, axis=1)[:, :K]
    return expert_TK


def check_names(given: str, known) -> None:
    """Raises ValueError if one of the names with commas between them is unknown."""
    for name in filter(None, given.split(",")):
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}.")


def shape_of(text: str) -> LayerShape:
    """A name in `shapes.REAL`, or T,K,D,F,E; raises ValueError on anything else."""
    if text in REAL:
        return REAL[text]
    try:
        return LayerShape(*(int(n) for n in text.split(",")))
    except (TypeError, ValueError):
        raise ValueError(
            f"{text!r} is neither T,K,D,F,E nor one of {', '.join(REAL)}."
        ) from None


def sample_seconds() -> float:
    """The `sample_s` of `measure`: on an accelerator a call returns before its end."""
    return 0.0 if jax.default_backend() == "cpu" else 0.02


def warmed(jobs: dict) -> tuple[dict, dict]:
    """Runs every job once, and leaves out those that fail.

    Args:
      jobs: {tuple: function without arguments}; where one fails, all go whose names
        differ from its name in the last place only.

    Returns:
      `(jobs, {name without its last place: the first line of the error})`.
    """
    failed: dict = {}
    for name, job in jobs.items():
        if name[:-1] in failed:
            continue
        try:
            jax.block_until_ready(job())
        except Exception as e:  # whatever a compiler or a library raises
            failed[name[:-1]] = (str(e).strip().splitlines() or [repr(e)])[0][:300]
            print(f"{name}: {failed[name[:-1]]}", file=sys.stderr, flush=True)
    return {n: job for n, job in jobs.items() if n[:-1] not in failed}, failed


def measure(
    jobs: dict, repeats: int, pause_s: float = 0.0, sample_s: float = 0.0
) -> dict:
    """Seconds of each job, interleaved, so that a busy spell meets all alike.

    Args:
      jobs: {name: function without arguments}; called twice before they count.
      repeats: how often each job runs.
      pause_s: seconds of sleep before every run, for the threads of one library to stop
        waiting busily where another one's are timed next.
      sample_s: a job that is shorter is started as often as fills this, up to 50 times,
        before its end is waited for; the time is that of one.

    Returns:
      {name: {"wall": [...], "cpu": [...]}}; "cpu" is the time of all threads.
    """
    seconds: dict = {name: {"wall": [], "cpu": []} for name in jobs}
    calls = dict.fromkeys(jobs, 1)
    for i in range(repeats + 2):
        for name, job in jobs.items():
            time.sleep(pause_s)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(calls[name] - 1):
                job()
            result = jax.block_until_ready(job())
            wall = (time.perf_counter() - wall) / calls[name]
            cpu = (time.process_time() - cpu) / calls[name]
            del result  # the next result takes its pages again
            if i == 1:
                calls[name] = max(1, min(50, round(sample_s / wall)))
            if i >= 2:
                seconds[name]["wall"].append(wall)
                seconds[name]["cpu"].append(cpu)
    return seconds


def summary(seconds: dict, limit: str | None = None) -> dict:
    """Minimum, median and spread of each job, and ratios of minima to a limit.

    Args:
      seconds: the result of `measure`.
      limit: name of the job that ratios are over.
    """
    out = {}
    for name, times in seconds.items():
        row = {
            "min_s": min(times["wall"]),
            "median_s": statistics.median(times["wall"]),
            "max_s": max(times["wall"]),
            "cpu_min_s": min(times["cpu"]),
        }
        if limit is not None:
            row["ratio"] = row["min_s"] / min(seconds[limit]["wall"])
            row["cpu_ratio"] = row["cpu_min_s"] / min(seconds[limit]["cpu"])
        out[name] = row
    return out


def environment() -> dict:
    """The device, versions and commit that figures were measured with."""
    return {
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "allocator": allocator_text(),
        "commit": commit(),
    }


def allocator_text() -> str:
    """How this process's C library treats freed memory."""
    reason = allocator.why_not()
    if reason is None:
        return "keeps freed memory (moex.keep_memory)"
    tunables = os.environ.get("GLIBC_TUNABLES", "none")
    return f"default ({reason}); GLIBC_TUNABLES: {tunables}"


def write_json(path: pathlib.Path | None, figures: dict) -> None:
    """Write figures with their environment, if a file is named."""
    if path is not None:
        figures = {**figures, "environment": environment()}
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
