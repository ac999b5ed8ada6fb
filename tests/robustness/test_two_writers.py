"""Two processes on one run directory: one trains, one is refused, nothing is lost.

On one machine, and on two that share the folder but not the locks of their systems.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments.crash.kill9 import step_of
from moex.runs.open import load_run
from moex.train import loop
from tests import runs
from tests.robustness.attacks import ERROR, check_refused, moex
from tests.robustness.test_checkpoints import steps_of

STEPS = 60
OVERRIDES = (f"steps={STEPS}", "checkpoint.every=20", "eval.every=30", "log.every=1")
# Another machine: its locks are not ours, nor its name, its processes or its start.
HOST = """
import errno, fcntl, os, pathlib, platform, sys
def flock(*args):
    raise OSError(errno.ENOLCK, "no locks available")
fcntl.flock = flock
platform.node = lambda: {name!r}
readlink, read_text = os.readlink, pathlib.Path.read_text
os.readlink = lambda p, *a, **k: {name!r} if "/ns/" in str(p) else readlink(p, *a, **k)
def text(self, *args, **kwargs):
    return {name!r} if self.name == "boot_id" else read_text(self, *args, **kwargs)
pathlib.Path.read_text = text
from moex.cli import main
main(sys.argv[1:])
"""


def train(folder, workdir, host=None, *more):
    """A process that trains in `workdir`, on this machine or on one of a name."""
    args = [f"--config={folder / 'tiny.py'}", f"--workdir={workdir}"]
    args += [f"--config.{o}" for o in (*OVERRIDES, *more)]
    code = ["-m", "moex.cli"] if host is None else ["-c", HOST.format(name=host)]
    return subprocess.Popen(
        [sys.executable, *code, "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=runs.environment(),
    )


def wait_for(process, step):
    for line in process.stdout:
        if (step_of(line) or 0) >= step:
            return
    raise AssertionError(process.communicate())


def check_whole(workdir, steps=STEPS):
    """Check that every step is logged once and that the checkpoints are intact."""
    assert [r["step"] for r in runs.records(workdir)] == list(range(1, steps + 1))
    for step in steps_of(workdir):
        assert load_run(workdir, step=step).step == step
    assert steps_of(workdir)[-1] == steps


def check_was_refused(process, out_err):
    out, err = out_err
    assert process.returncode == 2, out + err
    lines = [line for line in err.splitlines() if line.startswith(ERROR)]
    assert len(lines) == 1 and "--workdir" in lines[0] and "Traceback" not in err, err
    assert "since" in lines[0], "the line must say who writes, and since when"


HOSTS = [(None, None), ("host-a", "host-b"), (None, "host-b"), ("host-a", None)]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), HOSTS)
def test_the_second_of_two_is_refused(folder, tmp_path, first, second):
    a = train(folder, tmp_path / "run", first, "steps=1000000")
    try:
        wait_for(a, 2)
        b = train(folder, tmp_path / "run", second, f"steps={STEPS}")
        check_was_refused(b, b.communicate(timeout=300))
        a.send_signal(signal.SIGTERM)
        out, err = a.communicate(timeout=300)
        assert a.returncode == 0, out + err
    finally:
        a.kill()
    check_whole(tmp_path / "run", steps=steps_of(tmp_path / "run")[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), HOSTS[:2])
def test_of_two_that_start_at_once_one_trains(folder, tmp_path, first, second):
    both = [train(folder, tmp_path / "run", host) for host in (first, second)]
    told = [p.communicate(timeout=600) for p in both]
    codes = [p.returncode for p in both]
    assert sorted(codes) == [0, 2], told
    check_was_refused(*max(zip(both, told, strict=True), key=lambda p: p[0].returncode))
    check_whole(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("host", [None, "host-a"])
def test_a_killed_writer_does_not_stand_in_the_way(folder, tmp_path, host):
    a = train(folder, tmp_path / "run", host)
    wait_for(a, 2)
    a.kill()
    a.communicate()
    b = train(folder, tmp_path / "run", host)
    out, err = b.communicate(timeout=300)
    assert b.returncode == 0, out + err
    check_whole(tmp_path / "run")


@pytest.mark.thorough
def test_a_second_command_inside_a_first_is_refused(folder, run, monkeypatch):
    args = ("train", f"--config={folder / 'tiny.py'}", f"--workdir={run}")
    inner = []

    def stand(self):
        inner.append(moex(*args, "--config.steps=9"))
        return {"step": self.step}

    monkeypatch.setattr(loop.Run, "loop", stand)
    log = (run / "metrics.jsonl").read_bytes()
    assert moex(*args).code == 0
    check_refused(*inner, "--workdir")
    link = run.parent / "link"
    os.symlink(run, link)
    outcome = moex("train", args[1], f"--workdir={link}")
    assert outcome.code == 0, "the lock was not given back"
    check_refused(inner[1], "--workdir")
    assert (run / "metrics.jsonl").read_bytes() == log
    shutil.rmtree(run)
