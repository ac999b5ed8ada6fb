"""Processes that end in the middle: killed, asked to stop, out of disk.

`experiments/crash/kill9.py` is the long form of the first test.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments.crash import kill9
from moex.runs.checkpoint import Checkpointer
from tests import runs

STEPS = 60
OVERRIDES = (f"steps={STEPS}", "checkpoint.every=5", "eval.every=20")
FILE_LIMIT_KB = 64
# The cache of programs lies under the same limit, and JAX warns if it cannot write it.
NO_NEW_PROGRAMS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3600"}
INTERRUPTED = "moex: error: interrupted; nothing was written"


@pytest.fixture(scope="module", autouse=True)
def ctrl_c():
    """A shell's `&` has Ctrl-C ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    runs.write_config(folder, dense=False)
    return folder


@pytest.fixture(scope="module")
def command(folder):
    """`command(workdir)`: the training command, as a list."""
    return lambda workdir: kill9.train_command(folder / "tiny.py", workdir, *OVERRIDES)


@pytest.fixture(scope="module")
def undisturbed(folder, command):
    """The log of a run that was left alone; its programs are kept for the others."""
    kill9.finish(command(folder / "undisturbed"), runs.environment())
    found = kill9.logged(folder / "undisturbed")
    assert [key for key in found if key[0] == "train"][-1] == ("train", STEPS)
    return found


def steps(workdir):
    reader = Checkpointer(workdir, read_only=True)
    try:
        return reader.steps()
    finally:
        reader.close()


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(1, marks=pytest.mark.thorough),
        pytest.param(8, marks=pytest.mark.slow),
    ],
)
def test_kill_9_at_random_moments(undisturbed, command, tmp_path, kills):
    made = kill9.kill_and_resume(
        command(tmp_path),
        runs.environment(),
        steps=STEPS,
        kills=kills,
        rng=random.Random(kills),
    )
    assert made[0]["hit"]
    assert kill9.logged(tmp_path) == undisturbed


@pytest.mark.thorough
def test_sigterm_then_a_full_disk_then_the_end(undisturbed, command, tmp_path):
    # SIGTERM: the step is saved and the exit code is 0.
    process = kill9.start(command(tmp_path), runs.environment())
    for line in process.stdout:
        if kill9.step_of(line) == 6:
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "checkpoint saved; the same command goes on from here" in out
    stopped_at = steps(tmp_path)[-1]
    assert f"stopped at step {stopped_at} of {STEPS}" in out
    assert 6 <= stopped_at < STEPS

    # No file may grow larger: the next save fails, and says what is left.
    limit = f'ulimit -f {FILE_LIMIT_KB * 1024 // 512} && exec "$@"'
    limited = ["sh", "-c", limit, "sh", *command(tmp_path)]
    process = kill9.start(limited, runs.environment(**NO_NEW_PROGRAMS))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    (line,) = err.strip().splitlines()  # and no traceback of Orbax's other writes
    assert line.startswith("moex: error: ")
    assert f"under {tmp_path / 'checkpoints'} failed: " in line
    assert os.strerror(27) in line  # EFBIG
    assert f"Last good checkpoint: step {stopped_at}." in line
    assert steps(tmp_path)[-1] == stopped_at

    # With room again the same command comes to the end of the undisturbed run.
    kill9.finish(command(tmp_path), runs.environment())
    assert kill9.logged(tmp_path) == undisturbed
    assert not (tmp_path / "corrupt").exists()


