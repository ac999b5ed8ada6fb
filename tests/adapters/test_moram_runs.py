"""A sequence of runs, one for each task: each takes over the atoms before it."""

import jax
import numpy as np
import pytest

from moex.adapters.moram import consolidated
from moex.config.base import ConfigError
from moex.interop.adapter import export_adapter, import_adapter
from moex.json_files import read_object
from moex.model.paths import flat_paths
from moex.runs.open import load_run
from moex.train.job import make_job
from tests import runs

pytestmark = pytest.mark.slow  # each has runs to train

STEPS = 4
MORAM = "MoRAM(rank=2, alpha=4.0, k=2, bank={}, targets=('attention', 'experts'))"
QUICK = (f"steps={STEPS}", "checkpoint.every=2", "eval.every=0")


def task(bank, before):
    return (*QUICK, f"model.adapter={MORAM.format(bank)}", f"init_from={before}")


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    """(folder of the config, run directories of base, first and second task)."""
    folder = tmp_path_factory.mktemp("moram")
    runs.write_config(folder, dense=False)
    base, first, second = (folder / name for name in ("base", "first", "second"))
    with runs.one_device(), runs.one_trace_of_equal_configs():
        job = make_job(runs.config(folder, *QUICK), log=lambda line: None)
        state = job.init_state()
        runs.write(job, {name: state[name] for name in ("params", "state")}, base)
        runs.train(folder, first, *task(0, base))
        runs.train(folder, second, *task(2, first))
        yield folder, base, first, second


def params(run):
    return jax.tree.map(np.asarray, load_run(run).params)


def test_a_task_takes_over_the_atoms_before_it_and_leaves_them(sequence):
    _, base, first, second = sequence
    before, after = params(first), flat_paths(params(second))
    kept = flat_paths(consolidated(before, 2.0))
    assert sum("bank_" in name for name in kept) == 10
    for name, array in kept.items():
        assert after[name].tobytes() == np.asarray(array).tobytes(), name
    for name, array in flat_paths(params(base)).items():
        assert after[name].tobytes() == array.tobytes(), name
    fresh = [name for name in after if name not in kept]
    assert len(fresh) == 10
    assert all(np.any(after[n]) for n in fresh if n.endswith("b_NRO"))


def test_checkpoints_hold_all_atoms_and_nothing_else(sequence):
    (facts,) = (sequence[3] / "checkpoints" / str(STEPS)).rglob("params/_METADATA")
    names = read_object(facts)["tree_metadata"]
    assert len(names) == 20
    assert all("'adapters'" in name for name in names)


def test_atoms_travel_to_another_run_of_the_base(sequence, tmp_path):
    _, base, _, second = sequence
    export_adapter(second, tmp_path / "atoms", say=lambda line: None)
    run = tmp_path / "run"
    import_adapter(base, tmp_path / "atoms", run, say=lambda line: None)
    runs.assert_same_arrays(params(run), params(second))


def test_a_stopped_task_goes_on_as_if_it_had_not_stopped(sequence, tmp_path):
    folder, _, first, second = sequence
    again = tmp_path / "again"
    runs.train(folder, again, *task(2, first), "steps=2")
    runs.train(folder, again, *task(2, first))
    assert runs.records(again) == runs.records(second)
    runs.assert_same_arrays(params(again), params(second))


@pytest.mark.parametrize(
    ("bank", "told"),
    [
        (3, "config.model.adapter.bank = 3: must be 2 for a new task"),
        (4, "config.model.adapter.bank = 4: must be 2 for a new task"),
    ],
)
def test_a_bank_of_another_size_is_one_clear_line(sequence, tmp_path, bank, told):
    folder, _, first, _ = sequence
    with pytest.raises(ConfigError, match=told):
        runs.train(folder, tmp_path / "run", *task(bank, first))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_bank_needs_a_run_to_start_from(sequence, tmp_path):
    folder, base, _, _ = sequence
    told = "config.model.adapter.bank = 2: must be 0: there is no run with MoRAM"
    for before in (base, ""):
        start = [o for o in task(2, before) if o != "init_from="]
        with pytest.raises(ConfigError, match=told):
            runs.train(folder, tmp_path / "run", *start)
