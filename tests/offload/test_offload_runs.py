"""`moex generate` and `moex eval` with `--offload`, as a user calls them."""

import dataclasses
import json
import shutil

import pytest

from moex import cache, cli
from moex.runs import checkpoint
from moex.runs.directory import RunDir
from moex.train.job import make_job
from tests import runs
from tests.helpers import built
from tests.interop.folders import import_fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a dense and two MoE layers with random weights, and its cache."""
    folder = tmp_path_factory.mktemp("offload")
    cfg = runs.config(folder, "checkpoint.every=0", "eval.every=0")
    dense, moe = cfg.model.layers
    layers = dense, dataclasses.replace(moe, repeat=2)
    cfg.model = dataclasses.replace(cfg.model, layers=layers)
    with runs.one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEX_CACHE", str(folder / "cache"))
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        patch.setattr(checkpoint, "PIECE_BYTES", 1)  # as if the experts were large
        runs.write(job, {"params": params, "state": state}, folder / "run")
        yield folder / "run"


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: (exit code, what is printed, what is said)."""

    def moex(*args):
        capsys.readouterr()
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return moex


WRITE = ("--prompt=the cat", "--max-new-tokens=6")


def test_text_is_the_same(run, moex):
    """Sampled at the usual temperature, with a bank from the disk and from memory."""
    code, text, _ = moex("generate", run, *WRITE)
    assert code == 0
    for flags in (["--offload=1"], ["--offload=50%", "--offload-bank=pinned"]):
        code, own, said = moex("generate", run, *WRITE, *flags)
        assert (code, own) == (0, text), said
        lines = [line for line in said.splitlines() if line.startswith("offload: ")]
        assert len(lines) == 1
        assert "hits and" in lines[0] and "MB moved" in lines[0]


@pytest.mark.thorough
def test_the_hottest_experts_of_a_trace_stay(run, moex, tmp_path):
    trace = tmp_path / "trace.parquet"
    assert moex("trace", run, f"--out={trace}", "--tokens=64")[0] == 0
    flags = "--offload=2", "--offload-policy=static", f"--offload-trace={trace}"
    code, own, said = moex("generate", run, *WRITE, *flags)
    assert (code, own) == moex("generate", run, *WRITE)[:2], said


def test_a_predictor_lies_beside_its_run(run, moex, tmp_path):
    """It is trained on a trace of the run, and found there."""
    trace = tmp_path / "trace.parquet"
    assert moex("trace", run, f"--out={trace}", "--tokens=256")[0] == 0
    code, _, said = moex("generate", run, *WRITE, "--offload=1", *PREDICTED)
    assert code == 2 and said.count("\n") == 1
    assert f"{run / 'predictor.safetensors'}: no such file" in said
    code, told, said = moex("place", trace, "--fit-predictor", "--predictor-steps=3")
    assert code == 0, said
    assert told.splitlines()[-1].startswith(f"{run / 'predictor.safetensors'}: ")
    code, _, said = moex("place", trace, "--fit-predictor")
    assert code == 2 and "predictor.safetensors': exists" in said
    code, own, said = moex("generate", run, *WRITE, "--offload=2", *PREDICTED)
    assert (code, own) == moex("generate", run, *WRITE)[:2], said
    assert " loaded ahead" in said and ", 0 loaded ahead" not in said
    (run / "predictor.safetensors").rename(tmp_path / "moved.safetensors")
    flag = f"--offload-prefetch={tmp_path / 'moved.safetensors'}"
    assert moex("generate", run, *WRITE, "--offload=2", flag)[:2] == (0, own)


PREDICTED = "--offload-prefetch=predictor", "--offload-policy=predicted"


@pytest.mark.slow
def test_weights_in_fewer_bytes_are_offloaded(run, moex):
    code, text, _ = moex("generate", run, *WRITE, "--weights=int8")
    assert code == 0
    flags = "--weights=int8", "--offload=1"
    assert moex("generate", run, *WRITE, *flags)[:2] == (0, text)


@pytest.mark.thorough
def test_losses_are_the_same(run, moex):
    code, text, _ = moex("eval", run, "--json", "--sequences=5")
    assert code == 0
    code, own, _ = moex("eval", run, "--json", "--sequences=5", "--offload=1")
    assert code == 0
    want, found = json.loads(text), json.loads(own)
    assert want.keys() == found.keys()
    assert found["nll"] == pytest.approx(want["nll"], rel=1e-6)
    assert found["tokens"] == want["tokens"] > 0


def test_the_bank_is_written_once_and_can_be_cleared(run, moex):
    cache.clear(["banks"])  # those of other tests
    moex("generate", run, *WRITE, "--offload=1")
    entries = [entry for entry in cache.entries() if entry.kind == "banks"]
    assert len(entries) == 1
    rows = [f.stat() for f in entries[0].path.iterdir()]
    moex("generate", run, *WRITE, "--offload=2")
    assert [f.stat().st_ctime for f in entries[0].path.iterdir()] == [
        row.st_ctime for row in rows
    ]
    cache.clear(["banks"])
    assert not entries[0].path.exists()


