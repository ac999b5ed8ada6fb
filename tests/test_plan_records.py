"""Plans of today beside what the compiler for TPUs said in `benchmarks.plan`."""

import json
import pathlib

import pytest

from benchmarks.plan import CASES
from moex.config.flags import load_config
from moex.plan.planner import plan
from moex.plan.topology import parse

RECORDS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "plan"


def test_every_case_has_a_record():
    assert {path.stem for path in RECORDS.glob("*.json")} == {*CASES}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if i else pytest.mark.thorough)
        for i, name in enumerate(CASES)
    ],
)
def test_the_plan_is_within_15_percent_of_the_compiler(name):
    made = json.loads((RECORDS / f"{name}.json").read_text())
    topology, flags = CASES[name]
    assert made["flags"] == list(flags)
    memory = plan(load_config(list(flags)), parse(topology)).memory
    assert memory.state == made["compiled"]["state_bytes"]
    assert memory.peak == pytest.approx(made["compiled"]["peak_bytes"], rel=0.15)
