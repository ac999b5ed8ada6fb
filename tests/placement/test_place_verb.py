"""`moex place` and plan files: the table, the drift, and every mistake as one line."""

import dataclasses
import json
import re

import numpy as np
import pytest

from moex.analysis.trace import Slots
from moex.convert.plans import Place, Plan
from moex.convert.to_placed import devices_of
from moex.placement import report
from moex.placement.affinity import Layer
from moex.placement.plan import placement_of
from moex.placement.solve import How
from tests.analysis import oracle
from tests.convert.conftest import moex as moex  # noqa: PLC0414, a fixture

E, N = 8, 560
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
INFOS = tuple(oracle.info(n, experts=E, zero=0, slots=1) for n in (0, 2, 3))


def write(file, mixed=0.1, seed=0, infos=INFOS, n=N):
    """A trace in which expert e is followed by one of its own, but for a share."""
    rng = np.random.default_rng(seed)
    follow = [np.random.default_rng(5 + i).permutation(E) for i in range(len(infos))]
    expert_N = rng.integers(0, E, n)
    slots = {}
    for own, to in zip(infos, follow, strict=True):
        other_N = rng.integers(0, E, n)
        expert_N = np.where(rng.random(n) < mixed, other_N, to[expert_N])
        keep, ones = np.ones((n, 1), bool), np.ones((n, 1), np.float32)
        slots[own.label] = Slots(
            expert_NK=expert_N[:, None].astype(np.int32),
            keep_NK=keep,
            gate_NK=ones,
            logit_NK=ones,
            prob_NK=ones,
        )
    oracle.write(file, [(oracle.random_tokens(rng, n), slots)], layers=infos)
    return file


@pytest.fixture
def trace(tmp_path):
    return write(tmp_path / "t.parquet")


def test_affinity_is_found_and_told_from_popularity(moex, trace, tmp_path):
    plan = tmp_path / "plan.json"
    found = json.loads(moex("place", trace, "--devices=4", f"--out={plan}", "--json"))
    crossings = found["crossings"]
    assert crossings["placed"]["all"] < 0.15 < 0.5 < crossings["null"]["all"]
    assert crossings["placed"]["other"] < 0.2
    assert crossings["contiguous"]["all"] > 0.55
    assert found["tokens"] + found["held_out"] == N
    assert found["held_out"] == N / 4
    assert found["devices_per_token"]["placed"] == [1, 1]
    text = moex("place", trace, "--devices=4", "--nodes=2", "--method=milp")
    assert "gap to what may be possible: 0.0000" in text
    assert "in 2 nodes" in text
    read = Plan.read(plan, "place")
    assert [own.layer for own in read.layers] == [0, 2, 3]
    assert read.how["crossings"] == crossings


def test_a_stale_plan_shows_its_drift(moex, trace, tmp_path):
    plan, later = tmp_path / "plan.json", write(tmp_path / "l.parquet", mixed=0.7)
    moex("place", trace, "--devices=4", f"--out={plan}", "--held-out-every=0")
    found = json.loads(moex("place", later, f"--plan={plan}", "--json"))
    rows = found["crossings"]
    assert rows["then"]["all"] < 0.15
    assert rows["plan"]["all"] > 0.4
    assert rows["anew"]["all"] <= rows["plan"]["all"]
    assert "the plan, when it was made" in moex("place", later, f"--plan={plan}")
    # A plan that somebody cut to one layer: the others stay as they are.
    data = json.loads(plan.read_text())
    del data["layers"][1:], data["how"]
    plan.write_text(json.dumps(data))
    rows = json.loads(moex("place", trace, f"--plan={plan}", "--json"))["crossings"]
    assert set(rows) == {"contiguous", "plan", "anew"}
    assert rows["plan"]["all"] != rows["contiguous"]["all"]


def test_replicas_are_shown(moex, trace):
    text = moex("place", trace, "--devices=4", "--replicas=12")
    assert "36 replicas in all" in text
    told = json.loads(moex("place", trace, "--devices=4", "--replicas=12", "--json"))
    for row in told["replicas"]:
        every = [e for device in row["replicas"] for e in device]
        assert sorted(set(every)) == list(range(E))
        assert 1 <= row["imbalance"]["replicated"] < 1.2


