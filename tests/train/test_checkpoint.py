"""Checkpoints: every bit comes back, every damage is noticed, nothing is thrown away.

E experts · D, F widths
"""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moex.config.base import ConfigError
from moex.model.optim import AdamW, Muon, Optim, make_optimizer
from moex.model.spec import ParamInfo, init_guard
from moex.runs import checksums
from moex.runs.checkpoint import Checkpointer, CheckpointError
from moex.runs.directory import RunDir
from moex.runs.record import read_record
from tests import runs
from tests.helpers import mesh_of
from tests.marks import thorough_but_for

INFO = {
    "experts/w_EDF": ParamInfo(("expert", "embed", "mlp"), matrix=((1,), (2,))),
    "norm/scale_D": ParamInfo(("embed",)),
}
RULES = {
    "adamw": Optim(rule=AdamW(), lr=0.1),
    "muon": Optim(rule=Muon(), lr=0.1, clip=None),
    "frozen": Optim(rule=AdamW(), lr=0.1, lr_factors=(("norm", 0.0), ("w_E", 0.5))),
}
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


def train_state(rule="adamw", seed=0):
    """A train state without a model: parameters, moments, router bias, guard."""
    rng = np.random.default_rng(seed)
    params = {
        "experts": {"w_EDF": jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32)},
        "norm": {"scale_D": jnp.asarray(rng.normal(size=8), jnp.float32)},
    }
    tx, _ = make_optimizer(RULES[rule], 10, params, INFO)
    grads = jax.tree.map(lambda a: a * a, params)
    _, opt = tx.update(grads, tx.init(params), params)
    bias_E = jnp.asarray(rng.normal(size=4), jnp.float32)
    state = {"router": {"bias_E": bias_E}}
    return {"params": params, "opt": opt, "state": state, "guard": init_guard()}


STATE = train_state()


def abstract(tree, place=None):
    """`ShapeDtypeStruct`s of a tree, all placed by `place(shape)`."""
    whole = NamedSharding(mesh_of(), PartitionSpec())
    place = place or (lambda shape: whole)
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(a.shape)), tree
    )


@pytest.fixture
def opened():
    """Opens checkpointers and closes them at the end of the test."""
    made = []

    def open_(workdir, **options):
        made.append(Checkpointer(workdir, **options))
        return made[-1]

    yield open_
    for checkpointer in made:
        checkpointer.close()


def save(checkpointer, *steps, state=None, nll=None, **options):
    """Save one state per step; the data position tells the step."""
    for step in steps:
        values = STATE if state is None else state
        metrics = None if nll is None else {"nll": nll[step]}
        checkpointer.save(
            step,
            values,
            data={"sequences": 4 * step},
            meta={"a": 1},
            metrics=metrics,
            **options,
        )
    checkpointer.wait()


def assert_same(actual, expected):
    expected, structure = jax.tree.flatten(expected)
    actual, found = jax.tree.flatten(actual)
    assert found == structure
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# Round trip.


@pytest.mark.parametrize("rule", thorough_but_for(RULES, "muon"))
def test_optimizer_states_come_back(opened, tmp_path, rule):
    state = train_state(rule)
    checkpointer = opened(tmp_path)
    save(checkpointer, 3, state=state)
    step, arrays, data, meta = checkpointer.restore(abstract(state))
    assert (step, data, meta["a"]) == (3, {"sequences": 12}, 1)
    assert arrays.keys() == state.keys()
    for name, tree in state.items():
        assert_same(arrays[name], tree)


@pytest.mark.thorough
def test_an_optimizer_state_that_was_not_kept_is_zeros(opened, tmp_path):
    """As runs are written that were imported, few bytes on the host at a time."""
    mesh = mesh_of(8, fsdp=4, tensor=2)
    state = {k: v for k, v in STATE.items() if k != "opt"}
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    experts = jax.device_put(STATE["params"]["experts"]["w_EDF"], split)
    state["params"] = STATE["params"] | {"experts": {"w_EDF": experts}}
    save(opened(tmp_path, host_bytes=100), 0, state=state)
    assert not (tmp_path / "checkpoints" / "0" / "opt").exists()
    for limit in (None, 1 << 16):
        reader = opened(tmp_path, read_only=True, host_bytes=limit)
        _, arrays, _, _ = reader.restore(abstract(STATE))
        assert_same({k: arrays[k] for k in state}, state)
        assert_same(arrays["opt"], jax.tree.map(jnp.zeros_like, STATE["opt"]))
    with pytest.raises(CheckpointError):  # "opt" of a run that had one
        save(opened(tmp_path / "other"), 0)
        shutil.rmtree(tmp_path / "other" / "checkpoints" / "0" / "opt")
        opened(tmp_path / "other").restore(abstract(STATE), warn=lambda line: None)


