"""The three curves of a machine, and their file."""

import dataclasses
import math

import pytest

from moex.config.base import ConfigError
from moex.offload.costs import Costs
from moex.offload.profile import fitted
from moex.offload.record import Turn


def test_the_host_has_an_intercept_once():
    costs = Costs(cpu_first=0.79, cpu_row=1.0)
    assert costs.cpu(0) == 0.0
    assert costs.cpu(3) == pytest.approx(3.79)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"device": -0.1}, "costs: device = -0.1: must be 0 or more"),
        ({"move": math.nan}, "costs: move = nan: must be 0 or more"),
        ({"cpu_first": math.inf}, "costs: cpu_first = inf: must be finite"),
        ({"device": math.inf}, "device = inf: must be finite, if cpu_row is not"),
    ],
)
def test_impossible_costs_are_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        Costs(**{"device": 1.0, "move": 1.0, **values})


def test_a_file_gives_what_was_saved(tmp_path):
    file = tmp_path / "costs.json"
    for costs in (Costs(device=0.5, move=0.25, layer=1), Costs(cpu_row=2)):
        costs.save(file, {"machine": "mine"})
        assert Costs.read(file) == costs


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"device": -1}', "costs.json: device = -1.0: must be from 0 to 1e+12"),
        ('{"device": "1"}', "costs.json: device = '1': must be"),
        ('{"device": NaN}', "costs.json: is not JSON"),
        ('{"devise": 1}', "no such field: 'devise'. Did you mean 'device'"),
        ("[]", "costs.json: must be a JSON object, not a list"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, told):
    file = tmp_path / "costs.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        Costs.read(file)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_costs_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Costs(device=1.0).device = 2.0


def test_costs_are_found_in_the_times_of_a_record():
    costs = Costs(device=0.25, move=2.0, layer=1.0, again=0.75)
    turns = []
    for first, experts, moves in [
        *((True, 0, 2), (False, 2, 0)),
        *((True, 1, 1), (False, 1, 0)),
        *((True, 2, 0), (True, 3, 1), (False, 1, 0)),
    ]:
        seconds = (costs.layer if first else costs.again) + costs.device * experts
        turns.append(Turn(0, first, experts, moves, seconds, costs.move * moves))
    found = fitted([turns])
    for name, value in dataclasses.asdict(costs).items():
        assert getattr(found, name) == pytest.approx(value), name


def test_no_cost_of_a_record_is_below_0():
    # Experts seem to make a turn shorter, and nothing ran again.
    turns = [Turn(0, True, n, 1, 2.0 - 0.1 * n, 1.0) for n in range(3)]
    found = fitted([turns])
    assert found.device == 0.0 == found.again
    assert found.layer == pytest.approx(1.9)
