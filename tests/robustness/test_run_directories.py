"""Run directories with something missing, broken or in the way, and every verb on them.

A verb refuses in one line, or does what it does on the run as it was. Verbs that only
read change nothing.
"""

import functools
import itertools
import json
import os
import shutil

import pytest

from tests import runs
from tests.robustness.attacks import (
    check_no_traceback,
    check_refused,
    moex,
    snapshot,
    some,
)
from tests.robustness.test_checkpoints import check_same, resume, steps_of, truth

__all__ = ["truth"]  # a fixture
FILES = (
    *("config.json", "metrics.jsonl", "routing.jsonl", "environment.json"),
    "tokenizer/moex_tokenizer.json",
)


def gone(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def junk(path):
    path.write_bytes(bytes(range(256)) * 4)


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def deep(path):
    path.write_text("[" * 100_000 + "\n")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def two_gigabytes(path):
    os.truncate(path, 2 << 30)


WAYS = (gone, empty, junk, half, deep, a_folder, a_loop, two_gigabytes)


def on(way, file):
    return lambda run: way(run / file)


def instead(name, make):
    """Something else in the place of a folder."""

    def attack(run):
        shutil.rmtree(run / name)
        make(run / name)

    return attack


def beside(name, make=os.mkdir):
    return lambda run: make(run / name)


def tokenizer(**fields):
    """Other fields of the saved tokenizer; `...` removes one."""

    def attack(run):
        file = run / "tokenizer/moex_tokenizer.json"
        data = json.loads(file.read_text()) | fields
        kept = {name: value for name, value in data.items() if value is not ...}
        file.write_text(json.dumps(kept))

    return attack


CASES = {f"{file}-{way.__name__}": on(way, file) for file in FILES for way in WAYS}
CASES |= {
    **{
        f"tokenizer-{name}-{value}": tokenizer(**{name: value})
        for name, values in {
            "kind": ("magic", None, 7, ...),
            "doc_id": (32, -1, "256", 4_000_000_000, None, ...),
            "begin_id": (32, -1, "256", 257, None, ...),
            "prefix_id": (32, 1.5, ...),
            "vocab_size": (300, 10**12, "257", ...),
            "fingerprint": ("0" * 64, None, ...),
        }.items()
        for value in values
    },
    "tokenizer-gone": lambda run: shutil.rmtree(run / "tokenizer"),
    "tokenizer-a-file": instead("tokenizer", lambda p: p.write_text("x")),
    "tokenizer-empty": instead("tokenizer", os.mkdir),
    "checkpoints-gone": lambda run: shutil.rmtree(run / "checkpoints"),
    "checkpoints-a-file": instead("checkpoints", lambda p: p.write_text("x")),
    "checkpoints-empty": instead("checkpoints", os.mkdir),
    "checkpoints-a-loop": instead("checkpoints", lambda p: p.symlink_to("checkpoints")),
    **{
        f"steps-beside-{name}": beside(f"checkpoints/{name}")
        for name in ("10", "x", "-1", "9x", "9" * 25, "10.orbax-checkpoint-tmp", "1e3")
    },
    "steps-beside-a-file": beside("checkpoints/12", lambda p: p.write_text("x")),
    "corrupt-a-file": beside("corrupt", lambda p: p.write_text("x")),
    "tb-a-file": lambda run: (run / "tb").write_text("x"),
    "page-a-folder": beside("report.html"),
    "metrics-tmp-a-folder": beside("metrics.jsonl.tmp"),
    "probe-a-folder": beside(".write-test-0"),
    "everything-gone": lambda run: [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in run.iterdir()
    ],
    "a-file": lambda run: (shutil.rmtree(run), run.write_text("x")),
    "nowhere": shutil.rmtree,
    "a-loop": lambda run: (shutil.rmtree(run), run.symlink_to(run.name)),
}
READERS = ("eval", "generate", "export-hf", "convert", "trace")
# The verbs take turns; the quick cases are for the one that compiles nothing.
PARAMETERS = some({name: name for name in CASES}, 5)
TURNS = dict(zip(CASES, itertools.cycle(READERS), strict=False)) | {
    str(p.id): "export-hf" for p in PARAMETERS if not p.marks
}


def command(verb, run):
    """A quick command of a verb that reads a run."""
    out = run.parent / verb
    return {
        "eval": ("eval", run, "--sequences=4", "--json"),
        "generate": ("generate", run, "--prompt=the ", "--max-new-tokens=4"),
        "export-hf": ("export-hf", run, f"--out={out}"),
        "convert": ("convert", run, "--to=latent", "--group=2", f"--workdir={out}"),
        "trace": ("trace", run, f"--out={out}", "--tokens=64"),
    }[verb]


@pytest.fixture(scope="module")
def printed(trained, tmp_path_factory):
    """`printed(verb)`: what it prints of the run as it is."""

    @functools.cache
    def printed(verb):
        run = shutil.copytree(trained, tmp_path_factory.mktemp(verb) / "run")
        outcome = moex(*command(verb, run))
        check_no_traceback(outcome)
        return told(outcome, run)

    return printed


def told(outcome, run) -> str:
    """What was printed beside warnings, whatever the folder is called."""
    lines = [*outcome.out.splitlines(), *outcome.errors]
    kept = "\n".join(line for line in lines if "warning: " not in line)
    return kept.replace(str(run.parent), "")


def test_there_are_many_cases():
    assert len(CASES) >= 40


@pytest.mark.thorough
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_damaged_run_directory(name, folder, run, truth, printed):
    CASES[name](run)
    before, steps = snapshot(run.parent), steps_of(run)
    verb = TURNS[name]
    outcome = moex(*command(verb, run))
    check_no_traceback(outcome)
    if told(outcome, run) != printed(verb):
        check_refused(outcome, codes=(1, 2))
    here = {n: h for n, h in snapshot(run.parent).items() if n.split("/")[0] != verb}
    assert here == before

    page = run.parent / "page.html"
    outcome = moex("report", run, f"--out={page}")
    check_no_traceback(outcome)
    if outcome.code != 0:
        check_refused(outcome, codes=(1, 2))
        assert not page.exists()
    assert json.dumps(snapshot(run)) == json.dumps(
        {n[4:]: h for n, h in before.items() if n.startswith("run/")}
    )

    kept = lines(run)
    outcome, found = resume(folder, run)
    check_no_traceback(outcome)
    if found is None:
        check_refused(outcome, codes=(1, 2))
        assert lines(run) == kept, "a refused command changed the log"
    elif found.step == 0:
        assert not steps and not kept, "a run began again in silence"
    else:
        check_same(found, truth)
        assert found.step == max(s for s in steps if s in truth)


def lines(run):
    """The training lines of the log that can be read."""
    try:
        return runs.records(run)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
