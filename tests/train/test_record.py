"""What a checkpoint has beside its arrays, and the run's record of its checkpoints."""

import json

import pytest

from moex.config.base import ConfigError
from moex.json_files import digest
from moex.runs.directory import RunDir
from moex.runs.record import (
    ChecksumError,
    check_may_begin,
    digest_of,
    read_about,
    read_record,
    write_record,
)

META = {
    "step": 4,
    "final": {"eval_nll": 2.5},
    "checksums": {"params": {"['w']": "0" * 16}, "opt": {"['m']": "1" * 16}},
}
DATA = {"sequences": 40}
NLL = {"nll": 2.5}


def write(folder, *, meta=META, data=DATA, metrics=NLL, old=False):
    """The JSON of a checkpoint, as Orbax lays it out; its digest."""
    step = int(folder.name)
    own = digest_of(step, data, metrics, meta)
    stored = meta if old else {"digest": own, "covered": meta}
    for name, content in (("meta", stored), ("data", data)):
        put(folder / name / "metadata", content)
    if metrics is not None:
        put(folder / "metrics" / "metrics", metrics)
    return own


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    put(file, content)


def test_what_was_written_is_read(tmp_path):
    for name, metrics in (("scored", NLL), ("not scored", None)):
        folder = tmp_path / name / "4"
        own = write(folder, metrics=metrics)
        for known in (own, "", None):
            assert read_about(folder, known) == (META, DATA, own)
    odd = META | {"final": {"x": float("nan"), "y": [1, 1e-45, 0.1]}}
    own = write(tmp_path / "odd" / "4", meta=odd)
    assert read_about(tmp_path / "odd" / "4", own)[2] == own
    assert digest({"a": (1, 2), "b": {1: 2}}) == digest({"b": {"1": 2}, "a": [1, 2]})