def test_checksums_need_no_memory():
    """Of a sharded array neither; one that is gathered would fill every device."""
    mesh = mesh_of(8, fsdp=8)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    for sharding in (NamedSharding(mesh, PartitionSpec()), split):
        array = jax.ShapeDtypeStruct((64, 1024, 16), jnp.float32, sharding=sharding)
        compiled = jax.jit(checksums._checksum).lower(array).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 10_000


def test_a_checksum_by_hand():
    """Its definition, which the checkpoints that there are were written with."""
    values = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    bits = values.reshape(-1).view(np.uint32)
    place = np.arange(bits.size, dtype=np.uint32)
    mixed = bits ^ (place * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    sums = (bits * (2 * place + 1)).sum(dtype=np.uint32)
    more = (mixed ^ (mixed >> 16)).sum(dtype=np.uint32)
    found = checksums.checksums({"x": jnp.asarray(values)})
    assert found == {"['x']": f"{sums:08x}{more:08x}"}


def test_dtypes_and_special_values_come_back(opened, tmp_path):
    bits = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
    params = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        values = bits % 2 if name == "bool" else np.resize(bits, 64 * dtype.itemsize)
        params[name] = jnp.asarray(values.view(dtype))  # NaNs with payloads among them
    odd = {"scalar": -0.0, "inf": [np.inf, -np.inf], "subnormal": 1e-45}
    params |= {k: jnp.asarray(v, jnp.float32) for k, v in odd.items()}
    params |= {"nested": {"0": {"10": jnp.ones((1, 1, 2))}}}
    state = STATE | {"params": params}
    checkpointer = opened(tmp_path)
    save(checkpointer, 1, state=state)
    _, arrays, _, _ = checkpointer.restore(abstract(state))
    assert_same(arrays["params"], params)


def test_parts_can_be_read_alone(opened, tmp_path):
    save(opened(tmp_path), 1)
    reader = opened(tmp_path, read_only=True)
    wanted = abstract({k: STATE[k] for k in ("params", "state", "guard")})
    _, arrays, _, _ = reader.restore(wanted, items=("params", "state"))
    assert arrays.keys() == {"params", "state", "guard"}
    assert_same(arrays["state"], STATE["state"])


def test_no_checkpoint_is_no_error(opened, tmp_path):
    assert opened(tmp_path).restore(abstract(STATE)) is None
    assert opened(tmp_path, read_only=True).restore(abstract(STATE)) is None


def split_over(mesh, axis):
    def place(shape):
        fits = len(shape) > 1 and shape[1] % mesh.shape[axis] == 0
        spec = PartitionSpec(None, axis) if fits else PartitionSpec()
        return NamedSharding(mesh, spec)

    return place


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (8, 4)])
def test_restore_onto_another_mesh(opened, tmp_path, before, after):
    meshes = [mesh_of(n, fsdp=n) for n in (before, after)]
    places = [split_over(mesh, "fsdp") for mesh in meshes]
    state = jax.tree.map(lambda a: jax.device_put(a, places[0](a.shape)), STATE)
    checkpointer = opened(tmp_path)
    save(checkpointer, 1, state=state)
    _, arrays, _, _ = checkpointer.restore(abstract(STATE, places[1]))
    for name, tree in STATE.items():
        assert_same(arrays[name], tree)
    w_EDF = arrays["params"]["experts"]["w_EDF"]
    assert w_EDF.sharding.shard_shape(w_EDF.shape) == (4, 8 // after, 16)


# Which are kept.


def test_the_latest_are_kept(opened, tmp_path):
    checkpointer = opened(tmp_path, keep=2)
    save(checkpointer, 1, 2, 3, 4)
    assert checkpointer.steps() == [3, 4]


def test_the_best_are_kept_besides(opened, tmp_path):
    nll = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5}
    checkpointer = opened(tmp_path, keep=1, keep_best=2)
    save(checkpointer, 1, 2, 3, 4, nll=nll)
    assert checkpointer.steps() == [2, 3, 4]
    save(checkpointer, 5, nll=nll)
    save(checkpointer, 6)  # not scored
    assert checkpointer.steps() == [2, 3, 6]
    again = opened(tmp_path, keep=1, keep_best=2)
    save(again, 7)
    assert again.steps() == [2, 3, 7]


