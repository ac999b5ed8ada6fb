"""The command, as tests of conversions call it."""

import dataclasses

import pytest

from moex import cli
from moex.runs import checkpoint
from moex.train.job import make_job
from tests import runs
from tests.helpers import built


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: what it prints; a mistake gives its line."""

    def moex(*args):
        capsys.readouterr()
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            assert stop.code == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            return err
        return capsys.readouterr().out

    return moex


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory):
    """A run of two equal MoE layers with 4 experts and random weights."""
    folder = tmp_path_factory.mktemp("prune")
    cfg = runs.config(folder, "checkpoint.every=0", "eval.every=0")
    layer = dataclasses.replace(cfg.model.layers[1], repeat=2)
    cfg.model = dataclasses.replace(cfg.model, layers=(layer,))
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        patch = pytest.MonkeyPatch()
        patch.setattr(checkpoint, "PIECE_BYTES", 1)  # as if the experts were large
        runs.write(job, {"params": params, "state": state}, folder / "run")
        patch.undo()
        yield folder / "run"