@pytest.mark.slow
def test_a_second_process_is_refused_and_ctrl_c_saves(undisturbed, command, tmp_path):
    first = kill9.start(command(tmp_path), runs.environment())
    for line in first.stdout:
        if kill9.step_of(line) == 3:
            break
    first.send_signal(signal.SIGSTOP)  # or it would come to its end meanwhile
    second = kill9.start(command(tmp_path), runs.environment())
    _, err = second.communicate(timeout=300)
    assert second.returncode == 2, err
    (line,) = err.strip().splitlines()
    assert f"error: --workdir={tmp_path}: process {first.pid} on " in line
    first.send_signal(signal.SIGINT)
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130, err
    assert err.strip() == "interrupt: saving, then leaving (again: leave at once)"
    assert f"stopped at step {steps(tmp_path)[-1]} of {STEPS}: checkpoint saved" in out
    assert not (tmp_path / "run.lock").exists()
    kill9.finish(command(tmp_path), runs.environment())
    assert kill9.logged(tmp_path) == undisturbed


@pytest.mark.slow
def test_distillation_goes_on_after_kill_9_and_ctrl_c(folder, tmp_path):
    teacher, env = tmp_path / "teacher", runs.environment()
    config = folder / "tiny.py"
    kill9.finish(kill9.train_command(config, teacher, "steps=10", "seed=1"), env)
    task = f"task=Distillation(teacher={str(teacher)!r}, weight=1.0)"

    def command(name):
        return kill9.train_command(config, tmp_path / name, *OVERRIDES, task)

    kill9.finish(command("undisturbed"), env)
    expected = kill9.logged(tmp_path / "undisturbed")
    assert expected["train", STEPS]["loss/distillation"] > 0
    rng = random.Random(3)
    made = kill9.kill_and_resume(command("killed"), env, steps=STEPS, kills=3, rng=rng)
    assert made[0]["hit"]
    assert kill9.logged(tmp_path / "killed") == expected
    process = kill9.start(command("stopped"), env)
    for line in process.stdout:
        if kill9.step_of(line) == 7:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    stopped_at = steps(tmp_path / "stopped")[-1]
    assert f"stopped at step {stopped_at} of {STEPS}: checkpoint saved" in out
    kill9.finish(command("stopped"), env)
    assert kill9.logged(tmp_path / "stopped") == expected


@pytest.mark.thorough
def test_ctrl_c_before_there_is_a_checkpoint_says_so(undisturbed, command, tmp_path):
    process = kill9.start(command(tmp_path), runs.environment())
    while not (tmp_path / "run.lock").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip() == (
        "moex: error: interrupted; no checkpoint was saved yet: the same command "
        "begins at step 0"
    )


# A command that lasts, with Ctrl-C in a callback of the garbage collector.
IN_CALLBACK = """
import gc, os, signal, sys
from moex import cli
from moex.commands import params

def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    os.kill(os.getpid(), signal.SIGINT)

def command(self, args, config_args):
    gc.callbacks.append(interrupt)
    gc.collect()
    for _ in range(10**9):
        pass

params.Command.run = command
cli.main()
"""


def test_ctrl_c_in_a_callback_is_not_lost():
    done = subprocess.run(
        [sys.executable, "-c", IN_CALLBACK, "params"],
        capture_output=True,
        text=True,
        env=runs.environment(),
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (
        130,
        "moex: error: interrupted; nothing was written\n",
    )


@pytest.mark.thorough
def test_a_reader_that_has_enough_is_no_error():
    shell = f"{sys.executable} -m moex.cli config --config=configs/quickstart.py | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        capture_output=True,
        text=True,
        env=runs.environment(),
        cwd=runs.ROOT,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# `moex`, whose evaluations score their data again and again.
ENDLESS = """
from moex import cli
from moex.runs.program import Evaluated

once = Evaluated.eval_batches

def again(self, limit, doing=""):
    while True:
        print("scoring", flush=True)
        yield from once(self, limit)

Evaluated.eval_batches = again
cli.main()
"""


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_is_one_line(undisturbed, folder):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "eval", folder / "undisturbed"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=runs.environment(),
    )
    for _ in range(3):  # at the third the model is compiled and computes
        while process.stdout.readline().strip() != "scoring":
            assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (
        130,
        "moex: error: interrupted; nothing was written\n",
    )
