"""Does the simulator tell the time that decoding with offloaded experts takes?

    python -m experiments.offload.clock [--times=3]

A model of random weights with experts of 6 MB (4 layers of 16, 2 a token, width 512)
writes 16 tokens, one at a time, with slots for 4, 8 and 12 experts of a layer and three
policies. The costs are measured once for all of these, in a warm-up with other tokens
and slots for 6 experts of a layer (`moex/offload/profile.py`); the simulator gets them,
and which experts the model used. Warm-up and measured runs take turns, so that other
work of the machine meets all of them. Times are the shortest of 12 runs, of each part
of a layer in each step, and of whole steps. All of it is done `--times` times. Writes
clock.json.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib

import jax
import numpy as np

from experiments.compression import testbed
from moex.config.arguments import positive
from moex.json_files import dump_json
from moex.model.spec import init_params
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.offload.cache import ExpertCache
from moex.offload.costs import Costs
from moex.offload.measure import Measured, measure, shortest
from moex.offload.profile import fitted, warm_up
from moex.offload.record import Turn
from moex.offload.routes import Routes
from moex.offload.settings import Settings
from moex.offload.setup import Offloaded, open_offloaded
from moex.offload.simulate import simulate
from moex.runs.directory import RunDir
from moex.runs.program import compute_of
from moex.runs.write import write_run
from moex.train.job import make_job

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path("runs/offload")
LAYERS, EXPERTS, WIDTH, HIDDEN = 4, 16, 512, 1024
SLOTS, POLICIES, TOKENS = (4, 8, 12), ("lru", "lfu", "mrs"), 16
ROUNDS, REPEATS = 4, 3
WARM_UP = Settings("6")


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


def simulated(found: Measured, slots: int, policy, costs: Costs) -> dict:
    """The figures of the simulator for the steps after the prompt."""
    routes = routes_of(found.rows_SLE, found.score_SLE)
    per_layer = [slots] * LAYERS  # as --offload-allocate=equal, the default
    sizes = LAYERS, EXPERTS, slots * LAYERS
    cache = ExpertCache(*sizes, policy, per_layer=per_layer)
    steps = [np.array([n]) for n in range(len(routes))]
    simulate(routes, steps[:1], cache, costs)
    result = simulate(routes, steps[1:], cache, costs)
    told = result.statistics
    return {
        "seconds": result.time,
        "hits": int(told.hits_L.sum()),
        "misses": int(told.misses_L.sum()),
    }


def measured(offloaded: Offloaded) -> Measured:
    """Some runs of one size and policy."""
    cfg, prompt = offloaded.run.cfg, list(offloaded.run.tokenizer.encode("A"))
    args = cfg.model, [prompt], TOKENS, compute_of(cfg, train=False)
    return measure(offloaded.executor, *args, repeats=REPEATS)


def row_of(offloaded: Offloaded, rounds: list[Measured], costs: Costs) -> dict:
    """The figures of one size and policy, measured and simulated."""
    executor, slots = offloaded.executor, int(offloaded.executor.settings.size)
    found = dataclasses.replace(
        rounds[0],
        turns=shortest([own.turns for own in rounds]),
        seconds_S=np.min([own.seconds_S for own in rounds], axis=0),
    )
    policy = executor.settings.make_policy(executor.slots[0].pool)
    told = simulated(found, slots, policy, costs)
    turns = [turn for step in found.turns[1:] for turn in step]
    parts = {
        "first": sum(turn.seconds for turn in turns if turn.first),
        "again": sum(turn.seconds for turn in turns if not turn.first),
        "moves": sum(turn.moving for turn in turns),
    }
    seconds, whole = sum(parts.values()), float(found.seconds_S[1:].sum())
    return {
        "slots": slots,
        "policy": executor.settings.policy,
        "hits": found.hits,
        "misses": found.misses,
        "same counts": [told["hits"], told["misses"]] == [found.hits, found.misses],
        "seconds": seconds,
        "whole": whole,
        "simulated": told["seconds"],
        "ratio": told["seconds"] / seconds,
        "ratio whole": told["seconds"] / whole,
        "parts": parts,
        "parts simulated": parts_of(turns, costs),
    }


def parts_of(turns: list[Turn], costs: Costs) -> dict:
    """The time of each part by the costs."""
    first, again = ([t for t in turns if t.first is wanted] for wanted in (True, False))
    computing = [costs.device * sum(t.experts for t in some) for some in (first, again)]
    return {
        "first": costs.layer * len(first) + computing[0],
        "again": costs.again * len(again) + computing[1],
        "moves": costs.move * sum(turn.moves for turn in turns),
    }


def opened_all() -> list[Offloaded]:
    """The model with the slots of the warm-up, and then with those of every row."""
    run, rows = large_run(), itertools.product(SLOTS, POLICIES)
    settings = [WARM_UP, *(Settings(str(slots), policy=p) for slots, p in rows)]
    return [open_offloaded(run, own) for own in settings]


def one_time(opened: list[Offloaded]) -> dict:
    """Measure and simulate every size and policy once."""
    (warm, *others), load = opened, os.getloadavg()[0]
    calibrated, rounds = [], []
    for _ in range(ROUNDS):
        args = warm.executor, warm.run.cfg.model, compute_of(warm.run.cfg, train=False)
        calibrated.append(warm_up(*args, repeats=REPEATS))
        rounds.append([measured(own) for own in others])
    costs = fitted(shortest(calibrated))
    rows = [
        row_of(own, list(found), costs)
        for own, found in zip(others, zip(*rounds, strict=True), strict=True)
    ]
    return {"load": load, "costs": dataclasses.asdict(costs), "rows": rows}


def write(times: list[dict]) -> None:
    """Write clock.json, and print the table."""
    found = {"device": jax.devices()[0].device_kind, "tokens": TOKENS - 1}
    text = dump_json(found | {"times": times}, indent=1) + "\n"
    (HERE / "clock.json").write_text(text, encoding="utf-8")
    print(table(times))


def main() -> None:
    """Measure and simulate as often as is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=positive, default=3)
    args = parser.parse_args()
    opened = opened_all()
    write([one_time(opened) for _ in range(args.times)])


def table(times: list[dict]) -> str:
    """The table of the README: medians, and the smallest and greatest ratio."""
    told = ["| slots | policy | hits | measured, ms | simulated, ms | ratio | whole |"]
    told.append("|---|---|---|---|---|---|---|")
    for rows in zip(*(own["rows"] for own in times), strict=True):
        one = rows[0]
        cells = [f"{one['hits'] / (one['hits'] + one['misses']):.3f}"]
        for name in ("seconds", "simulated"):
            milliseconds = [1000 * row[name] / (TOKENS - 1) for row in rows]
            cells.append(f"{np.median(milliseconds):.1f}")
        for name in ("ratio", "ratio whole"):
            own = [row[name] for row in rows]
            cells.append(f"{np.median(own):.2f} ({min(own):.2f} to {max(own):.2f})")
        told.append(f"| {one['slots']} | {one['policy']} | {' | '.join(cells)} |")
    return "\n".join(told)


if __name__ == "__main__":
    main()
