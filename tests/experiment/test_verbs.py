"""`moex experiment list | run | check` on a small experiment of a user's own."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from moex import cli
from moex.config.base import ConfigError
from moex.experiment.find import find

CONFIG = '''
"""Is b smaller than a?"""

from moex.experiment.contract import Column, Experiment, Table, Work


def figure(*, seed, folder, others, base):
    if base < 0:
        raise ValueError("a figure below 0")
    (folder.path / "value").write_text(str(base + seed))
    return {"x": base + 0.1 * seed, "words": "text"}


def total(*, seed, folder, others):
    return {"x": sum(float((o.path / "value").read_text()) for o in others.values())}


def get_experiment(size):
    arms = {"a": Work(figure, {"base": 3.0}), "b": Work(figure, {"base": B})}
    arms["sum"] = Work(total, needs=("a", "b"))
    column = Column("x", "value", "{:.2f}")
    table = Table("Values", ("a", "b", "sum"), (column,), against="a")
    return Experiment(arms=arms, tables=(table,), seeds=(0, 1))
'''
CRITERIA = '''
"""Verdicts."""

from moex.experiment.claims import smaller, true


def smaller_than_a(results):
    """b is smaller than a."""
    return smaller(results.difference("b", "a", "x"), at_most=-0.5)


def sums_add_up(results):
    """The sum is that of both."""
    found = results.values("sum", "x")
    return true(found == {0: 3.0 + VALUE, 1: 5.0 + VALUE}, f"{found}")


CLAIMS, MECHANISMS = (smaller_than_a,), (sums_add_up,)
'''
README = "# A question\n\n<!-- results: `moex experiment run` writes what follows -->\n"
README += "<!-- end of results -->\n\nBelow.\n"


@pytest.fixture
def project(tmp_path, monkeypatch, request):
    """A folder with one experiment, whose name no other test has."""
    monkeypatch.chdir(tmp_path)
    name = re.sub(r"\W", "_", request.node.name)
    folder = tmp_path / "experiments" / name
    folder.mkdir(parents=True)
    write(folder)
    yield folder
    for module in [m for m in sys.modules if m.startswith(f"experiments.{name}")]:
        del sys.modules[module]


def write(folder, b=2.0):
    (folder / "config.py").write_text(CONFIG.replace("B}", f"{b}}}"))
    (folder / "criteria.py").write_text(CRITERIA.replace("VALUE", str(b)))
    (folder / "README.md").write_text(README)


def moex(*args):
    cli.main(["experiment", *args])


def test_an_experiment_is_run_listed_and_checked(project, capsys):
    moex("list")
    assert re.search(
        rf"{project.name} +0/6 +0/6 +Is b smaller", capsys.readouterr().out
    )
    moex("run", project.name, "--in-process")
    data = json.loads((project / "results.json").read_text())
    assert {k: v["x"] for k, v in data["cpu"]["sum"]["seeds"].items()} == {
        "0": 5.0,
        "1": 7.0,
    }
    assert data["cpu"]["a"]["identity"]["args"] == {"base": 3.0}
    capsys.readouterr()
    moex("run", project.name)  # nothing is left: the README and the plot
    out = capsys.readouterr().out
    assert "everything was done before" in out
    assert "b is smaller than a. holds: -1.000 ± 0.000" in out
    text = (project / "README.md").read_text()
    assert text.startswith("# A question") and text.endswith("Below.\n")
    assert "| b | 2 | 2.05 ± 0.64 | -1.00 |" in text
    assert "- mechanism: The sum is that of both. **holds**" in text
    assert (project / "plot_cpu.png").stat().st_size > 1000
    moex("check", project.name)
    moex("list", project.name)
    assert f"{project.name}  6/6" in capsys.readouterr().out


def test_check_sees_a_readme_a_mechanism_and_an_arm_that_changed(project, capsys):
    moex("run", project.name, "--in-process")
    with pytest.raises(SystemExit) as error:
        moex("check")
    assert error.value.code == 1
    assert "README.md: says something else" in capsys.readouterr().err
    moex("run", project.name)
    criteria = project / "criteria.py"
    criteria.write_text(criteria.read_text().replace("3.0 +", "4.0 +"))
    forget(project)
    with pytest.raises(SystemExit):
        moex("check")
    assert "mechanism: The sum is that of both." in capsys.readouterr().err
    config = project / "config.py"
    config.write_text(config.read_text().replace('"base": 3.0', '"base": 3.5'))
    forget(project)
    with pytest.raises(SystemExit):
        moex("check")
    assert "a is another arm today: args.base was 3.0" in capsys.readouterr().err


def forget(project):
    """Let the files of an experiment be read again."""
    for module in [m for m in sys.modules if project.name in m]:
        del sys.modules[module]


def mistake(capsys, *args):
    with pytest.raises(SystemExit) as error:
        moex(*args)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line(project, capsys):
    name = project.name
    assert f"Did you mean '{name}'?" in mistake(capsys, "run", f"{name}s")
    assert "--size = 'tpu'" in mistake(capsys, "run", name, "--size=tpu")
    assert "--arms = 'c': must be one of 'a', 'b'" in mistake(
        capsys, "run", name, "--arms=c"
    )
    assert "--seeds = 'x'" in mistake(capsys, "run", name, "--seeds=x")
    assert "--jobs = 999" in mistake(capsys, "run", name, "--jobs=999")
    assert "one name" in mistake(capsys, "run")
    assert "--again: is for" in mistake(capsys, "check", "--again")
    assert "--jobs: is for" in mistake(capsys, "check", "--jobs=2")
    assert "--size: is not for" in mistake(capsys, "list", "--size=cpu")
    assert "takes the configs of the experiment" in mistake(
        capsys, "run", name, "--config=quickstart"
    )
    assert not (project / "results.json").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("config.py", "def get", "def got", "has no attribute 'get_experiment'"),
        ("config.py", "import Column", "import Colum", "cannot be imported"),
        ("config.py", 'needs=("a", "b")', 'needs=("a", "c")', "arm sum: needs = 'c'"),
        ("config.py", 'against="a"', 'against="z"', "table 'Values' = 'z'"),
        ("config.py", "return Experiment(", "return dict(", "must return an Exper"),
        ("config.py", "seeds=(0, 1)", "seeds=()", "seeds = (): must be one seed"),
        ("criteria.py", "CLAIMS, MECHANISMS", "CLAIMS, MECH", "has no MECHANISMS"),
    ],
)
def test_a_broken_experiment_is_one_line(project, file, old, new, told, capsys):
    path = project / file
    path.write_text(path.read_text().replace(old, new) + "# get_experiment\n")
    line = mistake(capsys, "run", project.name, "--in-process")
    assert told in line and file in line


def test_what_is_asked_for_again_is_done_again_in_this_process_too(project, capsys):
    moex("run", project.name, "--in-process")
    results = project / "results.json"
    text = results.read_text()
    results.write_text(text.replace('"x": 3.0', '"x": 9.0'))
    capsys.readouterr()
    moex("run", project.name, "--in-process", "--again", "--dry-run", "--seeds=0,0")
    assert "3 to do" in capsys.readouterr().out
    moex("run", project.name, "--in-process", "--again", "--arms=a")
    figures = json.loads(results.read_text())["cpu"]["a"]["seeds"]["0"]
    assert figures["x"] == 3.0


def test_lost_results_are_made_again(project, capsys):
    moex("run", project.name, "--in-process")
    (project / "results.json").unlink()
    moex("run", project.name, "--in-process")
    data = json.loads((project / "results.json").read_text())
    assert all(list(own["seeds"]) == ["0", "1"] for own in data["cpu"].values())


def test_a_figure_that_is_not_finite_is_shown_as_such(project, capsys):
    config = project / "config.py"
    nan = 'return {"x": float("nan") if base < 3 else base'
    config.write_text(config.read_text().replace('return {"x": base', nan))
    moex("run", project.name, "--in-process")
    moex("run", project.name)
    out = capsys.readouterr().out
    assert "b is smaller than a. does not hold here: +nan" in out
    assert "| b | 2 | nan ± nan |" in (project / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('return {"x": base', "return [base]", "arm a: must return a dict"),
        ('"words": "text"', '"words": {1}', "figure 'words' is of type set"),
        ("*, seed, folder, others, base", "*, seed, base", "figure cannot be called"),
    ],
)
def test_work_that_returns_the_wrong_thing_is_one_line(project, old, new, told, capsys):
    config = project / "config.py"
    text = config.read_text()
    if old.startswith("return"):
        text = text.replace(old + ' + 0.1 * seed, "words": "text"}', new)
    config.write_text(text.replace(old, new))
    assert told in mistake(capsys, "run", project.name, "--in-process")


def test_numbers_of_numpy_are_figures(project):
    config = project / "config.py"
    text = config.read_text().replace('"words": "text"', '"words": np.ones(2)')
    text = text.replace('"x": base', '"x": np.float32(base)')
    config.write_text(text.replace("from moex", "import numpy as np\nfrom moex", 1))
    moex("run", project.name, "--in-process", "--arms=a", "--seeds=0")
    data = json.loads((project / "results.json").read_text())
    assert data["cpu"]["a"]["seeds"]["0"]["words"] == [1.0, 1.0]


@pytest.mark.parametrize("file", ["criteria.py", "README.md"])
def test_what_is_missing_is_said_before_anything_is_done(project, file, capsys):
    (project / file).unlink()
    assert f"{file}: an experiment needs this file" in mistake(
        capsys, "run", project.name, "--in-process"
    )
    assert not (project / "results.json").exists()


def test_there_is_no_folder_of_experiments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="go to a checkout of moex"):
        find("any")


@pytest.mark.thorough
def test_processes_do_what_is_left_and_a_failure_leaves_the_others(project, capsys):
    write(project, b=-1.0)
    with pytest.raises(SystemExit) as error:
        moex("run", project.name, "--jobs=2")
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert "b, seed 0 failed: " in out and "a figure below 0" in out
    data = json.loads((project / "results.json").read_text())
    assert list(data["cpu"]) == ["a"]
    write(project)
    forget(project)
    moex("run", project.name)
    out = capsys.readouterr().out
    assert "4 to do" in out and "4/4 sum, seed 1 done" in out


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done(project):
    config = project / "config.py"
    wait = "    import time\n\n    time.sleep(60 * seed)\n"
    first = "    if base < 0:"
    slow = config.read_text().replace(first, wait + first)
    config.write_text(slow)
    command = [sys.executable, "-m", "moex.cli", "experiment", "run", project.name]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    results = project / "results.json"
    while time.monotonic() < end:
        if results.exists() and "sum" in json.loads(results.read_text())["cpu"]:
            break
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command goes on" in err
    data = json.loads(results.read_text())["cpu"]
    assert all(list(own["seeds"]) == ["0"] for own in data.values())