@pytest.mark.thorough
def test_after_skipped_updates_nothing_is_replaced_or_ranked(opened, tmp_path):
    nll = dict.fromkeys(range(1, 8), 2.0) | {3: 0.1}
    checkpointer = opened(tmp_path, keep=1, keep_best=1)
    save(checkpointer, 1, 2, nll=nll)
    before = checkpointer.steps()
    save(checkpointer, 3, nll=nll, skipped_in_row=2)
    assert checkpointer.steps() == [*before, 3]
    assert checkpointer.last_good() == 2
    assert checkpointer.last_good(before=2) == (1 if 1 in before else None)
    again = opened(tmp_path, keep=1, keep_best=1)
    assert again.restore(abstract(STATE))[0] == 3  # the updates go on from there
    assert again.last_good() == 2
    save(again, 4, nll=nll)  # one was taken
    assert 4 in again.steps() and 3 not in again.steps()
    assert again.last_good() == 4


@pytest.mark.thorough
def test_what_an_older_moex_saved_while_it_skipped_is_not_good(opened, tmp_path):
    skipping = STATE | {"guard": STATE["guard"] | {"skipped_in_row": jnp.int32(5)}}
    checkpointer = opened(tmp_path, keep=3)
    save(checkpointer, 2)
    save(checkpointer, 4, 6, state=skipping)
    as_before_digests(tmp_path)
    again = opened(tmp_path, keep=3)
    assert again.restore(abstract(STATE))[0] == 6
    assert again.last_good() == 2


# Damage.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with steps 1, 2 and 3."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir, keep=3)
    save(checkpointer, 1, 2, 3)
    checkpointer.close()
    return workdir


