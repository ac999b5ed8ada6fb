"""Several real processes on localhost: join, train, lose one, stop, go on with others.

`experiments/elastic` is the long form, with four processes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import local
from moex.config.base import ConfigError
from moex.runs import claim
from moex.train.job import make_job
from tests import recorded, runs

STEPS = 10
OVERRIDES = (
    *(f"steps={STEPS}", "checkpoint.every=3", "eval.every=0", "mesh.fsdp=2"),
    *("data.threads=0", "log.compressors=False"),
)
LAUNCH_S = 240  # for which any launch may last; a hang fails the test
# Sums over devices are added up in another order when they lie in other processes.
OTHER_ORDER = {"rtol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    runs.write_config(folder, dense=False)
    return folder


def train_args(folder, workdir, *overrides):
    return [
        *(f"--config={folder / 'tiny.py'}", f"--workdir={workdir}"),
        *(f"--config.{o}" for o in (*OVERRIDES, *overrides)),
    ]


def launch(folder, workdir, *options, disturb="-1 0 0", **variables):
    """Two recorded processes with two devices each; the completed launcher."""
    workdir.mkdir()
    command = [
        *(sys.executable, "-m", "launch.local", "--module=tests.recorded"),
        *("--processes=2", "--devices-per-process=2", *options, "--"),
        *train_args(folder, workdir),
    ]
    env = runs.environment(RECORD=str(workdir), DISTURB=disturb, **variables)
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LAUNCH_S
    )


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The run directory of two processes that were left alone."""
    done = launch(folder, folder / "undisturbed")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "joined 2 processes (by flags; process 0 at localhost:" in done.stdout
    assert "[Gloo]" not in done.stdout
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def four_devices():
    """One process with as many devices as the two have together."""
    four = jax.devices()[:4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: four)
        patch.setattr(jax, "device_count", lambda: 4)
        yield


@pytest.fixture(scope="module")
def expected_ids(folder, four_devices):
    """The ids of each batch in the order of one process."""
    batches = make_job(runs.config(folder, *OVERRIDES), log=str).batches(0)
    return [next(batches)["example_id"].tolist() for _ in range(STEPS)]


def final_nll(workdir):
    return runs.records(workdir, "eval")[-1]["nll"]


@pytest.mark.thorough
def test_two_processes_end_like_one(folder, undisturbed, four_devices, expected_ids):
    said = []
    runs.train(folder, folder / "alone", *OVERRIDES, said=said)
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("nll", "tokens"))):
        two, one = (runs.records(w, kind) for w in (undisturbed, folder / "alone"))
        assert [r["step"] for r in two] == [r["step"] for r in one]
        for name in names:
            values = [[record[name] for record in records] for records in (two, one)]
            np.testing.assert_allclose(*values, **OTHER_ORDER)
    # Saved by two processes and by one; both read by one on this mesh.
    step, arrays, data = runs.saved_state(folder, undisturbed, *OVERRIDES)
    alone = runs.saved_state(folder, folder / "alone", *OVERRIDES)
    assert (step, data) == (STEPS, alone[2])
    for two, one in zip(
        jax.tree.leaves(arrays["params"]),
        jax.tree.leaves(alone[1]["params"]),
        strict=True,
    ):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)
    assert recorded.read(undisturbed, 0, 2) == expected_ids


@pytest.mark.slow
def test_kill_9_of_one_and_a_damaged_checkpoint_then_a_restart(
    folder, undisturbed, expected_ids
):
    workdir = folder / "killed"
    # In step 10 the save of step 6 is complete, that of step 9 perhaps.
    killed = f"1 {signal.SIGKILL.value} 10"
    done = launch(folder, workdir, "--restarts=2", disturb=killed, DAMAGE="1")
    assert done.returncode == 0, done.stderr
    *two, others, restart = done.stderr.splitlines()
    first, error = sorted(two)  # the launcher and process 0 both see it at once
    assert error.startswith("moex: error: process 1 of 2 was lost (its connection")
    assert first == "launch: process 1 of 2 was ended by signal 9 (SIGKILL)"
    found = re.fullmatch(
        r"launch: the others after (.*) s: process 0 ended with exit code 1", others
    )
    assert float(found[1]) < 10  # much sooner than the heartbeat
    assert restart == "launch: restart 1 of 2"
    # Every figure of every step, bit for bit; nothing is logged twice.
    for kind in ("train", "eval"):
        assert runs.records(workdir, kind) == runs.records(undisturbed, kind)
    at = int(re.search(r"resuming .* after step (\d+)\n", done.stdout)[1])
    newest = at + 3
    assert newest in (6, 9)
    assert f"warning: checkpoint {newest} is damaged and set aside: che" in done.stdout
    assert (workdir / "corrupt" / str(newest)).is_dir()
    before, after = (recorded.read(workdir, attempt, 2) for attempt in (0, 1))
    assert len(before) >= 9
    assert before == expected_ids[: len(before)]
    assert before[:at] + after == expected_ids


