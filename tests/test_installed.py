"""An own folder against moex installed from a wheel: no checkout, an empty home."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig

import pytest

from tests import runs
from tests.test_init import SMALL

pytestmark = pytest.mark.slow
PARTS = ("configs", "kernels_pallas", "moex", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def moex(tmp_path_factory):
    """The path of the installed command; pip fetches setuptools to build the wheel."""
    place = tmp_path_factory.mktemp("installed")
    (place / "source").mkdir()
    for part in PARTS:  # not in place: a build leaves folders behind
        command = ["cp", "-R", str(runs.ROOT / part), str(place / "source")]
        subprocess.run(command, check=True)
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "-w", str(place), str(place / "source")]
    subprocess.run(wheel, check=True, cwd=place)
    shutil.rmtree(place / "source")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    (library,) = place.glob("venv/lib/python*/site-packages")
    # What moex needs is taken from here; a .pth file reads no other .pth files, so a
    # checkout that is installed here is not seen.
    others = sysconfig.get_paths()["purelib"]
    (library / "needed.pth").write_text(f"{others}\n", encoding="utf-8")
    (built,) = place.glob("*.whl")
    python = str(place / "venv/bin/python")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install.append("--ignore-installed")  # that of the checkout is seen, but not here
    subprocess.run([*install, str(built)], check=True)
    return place / "venv/bin/moex"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def call(moex, home):
    """Run a command in a folder; returns what it wrote."""

    def call(folder, *args, code=0):
        done = subprocess.run(
            [str(moex), *map(str, args)],
            cwd=folder,
            env=environment(home),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said

    return call


def environment(home):
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    own = {"HOME": str(home), "JAX_PLATFORMS": "cpu", "MOEX_PROGRESS": "0"}
    return kept | own


@pytest.fixture(scope="module")
def folder(call, home):
    """An own folder with a run that was killed and went on."""
    call(home, "init", "own")
    return home / "own"


TRAIN = (*("train", "--config=config.py", "--workdir=runs/first"), *SMALL)
CRASH = ("--config.checkpoint.every=2", "--config.steps=12", "--config.log.every=1")


def test_the_installed_moex_is_used(moex, home):
    code = "import moex, moex.configs.quickstart as q; print(moex.__file__, q.__file__)"
    done = subprocess.run(
        [str(moex.parent / "python"), "-c", code],
        cwd=home,
        env=environment(home),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    for file in done.stdout.split():
        assert pathlib.Path(file).is_relative_to(moex.parents[1])


def test_the_configs_are_listed_and_found_by_name(call, home):
    assert re.search("^quickstart ", call(home, "config", "--list"), re.M)
    assert "router: TopP" in call(home, "config", "--config=quickstart:router=topp")
    said = call(home, "config", "--config=quickstrat", code=2)
    assert "Did you mean 'quickstart'?" in said


def test_a_run_is_killed_and_goes_on(moex, call, folder, home):
    process = subprocess.Popen(
        [str(moex), *TRAIN, *CRASH],
        cwd=folder,
        env=environment(home),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    said = call(folder, *TRAIN, *CRASH)
    assert re.search("^step 12/12", said, re.M)
    steps = [line["step"] for line in runs.records(folder / "runs/first")]
    assert steps == list(range(1, 13))


def test_every_verb_finds_the_router_of_the_folder(call, folder, home):
    config = "--config=config.py"
    start = (*TRAIN[:2], "--workdir=runs/second", *SMALL, "--config.steps=2")
    said = call(folder, *start, "--config.init_from=runs/first")
    assert "runs/first" in said
    call(folder, "trace", "runs/first", "--out=trace.parquet", "--tokens=64")
    for args in (
        ("config", config),
        ("params", config),
        ("plan", config, "--topology=h100:1"),
        ("data", "inspect", config),
        ("eval", "runs/first", "--sequences=4"),
        ("generate", "runs/first", "--prompt=def ", "--max-new-tokens=4"),
        ("analyse", "trace.parquet"),
        ("report", "runs/first", "--trace=trace.parquet", "--out=report.html"),
        ("compare", "runs/first", "runs/second", "--out=compare.html"),
        ("convert", "runs/first", "--to=latent", "--group=4", "--latent=64")
        + ("--workdir=runs/latent",),
        ("eval", "runs/latent", "--sequences=4"),
        ("train", config, "--workdir=runs/sweep", *SMALL, "--config.steps=1")
        + ("--sweep", "seed=0,1"),
    ):
        call(folder, *args)


def test_from_another_folder_the_run_is_opened_with_its_project(call, folder, home):
    run = folder / "runs/first"
    for verb, *rest in (
        ("eval", "--sequences=4"),
        ("generate", "--prompt=def ", "--max-new-tokens=4"),
        ("report", "--out=report.html"),
    ):
        said = call(home, verb, run, *rest, code=2)
        assert said.count("\n") == 1
        assert "give the folder with router as --project=FOLDER" in said
        call(home, verb, run, *rest, f"--project={folder}")
