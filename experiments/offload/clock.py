"""Does the simulator tell the time that decoding with offloaded experts takes?

    python -m experiments.offload.clock

A model of random weights with experts of 6 MB (4 layers of 16, 2 a token, width 512)
writes 48 tokens, one at a time, with slots for 4, 8 and 12 experts of a layer and three
policies. The costs are measured beforehand, one by one (`moex/offload/profile.py`); the
simulator gets them, and which experts the model used. Writes clock.json.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from experiments.compression import testbed
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
SLOTS, POLICIES, TOKENS, REPEATS = (4, 8, 12), ("lru", "lfu", "mrs"), 48, 3


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
    """A measured run, and the scores that the policy was told, float[S, L, E]."""
    scores: list = []
    plain = ExpertCache.routed

    def routed(self, layer, score_E):
        scores.append(np.array(score_E))
        plain(self, layer, score_E)

    ExpertCache.routed = routed  # type: ignore
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
    shape = found.rows_SLE.shape
    return found, np.stack(scores[-shape[0] * shape[1] :]).reshape(shape)


def simulated(found, score_SLE, slots: int, policy, costs: Costs) -> dict:
    """What the simulator says of the steps after the prompt."""
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
    run = large_run()
    rows, costs = [], None
    for slots in SLOTS:
        for name in POLICIES:
            settings = Settings(str(slots), policy=name)
            offloaded = open_offloaded(run, settings)
            compute = compute_of(offloaded.run.cfg, train=False)
            if costs is None:
                costs = profile(offloaded.executor, WIDTH, compute)
                costs = dataclasses.replace(costs, again=costs.layer)
                print(costs, flush=True)
            found, score_SLE = recorded(offloaded, compute)
            pool = offloaded.executor.slots[0].pool
            told = simulated(
                found, score_SLE, slots, settings.make_policy(pool, 2), costs
            )
            seconds = float(found.seconds_S[1:].sum())
            row = {
                "slots": slots,
                "policy": name,
                "seconds": seconds,
                "simulated": told["seconds"],
                "ratio": told["seconds"] / seconds,
                "hits": found.hits,
                "misses": found.misses,
                "same counts": [told["hits"], told["misses"]]
                == [found.hits, found.misses],
            }
            rows.append(row)
            print(row, flush=True)
    found = {"device": jax.devices()[0].device_kind, "tokens": TOKENS - 1}
    found |= {"costs": dataclasses.asdict(costs), "rows": rows}
    (HERE / "clock.json").write_text(
        dump_json(found, indent=1) + "\n", encoding="utf-8"
    )
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
