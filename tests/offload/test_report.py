"""Tables of replays: the rows of every policy and size, and what cannot be replayed."""

import dataclasses

import numpy as np
import pytest

from moex.analysis.trace import Trace
from moex.config.base import ConfigError
from moex.offload.cache import ExpertCache, allocate
from moex.offload.costs import Costs
from moex.offload.fit import Training, fit
from moex.offload.policies import Lru
from moex.offload.report import POLICIES, How, lines, simulation
from moex.offload.routes import in_step, read_routes
from moex.offload.simulate import simulate
from tests.analysis.oracle import random_chunk, write
from tests.offload.routes import routes_of

COSTS = Costs(cpu_row=0.5, device=0.1, move=0.3, layer=1.0)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    chunk = random_chunk(np.random.default_rng(0), 70, logits=True)
    file = write(tmp_path_factory.mktemp("trace") / "t", [chunk], logits=True)
    with Trace.open(file) as trace:
        yield trace


def test_a_table_has_a_row_for_each_policy_and_size(trace):
    found = simulation(trace, How(slots=("3", "100%"), batch=2))
    names = [p for p in POLICIES if p != "predicted"]
    rows = {(r["policy"], r["slots"]): r for r in found["rows"]}
    assert list(rows) == [(p, s) for p in names for s in ("3", "100%")]
    assert found["profile_tokens"] == found["tokens"] == 35
    for (_, size), row in rows.items():
        assert row["total_slots"] == {"3": 9, "100%": 15}[size]
        assert (
            row["hits"] + row["misses"]
            == rows["lru", "3"]["hits"] + (rows["lru", "3"]["misses"])
        )
        assert row["hit_rate"] <= rows["belady", size]["hit_rate"]
        assert "time_per_token" not in row
    assert len({r["hit_rate"] for r in found["rows"] if r["slots"] == "100%"}) == 1
    told = lines(found)
    assert "35 tokens in 21 steps of 3 MoE layers with 5 experts" in told[0]
    lru = next(line for line in told if line.startswith("lru"))
    assert lru.split()[1:] == [
        f"{rows['lru', s]['hit_rate']:.1%}" for s in ("3", "100%")
    ]


def test_a_row_is_a_replay_of_the_second_half(trace):
    how = How(slots=("50%",), policies=("lru",), costs=COSTS, allocate="demand")
    (row,) = simulation(trace, how)["rows"]
    profile, replayed = read_routes(trace, logits=True).halves()
    per_layer = allocate(profile.demand(), 8, 5)
    cache = ExpertCache(3, 5, 8, Lru(3, 5), per_layer=per_layer)
    found = simulate(replayed, in_step(replayed), cache, COSTS)
    assert row["hit_rate"] == found.hit_rate
    assert row["time_per_token"] == found.time / 35
    assert row["stall"] == found.stall / found.time


def test_every_choice_replays_the_same_experts(trace, tmp_path):
    fit(trace, Training(steps=2), hidden=8).save(tmp_path / "p.safetensors")
    needed = set()
    for fields in (
        {"prefetch": "affinity", "ahead": 2},
        {"prefetch": "logits", "impact": True, "scheduler": "best"},
        {"prefetch": "perfect", "allocate": "shared", "scheduler": "hss"},
        {"prefetch": str(tmp_path / "p.safetensors")},
    ):
        found = simulation(trace, How(slots=("60%",), costs=COSTS, **fields))
        assert [r["policy"] for r in found["rows"]] == list(POLICIES)
        needed |= {r["hits"] + r["misses"] for r in found["rows"]}
        belady = found["rows"][-1]
        assert belady["prefetched"] == belady["hosted"] == 0
        assert found["rows"][1]["prefetched"] > 0
        assert any("time per token" in line for line in lines(found))
    assert len(needed) == 1


def test_batches_that_are_divided_anew_need_fewer_experts(trace):
    plain = simulation(trace, How(slots=("3",), policies=("lru",), batch=2))
    again = How(slots=("3",), policies=("lru",), batch=2, regroup=True)
    regrouped = simulation(trace, again)["rows"][0]
    before = plain["rows"][0]
    assert regrouped["hits"] + regrouped["misses"] < before["hits"] + before["misses"]


def test_the_demand_of_a_layer_is_its_distinct_experts():
    ids = [[[n % 4, 4], [0, 1]] for n in range(20)]
    assert routes_of(ids).demand().tolist() == [5, 2]


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"slots": ("0",)}, "--slots = '0': must be from 1 to 5, the experts"),
        ({"slots": ("6",)}, "--slots = '6': must be from 1 to 5"),
        ({"slots": ("150%",)}, "--slots = '150%'"),
        ({"slots": ("four",)}, "--slots = 'four'"),
        ({"slots": ("nan%",)}, "--slots = 'nan%'"),
        ({"slots": ()}, r"--slots = \[\]: must be not empty"),
        ({"policies": ("lrv",)}, "--policy = 'lrv'.*Did you mean 'lru'"),
        ({"policies": ("predicted",)}, "keeps the experts that --prefetch predicts"),
        ({"batch": 0}, "--batch = 0: must be 1 or more"),
        ({"alpha": 2.0}, r"--alpha = 2.0: must be in \(0, 1\]"),
        ({"allocate": "even"}, "--allocate = 'even': must be one of 'equal'"),
        ({"scheduler": "hs"}, "--scheduler = 'hs'.*Did you mean 'hss'"),
        ({"prefetch": "logits"}, "--prefetch: depends on times; give --costs"),
        ({"scheduler": "best"}, "--scheduler: depends on times; give --costs"),
        ({"prefetch": "logit", "costs": COSTS}, "no such file.*Did you mean 'logits'"),
    ],
)
def test_bad_choices_are_refused_in_one_line(trace, fields, told):
    with pytest.raises(ConfigError, match=told) as error:
        simulation(trace, How(**fields))
    assert "\n" not in str(error.value)


def test_a_predictor_of_another_vocabulary_is_refused(trace, tmp_path):
    predictor = fit(trace, Training(steps=1), hidden=8)
    predictor.about = dataclasses.replace(predictor.about, tokenizer="other")
    predictor.save(tmp_path / "p.safetensors")
    how = How(prefetch=str(tmp_path / "p.safetensors"), costs=COSTS)
    with pytest.raises(ConfigError, match="predicts for another vocabulary"):
        simulation(trace, how)


def test_one_example_is_too_few(tmp_path):
    chunk = random_chunk(np.random.default_rng(0), 6, logits=True)
    few = pytest.raises(ConfigError, match="one example of 6 tokens is too few")
    with Trace.open(write(tmp_path / "t", [chunk], logits=True)) as short, few:
        simulation(short, How())
