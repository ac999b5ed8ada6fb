"""The verbs of the command line: one file each, found by their folder."""

import pathlib
import re
import subprocess
import sys

import pytest

from moex import cli, commands
from tests import documented, runs

FOLDER = pathlib.Path(commands.__file__).parent


@pytest.fixture
def last_step(tmp_path, monkeypatch):
    """A file more in the folder of verbs, and a run with three checkpoints."""
    file = documented.files()["moex/commands/last_step.py"]
    (tmp_path / "verbs").mkdir()
    (tmp_path / "verbs" / "last_step.py").write_text(file, encoding="utf-8")
    folders = [*commands.__path__, str(tmp_path / "verbs")]
    monkeypatch.setattr(commands, "__path__", folders)
    for step in (2, 10, 9):
        (tmp_path / "run" / "checkpoints" / str(step)).mkdir(parents=True)
    yield tmp_path / "run"
    sys.modules.pop("moex.commands.last_step", None)


def said(capsys, *args):
    """What a command prints, and its error."""
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        assert stop.code in (0, 2)
    found = capsys.readouterr()
    return found.out, found.err


def test_a_new_verb_is_one_file(last_step, capsys):
    text, _ = said(capsys, "--help")
    lines = [" ".join(line.split()) for line in text.split("\n")]
    assert "last-step print the newest checkpoint of a run" in " ".join(lines)
    text, _ = said(capsys, "last-step", "--help")
    assert "Nothing is restored." in text
    assert text.endswith("\nExamples:\n  moex last-step runs/first\n")
    assert "--project FOLDER" in text
    assert said(capsys, "last-step", last_step) == ("10\n", "")
    assert (
        said(capsys, "last-step", last_step, "--json")[0] == "{'steps': [2, 9, 10]}\n"
    )
    _, error = said(capsys, "last-step", last_step, "--config.steps=3")
    assert error == (
        "moex: error: --config.steps=3: last-step takes the config of the run.\n"
    )
    _, error = said(capsys, "last-stop", last_step)
    assert "'last-stop': no such command. Did you mean 'last-step'?" in error


def test_every_file_is_a_verb_of_its_contract():
    files = {p.stem.replace("_", "-") for p in FOLDER.glob("*.py")}
    assert set(commands.names()) == files - {"--init--", "arguments"}
    assert commands.names()[: len(commands.FIRST)] == list(commands.FIRST)
    for name in commands.names():
        verb = commands.find(name)
        assert isinstance(verb, commands.Verb)
        assert verb.description() == verb.description().strip()
        assert re.match(r"[A-Z][^.]+\.", verb.description()), name


def test_a_verb_is_a_short_file():
    for path in FOLDER.glob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= (130 if path.stem == "arguments" else 95), path.name


def test_help_imports_nothing_that_computes():
    """All verbs are loaded and add their arguments: it must stay quick."""
    code = (
        "import sys; from moex import cli, commands\n"
        "for name in commands.names(): cli.make_parser([name])\n"
        "cli.make_parser([])\n"
        "print(*{'jax', 'numpy', 'flax', 'orbax'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=runs.environment(),
        cwd=runs.ROOT,
    )
    assert (done.stdout, done.stderr) == ("\n", "")
