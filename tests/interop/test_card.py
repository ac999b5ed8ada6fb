"""The README.md of an export: what the run knows, and no path of this machine."""

import dataclasses
import json

import pytest

from moex.interop.card import CARD, model_card
from moex.interop.export import export_hf
from moex.runs.open import load_run
from moex.train.job import make_job
from tests import runs
from tests.helpers import built
from tests.interop.folders import SAY, import_fixture

LINES = [
    {"kind": "train", "step": 3, "loss": 5.0, "tokens_seen": 300},
    {"kind": "train", "step": 4, "loss": 5.0, "tokens_seen": 400},
    {"kind": "eval", "step": 2, "nll": 6.0, "tokens": 50},
    {"kind": "eval", "step": 4, "nll": 5.25, "bits_per_byte": 7.5, "tokens": 1050},
    {"kind": "eval", "step": 8, "nll": 4.0, "tokens": 1050},  # after the checkpoint
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run without training, at step 0."""
    folder = tmp_path_factory.mktemp("card")
    bias = "model.layers[1].pattern[0].router.bias_rate=0.0"
    cfg = runs.config(folder, "model.attention.qk_norm=True", bias)
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        runs.write(job, {"params": params, "state": state}, folder / "run")
        return load_run(folder / "run")


def test_the_card_of_a_run_says_what_it_learned(run, tmp_path):
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    run.folder.metrics.write_text(text, encoding="utf-8")
    card = model_card("mine", dataclasses.replace(run, step=4), {"model_type": "x"})
    head, title, *_ = card.split("\n\n")
    assert head.splitlines()[-3:] == ["- moex", "- mixture-of-experts", "---"]
    assert title == "# mine"
    for line in (
        "| training | 4 steps of 8 |",
        "| tokens seen | 400 |",
        "| data | corpus |",
        "| batches | 4 sequences of 32 tokens |",
        "| layers | 2 of width 32 |",
        "| vocabulary | 257 tokens |",
        "Score: held out at step 4: 5.2500 nats per token, 7.5000 bits per byte "
        "(1,050 tokens).",
        "experts: Glu",
        "hidden = 32",
    ):
        assert line in map(str.strip, card.splitlines()), line
    assert str(run.folder) not in card and "/" not in card.replace("bits per", "")
    assert "imported" not in card and "license" not in head


def test_the_card_of_a_run_without_scores(run):
    run.folder.metrics.unlink(missing_ok=True)
    card = model_card("mine", dataclasses.replace(run, step=4), {"model_type": "x"})
    assert "Score: nothing was scored on held-out data." in card
    assert "tokens seen" not in card


@pytest.mark.thorough
def test_the_card_of_an_import_says_where_it_came_from(tmp_path):
    import_fixture("mixtral", tmp_path / "run")
    with runs.one_device():
        export_hf(tmp_path / "run", tmp_path / "folder", **SAY)
    card = (tmp_path / "folder" / CARD).read_text(encoding="utf-8")
    assert "It was imported from a checkpoint of `mixtral`." in card
    assert "| data |" not in card  # it has not learned any
    assert "# folder\n" in card and str(tmp_path) not in card