MISTAKES = {
    "no experts": ("--offload=0", "more than 0"),
    "fewer than none": ("--offload=-3", "more than 0"),
    "no number": ("--offload=all", "such as 8"),
    "too large a share": ("--offload=101%", "up to 100%"),
    "an unknown unit": ("--offload=3XB", "units: "),
    "too few bytes": ("--offload=9B", "has no room for an expert"),
    "an unknown policy": ("--offload=1 --offload-policy=lry", "Did you mean 'lru'?"),
    "an unknown bank": ("--offload=1 --offload-bank=tape", "'disk', 'pinned'"),
    "a policy without predictions": (
        "--offload=1 --offload-policy=predicted",
        "needs --offload-prefetch",
    ),
    "a static policy alone": (
        "--offload=1 --offload-policy=static",
        "--offload-trace: goes with",
    ),
    "no trace": (
        "--offload=1 --offload-policy=static --offload-trace=/nowhere",
        "/nowhere: no such file",
    ),
    "a prefetch alone": ("--offload-prefetch", "is for --offload"),
    "layers ahead of nothing": (
        "--offload=1 --offload-ahead=2",
        "is for --offload-prefetch",
    ),
    "no layers ahead": ("--offload=1 --offload-prefetch --offload-ahead=0", "ahead"),
    "an unknown prefetch": (
        "--offload=1 --offload-prefetch=rooter",
        "Did you mean 'router'?",
    ),
    "an unknown allocation": (
        "--offload=1 --offload-allocate=equally",
        "Did you mean 'equal'?",
    ),
    "a demand of nothing": (
        "--offload=1 --offload-allocate=demand",
        "--offload-trace: goes with",
    ),
    "too few slots for all layers": (
        "--offload=1% --offload-allocate=equal",
        "needs a slot for each of 2 layers",
    ),
    "a policy alone": ("--offload-policy=lru", "is for --offload"),
    "with a store": ("--offload=1 --experts=a:b", "together with --experts"),
    "with adapters": ("--offload=1 --adapter=x", "together with --adapter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, run, moex):
    flags, told = MISTAKES[name]
    code, text, said = moex("generate", run, *WRITE, *flags.split())
    assert (code, text) == (2, "")
    assert said.count("\n") == 1
    assert told in said


def test_a_model_without_experts_cannot_be_offloaded(tmp_path, moex):
    cfg = runs.config(tmp_path, "model.vocab=257")
    cfg.model = dataclasses.replace(cfg.model, layers=cfg.model.layers[:1])
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    folder.save_config(cfg)
    code, _, said = moex("generate", folder, *WRITE, "--offload=1")
    assert code == 2
    assert "the model has no layer with routed experts" in said


def test_a_mesh_cannot_be_asked_for(run, moex):
    flags = "--offload=1", "--config.mesh.expert=2"
    code, _, said = moex("eval", run, *flags)
    assert code == 2
    assert said.count("\n") == 1
    assert "config.mesh: --offload computes on one device" in said


def test_no_room_for_the_bank_is_one_line(run, moex, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path))
    usage = type("Usage", (), {"free": 1})
    monkeypatch.setattr("moex.offload.bank.shutil.disk_usage", lambda path: usage)
    code, _, said = moex("generate", run, *WRITE, "--offload=1")
    assert code == 2
    assert "GiB are free; set MOEX_CACHE" in said


def test_a_damaged_checkpoint_is_told(run, moex, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").rglob("d"):
        runs.flip_bit(folder)
    code, _, said = moex("generate", copy, *WRITE, "--offload=1")
    assert code == 1
    assert "cannot be read" in said.splitlines()[-1]
    assert not [*(tmp_path / "cache" / "banks").iterdir()]


def test_a_damaged_bank_is_one_line_that_says_what_helps(run, moex):
    moex("generate", run, *WRITE, "--offload=1")
    entries = [entry for entry in cache.entries() if entry.kind == "banks"]
    file = next(entries[0].path.iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    code, _, said = moex("generate", run, *WRITE, "--offload=1")
    assert code == 2
    assert f"{file}: " in said and "moex cache --clear=banks" in said


FAMILIES = "deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_model_writes_the_same(name, moex, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path / "cache"))
    import_fixture(name, tmp_path / "run")
    with runs.one_device():
        code, text, said = moex("generate", tmp_path / "run", *WRITE)
        assert code == 0, said
        ways = (), ("--offload-prefetch=impact",), ("--offload-allocate=shared",)
        for flags in ways:
            flags = "--offload=1", *flags
            code, own, said = moex("generate", tmp_path / "run", *WRITE, *flags)
            assert (code, own) == (0, text), said
