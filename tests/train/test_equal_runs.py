"""`moex compare --assert-equal` on runs that were trained: meshes, repeats, changes."""

import pytest

from moex.analysis.equality import RunsDiffer, Tolerance, assert_equal
from tests import runs

SHORT = ("steps=3", "eval.every=0", "checkpoint.every=0", "batch_size=8")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`{name: run directory}`: one device twice, a mesh of eight, another seed."""
    folder = tmp_path_factory.mktemp("equal")
    with runs.one_device():
        for name in ("one", "again"):
            runs.train(folder, folder / name, *SHORT)
        runs.train(folder, folder / "seed", *SHORT, "seed=1")
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2")
    runs.train(folder, folder / "mesh", *SHORT, *mesh)
    return {name: folder / name for name in ("one", "again", "seed", "mesh")}


def test_the_same_run_twice_is_equal_in_every_bit(trained):
    said = assert_equal([trained["one"], trained["again"]], Tolerance())
    assert "are equal exactly" in said and "at 3 steps" in said


def test_a_run_on_a_mesh_is_equal_within_rounding(trained):
    both = [trained["one"], trained["mesh"]]
    assert "are equal, numbers within" in assert_equal(both, Tolerance(1e-4, 1e-6))


def test_another_seed_is_told_by_step_and_quantity(trained):
    with pytest.raises(RunsDiffer, match="^step 1, train "):
        assert_equal([trained["one"], trained["seed"]], Tolerance(1e-4, 1e-6))
