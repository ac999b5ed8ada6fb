"""`moex compare --ladder` on run directories that are written here by a law."""

import json

import pytest

from moex import cli
from moex.analysis.reading import FLOPS
from moex.runs.directory import RunDir
from tests import runs

TOKENS = 128  # of a step
STEPS = (4, 16, 64, 256)


def loss_of(steps, seed):
    return 2.0 + 1.5 * steps**-0.3 + 0.001 * (-1) ** seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four sizes of two seeds, and an idea that is 1.5 times as good for its FLOPs."""
    root = tmp_path_factory.mktemp("judging")
    base = runs.config(root, "model.vocab=257")

    def write(path, steps, seed, loss, slower=1.0):
        base.steps, base.seed, base.optim.warmup_steps = steps, seed, 0
        path.mkdir(parents=True)
        RunDir(path).save_config(base)
        spent = {"tokens_seen": steps * TOKENS, "perf/step_s": 0.5 * slower, FLOPS: 1e6}
        told = {"step": steps, "nll": loss, "bits_per_byte": loss}
        lines = [{"kind": "train"} | told | spent, {"kind": "eval"} | told]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "metrics.jsonl").write_text(text)

    for steps in STEPS:
        for seed in (0, 1):
            loss = loss_of(steps, seed)
            write(root / "ladder" / str(steps) / f"seed{seed}", steps, seed, loss)
    for steps in (10, 40):
        for seed in (0, 1):
            loss = loss_of(1.5 * steps, seed)
            path = root / "idea" / f"{steps}-{seed}"
            write(path, steps, seed, loss, slower=2.0)
    return root


def moex(capsys, *args):
    capsys.readouterr()
    cli.main(["compare", *map(str, args)])
    return capsys.readouterr().out


def ideas(folder):
    return sorted((folder / "idea").iterdir())


def test_an_idea_saves_compute_and_costs_time(folder, capsys):
    out = moex(capsys, *ideas(folder), f"--ladder={folder / 'ladder'}", "--json")
    found = json.loads(out)
    assert len(found["ideas"]) == 2
    for idea in found["ideas"]:
        assert idea["compute"]["value"] == pytest.approx(1.5, rel=0.02)
        assert idea["time"]["value"] == pytest.approx(0.75, rel=0.02)
        assert idea["compute"]["low"] > 1 > idea["time"]["high"]
        assert not idea["extrapolated"]
    assert found["decision"] == "fewer FLOPs for the same loss, but more time"
    assert found["laws"]["flops"]["alpha"]["value"] == pytest.approx(0.3, rel=0.05)


def test_a_file_of_compare_is_a_ladder_too(folder, tmp_path, capsys):
    every = sorted((folder / "ladder").glob("*/*"))
    file = tmp_path / "ladder.json"
    moex(capsys, *every, f"--out={file}")
    text = moex(capsys, *ideas(folder), f"--ladder={file}")
    assert text == moex(capsys, *ideas(folder), f"--ladder={folder / 'ladder'}")
    assert "fewer FLOPs for the same loss, but more time" in text
    assert "1.50 [1.4" in text


@pytest.mark.parametrize(
    ("ladder", "more", "told"),
    [
        ("nowhere", (), "must be a folder with runs, or a file"),
        ("ladder/4", (), "the ladder has 1."),
        ("broken.json", (), "broken.json, group 0: has no held-out loss"),
        ("ladder", ("--out=a.html",), "--out: --ladder prints a judgement"),
        ("ladder", ("--assert-equal",), "--ladder: --assert-equal says one line"),
    ],
)
def test_mistakes_are_one_line(folder, ladder, more, told, capsys):
    (folder / "broken.json").write_text('{"groups": [{"label": "a", "runs": []}]}')
    with pytest.raises(SystemExit) as stop:
        moex(capsys, *ideas(folder), f"--ladder={folder / ladder}", *more)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
