"""Checkpoints that were damaged, edited or mixed up: noticed, or nothing changed.

An attack changes files of a finished run. The run is then resumed as `moex train` does
it, but for the training. It must be what was saved at some step, bit for bit: arrays,
position in the data, final figures and ranking; and if the step is not the newest one
that was left alone, a warning must say so.
"""

import dataclasses
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from moex.runs.open import load_run
from moex.train import loop
from tests import runs
from tests.robustness.attacks import (
    Outcome,
    at,
    attempt,
    check_no_traceback,
    check_refused,
    moex,
    snapshot,
    some,
)
from tests.robustness.conftest import OVERRIDES

NEWEST, BEFORE, OLDEST = 8, 6, 4
ITEMS = ("params", "opt", "state", "data", "meta", "metrics")


# Attacks on bytes: (kind, item, number of the file in it).


def files_of(folder) -> list[pathlib.Path]:
    """All files under a folder, in an order that does not depend on random names."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    return sorted(found, key=lambda p: (p.parent.name, p.stat().st_size, p.name))


def flip(file, rng, others):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file, rng, others):
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def empty(file, rng, others):
    file.write_bytes(b"")


def zero(file, rng, others):
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + 512)
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)


def append(file, rng, others):
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def delete(file, rng, others):
    file.unlink()


def swap(file, rng, others):
    """With another file of the step."""
    other = rng.choice([o for o in others if o != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def folder_instead(file, rng, others):
    file.unlink()
    file.mkdir()


def older(file, rng, others):
    """The same file of an older step, as near as its name and place tell."""
    step = next(p for p in file.parents if p.name == str(NEWEST))
    twin = step.parent / str(OLDEST) / file.relative_to(step)
    if not twin.is_file():  # the names of array files are random
        near = [p for p in twin.parent.iterdir() if p.is_file()]
        twin = min(near, key=lambda p: abs(p.stat().st_size - file.stat().st_size))
    file.write_bytes(twin.read_bytes())


BYTES = (flip, truncate, empty, zero, append, delete, swap, folder_instead, older)
NUMBERS = {"params": 9, "opt": 9, "state": 6, "data": 2, "meta": 2, "metrics": 2}


def on_bytes(kind, item, number):
    def attack(run, another):
        own = run / "checkpoints" / str(NEWEST) / item
        files = files_of(own)
        rng = random.Random(f"{kind.__name__} {item} {number}")
        kind(files[number % len(files)], rng, files_of(own.parent))

    return attack


# Attacks on JSON: (file, change).


def on_json(file, change):
    def attack(run, another):
        path = run / "checkpoints" / file
        data = json.loads(path.read_text())
        changed = change(data)
        text = changed if isinstance(changed, str) else json.dumps(changed)
        path.write_text(text)

    return attack


def field(*path, value):
    """As `at`, also in the `meta` of a checkpoint."""

    def change(data):
        # The figures of `meta` lie beside a digest of them.
        at(*path, value=value)(data.get("covered", data))
        return data

    return change


def first_checksum(item, value):
    def change(data):
        sums = data.get("covered", data)["checksums"][item]
        name = sorted(sums)[0]
        return field("checksums", item, name, value=value)(data)

    return change


WRONG = {
    **{"half": 16, "more": 400, "negative": -1, "null": None, "text": "32"},
    **{"list": [32], "float": 32.5, "true": True, "huge": 10**30, "gone": ...},
}
JUNK = {
    **{"not_json": "{", "nothing": "", "a_list": "[]", "null": "null"},
    **{"deep": "[" * 100_000, "empty": "{}"},
}
FINAL = {
    "better": {"eval_nll": 0.5, "eval_bits_per_byte": 0.7},
    **{"text": "good", "empty": {}, "null": None, "gone": ...},
}


def json_attacks() -> dict:
    found = {}
    data, meta = f"{NEWEST}/data/metadata", f"{NEWEST}/meta/metadata"
    metrics = f"{NEWEST}/metrics/metrics"
    for name, value in WRONG.items():
        found[f"data-sequences-{name}"] = on_json(data, field("sequences", value=value))
        found[f"meta-step-{name}"] = on_json(meta, field("step", value=value))
    for name, value in FINAL.items():
        found[f"meta-final-{name}"] = on_json(meta, field("final", value=value))
    for item in ("params", "opt", "state"):
        gone = field("checksums", item, value=...)
        found[f"meta-checksums-without-{item}"] = on_json(meta, gone)
        none = field("checksums", item, value={})
        found[f"meta-checksums-none-of-{item}"] = on_json(meta, none)
        for name, value in {"other": "0" * 16, "null": None, "gone": ...}.items():
            change = first_checksum(item, value)
            found[f"meta-checksum-of-{item}-{name}"] = on_json(meta, change)
    for name in ("checksums", "tokenizer", "model", "jax"):
        for what, value in {"gone": ..., "null": None, "text": "x"}.items():
            found[f"meta-{name}-{what}"] = on_json(meta, field(name, value=value))
    for name, value in {"best": 1e-6, "nan": float("nan"), "text": "x"}.items():
        # Of an older step, which was scored too: it would be kept as the best one.
        file = f"{OLDEST}/metrics/metrics"
        found[f"metrics-older-{name}"] = on_json(file, field("nll", value=value))
        found[f"metrics-{name}"] = on_json(metrics, field("nll", value=value))
    found["meta-without-digest"] = on_json(meta, lambda data: data["covered"])
    for name, value in {"other": "0" * 64, "null": None, "number": 7}.items():
        change = lambda data, value=value: data | {"digest": value}  # noqa: E731
        found[f"meta-digest-{name}"] = on_json(meta, change)
    files = {"data": data, "meta": meta, "metrics": metrics}
    files |= {"root": f"{NEWEST}/_CHECKPOINT_METADATA"}
    files |= {f"{item}_metadata": f"{NEWEST}/{item}/_METADATA" for item in ITEMS[:3]}
    files |= {f"{item}_sharding": f"{NEWEST}/{item}/_sharding" for item in ITEMS[:3]}
    for name, file in files.items():
        for what, text in JUNK.items():
            found[f"{name}-{what}"] = on_json(file, lambda data, text=text: text)
    return found


# Attacks on folders.


def rename(old, new):
    def attack(run, another):
        steps = run / "checkpoints"
        (steps / str(old)).rename(steps / str(new))

    return attack


def exchange(a, b):
    def attack(run, another):
        steps = run / "checkpoints"
        (steps / str(a)).rename(steps / "aside")
        (steps / str(b)).rename(steps / str(a))
        (steps / "aside").rename(steps / str(b))

    return attack


def copy_step(old, new):
    def attack(run, another):
        shutil.copytree(run / f"checkpoints/{old}", run / f"checkpoints/{new}")

    return attack


def take(*items, step=NEWEST, of="another"):
    """Items of the same shapes, of another run or of an older step."""

    def attack(run, another):
        source = another if of == "another" else run
        old = source / f"checkpoints/{step if of == 'another' else OLDEST}"
        for item in items:
            target = run / f"checkpoints/{NEWEST}/{item}"
            shutil.rmtree(target)
            shutil.copytree(old / item, target)

    return attack


def remove(*names, step=NEWEST):
    def attack(run, another):
        for name in names:
            path = run / f"checkpoints/{step}/{name}"
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return attack


def all_steps(attack_one):
    def attack(run, another):
        for step in (run / "checkpoints").iterdir():
            attack_one(step)

    return attack


def file_instead(run, another):
    shutil.rmtree(run / f"checkpoints/{NEWEST}")
    (run / f"checkpoints/{NEWEST}").write_text("x")


def only(*names):
    def attack(run, another):
        step = run / f"checkpoints/{NEWEST}"
        for path in step.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return attack


def folder_attacks() -> dict:
    found = {
        **{f"rename-8-to-{n}": rename(8, n) for n in (5, 7, 9, 16, 1000, "08")},
        **{f"rename-4-to-{n}": rename(4, n) for n in (10, 9, 5)},
        **{f"exchange-{a}-{b}": exchange(a, b) for a, b in ((8, 6), (8, 4), (6, 4))},
        **{f"copy-{a}-to-{b}": copy_step(a, b) for a, b in ((4, 10), (6, 9), (8, 12))},
        **{f"another-{item}": take(item) for item in ITEMS},
        **{f"oldest-{item}": take(item, of="run") for item in ITEMS},
        **{f"without-{item}": remove(item) for item in ITEMS},
        "another-arrays": take("params", "opt", "state"),
        "another-all-but-meta": take("params", "opt", "state", "data", "metrics"),
        "another-meta-and-data": take("meta", "data"),
        "oldest-arrays": take("params", "opt", "state", of="run"),
        "oldest-data-and-meta": take("data", "meta", of="run"),
        "oldest-all": take(*ITEMS, of="run"),
        "no-commit": remove("commit_success.txt"),
        "no-root-metadata": remove("_CHECKPOINT_METADATA"),
        "only-meta": only("meta", "data"),
        "only-params": only("params", "meta", "data", "_CHECKPOINT_METADATA"),
        "empty-folder": only(),
        "file-instead": file_instead,
        "all-without-meta": all_steps(lambda s: shutil.rmtree(s / "meta")),
        "all-without-params": all_steps(lambda s: shutil.rmtree(s / "params")),
        "all-gone": all_steps(shutil.rmtree),
        "checkpoints-gone": lambda run, another: shutil.rmtree(run / "checkpoints"),
        "checkpoints-a-file": lambda run, another: (
            shutil.rmtree(run / "checkpoints"),
            (run / "checkpoints").write_text("x"),
        ),
    }
    return found


CASES = {
    f"{kind.__name__}-{item}-{n}": on_bytes(kind, item, n)
    for kind in BYTES
    for item, count in NUMBERS.items()
    for n in range(count)
}
CASES |= json_attacks() | folder_attacks()


# What a resumed run is.


@dataclasses.dataclass
class Resumed:
    """A run as training would go on with it."""

    step: int
    sequences: int
    final: dict | None
    nll: dict  # held-out loss of every checkpoint, by which they are ranked
    arrays: dict


def resume(folder, run) -> tuple[Outcome, Resumed | None]:
    """`moex train` on a run, but for the training."""
    found = []

    def stand(self):
        manager = self.checkpointer.manager
        nll = {step: manager.metrics(step) for step in manager.all_steps()}
        arrays = jax.tree.map(np.asarray, self.state)
        found.append(Resumed(self.step, self.consumed, self.final, nll, arrays))
        return {"step": self.step}

    args = (f"--config={folder / 'tiny.py'}", f"--workdir={run}")
    args += tuple(f"--config.{o}" for o in OVERRIDES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "loop", stand)
        outcome = moex("train", *args)
    return outcome, found[0] if found else None


def steps_of(run) -> list[int]:
    """Numbers of the step folders of a run, ascending."""
    steps = run / "checkpoints"
    names = [p.name for p in steps.iterdir()] if steps.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope="module")
def truth(trained, folder, tmp_path_factory) -> dict[int, Resumed]:
    """The run as it was at each of its steps."""
    found = {}
    for step in (OLDEST, BEFORE, NEWEST):
        run = shutil.copytree(trained, tmp_path_factory.mktemp("truth") / "run")
        for other in steps_of(run):
            if other > step:
                shutil.rmtree(run / f"checkpoints/{other}")
        outcome, found[step] = resume(folder, run)
        assert found[step] is not None, outcome
        assert found[step].step == step
    assert [f.final is None for f in found.values()] == [True, True, False]
    return found


def check_same(found: Resumed, truth: dict[int, Resumed]) -> None:
    """Check that a resumed run is what was saved at its step."""
    assert found.step in truth, f"step {found.step} was never saved"
    expected = truth[found.step]
    assert found.sequences == expected.sequences
    assert found.final == expected.final
    for step, nll in found.nll.items():
        assert nll == truth[NEWEST].nll[step], f"ranking of step {step}"
    runs.assert_same_arrays(found.arrays, expected.arrays)


def check_reading(run, truth: dict[int, Resumed]) -> None:
    """Check what a command that only reads makes of it, and that it does so."""
    before = snapshot(run)
    outcome = attempt(lambda: load_run(run))
    check_no_traceback(outcome)
    assert snapshot(run) == before
    if outcome.code == 0:
        read = outcome.result
        assert read.step in truth, f"step {read.step} was never saved"
        expected = truth[read.step].arrays
        runs.assert_same_arrays(read.params, expected["params"])
        runs.assert_same_arrays(read.state, expected["state"])
        check_said(outcome, read.step, steps_of(run))


def check_said(outcome, step, steps) -> None:
    """Check that a step other than the newest was not taken in silence."""
    said = "is damaged" in outcome.warned or "is gone" in outcome.warned
    assert not steps or step == steps[-1] or said, outcome


def test_there_are_many_cases():
    assert len(CASES) >= 200


@pytest.mark.thorough
@pytest.mark.parametrize("attack", some(CASES, 8))
def test_a_damaged_checkpoint_is_noticed_or_harmless(
    attack, folder, run, another, truth
):
    attack(run, another)
    steps, there = steps_of(run), set(snapshot(run / "checkpoints").values())
    check_reading(run, truth)
    outcome, found = resume(folder, run)
    check_no_traceback(outcome)
    if found is None:
        check_refused(outcome, codes=(1, 2))
    else:
        check_same(found, truth)
        check_said(outcome, found.step, steps)
    assert there <= set(snapshot(run).values()), "a file of a checkpoint is gone"