@pytest.mark.slow
def test_sigterm_to_one_saves_on_all(folder, undisturbed, four_devices, expected_ids):
    workdir = folder / "stopped"
    done = launch(folder, workdir, disturb=f"1 {signal.SIGTERM.value} 4")
    assert done.returncode == 0, done.stderr
    at = int(re.search(rf"stopped at step (\d+) of {STEPS}: check", done.stdout)[1])
    assert 4 <= at < STEPS
    assert (workdir / "checkpoints" / str(at) / "meta").is_dir()
    # Goes on as one process, on another mesh.
    said = []
    other = (*OVERRIDES, "mesh.fsdp=1", "mesh.data=2", "mesh.expert=2")
    with pytest.MonkeyPatch.context() as patch:
        batches = runs.watch_batches(patch)
        runs.train(folder, workdir, *other, said=said)
    assert f"resuming {workdir} after step {at}" in said
    # Two processes and then one read each example that an undisturbed run reads, once.
    before = recorded.read(workdir, 0, 2)
    assert before == expected_ids[: len(before)]
    after = [batch["example_id"].tolist() for batch in batches]
    assert before[:at] + after == expected_ids
    assert len(after) == STEPS - at > 0
    np.testing.assert_allclose(final_nll(workdir), final_nll(undisturbed), rtol=1e-3)


def start_two(folder, workdir, *more, count=2):
    """`moex train` twice, each with its own overrides; (exit code, error) of each."""
    place = (
        f"--coordinator=localhost:{local.free_port()}",
        *(f"--num-processes={count}", "--join-timeout=60"),
    )
    env = runs.environment(JAX_NUM_CPU_DEVICES="2")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "moex.cli", "train"]
            + [*train_args(folder, workdir, *extra), *place, f"--process-id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i, extra in enumerate(more)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, e) for p, e in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_another_architecture_is_one_line_of_one_process(folder, undisturbed):
    wider = ["model.dim=64"]
    (code, error), (other, silent) = start_two(folder, undisturbed, wider, wider)
    assert (code, other) == (2, 2)
    lines = error.splitlines() + silent.splitlines()
    assert len(lines) == 1, lines
    line = lines[0]
    assert "holds a run with config.model.dim = 32, not 64" in line


@pytest.mark.slow
def test_a_file_that_cannot_be_read_ends_the_job_once(folder, undisturbed):
    workdir = folder / "cut"
    shutil.copytree(undisturbed, workdir)
    newest = workdir / "checkpoints" / str(STEPS)
    file = max((newest / "params").rglob("*"), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    (code, error), (other, silent) = start_two(folder, workdir, [], [])
    assert (code, other) == (1, 1)
    lines = error.splitlines() + silent.splitlines()
    assert len(lines) == 1, lines
    line = lines[0]
    assert f"checkpoint {STEPS} under {workdir}/checkpoints cannot be read: " in line
    assert line.endswith("it is set aside; the same command takes the one before it")
    assert (workdir / "corrupt" / str(STEPS)).is_dir()
    assert not newest.exists()


def test_a_folder_that_is_not_shared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(claim.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(claim, "SEEN_S", 0.0)
    (tmp_path / ".write-test-0").touch()
    claim.check_shared(tmp_path)
    (tmp_path / ".write-test-0").unlink()
    with pytest.raises(ConfigError, match="must be one folder that all hosts share"):
        claim.check_shared(tmp_path)


def test_signals_of_the_launcher_reach_its_processes(tmp_path):
    module = tmp_path / "sleeper.py"
    module.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(runs.ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local", "--processes=1", "--module=sleeper"]
        + ["--", "-"],
        stdout=subprocess.PIPE,
        text=True,
        env=runs.environment(PYTHONPATH=path),
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