def largest(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return max(files, key=lambda p: p.stat().st_size)


def truncate(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(folder, before, after):
    file = folder / "metadata"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


def empty_checksums(folder):
    edit(folder / "meta", '"checksums"', '"checksum"')


def as_before_digests(workdir):
    """Have the checkpoints look as moex before version 0.2 wrote them."""
    (workdir / "checkpoints.json").unlink()
    for meta in workdir.glob("checkpoints/*/meta/metadata"):
        covered = json.loads(meta.read_text())["covered"]
        del covered["skipped_in_row"]
        meta.write_text(json.dumps(covered))


DAMAGES = {
    "one bit of the parameters": lambda d: runs.flip_bit(d / "params"),
    "one bit of the optimizer": lambda d: runs.flip_bit(d / "opt"),
    "one bit of the state": lambda d: runs.flip_bit(d / "state"),
    "a data file cut in two": lambda d: truncate(d / "params"),
    "an empty data file": lambda d: largest(d / "params").write_bytes(b""),
    "no data file": lambda d: largest(d / "params").unlink(),
    "no meta": lambda d: shutil.rmtree(d / "meta"),
    "a meta without checksums": empty_checksums,
    "no position in the data": lambda d: shutil.rmtree(d / "data"),
    "no optimizer": lambda d: shutil.rmtree(d / "opt"),
    "another position in the data": lambda d: edit(
        d / "data", '"sequences"', '"other"'
    ),
    "other figures": lambda d: edit(d / "meta", '"a"', '"b"'),
    "no checksums of the optimizer": lambda d: edit(d / "meta", '"opt"', '"op"'),
    "nothing": lambda d: [shutil.rmtree(p) for p in d.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize(
    "damage",
    thorough_but_for(
        DAMAGES,
        *("one bit of the parameters", "a data file cut in two", "no meta", "nothing"),
    ),
)
def test_damage_is_noticed_and_the_step_before_is_taken(
    opened, saved, tmp_path, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "3")
    broken = sorted(p.name for p in (workdir / "checkpoints" / "3").rglob("*"))
    warnings = []
    checkpointer = opened(workdir, keep=3)
    step, arrays, data, _ = checkpointer.restore(abstract(STATE), warn=warnings.append)
    assert (step, data) == (2, {"sequences": 8})
    assert_same(arrays["params"], STATE["params"])
    (warning,) = warnings
    assert warning.startswith("warning: checkpoint 3 is damaged and set aside: ")
    assert "\n" not in warning
    assert checkpointer.steps() == [1, 2]
    kept = sorted(p.name for p in (workdir / "corrupt" / "3").rglob("*"))
    assert kept == broken
    # The step can be written again.
    save(checkpointer, 3)
    assert opened(workdir).restore(abstract(STATE))[0] == 3


def test_old_checkpoints_are_read_and_then_recorded(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    as_before_digests(workdir)
    reader = opened(workdir, read_only=True)
    assert reader.restore(abstract(STATE), items=("params",))[0] == 3
    writer = opened(workdir, keep=2)
    assert writer.restore(abstract(STATE))[0] == 3
    assert read_record(RunDir(workdir)) == {1: None, 2: None, 3: None}
    save(writer, 4)
    assert read_record(RunDir(workdir))[4] is not None
    # From now on none may look as if it came before.
    shutil.copytree(workdir / "checkpoints" / "3", workdir / "checkpoints" / "5")
    said = []
    assert opened(workdir, keep=2).restore(abstract(STATE), warn=said.append)[0] == 4
    assert len(said) == 1 and "checkpoint 5 is damaged" in said[0]


def test_swapped_folders_are_noticed(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    folder = workdir / "checkpoints"
    for a, b in (("3", "x"), ("2", "3"), ("x", "2")):
        (folder / a).rename(folder / b)
    said = []
    assert opened(workdir).restore(abstract(STATE), warn=said.append)[0] == 1
    assert len(said) == 2


@pytest.mark.thorough
def test_scores_that_rank_are_looked_at_in_every_checkpoint(opened, tmp_path):
    nll = {1: 3.0, 2: 1.0, 3: 2.0}
    save(opened(tmp_path, keep=1, keep_best=2), 1, 2, 3, nll=nll)
    scores = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
    scores.write_text(scores.read_text().replace("1.0", "9.0"))
    said = []
    again = opened(tmp_path, keep=1, keep_best=2)
    assert again.restore(abstract(STATE), warn=said.append)[0] == 3
    assert len(said) == 1 and "checkpoint 2 is damaged and set aside" in said[0]
    assert 2 not in again.steps()


def test_the_newest_that_is_gone_is_said(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")
    said = []
    assert opened(workdir).restore(abstract(STATE), warn=said.append)[0] == 2
    (line,) = said
    assert "checkpoint of step 3, which this run saved, is gone" in line
    assert "the newest is that of step 2" in line
    said.clear()  # once
    assert opened(workdir).restore(abstract(STATE), warn=said.append)[0] == 2
    assert said == []


def test_a_config_of_other_arrays_is_no_damage(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    bias_E = jnp.zeros(4)
    params = STATE["params"] | {"more": {"bias_E": bias_E}}
    with pytest.raises(
        ConfigError, match=r"config.model .* params\['more'\]\['bias_E'\]"
    ):
        opened(workdir).restore(abstract(STATE | {"params": params}))
    frozen = abstract(train_state("frozen"))
    with pytest.raises(ConfigError, match="config.optim does not match the checkpoint"):
        opened(workdir).restore(frozen)

    def refuse(step, meta):
        raise ConfigError(f"{step} {meta['a']}")

    with pytest.raises(ConfigError, match="^3 1$"):
        opened(workdir).restore(abstract(STATE), check=refuse)
    assert not (workdir / "corrupt").exists()
    assert opened(workdir).restore(abstract(STATE))[0] == 3


def test_a_checkpoint_that_may_not_be_read_is_no_damage(
    opened, saved, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    checkpointer = opened(workdir)
    monkeypatch.setattr(checkpointer.manager, "restore", refuse)
    with pytest.raises(CheckpointError, match="checkpoint 3 may not be read: .*denied"):
        checkpointer.restore(abstract(STATE))
    assert not (workdir / "corrupt").exists()


def test_a_kill_right_before_a_checkpoint_has_its_name(opened, tmp_path):
    """The record has it already; it is no checkpoint that was lost."""
    save(opened(tmp_path), 1)
    folder = tmp_path / "checkpoints"
    (folder / "1").rename(folder / "1.orbax-checkpoint-tmp")
    said = []
    again = opened(tmp_path)
    assert again.restore(abstract(STATE), warn=said.append) is None
    assert (said, read_record(RunDir(tmp_path))) == ([], {})


def test_the_checksum_names_the_array(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    # A consistent checkpoint of other parameters, as if bytes had changed on the way.
    other = opened(tmp_path / "other")
    save(other, 3, state=train_state(seed=1))
    shutil.rmtree(workdir / "checkpoints" / "3" / "params")
    shutil.copytree(
        tmp_path / "other" / "checkpoints" / "3" / "params",
        workdir / "checkpoints" / "3" / "params",
    )
    warnings = []
    assert opened(workdir).restore(abstract(STATE), warn=warnings.append)[0] == 2
    assert "checksum of params['experts']['w_EDF'] differs" in warnings[0]


def test_a_reader_changes_nothing_and_logs_nothing(
    opened, saved, tmp_path, caplog, request
):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    runs.flip_bit(workdir / "checkpoints" / "3" / "params")
    warnings = []
    reader = opened(workdir, read_only=True)
    absl_logger = logging.getLogger("absl")
    absl_logger.addHandler(caplog.handler)  # other tests may have cut it off
    caplog.set_level(logging.WARNING, "absl")
    request.addfinalizer(lambda: absl_logger.removeHandler(caplog.handler))
    assert reader.restore(abstract(STATE), warn=warnings.append)[0] == 2
    assert len(warnings) == 1
    assert sorted(p.name for p in workdir.iterdir()) == [
        *("checkpoints", "checkpoints.json")
    ]
    assert reader.steps() == [1, 2, 3]
    assert not [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    absl_logger.warning("another")
    assert caplog.messages[-1] == "another"


def test_set_aside_never_overwrites(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for _ in range(2):
        runs.flip_bit(workdir / "checkpoints" / "3" / "params")
        checkpointer = opened(workdir, keep=3)
        checkpointer.restore(abstract(STATE), warn=lambda line: None)
        save(checkpointer, 3)
    assert sorted(p.name for p in (workdir / "corrupt").iterdir()) == ["3", "3.1"]


def test_if_all_are_damaged_it_is_an_error(opened, saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for step in (1, 2, 3):
        runs.flip_bit(workdir / "checkpoints" / str(step) / "params")
    warnings = []
    with pytest.raises(
        CheckpointError, match=r"no intact checkpoint .*damaged: 1, 2, 3"
    ):
        opened(workdir).restore(abstract(STATE), warn=warnings.append)
    assert len(warnings) == 3
    assert len(list((workdir / "corrupt").iterdir())) == 3


def test_half_written_folders_are_ignored(opened, saved, tmp_path):
    """What a kill in the middle of a save leaves."""
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "3", checkpoints / "4.orbax-checkpoint-tmp")
    shutil.rmtree(checkpoints / "4.orbax-checkpoint-tmp" / "opt")
    reader = opened(workdir, read_only=True)
    assert reader.restore(abstract(STATE))[0] == 3
    writer = opened(workdir, keep=3)
    assert writer.restore(abstract(STATE))[0] == 3
    save(writer, 4)
    assert writer.steps() == [2, 3, 4]
    assert not list(checkpoints.glob("*tmp*"))


def test_a_save_that_fails_names_the_last_good_one(opened, tmp_path, monkeypatch):
    checkpointer = opened(tmp_path)
    save(checkpointer, 1)

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer.manager, "save", no_space)
    with pytest.raises(CheckpointError) as error:
        save(checkpointer, 2)
    assert "saving step 2" in str(error.value)
    assert "No space left on device" in str(error.value)
    assert "Last good checkpoint: step 1." in str(error.value)