MISTAKES = {
    "--devices: missing": (),
    "--devices = 3: must divide the 8 experts of layer 0: 2, 4, 8.": ("--devices=3",),
    "--devices = 16: must divide": ("--devices=16",),
    "--devices = 1: must be from 2": ("--devices=1",),
    "--nodes = 3: must be a divisor": ("--devices=4", "--nodes=3"),
    "--method = 'lap': must be one of": ("--devices=4", "--method=lap"),
    "--by = 'transition'": ("--devices=4", "--by=transition"),
    "--replicas = 9: must be a multiple": ("--devices=4", "--replicas=9"),
    "to all of them on every device, 32": ("--devices=4", "--replicas=36"),
    "folder: is a folder; `moex trace`": ("--devices=4", "--held-out=folder"),
    "sums.npz: not sums of moex (it is no .npz": ("--devices=4", "--held-out=sums.npz"),
    "--devices: is for placements": ("--simulate", "--devices=0"),
    "--held-out-every = 1: must be": ("--devices=4", "--held-out-every=1"),
    "nothere.parquet: no such file": ("--devices=4", "--held-out=nothere.parquet"),
    "nothere: ": ("--devices=4", "--run=nothere"),
    "nothere.json: cannot be read": ("--plan=nothere.json",),
    "--devices: is for a new placement": ("--plan=plan.json", "--devices=2"),
    "must be a whole number": ("--devices=two",),
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_line(moex, trace, tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "sums.npz").write_bytes(b"no archive")
    Plan(
        kind="place",
        run="r",
        step=0,
        base="",
        layers=(Place(layer=0, experts=2, devices=((0,), (1,))),),
    ).save(tmp_path / "plan.json")
    assert told in moex("place", trace, *MISTAKES[told])


def test_files_that_do_not_belong_together_are_refused(moex, trace, tmp_path):
    other = write(tmp_path / "o.parquet", infos=INFOS[:2])
    error = moex("place", trace, "--devices=4", f"--held-out={other}")
    assert "is of another model: layers or experts differ" in error
    one = write(tmp_path / "one.parquet", infos=INFOS[:1])
    assert "--by=coactivation" in moex("place", one, "--devices=4")
    assert "no token has two experts" in moex(
        "place", one, "--devices=4", "--by=coactivation"
    )
    few = write(tmp_path / "few.parquet", n=7)
    assert "no example is held out" in moex("place", few, "--devices=4")
    assert "as it is" in moex("place", few, "--devices=4", "--held-out-every=0")


PLAN = Place(layer=0, experts=4, devices=((0, 3), (1, 2)))
BAD = {
    "layer 0: devices: expert 3 stands there twice": {"devices": [[0, 3], [1, 3]]},
    "layer 0: devices: expert 2 is on none": {"devices": [[0, 3], [1]]},
    "layer 0: devices[1] = [2]: must be 2 experts": {"devices": [[0, 3, 1], [2]]},
    "layer 0: devices = 4: must be from 0 to 3": {"devices": [[0, 4], [1, 2]]},
    "has no field 'devices'": {"devices": None},
    "layer 0: devices = [0, 1, 2, 3]: must be": {"devices": [0, 1, 2, 3]},
}


@pytest.mark.parametrize("told", BAD)
def test_a_mistake_in_a_plan_is_named(moex, trace, tmp_path, told):
    file = tmp_path / "plan.json"
    Plan(kind="place", run="r", step=0, base="", layers=(PLAN,)).save(file)
    assert Plan.read(file, "place").layers == (PLAN,)
    data = json.loads(file.read_text())
    data["layers"][0] |= BAD[told]
    if BAD[told]["devices"] is None:
        del data["layers"][0]["devices"]
    file.write_text(json.dumps(data))
    error = moex("place", trace, f"--plan={file}")
    assert told in error
    assert str(file) in error


TOLD_OF_ITSELF = {
    "how: crossings = 3: must be dict": {"crossings": 3},
    "how.crossings: placed = 3: must be dict": {"crossings": {"placed": 3}},
    "how.crossings.placed: between = 'few': must be float": {
        "crossings": {"placed": {"all": 0.5, "between": "few"}}
    },
    "how.by = 'transition': must be one of": {"by": "transition"},
    "how.nodes = 3: must be a divisor of the 4 devices": {"nodes": 3},
}


@pytest.mark.parametrize("told", TOLD_OF_ITSELF)
def test_a_mistake_in_what_a_plan_tells_of_itself_is_named(moex, trace, tmp_path, told):
    file, layer = tmp_path / "plan.json", Place(layer=0, experts=E, devices=PAIRS)
    how = TOLD_OF_ITSELF[told]
    Plan(kind="place", run="r", step=0, base="", layers=(layer,), how=how).save(file)
    error = moex("place", trace, f"--plan={file}")
    assert f"{file}: {told}" in error


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ((PAIRS, ((0, 1, 2, 3), (4, 5, 6, 7))), "devices = [2, 4]: must be as many"),
        ((((0, 1, 2, 3, 4, 5, 6, 7),),), "devices = 1: must be 2 or more in every"),
    ],
)
def test_layers_of_a_plan_have_the_same_devices_and_at_least_two(trace, devices, told):
    layers = tuple(
        Place(layer=layer, experts=E, devices=own)
        for layer, own in zip((0, 2), devices, strict=False)
    )
    plan = Plan(kind="place", run="r", step=0, base="", layers=layers)
    text = report.Text.read(trace, objective="transitions", every=4)
    with pytest.raises(ValueError, match=re.escape(told)):
        placement_of(plan, text.own)
    with pytest.raises(ValueError, match=re.escape(told)):
        devices_of(plan)


def test_a_plan_for_other_layers_is_refused(trace):
    text = report.Text.read(trace, objective="transitions", every=4)
    facts = {"kind": "place", "run": "r", "step": 0, "base": ""}
    for layer, told in (
        (PLAN, "layer 0: experts = 4: must be 8, as in the trace"),
        (dataclasses.replace(PLAN, layer=1), "layer 1: is no MoE layer"),
    ):
        with pytest.raises(ValueError, match=told):
            placement_of(Plan(layers=(layer,), **facts), text.own)


def test_the_order_of_a_plan_is_that_of_its_devices(trace):
    text = report.Text.read(trace, objective="transitions", every=0)
    found, placed = report.report(text, How(devices=2), null=False)
    assert "null" not in found["crossings"]
    plan = report.placement_of(_plan_of(placed), text.own)
    for one, other in zip(plan.device, placed.device, strict=True):
        np.testing.assert_array_equal(one, other)
    assert placed.layers == tuple(Layer(n, E) for n in (0, 2, 3))


def _plan_of(placed):
    layers = tuple(
        Place(
            layer=own.number,
            experts=own.experts,
            devices=tuple(map(tuple, placed.experts(i))),
        )
        for i, own in enumerate(placed.layers)
    )
    return Plan(kind="place", run="r", step=0, base="", layers=layers)
