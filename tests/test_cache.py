"""What is kept between commands: compiled programs above all, in a private folder."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from moex import cache, cli

# Compiles a program; prints the folder of programs, and whether it was loaded from it.
COMPILE = """
import sys
from moex import keep_programs
folder = keep_programs()
assert "jax" not in sys.modules
import jax, jax.numpy as jnp
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
x = jnp.ones((3, int(sys.argv[1])))
print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x.T))(x)))
print(folder, "/jax/compilation_cache/cache_hits" in seen)
"""
VARIABLES = [name for name in os.environ if name.startswith(("JAX_COMP", "JAX_PERS"))]


def compile_program(folder, size=5, **environment):
    """The lines that COMPILE prints in a process of its own, and its stderr."""
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    env |= {"MOEX_CACHE": str(folder), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONWARNINGS": ""}
    env |= environment
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, str(size)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.split("\n")[:2], ran.stderr


@pytest.mark.thorough
def test_a_second_process_loads_the_program_of_the_first(tmp_path):
    (value, said), _ = compile_program(tmp_path)
    programs = tmp_path / "programs"
    assert said == f"{programs} False"
    assert programs.stat().st_mode & 0o777 == 0o700
    assert compile_program(tmp_path)[0] == [value, f"{programs} True"]
    for file in programs.glob("*-cache"):  # damaged: compiled again, with a warning
        file.write_bytes(file.read_bytes()[:100])
    again, stderr = compile_program(tmp_path)
    assert again == [value, f"{programs} False"] and "Error reading" in stderr


@pytest.mark.slow
def test_the_programs_used_last_stay_within_the_size(tmp_path):
    compile_program(tmp_path, 5)
    sizes = [f.stat().st_size for f in (tmp_path / "programs").glob("*-cache")]
    most = sum(sizes) + 100
    compile_program(tmp_path, 6, JAX_COMPILATION_CACHE_MAX_SIZE=str(most))
    left = [f.stat().st_size for f in (tmp_path / "programs").glob("*-cache")]
    assert 0 < sum(left) <= most


@pytest.mark.parametrize("given", ["", "/elsewhere"])
def test_a_folder_that_the_user_chose_is_left_alone(given, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path))
    assert cache.keep_programs() is None
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == given
    assert not (tmp_path / "programs").exists()


@pytest.fixture
def without_jax(monkeypatch, tmp_path):
    """As in a process that has not imported JAX and whose user has set nothing."""
    for name in VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path / "moex"))
    return tmp_path / "moex"


def test_a_folder_that_others_can_write_is_refused(without_jax, capsys):
    folder = without_jax / "programs"
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    assert cache.keep_programs() is None
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert f"{folder}: others can write here" in capsys.readouterr().err


def test_nothing_is_said_where_no_folder_can_be_made(without_jax, capsys):
    without_jax.write_text("a file", encoding="utf-8")
    assert cache.keep_programs() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "set_, moex",
    [
        ({"MOEX_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/moex"),
        ({"HOME": "/c"}, "/c/.cache/moex"),
    ],
)
def test_the_folder_follows_the_environment(set_, moex, monkeypatch):
    for name in ("MOEX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(name, value)
    assert cache.root() == pathlib.Path(moex)
    assert cache.root("~/d") == pathlib.Path("~/d").expanduser()


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache with one entry of each kind and with files that are not ours."""
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path / "moex"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "moex/programs"))
    name = "text-" + 8 * "0a1b"
    for file in (
        *(f"moex/{name}/manifest.json", "moex/thesis/a.txt", "moex/notes-0a.json"),
        *("moex/programs/jit_f-1-cache", "moex/programs/jit_f-1-atime"),
        *("xdg/moex/native/experts-1.so", "xdg/moex/native/other"),
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    return tmp_path


def files(folder):
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix() for p in found}


def test_the_verb_lists_what_is_kept_and_removes_nothing_else(kept, capsys):
    cli.main(["cache", "--json"])
    listed = json.loads(capsys.readouterr().out)["entries"]
    assert [(e["kind"], e["bytes"]) for e in listed] == [
        ("data", 5),
        ("programs", 5),
        ("kernels", 5),
    ]
    cli.main(["cache", "--clear=all", "--older-than=1"])
    assert len(files(kept)) == 7
    cli.main(["cache", "--clear=programs"])
    assert "removed programs" in capsys.readouterr().out
    assert not [f for f in files(kept) if "programs" in f]
    cli.main(["cache", "--clear=all"])
    others = {"moex/thesis/a.txt", "moex/notes-0a.json", "xdg/moex/native/other"}
    assert files(kept) == others


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--older-than=3"], "--older-than: is for --clear"),
        (["--clear=all", "--older-than=-1"], "--older-than = -1: must be >= 0"),
        (["--clear=everything"], "invalid choice: 'everything'"),
        (["--config=x.py"], "--config=x.py: cache takes no config"),
    ],
)
def test_a_mistake_is_told_in_one_line(flags, said, kept, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", *flags])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert len(files(kept)) == 7
