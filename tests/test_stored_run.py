"""A run directory that version 0.2.0 wrote is opened, resumed and reported.

`tests/stored_run` was made by `moex train` on its corpus.txt: 3 steps, checkpoints of
step 2 (the best) and 3.
"""

import functools
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

import moex
from moex import cli
from moex.runs.directory import RunDir, given_config
from moex.runs.lines import read_metrics
from moex.runs.open import load_run
from moex.train import training
from tests import runs

STORED = pathlib.Path(__file__).parent / "stored_run"
NEXT_LOSS = 5.99739  # of step 4, as version 0.2.0 went on


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


READ: list[str] = []  # files named config.json that were opened to be read


@functools.cache
def watch_configs():
    """Note every config.json that Python opens; a hook cannot be removed."""

    def note(event, args):
        if event == "open" and str(args[0]).endswith("config.json"):
            READ.append(str(args[0]))

    sys.addaudithook(note)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run where it was trained; its config is read once by each test."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    watch_configs()
    READ.clear()
    yield RunDir("run")
    assert READ == ["run/config.json"]


def test_a_config_that_was_changed_is_not_that_of_the_run(run):
    first = run.config()
    first.steps, first.data.sources = 99, ()
    assert run.config().steps == 3
    assert run.config().data.sources
    assert RunDir.of(run) is run  # which has read its config


@pytest.mark.parametrize("step", [None, 2])
def test_the_stored_run_opens(run, step):
    opened = load_run(run, step=step)
    assert opened.step == (step or 3)
    assert opened.tokenizer.vocab_size == 257
    shapes = {leaf.shape for leaf in jax.tree.leaves(opened.params)}
    assert (257, 4) in shapes


@pytest.mark.thorough
def test_the_stored_run_scores_what_it_logged(run, capsys):
    cli.main(["eval", "run", "--json"])
    found = json.loads(capsys.readouterr().out)
    logged = read_metrics(run.metrics)["eval"][3]
    assert found["tokens"] == logged["tokens"]
    np.testing.assert_allclose(found["nll"], logged["nll"], rtol=1e-5)


def test_the_stored_run_is_traced(run, capsys):
    cli.main(["trace", "run", "--out=trace.parquet"])
    assert "run at step 3, 719 tokens, 1 routers" in capsys.readouterr().out


def test_the_stored_run_is_resumed(run):
    cfg, said = run.config(), []
    cfg.steps = 4
    training.train(cfg, run, say=said.append)
    assert "resuming run after step 3" in said
    assert not any("data" in line and "changed" in line for line in said)
    lines = read_metrics(run.metrics)["train"]
    assert list(lines) == [1, 2, 3, 4]
    np.testing.assert_allclose(lines[4]["loss"], NEXT_LOSS, rtol=1e-4)
    assert lines[4]["tokens_seen"] == 4 * 4 * 16
    assert run.saved_steps()[-1] == 4
    starts = json.loads(run.environment.read_text())
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[1]["moex"] == moex.__version__


def test_the_stored_run_is_reported(run, capsys):
    cli.main(["report", "run"])
    assert "report: run/report.html" in capsys.readouterr().out
    page = run.report.read_text()
    assert "held out" in page and "TopK" in page


SCRIPTS = {  # what imports and conversions wrote beside config.json
    "0.2": 'from moex.train.job import load_config\n\n\ndef get_config(arg=""):\n'
    "    return load_config(pathlib.Path(__file__).parent)\n",
    "0.3": 'from moex.runs.directory import RunDir\n\n\ndef get_config(arg=""):\n'
    "    return RunDir(pathlib.Path(__file__).parent).config()\n",
}
THIS = "The config of this run: moex train --config=THIS_FILE --workdir=ITS_FOLDER."


@pytest.mark.parametrize("version", [None, *SCRIPTS])
def test_a_run_or_its_older_script_is_a_config(run, version):
    """The script is not run; the config is read once, as `run` checks."""
    name = run.path
    if version is not None:
        name /= "config.py"
        text = f'"""{THIS}"""\n\nimport pathlib\n\n{SCRIPTS[version]}'
        name.write_text(text + "\nraise RuntimeError\n")
    cfg = given_config([f"--config={name}", "--config.steps=9"])
    assert (cfg.steps, cfg.seq_len) == (9, 16)
