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
        (["--simulate", "--policy=lur"], "Did you mean 'lru'?"),
        (["--simulate", "--costs=none.json"], "none.json: cannot be read"),
        (["--simulate", "--batch=0"], "must be at least 1, not 0"),
        (["--simulate", "--fit-predictor=p"], "not allowed with argument"),
        (["--fit-predictor=no/where"], "in a folder that exists"),
    ],
)
def test_mistakes_are_one_line(moex, trace, args, told):
    error = moex("place", trace, *args)
    assert told in error
