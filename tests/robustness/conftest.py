"""One tiny run for all attacks; every attack has a copy of its own."""

import shutil

import pytest

from tests import runs

# Held-out losses fall, so the newest checkpoint is the best one; three are kept.
OVERRIDES = ("checkpoint.keep_best=1",)


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the config file and the corpus are."""
    folder = tmp_path_factory.mktemp("attacked")
    runs.write_config(folder)
    return folder


@pytest.fixture(scope="session")
def trained(folder):
    """A complete run of 8 steps with checkpoints of steps 4, 6 and 8; do not touch."""
    return _trained(folder, "run")


@pytest.fixture(scope="session")
def another(folder):
    """A run of the same shapes from another seed; do not touch."""
    return _trained(folder, "another", "seed=1")


def _trained(folder, name, *overrides):
    with runs.one_device():
        runs.train(folder, folder / name, *OVERRIDES, *overrides)
    return folder / name


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the run, in a folder of its own that is the current one."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run")
