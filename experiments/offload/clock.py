"""Does the simulator tell the time that decoding with offloaded experts takes?

    python -m experiments.offload.clock [--slots=4,8,12]

A model of random weights with experts of 6 MB (4 layers of 16, 2 a token, width 512)
writes 16 tokens, one at a time, with slots for 4, 8 and 12 experts of a layer and three
policies. The costs are measured beforehand, one by one (`moex/offload/profile.py`); the
simulator gets them, and which experts the model used. Of each layer and step the
shortest time of 12 runs counts. Writes clock.json, where rows of other sizes stay.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import numpy as np

from experiments.compression import testbed
from moex.json_files import dump_json, read_object
from moex.model.spec import init_params
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.offload.cache import ExpertCache
from moex.offload.costs import Costs
from moex.offload.executor import Executor
from moex.offload.measure import measure
from moex.offload.profile import profile
from moex.offload.routes import Routes
from moex.offload.settings import Settings
from moex.offload.setup import open_offloaded
from moex.offload.simulate import simulate
from moex.runs.directory import RunDir
from moex.runs.program import compute_of
from moex.runs.write import write_run
from moex.train.job import make_job

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path("runs/offload")
LAYERS, EXPERTS, WIDTH, HIDDEN = 4, 16, 512, 1024
SLOTS, POLICIES, TOKENS, REPEATS = (4, 8, 12), ("lru", "lfu", "mrs"), 16, 12


def large_run() -> RunDir:
    """The run of the model, with random weights."""
    run = RunDir(FOLDER / "large")
    if not run.is_run():
        files = testbed.write_texts((FOLDER / "texts").absolute(), 0)
        cfg = testbed.config(files, 0)
        # Routers that tell tokens apart: those of a fresh model are nearly equal.
        router = TopK(k=2, init_std=0.5)
        moe = MoE(num_experts=EXPERTS, router=router, experts=Glu(hidden=HIDDEN))
        layers = (Segment(pattern=(moe,), repeat=LAYERS),)
        cfg.model = LM(dim=WIDTH, attention=Attention(heads=8), layers=layers)
        job = make_job(cfg, log=lambda line: None)
        params, state = jax.jit(lambda key: init_params(job.cfg.model, key))(
            jax.random.key(0)
        )
        arrays = {"params": params, "state": state}
        write_run(run, job.cfg, job, job.tx, job.data, arrays)
    return run


def routes_of(rows_SLE, score_SLE) -> Routes:
    """The experts of each step, as if a step were a token."""
    steps, layers, experts = rows_SLE.shape
    most = int((rows_SLE > 0).sum(2).max())
    expert_SLK = np.full((steps, layers, most), -1, np.int32)
    for place in np.ndindex(steps, layers):
        ids = np.flatnonzero(rows_SLE[place])
        expert_SLK[place][: len(ids)] = ids
    with np.errstate(divide="ignore"):
        logits = np.log(score_SLE)
    zeros = np.zeros(steps, np.int32)
    return Routes(
        expert_NRK=expert_SLK,
        prob_NRK=np.zeros(expert_SLK.shape, np.float32),
        logits_NRE=logits,
        layer_R=tuple(range(layers)),
        experts_R=(experts,) * layers,
        example_N=zeros,
        index_N=np.arange(steps, dtype=np.int32),
        document_N=zeros,
        token_N=zeros,
    )


def recorded(offloaded, compute) -> tuple:
    """A measured run, the scores that the policy was told, and seconds.

    Returns:
      (`Measured`, float[S, L, E], float[S, L]): of each layer and step the shortest
      time of all runs; a whole step is more often disturbed by other work.
    """
    scores: list = []
    times: list = []
    plain, plain_step = ExpertCache.routed, Executor._run_step

    def routed(self, layer, score_E):
        scores.append(np.array(score_E))
        plain(self, layer, score_E)

    def run_step(self, *args):
        begin = time.perf_counter()
        found = plain_step(self, *args)
        jax.block_until_ready(found[0])
        times.append(time.perf_counter() - begin)
        return found

    ExpertCache.routed = routed  # type: ignore
    Executor._run_step = run_step  # type: ignore
    try:
        prompt = offloaded.run.tokenizer.encode("A")
        found = measure(
            offloaded.executor,
            offloaded.run.cfg.model,
            [list(prompt)],
            TOKENS,
            compute,
            repeats=REPEATS,
        )
    finally:
        ExpertCache.routed = plain  # type: ignore
        Executor._run_step = plain_step  # type: ignore
    shape = found.rows_SLE.shape
    score_SLE = np.stack(scores[-shape[0] * shape[1] :]).reshape(shape)
    seconds_NSL = np.reshape(times, (REPEATS + 1, *shape[:2]))[1:]
    return found, score_SLE, seconds_NSL.min(0)


def simulated(found, score_SLE, slots: int, policy, costs: Costs) -> dict:
    """The figures of the simulator for the steps after the prompt."""
    routes = routes_of(found.rows_SLE, score_SLE)
    cache = ExpertCache(LAYERS, EXPERTS, slots * LAYERS, policy)
    steps = [np.array([n]) for n in range(len(routes))]
    simulate(routes, steps[:1], cache, costs)
    result = simulate(routes, steps[1:], cache, costs)
    told = result.statistics
    return {
        "seconds": result.time,
        "hits": int(told.hits_L.sum()),
        "misses": int(told.misses_L.sum()),
    }


def main() -> None:
    """Measure and simulate every size and policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", default=",".join(map(str, SLOTS)))
    sizes = [int(text) for text in parser.parse_args().slots.split(",")]
    run, file = large_run(), HERE / "clock.json"
    before = read_object(file)["rows"] if file.exists() else []
    rows = [row for row in before if row["slots"] not in sizes]
    for slots in sizes:
        costs = None
        for name in POLICIES:
            settings = Settings(str(slots), policy=name)
            offloaded = open_offloaded(run, settings)
            compute = compute_of(offloaded.run.cfg, train=False)
            if costs is None:
                costs = profile(offloaded.executor, WIDTH, compute)
                # A layer that missed something runs again.
                costs = dataclasses.replace(costs, again=costs.layer)
                print(costs, flush=True)
            found, score_SLE, seconds_SL = recorded(offloaded, compute)
            pool = offloaded.executor.slots[0].pool
            told = simulated(
                found, score_SLE, slots, settings.make_policy(pool, 2), costs
            )
            seconds = float(seconds_SL[1:].sum())
            row = {
                "slots": slots,
                "policy": name,
                "seconds": seconds,
                "simulated": told["seconds"],
                "ratio": told["seconds"] / seconds,
                "costs": dataclasses.asdict(costs),
                "hits": found.hits,
                "misses": found.misses,
                "same counts": [told["hits"], told["misses"]]
                == [found.hits, found.misses],
            }
            rows.append(row)
    rows.sort(key=lambda row: (row["slots"], POLICIES.index(row["policy"])))
    found = {"device": jax.devices()[0].device_kind, "tokens": TOKENS - 1, "rows": rows}
    file.write_text(dump_json(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


def table(found: dict) -> str:
    """The table of the README."""
    told = ["| slots | policy | hits | measured, ms | simulated, ms | ratio |"]
    told.append("|---|---|---|---|---|---|")
    for row in found["rows"]:
        share = row["hits"] / (row["hits"] + row["misses"])
        times = [1000 * row[k] / found["tokens"] for k in ("seconds", "simulated")]
        told.append(
            f"| {row['slots']} | {row['policy']} | {share:.3f} | {times[0]:.1f} | "
            f"{times[1]:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(told)


if __name__ == "__main__":
    main()
