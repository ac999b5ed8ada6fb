"""One writer of a run directory: over threads, processes, and two forced hosts."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from moex.config.base import ConfigError
from moex.runs import lock
from moex.runs.claim import new_run
from moex.runs.directory import RunDir
from moex.runs.lock import LockLostError, RunLock, held

FILE = "run.lock"
ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import pathlib, sys, time
from moex.runs import lock
from moex.runs.directory import RunDir
folder, host, beat = sys.argv[1:]
if host:  # as on a machine whose locks of the system nobody else sees
    here = lock._here
    lock._here = lambda *a: here(*a) | {"host": host, "locks": None, "pids": host}
    lock._flock = lambda folder: None
lock.BEAT_S = float(beat)
with lock.held(RunDir(folder), "--workdir=x"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of `tmp_path`; ended after the test."""
    started = []

    def start(host="", beat=0.1):
        command = [sys.executable, "-c", HOLDER, str(tmp_path), host, str(beat)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment
            )
        )
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def other_host(monkeypatch):
    """This process is on a machine of its own, and time goes fast."""
    here = lock._here
    monkeypatch.setattr(
        lock, "_here", lambda *a: here(*a) | {"host": "b", "locks": None, "pids": "b"}
    )
    monkeypatch.setattr(lock, "_flock", lambda folder: None)
    for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 1.5), ("SETTLE_S", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def take(folder, said=None):
    """Take the lock and give it back; the lines that were said."""
    said = [] if said is None else said
    with held(RunDir(folder), "--workdir=runs/a", said.append):
        assert json.loads((folder / FILE).read_text())["pid"] == os.getpid()
    return said


def test_a_lock_is_given_back_and_leaves_nothing(tmp_path):
    assert take(tmp_path) == [] and take(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_process_that_lives_is_named(tmp_path, holder):
    process = holder()
    with pytest.raises(ConfigError) as refused:
        take(tmp_path)
    record = json.loads((tmp_path / FILE).read_text())
    assert record["pid"] == process.pid
    assert str(refused.value).startswith(
        f"--workdir=runs/a: process {process.pid} on {record['host']} writes this run "
        f"since {record['since']}; "
    )
    assert process.poll() is None


def test_a_killed_process_does_not_stand_in_the_way(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    (line,) = take(tmp_path)
    assert f"process {process.pid} on " in line and "ended without a word" in line


@pytest.mark.slow
def test_nor_where_the_system_has_no_locks(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda folder: None)
    process = holder()
    with pytest.raises(ConfigError, match=f"process {process.pid} on "):
        take(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(take(tmp_path)) == 1


@pytest.mark.thorough
def test_the_number_of_a_dead_process_may_be_that_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda folder: None)
    record = lock._here(os.open(tmp_path, os.O_RDONLY), None) | {"born": "before"}
    (tmp_path / FILE).write_text(json.dumps(record | {"token": "another"}))
    assert len(take(tmp_path)) == 1


@pytest.mark.thorough
def test_a_process_on_another_host_is_seen_to_live(tmp_path, holder, other_host):
    process = holder(host="a")
    said = []
    with pytest.raises(ConfigError, match=f"process {process.pid} on a writes"):
        take(tmp_path, said)
    assert len(said) == 1 and "looking for 1.5 s whether it lives" in said[0]


@pytest.mark.thorough
def test_a_silent_process_on_another_host_is_dead(tmp_path, holder, other_host):
    process = holder(host="a")
    process.send_signal(signal.SIGKILL)
    said = take(tmp_path)
    assert len(said) == 2
    assert f"process {process.pid} on a ended without a word" in said[1]


def test_who_was_taken_for_dead_stops(tmp_path, monkeypatch, other_host):
    first = RunLock(RunDir(tmp_path), "--workdir=runs/a")
    first.acquire()
    first._ended.set()  # as a process that is stopped: it shows no sign of life
    monkeypatch.setattr(lock, "_here", lambda *a: {"host": "c", "locks": 0, "pids": 0})
    said = []
    with held(RunDir(tmp_path), "--workdir=runs/a", said.append) as second:
        assert len(said) == 2
        with pytest.raises(LockLostError, match="process None on c|another process"):
            first.check()
        second.check()
        first.release()  # of what is not its own any more
        assert (tmp_path / FILE).exists()


def test_a_lock_that_somebody_deleted_is_put_back(tmp_path, other_host):
    with held(RunDir(tmp_path), "--workdir=runs/a") as mine:
        (tmp_path / FILE).unlink()
        for _ in range(100):
            if (tmp_path / FILE).exists():
                break
            threading.Event().wait(0.05)
        mine.check()
        assert (tmp_path / FILE).exists()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_at_once_one_gets_it(tmp_path, monkeypatch, other_host, links):
    def refuse(*names):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    got, start, end = [], threading.Barrier(8), threading.Event()

    def run():
        start.wait()
        try:
            with held(RunDir(tmp_path), "--workdir=runs/a", lambda line: None):
                got.append(1)
                end.wait()
        except ConfigError:
            got.append(0)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(400):
        if len(got) == 8:
            break
        threading.Event().wait(0.05)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0] * 7 + [1]


@pytest.mark.thorough
@pytest.mark.parametrize("text", ["", "\xff"])
def test_a_file_that_is_no_record_is_waited_for_once(tmp_path, other_host, text):
    (tmp_path / FILE).write_text(text, encoding="latin-1")
    said = take(tmp_path)
    assert "is of another process, on another machine" in said[0]


# A new run, of an import or a conversion.


def test_a_new_run_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), new_run(target, "--out=run") as made:
        (made.path / "half").mkdir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_run(target, "--out=run") as made:
        (made.path / "config.json").write_text("{}")
        assert not target.exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "config.json"]


def test_two_that_make_one_run(tmp_path):
    target = tmp_path / "run"
    with new_run(target, "--out=run") as made:
        (made.path / "mine").touch()
        refused = pytest.raises(ConfigError, match="--out=run: process .* writes this")
        with refused, new_run(target, "--out=run"):
            pass
    assert [p.name for p in target.iterdir()] == ["mine"]


def test_a_run_that_came_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "run"
    refused = pytest.raises(ConfigError, match="--out=run: came into being meanwhile")
    with refused, new_run(target, "--out=run"):
        target.mkdir()
        (target / "theirs").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "theirs"]


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    made = tmp_path / ".run.new"
    (made / "half" / "more").mkdir(parents=True)
    (made / "file").touch()
    with new_run(tmp_path / "run", "--out=run"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["run"]
