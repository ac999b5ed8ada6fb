"""The experiments of this repository: their configs, and their committed results."""

import pytest

from moex.experiment import verbs
from moex.experiment.contract import SIZES, Training
from moex.experiment.find import find, find_all
from moex.plan.planner import plan
from moex.plan.topology import parse
from tests.runs import ROOT

NAMES = [path.parent.name for path in sorted(ROOT.glob("experiments/*/criteria.py"))]
TOPOLOGIES = {"cpu": "cpu:1", "gpu": "h200:1"}


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_there_are_experiments():
    assert "chain_of_experts" in NAMES
    assert [found.name for found in find_all()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_is_what_results_and_criteria_give(name):
    said = []
    assert verbs.check([name], None, said.append) == ""
    assert said
    question = find(name).question
    assert question.endswith("?")
    assert f"**Question.** {question}" in (find(name).folder / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_can_be_planned(name, size):
    """A plan traces the gradients of the step."""
    topology = parse(TOPOLOGIES[size])
    for arm in find(name).at(size).arms.values():
        if isinstance(arm, Training):
            found = plan(arm.config, topology)
            assert found.memory.peak > 0
            assert found.step_seconds is not None or size == "cpu"