CHANGES = {
    "position": ("data", lambda d: d.update(sequences=90)),
    "another field of the data": ("data", lambda d: d.update(more=1)),
    "final figures": ("meta", lambda m: m["covered"]["final"].update(eval_nll=0.1)),
    "no final figures": ("meta", lambda m: m["covered"].pop("final")),
    "a checksum": ("meta", lambda m: m["covered"]["checksums"]["opt"].clear()),
    "no optimizer": ("meta", lambda m: m["covered"]["checksums"].pop("opt")),
    "no checksums": ("meta", lambda m: m["covered"].pop("checksums")),
    "no digest": ("meta", lambda m: m.pop("digest")),
    "a digest that is none": ("meta", lambda m: m.update(digest=None)),
    "the form of an old one": (
        "meta",
        lambda m: [m.update(m.pop("covered")), m.pop("digest")],
    ),
    "scores": ("metrics", lambda m: m.update(nll=0.1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(tmp_path, change):
    own = write(tmp_path / "4")
    name, do = CHANGES[change]
    files = {"metrics": "metrics/metrics"}
    edit(tmp_path / "4" / files.get(name, f"{name}/metadata"), do)
    for known in (own, ""):
        with pytest.raises(ChecksumError):
            read_about(tmp_path / "4", known)
    if change != "the form of an old one":  # without a record nothing else can tell
        with pytest.raises(ChecksumError):
            read_about(tmp_path / "4", None)


def test_scores_that_went_or_came_are_noticed(tmp_path):
    write(tmp_path / "4")
    (tmp_path / "4" / "metrics" / "metrics").unlink()
    with pytest.raises(ChecksumError):
        read_about(tmp_path / "4", None)
    write(tmp_path / "6", meta=META | {"step": 6}, metrics=None)
    put(tmp_path / "6" / "metrics" / "metrics", NLL)
    with pytest.raises(ChecksumError):
        read_about(tmp_path / "6", None)


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_another_number_is_noticed(tmp_path, old):
    write(tmp_path / "4", old=old)
    (tmp_path / "4").rename(tmp_path / "8")
    with pytest.raises(ChecksumError, match="the folder of step 8 holds step 4"):
        read_about(tmp_path / "8", None)


def test_the_checkpoint_of_another_run_is_noticed(tmp_path):
    other = write(tmp_path / "4", data={"sequences": 41})
    own = digest_of(4, DATA, NLL, META)
    with pytest.raises(ChecksumError, match="not the checkpoint that this run saved"):
        read_about(tmp_path / "4", own)
    assert read_about(tmp_path / "4", "")[2] == other


def test_old_checkpoints_are_read(tmp_path):
    write(tmp_path / "4", old=True)
    assert read_about(tmp_path / "4", None) == (META, DATA, None)
    with pytest.raises(ChecksumError):  # in a run that has had digests
        read_about(tmp_path / "4", "")
    # Step 0 of an import had no optimizer state; another step that lost it is damaged.
    meta = META | {"step": 0, "checksums": {"params": {}}}
    write(tmp_path / "0", meta=meta, old=True)
    assert read_about(tmp_path / "0", None)[0] == meta
    write(tmp_path / "6", meta=meta | {"step": 6}, old=True)
    (tmp_path / "0" / "opt").mkdir()
    for step in (0, 6):
        with pytest.raises(ChecksumError, match="no checksum of opt"):
            read_about(tmp_path / str(step), None)


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"covered": 3}', "[" * 10000])
def test_a_meta_that_is_no_json_is_damage(tmp_path, text):
    write(tmp_path / "4")
    (tmp_path / "4" / "meta" / "metadata").write_text(text)
    with pytest.raises(ChecksumError):
        read_about(tmp_path / "4", None)


def test_the_record_comes_back(tmp_path):
    assert read_record(RunDir(tmp_path)) is None
    for steps in ({}, {2: None, 10: "ab", 9: "cd"}):
        write_record(RunDir(tmp_path), steps)
        assert read_record(RunDir(tmp_path)) == steps
    assert list(read_record(RunDir(tmp_path))) == [2, 9, 10]


@pytest.mark.parametrize("text", ["", "{}", '{"steps": [4]}', '{"steps": {"x": null}}'])
def test_a_damaged_record_is_said(tmp_path, text):
    (RunDir(tmp_path).record).write_text(text)
    with pytest.raises(ConfigError, match="checkpoints.json"):
        read_record(RunDir(tmp_path))


def logged(folder, last, started=(0,)):
    """The files of a run that trained `last` steps."""
    lines = [json.dumps({"kind": "train", "step": s}) for s in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    starts = [{"step": step} for step in started]
    (folder / "environment.json").write_text(json.dumps(starts))


@pytest.mark.parametrize("record", [None, {}])
@pytest.mark.parametrize("last", [0, 1, 4, 8])
def test_a_run_that_was_killed_before_its_first_checkpoint_may_begin(
    tmp_path, record, last
):
    logged(tmp_path, last)
    if record is not None:
        write_record(RunDir(tmp_path), record)
    check_may_begin(RunDir(tmp_path), every=4)
    check_may_begin(RunDir(tmp_path), every=0)


def test_a_run_that_lost_its_checkpoints_may_not(tmp_path):
    def refused(why):
        with pytest.raises(ConfigError) as error:
            check_may_begin(RunDir(tmp_path), every=4)
        assert why in str(error.value) and "Put " in str(error.value)
        return str(error.value)

    logged(tmp_path, 9)  # of moex before there was a record
    refused("it trained 9 steps and saved one in 4")
    logged(tmp_path, 0, started=(0, 4))
    refused("it went on from step 4 once")
    logged(tmp_path, 2)
    write_record(RunDir(tmp_path), {2: "ab", 4: "cd"})
    refused("it saved step 4")
    (tmp_path / "corrupt").mkdir()
    assert f"damaged ones are in {tmp_path / 'corrupt'}" in refused("it saved step 4")


def test_nor_one_that_was_imported(tmp_path):
    with pytest.raises(ConfigError, match="imported or converted"):
        check_may_begin(RunDir(tmp_path), every=4)
