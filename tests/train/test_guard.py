"""Updates that would spoil the parameters: skipped, counted, and then the stop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.schedule import Schedule
from moex.runs.directory import RunDir
from moex.runs.record import read_about
from moex.train import loop, training
from moex.train.loop import TrainingStopped
from moex.train.step import SPIKE_WARMUP
from tests import runs


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guard")


@pytest.fixture
def train(folder):
    def train(workdir, *overrides):
        return runs.train(folder, workdir, *overrides)

    return train


def saved(workdir):
    """`(step, skipped_in_row)` of the checkpoints there."""
    return [
        (step, read_about(workdir / "checkpoints" / str(step), "")[0]["skipped_in_row"])
        for step in RunDir(workdir).saved_steps()
    ]


def test_bad_updates_are_skipped_and_counted(train, tmp_path, monkeypatch, capsys):
    """The batch of step 2 has no finite loss: the run is as if there was no step 2.

    What was due then is done after the next update that is taken.
    """
    runs.watch_batches(monkeypatch, poison={1})
    train(tmp_path, "steps=5", "eval.every=2")
    found = runs.records(tmp_path)
    assert [r["skipped"] for r in found] == [0, 1, 1, 1, 1]
    finite = [r["loss"] is not None and np.isfinite(r["loss"]) for r in found]
    assert finite == [True, False, True, True, True]
    assert (
        "warning: update 2 skipped (loss nan, gradient norm nan); 1 in a row, 1 in all"
        in capsys.readouterr().out
    )
    assert saved(tmp_path) == [(3, 0), (4, 0), (5, 0)]
    assert [r["step"] for r in runs.records(tmp_path, "eval")] == [3, 4, 5]


@pytest.mark.thorough
def test_the_last_step_after_a_skipped_one_ends_the_run(
    train, tmp_path, monkeypatch, capsys
):
    """What was due at step 4 would save step 5 without its final figures."""
    options = ("steps=5", "eval.every=4", "checkpoint.every=4")
    runs.watch_batches(monkeypatch, poison={3})
    train(tmp_path, *options)
    assert [r["step"] for r in runs.records(tmp_path, "eval")] == [5]
    train(tmp_path, *options)
    assert "it has taken 5 steps and config.steps is 5" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_run_stops_after_nan_limit(train, tmp_path, monkeypatch):
    runs.watch_batches(monkeypatch, poison=set(range(4, 8)))
    with pytest.raises(TrainingStopped) as stopped:
        train(tmp_path, "nan_limit=4")
    message = str(stopped.value)
    assert "4 updates in a row had a loss or gradient that is not finite" in message
    assert "config.nan_limit = 4" in message
    assert "stopped at step 8. Last good checkpoint: 2 (not 4: the " in message
    assert saved(tmp_path) == [(2, 0), (4, 0)]
    monkeypatch.undo()
    # The same command goes on; good batches bring it to the end.
    assert train(tmp_path, "nan_limit=4")["step"] == 8
    assert [r["skipped"] for r in runs.records(tmp_path)] == [0] * 8


def test_a_stop_among_skipped_updates_replaces_nothing(train, tmp_path, monkeypatch):
    """The step is saved, and the healthy checkpoint stays; the count goes on."""
    runs.watch_batches(monkeypatch, poison=set(range(3, 8)))
    look = loop.Run._look

    def looked(run, at, *args):
        look(run, at, *args)
        run.stop_asked |= at == 5

    monkeypatch.setattr(loop.Run, "_look", looked)
    result = train(tmp_path, "checkpoint.keep=1", "checkpoint.every=3")
    at = result["step"]
    assert result["stopped"] and at in (5, 6)
    assert saved(tmp_path) == [(3, 0), (at, at - 3)]
    monkeypatch.undo()
    runs.watch_batches(monkeypatch, poison=set(range(8)))
    with pytest.raises(TrainingStopped) as stopped:
        train(tmp_path, f"nan_limit={at - 2}", "checkpoint.keep=1")
    assert f"stopped at step {at + 1}. Last good checkpoint: 3." in str(stopped.value)


def test_a_state_that_is_not_finite_is_not_saved(train, tmp_path, monkeypatch, capsys):
    real = loop.all_finite
    finite = iter([True, False, False])
    monkeypatch.setattr(loop, "all_finite", lambda tree: next(finite) and real(tree))
    with pytest.raises(TrainingStopped, match="Last good checkpoint: 2"):
        train(tmp_path, "steps=5", "eval.every=0")
    assert saved(tmp_path) == [(2, 0)]
    assert "warning: step 4 is not saved: some parameters are not finite" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_rows_that_find_no_room_name_the_field(train, tmp_path, monkeypatch, capsys):
    """Two devices, each with room for the mean number of rows and none above it."""
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    mesh = ("mesh.expert=2", "mesh.exchange=all_to_all", "mesh.exchange_buffer=1.0")
    with pytest.raises(TrainingStopped, match="raise config.mesh.exchange_buffer"):
        train(tmp_path, "nan_limit=2", "eval.every=0", *mesh)
    found = re.findall(
        r"warning: update \d skipped \(loss [\d.]+, gradient norm [\d.]+, (\d+) rows "
        "found no room on their way to the experts: raise "
        r"config\.mesh\.exchange_buffer\); \d in a row, (\d+) in all",
        capsys.readouterr().out,
    )
    assert len(found) >= 2 and all(int(rows) > 0 for rows, _ in found)


@pytest.mark.slow
def test_parameters_that_a_schedule_unfreezes_are_trained(folder, tmp_path):
    """The router alone at first, whose norm is a fortieth: a few skips, then all."""
    cfg = runs.config(folder, "steps=72", "eval.every=0", "checkpoint.every=0")
    thaw = Schedule(points=((59, 0.0), (60, 1.0)))
    cfg.optim.lr_factors = (("*", thaw), ("router", 1.0))
    assert training.train(cfg, tmp_path, say=lambda line: None)["step"] == 72
    found = runs.records(tmp_path)
    norms = [r["grad_norm"] for r in found]
    assert min(norms[60:63]) > cfg.optim.spike_factor * np.mean(norms[:60])
    assert 3 <= found[-1]["skipped"] <= 6
    assert found[-1]["nll"] < found[59]["nll"] - 1


@pytest.mark.slow
def test_that_nothing_is_trained_is_said_once(folder, tmp_path, capsys):
    cfg = runs.config(folder, "steps=6", "eval.every=0", "checkpoint.every=0")
    cfg.optim.lr_factors = (("*", Schedule(points=((3, 0.0), (4, 1.0)))),)
    training.train(cfg, tmp_path, say=lambda line: None)
    assert [r["grad_norm"] == 0 for r in runs.records(tmp_path)] == [True] * 4 + [
        False
    ] * 2
    said = [s for s in capsys.readouterr().out.splitlines() if "gradients" in s]
    assert said == ["warning: all gradients are 0 at step 1: nothing is trained"]


@pytest.mark.slow
def test_a_learning_rate_that_spoils_the_model_still_stops_it(folder, tmp_path):
    """It jumps by a thousand; the loss is far above that of a guess, log 257."""
    cfg = runs.config(folder, "steps=90", "eval.every=0", "checkpoint.every=0")
    cfg.optim.lr_factors = (("*", Schedule(points=((59, 1.0), (60, 1e3)))),)
    with pytest.raises(TrainingStopped, match="10 updates in a row"):
        training.train(cfg, tmp_path, say=lambda line: None)
    assert runs.records(tmp_path)[-1]["nll"] > 2 * np.log(257)


def test_spikes_are_skipped(train, tmp_path, monkeypatch, capsys):
    """After 50 updates whose gradients had a norm of 0.01, a norm of 1 is a spike."""
    start = training._start

    def started(*args):
        run = start(*args)
        past = {"accepted": SPIKE_WARMUP, "grad_norm_mean": 0.01}
        for name, value in past.items():
            old = run.state["guard"][name]
            run.state["guard"][name] = jax.device_put(
                jnp.asarray(value, old.dtype), old.sharding
            )
        return run

    monkeypatch.setattr(training, "_start", started)
    with pytest.raises(TrainingStopped, match="spikes .* stopped at step 3. .*: none"):
        train(tmp_path, "nan_limit=3")
    first, second = runs.records(tmp_path)
    assert [first["skipped"], second["skipped"]] == [1, 2]
    assert np.isfinite(first["grad_norm"])
    assert first["grad_norm"] > 10 * 0.01
    assert "warning: update 2 skipped (loss 5." in capsys.readouterr().out
