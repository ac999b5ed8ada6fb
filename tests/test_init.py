"""`moex init`: the folder that it makes is good as it is."""

import subprocess
import sys

import pytest

from moex import cli, project
from moex.config import shipped
from moex.config.base import from_dict, own_files, to_dict
from moex.config.flags import load_config
from moex.runs.keys import check_run
from tests import runs
from tests.test_own_kinds import moex

OWN = ("router", "test_router")
# So small that it is quick; the text and its tokenizer are those of the folder.
SMALL = (
    *("--config.batch_size=2", "--config.seq_len=16", "--config.kernels=xla"),
    *("--config.eval.sequences=4", "--config.log.sample_tokens=4"),
    "--config.optim.warmup_steps=0",
)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder that `moex init` made, which the test is in."""
    folder = tmp_path / "deep" / "my router"
    cli.main(["init", str(folder)])
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in OWN:
        sys.modules.pop(name, None)
    project.use(None)


def test_it_says_what_it_made_and_how_to_go_on(made, capsys):
    assert sorted(file.name for file in made.iterdir()) == sorted(shipped.TEMPLATE)
    (made / "other").mkdir()
    cli.main(["init", "other"])
    said = capsys.readouterr().out
    assert said.startswith("other: made README.md, config.py")
    first, second = said.partition("train it: ")[2].splitlines()
    assert first == f"cd '{made / 'other'}'"  # good in any folder
    assert second.endswith(" train --config=config.py --workdir=runs/first")


@pytest.mark.parametrize("name", ["", "config.py"])
def test_a_folder_with_something_in_it_is_left_as_it_is(made, name, capsys):
    (made / "config.py").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        cli.main(["init", str(made / name)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == f"moex: error: {made / name}: is no empty folder; give a new one.\n"
    assert (made / "config.py").read_text(encoding="utf-8") == "mine"


def test_its_files_have_no_fault_that_ruff_finds(made):
    for args in (["check", "--select=E,F,I,B,UP,SIM"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *args, "--isolated", "."]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr


def test_its_config_is_good_and_is_found_again(made):
    cfg = load_config(["--config=config.py"])
    check_run(cfg)
    assert own_files(cfg) == [made / "router.py"]
    saved = to_dict(cfg)
    assert "'router.Cosine'" in str(saved)
    assert to_dict(from_dict(saved)) == saved


@pytest.mark.thorough
def test_its_own_tests_pass(made, monkeypatch):
    monkeypatch.syspath_prepend(made)
    import test_router  # the one in the folder

    tests = [f for name, f in vars(test_router).items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


@pytest.mark.slow
def test_it_trains_as_it_is_and_the_run_is_opened(made, tmp_path, capsys):
    with runs.one_device():
        for steps in (2, 3):
            workdir = ["--workdir=runs/first", f"--config.steps={steps}"]
            moex("train", "--config=config.py", *workdir, *SMALL)
        sys.modules.pop("router")
        moex("eval", "runs/first")
    assert [line["step"] for line in runs.records(made / "runs/first")] == [1, 2, 3]
    assert "nats per token" in capsys.readouterr().out
