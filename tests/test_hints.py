"""Commands that are printed can be copied into the shell where they are read."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from moex import hints, project
from moex.commands.arguments import train_on
from moex.runs.directory import RunDir
from moex.train.lines import last_lines
from tests import printed, runs
from tests.printed import Printed


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A virtual environment in the current folder; the folder of its programs."""
    scripts = tmp_path / "my env" / "bin"
    scripts.mkdir(parents=True)
    for name in ("moex", "tensorboard"):
        write_program(scripts / name, "mine")
    monkeypatch.setattr(hints.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(tmp_path)
    yield scripts
    project.use(None)


def write_program(file: pathlib.Path, word: str):
    """A program that prints a word and its arguments, one a line."""
    file.write_text(f'#!/bin/sh\nprintf "%s\\n" {word} "$@"\n', encoding="utf-8")
    file.chmod(0o755)


def shell(line: str) -> list[str]:
    """The lines that a command prints in the shell of the user."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


WORDS = ("generate", "runs/it's my run", "--prompt", "def ")


def test_a_program_of_an_environment_that_is_not_active_has_its_path(environment):
    line = hints.command("moex", *WORDS)
    assert shlex.split(line)[0] == "my env/bin/moex"
    assert shell(line) == ["mine", *WORDS]


def test_from_another_folder_the_path_is_whole(environment, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    line = hints.command("tensorboard", "--logdir", "a")
    assert shlex.split(line)[0] == str(environment / "tensorboard")
    monkeypatch.chdir(tmp_path)
    there = hints.command(
        "tensorboard", "--logdir", "a", folder=pathlib.Path("elsewhere")
    )
    assert there == line
    assert shell(line) == ["mine", "--logdir", "a"]


def test_in_an_active_environment_the_name_is_enough(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment}:{os.defpath}")
    line = hints.command("moex", *WORDS)
    assert shlex.split(line)[0] == "moex"
    assert shell(line) == ["mine", *WORDS]


def test_the_program_of_another_environment_is_not_taken(
    environment, tmp_path, monkeypatch
):
    (tmp_path / "other").mkdir()
    write_program(tmp_path / "other" / "moex", "other")
    monkeypatch.setenv("PATH", f"{tmp_path / 'other'}:{os.defpath}")
    assert shell(hints.command("moex", "eval"))[0] == "mine"
    (environment / "moex").unlink()  # installed for the user, beside another Python
    assert shell(hints.command("moex", "eval"))[0] == "other"


def test_without_a_program_the_module_runs(environment):
    (environment / "moex").unlink()
    line = hints.command("moex", "--version")
    assert shlex.split(line)[:3] == [sys.executable, "-m", "moex.cli"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(runs.ROOT))
        assert shell(line)[0].startswith("moex ")


def test_the_folder_of_own_classes_is_named_where_it_is_another(
    environment, tmp_path, monkeypatch
):
    mine = tmp_path / "my kinds"
    mine.mkdir()
    (mine / "hint_kinds.py").write_text("class Kind: ...\n", encoding="utf-8")
    project.use(mine)
    assert "--project" not in hints.command("moex", "eval", "a")  # nothing used yet
    assert project.find_class("hint_kinds", "Kind") is not None
    line = hints.command("moex", "eval", "a")
    assert shell(line) == ["mine", "eval", "a", "--project=my kinds"]
    assert "--project" not in hints.command("tensorboard", "--logdir", "a")
    monkeypatch.chdir(mine)
    assert "--project" not in hints.command("moex", "eval", "a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"--project={mine}" in shlex.split(hints.command("moex", "eval", "a"))
    sys.modules.pop("hint_kinds")


def hinted(text: str) -> list[list[str]]:
    """The words of each command in lines such as `let it write: moex ...`."""
    found = re.findall(r"^(?:look at it|let it write): +(.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("run", ["runs/a", 'my runs/it\'s "b" $HOME *'])
def test_the_end_of_a_training_names_commands_that_are_right(
    tmp_path, monkeypatch, run
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path(run, "tb").mkdir(parents=True)
    cfg = runs.config(tmp_path)
    for tensorboard in (False, True):
        cfg.log.tensorboard = tensorboard
        look, write = hinted(last_lines(cfg, RunDir(run), 60.0))
        assert write == ["moex", "generate", run, "--prompt", cfg.log.sample_prompts[0]]
        if tensorboard:
            assert look[:2] == ["tensorboard", "--logdir"]
            assert pathlib.Path(run).is_relative_to(look[2]) or look[2] == f"{run}/tb"
        else:
            assert look == ["moex", "report", run]
        for words in (look, write):
            assert not printed.wrong(Printed("hint", shlex.join(words)))


def test_the_command_that_goes_on_training_is_right():
    words = shlex.split(train_on("my runs/a"))
    assert words == ["moex", "train", "--workdir=my runs/a"]
    assert not printed.wrong(Printed("hint", train_on("runs/a")))
