"""`import moex`: the public names, each loaded when it is asked for."""

import importlib
import re
import subprocess
import sys
import tomllib

import pytest

import moex
from tests import runs


def printed(code: str) -> str:
    """The output of a new Python process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=runs.environment(),
        cwd=runs.ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", moex.MODULES)
def test_a_public_name_is_that_of_its_module(name):
    value = getattr(moex, name)
    assert value is getattr(importlib.import_module(moex.MODULES[name]), name)
    assert value.__module__ == moex.MODULES[name]  # where it is defined


def test_all_public_names_are_listed_once():
    assert len(moex.__all__) == len(set(moex.__all__)) > 40
    assert set(moex.__all__) <= set(dir(moex))
    names = " ".join(moex.PUBLIC.values()).split()
    assert len(names) == len(moex.MODULES)
    found: dict = {}
    exec("from moex import *", found)
    assert set(moex.__all__) <= set(found)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'TopKK'"):
        _ = moex.TopKK
    with pytest.raises(ImportError, match="cannot import name 'TopKK'"):
        exec("from moex import TopKK")


def test_import_moex_brings_nothing_that_computes():
    heavy = "{'jax', 'flax', 'optax', 'numpy', 'ml_collections'}"
    code = (
        f"import sys, moex; moex.__version__; print(sorted({heavy} & set(sys.modules)))"
    )
    assert printed(code) == "[]\n"
    code = "import sys, moex; moex.keep_memory; print('jax' in sys.modules)"
    assert printed(code) == "False\n"
    code = "import sys; from moex import TopK; print('jax' in sys.modules, TopK(k=2).k)"
    assert printed(code) == "True 2\n"


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moex.__version__)
    text = (runs.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    about = tomllib.loads(text)
    assert about["project"]["dynamic"] == ["version"]
    own = about["tool"]["setuptools"]["dynamic"]["version"]
    assert own == {"attr": "moex.__version__"}
