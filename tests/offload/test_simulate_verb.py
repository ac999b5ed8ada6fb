"""`moex place --simulate` and `--fit-predictor`: their output, and mistakes."""

import json

import pytest

from moex.offload.costs import Costs
from moex.offload.predictor import Predictor
from tests.convert.conftest import moex as moex  # noqa: PLC0414, a fixture
from tests.placement.test_place_verb import write


@pytest.fixture
def trace(tmp_path):
    return write(tmp_path / "t.parquet")


def test_policies_and_sizes_are_a_table(moex, trace):
    text = moex("place", trace, "--simulate", "--slots=2,50%", "--policy=lru,belady")
    lines = text.splitlines()
    assert "hit rate, by slots of a layer" in lines
    at = lines.index("hit rate, by slots of a layer")
    assert lines[at + 1].split() == ["2", "50%"]
    shares = {r.split()[0]: r.split()[1:] for r in lines[at + 2 : at + 4]}
    values = {k: [float(v.rstrip("%")) for v in vs] for k, vs in shares.items()}
    assert all(a < b for a, b in zip(values["lru"], values["belady"], strict=True))


@pytest.mark.thorough
def test_a_predictor_is_trained_and_prefetches(moex, trace, tmp_path):
    file, costs = tmp_path / "p.safetensors", tmp_path / "costs.json"
    args = ("--predictor-steps=3", "--predictor-last=2")
    text = moex("place", trace, f"--fit-predictor={file}", *args)
    assert text.splitlines()[-1].startswith(f"{file}: ")
    assert "popular" in text
    assert Predictor.read(file).about.last == 2
    Costs(device=0.1, move=0.2, layer=1).save(costs)
    args = (f"--costs={costs}", f"--prefetch={file}", "--slots=2", "--json")
    found = json.loads(moex("place", trace, "--simulate", *args))
    rows = {row["policy"]: row for row in found["rows"]}
    assert rows["predicted"]["prefetched"] > 0
    assert rows["predicted"]["time_per_token"] > 0.3
    assert found["how"]["costs"]["move"] == 0.2


@pytest.mark.parametrize(
    "args, told",
    [
        (["--slots=4"], "--slots: needs --simulate."),
        (["--predictor-last=4", "--simulate"], "--predictor-last: needs --fit"),
        (
            ["--simulate", "--devices=2"],
            "--devices: is for placements; leave out --sim",
        ),
        (["--simulate", "--slots=9"], "--slots = '9': must be from 1 to 8"),
        (["--simulate", "--slots=0"], "--slots = '0': must be from 1 to 8"),
        (["--simulate", "--slots=,"], "--slots = ',': must be one or more"),
        (["--simulate", "--policy="], "--policy = '': must be one or more"),
        (["--simulate", "--seed=-1"], "--seed = -1: must be 0 or more"),
        (["--fit-predictor=p", "--seed=-1"], "seed = -1: must be 0 or more"),
        (["--fit-predictor=p", "--predictor-last=0"], "--predictor-last = 0: must"),
        (["--simulate", "--ahead=2"], "--ahead = 2: is for --prefetch=affinity"),
        (["--simulate", "--policy=lur"], "Did you mean 'lru'?"),
        (["--simulate", "--costs=none.json"], "none.json: cannot be read"),
        (["--simulate", "--batch=0"], "must be at least 1, not 0"),
        (["--simulate", "--fit-predictor=p"], "not allowed with argument"),
        (["--fit-predictor=no/where"], "in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(moex, trace, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    error = moex("place", trace, *args)
    assert told in error


COSTS = {
    "c.json: has no field 'device' and no 'cpu_row'": ({"move": 1}, ()),
    "c.json: device = -1.0: must be from 0 to 1e+12": ({"device": -1}, ()),
    "c.json: device = 1e+300: must be from 0": ({"device": 1e300, "move": 1}, ()),
    "--costs: has no 'move'; --scheduler=device needs it": ({"device": 1}, ()),
    "--costs: has no 'cpu_row'; --scheduler=static needs it": (
        {"device": 1, "move": 1},
        ("--scheduler=static",),
    ),
    "--costs: has no 'move'; --scheduler=hss needs it": (
        {"device": 1},
        ("--scheduler=hss",),
    ),
    "--costs: has no 'device'; --policy=belady needs it": (
        {"cpu_row": 1},
        ("--scheduler=hss", "--policy=lru,belady"),
    ),
    "--prefetch = 'logits': ": ({"device": 1, "move": 1}, ("--prefetch=logits",)),
    "bytes. It may also be one of none": (
        {"device": 1, "move": 1},
        ("--prefetch=c.json",),
    ),
}


@pytest.mark.parametrize("told", COSTS)
def test_costs_with_which_nobody_computes_are_one_line(
    moex, trace, tmp_path, monkeypatch, told
):
    monkeypatch.chdir(tmp_path)
    costs, args = COSTS[told]
    (tmp_path / "c.json").write_text(json.dumps(costs))
    assert told in moex("place", trace, "--simulate", "--costs=c.json", *args)


def test_costs_of_nothing_and_a_host_alone_are_replayed(moex, trace, tmp_path):
    file = tmp_path / "c.json"
    for costs, scheduler, policies in (
        ({"device": 0, "move": 0}, "device", 6),
        ({"cpu_row": 1}, "best", 5),  # Belady's bound needs a device
    ):
        file.write_text(json.dumps(costs))
        args = (f"--costs={file}", f"--scheduler={scheduler}", "--slots=2", "--json")
        rows = json.loads(moex("place", trace, "--simulate", *args))["rows"]
        assert len(rows) == policies
        assert all(0 <= row["stall"] <= 1 for row in rows)
