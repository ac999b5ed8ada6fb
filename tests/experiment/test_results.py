"""Results, their sums over seeds, and verdicts, against plain loops and SciPy."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from moex import Glu, MoE, TopK
from moex.analysis.compare import Estimate
from moex.config.base import ConfigError
from moex.experiment import claims
from moex.experiment.claims import Finding, judge, larger, smaller
from moex.experiment.contract import Experiment, Work, changed_fields
from moex.experiment.results import File, NotDone, Results


def work(**figures):
    return figures


def experiment(**args):
    return Experiment(arms={"a": Work(work, args), "b": Work(work)}, tables=())


RESULTS = Results(
    {
        "a": {0: {"nll": 3.0}, 1: {"nll": 3.5}, 2: {"nll": 2.9}},
        "b": {2: {"nll": 3.2}, 0: {"nll": 3.1}, 5: {"nll": 9.0}},
        "c": {0: {"other": 1.0}},
    }
)


def test_differences_are_taken_between_equal_seeds():
    found = RESULTS.difference("a", "b", "nll")
    own = [3.0 - 3.1, 2.9 - 3.2]
    assert found.mean == pytest.approx(np.mean(own))
    low, high = stats.t.interval(0.95, 1, np.mean(own), stats.sem(own))
    assert found.half_width == pytest.approx((high - low) / 2)
    ratio = RESULTS.ratio("a", "b", "nll")
    assert ratio.mean == pytest.approx((3.0 / 3.1 + 2.9 / 3.2) / 2)


def test_what_is_missing_is_named():
    with pytest.raises(NotDone, match="nll of c"):
        RESULTS.mean("c", "nll")
    with pytest.raises(NotDone, match="nll of d"):
        RESULTS.difference("a", "d", "nll")


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (-0.10, 0.02, claims.HOLDS),
        (-0.03, 0.02, claims.IN_DIRECTION),
        (-0.03, 0.04, claims.NOT_HERE),
        (-0.10, 0.20, claims.NOT_HERE),
        (+0.10, 0.02, claims.NOT_HERE),
        (-0.10, None, claims.IN_DIRECTION),
        (+0.10, None, claims.NOT_HERE),
        (-0.10, 0.0, claims.HOLDS),
        (math.nan, 0.1, claims.NOT_HERE),
    ],
)
def test_verdicts_need_the_size_and_the_interval(mean, half, verdict):
    assert smaller(Estimate(mean, half), at_most=-0.05).verdict == verdict
    flipped = Estimate(-mean, half)
    assert larger(flipped, at_least=0.05).verdict == verdict
    ratio = Estimate(1 + mean, half)
    assert smaller(ratio, at_most=0.95, nothing=1.0).verdict == verdict


def test_a_claim_without_its_arms_is_not_tested():
    def claimed(results):
        """It is better.

        More text.
        """
        return smaller(results.difference("a", "z", "nll"))

    def worse(results):
        """It is worse."""
        return Finding(claims.NOT_HERE, "1")

    first, second = judge(RESULTS, (worse,), (claimed,))
    assert (first.text, first.failed) == ("It is worse.", True)
    assert (second.text, second.failed) == ("It is better.", False)
    assert second.finding == Finding(claims.NOT_TESTED, "nll of z is missing")


def test_results_are_kept_by_arm_and_seed_and_void_when_the_arm_changes(tmp_path):
    file, one = File(tmp_path), experiment(x=1)
    file.add(one, "cpu", "b", 1, {"nll": 1.0})
    file.add(one, "cpu", "a", 10, {"nll": 2.0})
    file.add(one, "cpu", "a", 2, {"nll": 3.0})
    assert list(file.read()["cpu"]) == ["a", "b"]
    assert file.of(one, "cpu").values("a", "nll") == {2: 3.0, 10: 2.0}
    assert file.of(one, "gpu").arms == {"a": {}, "b": {}}
    other = experiment(x=2)
    assert file.of(other, "cpu").arms["a"] == {}
    (line,) = file.stale(other, "cpu")
    assert "a is another arm today: args.x was 1 and is 2" in line
    assert file.stale(one, "cpu") == []
    file.add(other, "cpu", "a", 0, {"nll": 4.0})
    assert file.of(other, "cpu").values("a", "nll") == {0: 4.0}


def test_results_of_an_arm_that_is_gone_are_named(tmp_path):
    file = File(tmp_path)
    file.add(experiment(), "cpu", "b", 0, {"nll": 1.0})
    left = dataclasses.replace(experiment(), arms={"bb": Work(work)})
    (line,) = file.stale(left, "cpu")
    assert "there is no arm 'b'" in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "must be a JSON object"),
        ('{"tpu": {}}', "no such field: 'tpu'"),
        ('{"cpu": {"a": {"seeds": {}}}}', "cpu, a"),
        ('{"cpu": {"a": {"identity": {}, "seeds": {"0": 1}}}}', "seeds"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, text, told):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        File(tmp_path).read()
    assert "results.json" in str(error.value)


def test_the_identity_of_a_config_leaves_out_defaults():
    config = MoE(num_experts=4, router=TopK(k=2), experts=Glu(hidden=8))
    assert changed_fields({"moe": (config,)}) == {
        "moe": [
            {
                "__config__": "MoE",
                "num_experts": 4,
                "router": {"__config__": "TopK", "k": 2},
                "experts": {"__config__": "Glu", "hidden": 8},
            }
        ]
    }


def test_arms_come_behind_those_that_they_need():
    needs = {"c": ("b",), "b": ("a",), "a": ()}
    arms = {name: Work(work, needs=own) for name, own in needs.items()}
    assert Experiment(arms=arms, tables=()).order() == ["a", "b", "c"]
    arms["a"] = Work(work, needs=("c",))
    with pytest.raises(ConfigError, match="need each other"):
        Experiment(arms=arms, tables=()).check()
    arms["a"] = Work(work, needs=("d",))
    with pytest.raises(ConfigError, match="arm a: needs = 'd': must be one of"):
        Experiment(arms=arms, tables=()).check()
