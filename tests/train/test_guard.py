"""Updates that would spoil the parameters: skipped, counted, and then the stop."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.train import loop
from moex.train.checkpoint import Checkpointer
from moex.train.loop import TrainingStopped
from moex.train.step import SPIKE_WARMUP
from tests import runs


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.shared_programs(), runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guard")


@pytest.fixture
def train(folder):
    def train(workdir, *overrides):
        return runs.train(folder, workdir, *overrides)

    return train


def test_bad_updates_are_skipped_and_counted(train, tmp_path, monkeypatch, capsys):
    """The batch of step 3 has no finite loss: the run is as if there was no step 3."""
    runs.watch_batches(monkeypatch, poison={2})
    train(tmp_path, "steps=4", "eval.every=0")
    found = runs.records(tmp_path)
    assert [r["skipped"] for r in found] == [0, 0, 1, 1]
    assert [np.isfinite(r["loss"]) for r in found] == [True, True, False, True]
    assert (
        "warning: update 3 skipped (loss nan, gradient norm nan); 1 in a row, 1 in all"
        in capsys.readouterr().out
    )
    monkeypatch.undo()
    watch = Checkpointer(tmp_path, read_only=True)
    assert watch.steps() == [2, 4]
    watch.close()


def test_the_run_stops_after_nan_limit(train, folder, tmp_path, monkeypatch):
    runs.watch_batches(monkeypatch, poison=set(range(3, 8)))
    with pytest.raises(TrainingStopped) as stopped:
        train(tmp_path, "nan_limit=4")
    message = str(stopped.value)
    assert "4 updates in a row had a loss or gradient that is not finite" in message
    assert "config.nan_limit = 4" in message
    assert "stopped at step 7. Last good checkpoint: 6." in message
    # Checkpoints of steps 4 and 6 hold what step 3 made.
    four, six = (runs.saved_state(folder, tmp_path, step=s) for s in (4, 6))
    for name in ("params", "opt"):
        jax.tree.map(np.testing.assert_array_equal, four[1][name], six[1][name])
    assert [s[1]["guard"]["skipped_in_row"] for s in (four, six)] == [1, 3]
    monkeypatch.undo()
    # The same command goes on; good batches bring it to the end.
    assert train(tmp_path, "nan_limit=4")["step"] == 8
    assert [r["skipped"] for r in runs.records(tmp_path)] == [0, 0, 0, 1, 2, 3, 3, 3]


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


def test_spikes_are_skipped(train, tmp_path, monkeypatch, capsys):
    """After 50 updates whose gradients had a norm of 0.01, a norm of 1 is a spike."""
    start = loop._start

    def started(*args):
        run = start(*args)
        past = {"accepted": SPIKE_WARMUP, "grad_norm_mean": 0.01}
        for name, value in past.items():
            old = run.state["guard"][name]
            run.state["guard"][name] = jax.device_put(
                jnp.asarray(value, old.dtype), old.sharding
            )
        return run

    monkeypatch.setattr(loop, "_start", started)
    with pytest.raises(TrainingStopped, match="spikes .* stopped at step 3. .*: 2"):
        train(tmp_path, "nan_limit=3")
    first, second = runs.records(tmp_path)
    assert [first["skipped"], second["skipped"]] == [1, 2]
    assert np.isfinite(first["grad_norm"])
    assert first["grad_norm"] > 10 * 0.01
    assert "warning: update 2 skipped (loss 5." in capsys.readouterr().out
