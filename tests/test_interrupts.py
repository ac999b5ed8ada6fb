"""Ctrl-C in every verb: one true line, exit code 130, and no half of a file."""

import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moex import interrupts
from tests import runs

STORED = pathlib.Path(__file__).parent / "stored_run"
LLAMA = pathlib.Path(__file__).parent / "interop" / "fixtures" / "llama"


@pytest.fixture(scope="module", autouse=True)
def ctrl_c():
    """A shell's `&` has Ctrl-C ignored, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*command, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=runs.environment(),
        **options,
    )


def test_what_is_said_of_an_output(tmp_path):
    file = tmp_path / "trace.parquet"
    told = interrupts.outcome(file, "")
    assert told() == f"{file} was not written"
    partial = tmp_path / "trace.parquet.partial"
    partial.touch()
    (tmp_path / "another.partial").touch()
    assert told() == f"{file} was not written; {partial} can be removed"
    partial.rename(file)
    assert told() == f"{file} was written"
    assert interrupts.outcome(file, "")() == f"{file} was not written"  # it was there
    assert interrupts.outcome(None, "nothing was written")() == "nothing was written"


def test_what_is_said_of_a_new_folder(tmp_path):
    empty = tmp_path / "run"
    empty.mkdir()
    told = interrupts.outcome(empty, "")
    made = tmp_path / ".run.new"
    made.mkdir()
    assert told() == f"{empty} was not written; {made} can be removed"
    made.replace(empty)
    assert told() == f"{empty} was written"


# A verb that keeps the main thread inside C, as a compiler does.
INSIDE_C = """
import hashlib
import threading
from moex import cli
from moex.commands import params

def command(self, args, config_args):
    threading.Timer(1, print, ["begun"], {"flush": True}).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

params.Command.run = command
cli.main()
"""


def test_a_second_ctrl_c_ends_at_once_what_a_library_does():
    process = start("-c", INSIDE_C, "params")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    assert first == "interrupt: what runs now has to end first (again: leave at once)\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "moex: error: left at once; nothing was written\n"


# `moex`, whose traces go on for ever.
ENDLESS = """
from moex import cli
from moex.runs.program import Evaluated

once = Evaluated.eval_batches

def again(self, limit, doing):
    while True:
        yield from once(self, limit, doing)
        print("traced", flush=True)

Evaluated.eval_batches = again
cli.main()
"""


@pytest.mark.thorough
def test_an_interrupted_trace_leaves_no_file_and_says_so(tmp_path):
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    process = start("-c", ENDLESS, "trace", "run", "--out=t.parquet", cwd=tmp_path)
    assert process.stdout.readline() == "traced\n", process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    *_, last = err.splitlines()
    assert last == "moex: error: interrupted; t.parquet was not written"
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*t.parquet*"))


OUTPUT = {
    "trace": "t.parquet",
    "convert": "new",
    "import-hf": "new",
    "report": "r.html",
}
COMMANDS = {
    "train": ("train", "--config=run", "--workdir=run", "--config.steps=2000"),
    "eval": ("eval", "run"),
    "trace": ("trace", "run", "--out=t.parquet"),
    "data": ("data", "prepare", "--config=run"),
    "convert": ("convert", "run", "--to=latent", "--group=2", "--workdir=new"),
    "import-hf": ("import-hf", LLAMA, "--out=new"),
    "report": ("report", "run", "--out=r.html"),
    "generate": ("generate", "run", "--prompt=a", "--max-new-tokens=32"),
}

MOMENTS = 7


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMMANDS)
def test_ctrl_c_at_any_moment_ends_with_one_true_line(verb, tmp_path):
    """Each moment is later than the one before, up to the end of the command."""
    rng, took = random.Random(verb), 20.0
    for part in range(MOMENTS):
        folder = tmp_path / str(part)
        shutil.copytree(STORED, folder)
        began = time.monotonic()
        process = start("-m", "moex", *COMMANDS[verb], cwd=folder)
        time.sleep((part + rng.random()) / MOMENTS * took)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
        code = process.returncode
        if code == 0:  # it came to its end before: look at earlier moments
            took = 0.8 * (time.monotonic() - began)
            continue
        # While Python itself starts or ends, the signal ends it without a word.
        assert code in (130, -signal.SIGINT), err
        if code < 0 or ("KeyboardInterrupt" in err and "moex/" not in err):
            continue
        last = err.strip().splitlines()[-1]
        assert "Traceback" not in err and "Fatal" not in err, err
        said = f"{last}\n{out}"
        if verb == "train" and "checkpoint saved" in out:
            step = out.rpartition("stopped at step ")[2].split()[0]
            assert (folder / "run" / "checkpoints" / step).is_dir()
            continue
        assert last.startswith("moex: error: interrupted; "), said
        last = last.replace("nothing was written", "it was not written")
        if verb in OUTPUT:
            written = (folder / OUTPUT[verb]).exists()
            assert ("was not written" in last) != written, said
            assert "can be removed" not in last
        names = {path.name for path in folder.iterdir()}
        assert names <= {"run", "corpus.txt", OUTPUT.get(verb)}, said
