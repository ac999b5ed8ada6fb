"""Runs with adapters: they train on a base, keep only their own, and open with it."""

import dataclasses
import json
import shutil
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.adapters.lora import LoRA
from moex.adapters.moram import consolidated
from moex.config.base import ConfigError
from moex.convert.apply import convert_run
from moex.convert.kinds.folded import Folded
from moex.convert.kinds.merged import Merged
from moex.convert.plans import Merge, Plan
from moex.interop.adapter import export_adapter, import_adapter
from moex.model.accounting import num_bytes
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.paths import flat_paths
from moex.model.spec import init_guard
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.keys import Loss
from moex.runs.open import load_run
from moex.serve.text import write_text
from moex.train.step import make_train_step
from tests import runs
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm
from tests.marks import slow

pytestmark = pytest.mark.thorough  # each has runs to train

LORA = "LoRA(rank=2, alpha=4.0, targets=('attention', 'experts'), dropout=0.1)"


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def base(folder):
    runs.train(folder, folder / "base", "steps=2")
    return folder / "base"


def adapt(folder, base, workdir, *overrides):
    own = (f"init_from={base}", f"model.adapter={LORA}", *overrides)
    return runs.train(folder, workdir, *own)


@pytest.fixture(scope="module")
def adapted(folder, base):
    adapt(folder, base, folder / "adapted", "steps=4")
    return folder / "adapted"


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_the_base_stays_as_it_is_and_the_adapters_learn(base, adapted):
    runs_ = [load_run(run) for run in (base, adapted)]
    states = [flat_paths(run.state) for run in runs_]
    assert any(bool(jnp.any(a != 0)) for a in states[0].values())  # router biases
    runs.assert_same_arrays(*states)
    before, after = (flat_paths(run.params) for run in runs_)
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    own = {n: a for n, a in after.items() if n not in before}
    assert own and all("/adapters/" in name for name in own)
    assert all(bool(jnp.any(a != 0)) for n, a in own.items() if n.endswith("b_NRO"))


def test_checkpoints_hold_only_what_is_trained(adapted):
    arrays = json.loads((adapted / "checkpoints/4/meta/metadata").read_text())
    names = arrays["covered"]["checksums"]["params"]
    assert names and all("adapters" in name for name in names)


def test_lora_on_a_model_of_no_family_leaves_in_our_layout(folder, base, adapted):
    said = []
    export_adapter(adapted, folder / "alone", say=said.append)
    assert "no family of transformers" in said[-2] and "of moex, as PEFT" in said[-1]
    import_adapter(base, folder / "alone", folder / "from_alone", say=said.append)
    old, new = (load_run(run) for run in (adapted, folder / "from_alone"))
    assert old.cfg.model == new.cfg.model
    runs.assert_same_arrays(old.params, new.params)


def test_a_run_goes_on_exactly(folder, base, adapted):
    adapt(folder, base, folder / "twice", "steps=2")
    adapt(folder, base, folder / "twice", "steps=4")
    once, twice = (load_run(run) for run in (adapted, folder / "twice"))
    runs.assert_same_arrays(twice.params, once.params)


@pytest.mark.slow
def test_experts_that_share_weights_share_an_adapter(folder, base):
    """They are trained on, exported, read again and folded in; the map stays."""
    quiet = {"say": lambda line: None}
    layer = Merge(
        layer=1, experts=4, groups=((2, 0), (1, 3)), dominant=(2, 1), weights=(1.0,) * 4
    )
    plan = Plan(
        kind="merge",
        run="base",
        step=2,
        base=base_hash(RunDir(base).config().model),
        layers=(layer,),
    )
    merged, run = folder / "merged", folder / "on-merged"
    convert_run(base, merged, [Merged(plan=plan)], sequences=0, **quiet)
    stored = "model.layers[1].pattern[0].stored_experts=2"
    adapt(folder, merged, run, stored, "steps=4")
    made, under = load_run(run), load_run(merged)
    path = "segments/1/blocks/0/ffn"
    params, state = flat_paths(made.params), flat_paths(made.state)
    np.testing.assert_array_equal(state[f"{path}/stored_E"], [[0, 1, 0, 1]])
    own = params[f"{path}/experts/adapters/w_out_EFD/b_NRO"]
    assert own.shape[:2] == (1, 2) and np.abs(own).max() > 0
    for name, array in flat_paths(under.params).items():
        assert params[name].tobytes() == array.tobytes(), name
    export_adapter(run, folder / "merged-files", **quiet)
    import_adapter(merged, folder / "merged-files", folder / "merged-again", **quiet)
    again = flat_paths(load_run(folder / "merged-again").params)
    assert all(params[name].tobytes() == again[name].tobytes() for name in params)
    report = convert_run(run, folder / "merged-folded", [Folded()], **quiet)
    assert report["loss"]["after"] == pytest.approx(report["loss"]["before"], rel=1e-5)
    state = flat_paths(load_run(folder / "merged-folded").state)
    np.testing.assert_array_equal(state[f"{path}/stored_E"], [[0, 1, 0, 1]])


@pytest.mark.slow
def test_another_run_starts_from_a_run_with_adapters(folder, adapted):
    run = folder / "third"
    adapt(folder, adapted, run, "steps=2", "optim.lr=1e-9")
    first, third = (flat_paths(load_run(r).params) for r in (adapted, run))
    for name, array in first.items():
        np.testing.assert_allclose(array, third[name], atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_base_in_int8_is_trained_on_and_opened(folder, base, adapted):
    run = folder / "int8"
    own = LORA.replace("dropout=0.1", "dropout=0.1, base_dtype='int8'")
    runs.train(folder, run, f"init_from={base}", f"model.adapter={own}", "steps=4")
    small, whole = load_run(run), load_run(adapted)
    kinds = {n: a.dtype.name for n, a in flat_paths(small.params).items()}
    assert kinds["segments/0/blocks/0/attention/w_q_DGRA/values"] == "int8"
    assert num_bytes(small.params) < 0.5 * num_bytes(whole.params)
    saved = json.loads((run / "checkpoints/4/meta/metadata").read_text())
    assert all("adapters" in n for n in saved["covered"]["checksums"]["params"])
    own, near = ([r["loss"] for r in runs.records(r)] for r in (run, adapted))
    np.testing.assert_allclose(own, near, rtol=0, atol=0.02)
    assert all(
        bool(jnp.any(array != 0))
        for name, array in flat_paths(small.params).items()
        if name.endswith("b_NRO")
    )
    options = {"max_new_tokens": 6, "temperature": 0, "seed": 0}
    assert write_text(run, ["the cat"], **options)


@pytest.fixture
def pair(tmp_path, base, adapted):
    """Copies of base and adapted run, side by side as they were."""
    return (
        shutil.copytree(base, tmp_path / "base"),
        shutil.copytree(adapted, tmp_path / "adapted"),
    )


def test_both_can_be_moved_together(pair):
    assert load_run(pair[1]).step == 4


def test_without_the_base_one_line_says_what_to_do(pair):
    shutil.rmtree(pair[0])
    with pytest.raises(ConfigError, match=r"adapters on step 2 of .*not there; put it"):
        load_run(pair[1])


def test_a_base_that_changed_is_refused(folder, pair):
    record = RunDir(pair[0]).record
    data = json.loads(record.read_text())
    data["steps"]["2"] = "0" * 64
    record.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="whose parameters are not the same any more"):
        load_run(pair[1])


def test_a_base_of_another_model_is_refused(folder, base):
    with pytest.raises(
        ConfigError, match=r"another architecture: .*shape \(32,\) there"
    ):
        adapt(folder, base, folder / "wrong", "steps=2", "model.dim=16")
    assert not (folder / "wrong").exists() or not RunDir(folder / "wrong").is_run()


def step_of(cfg, grad_accum):
    spec, params, state = built(cfg)
    optim = Optim(rule=AdamW(), lr=1e-2)
    tx, _ = make_optimizer(optim, 10, spec.params, spec.info)
    step = make_train_step(
        *(TASK, spec, tx, Loss()),
        grad_accum=grad_accum,
        num_domains=2,
        optim=optim,
        compute=XLA,
    )
    own = {"params": params, "state": state, "opt": tx.init(params)}
    return step, own | {"guard": init_guard()}


@pytest.mark.parametrize("grad_accum", [slow(1), 2])
def test_frozen_parameters_have_no_gradient_and_no_moments(grad_accum):
    """No array of the step has the shape of a frozen stack but the parameter itself."""
    lora = LoRA(rank=2, alpha=4.0, targets=("attention",))
    cfg = dataclasses.replace(tiny_lm(), adapter=lora)
    step, train_state = step_of(cfg, grad_accum)
    batch = random_batch(4, 8)
    frozen = (2, 8, 16, 2, 8)  # both MoE layers, 8 experts: gate and up
    assert (
        train_state["params"]["segments"]["1"]["blocks"]["0"]["ffn"]["experts"][
            "w_in_ED2F"
        ].shape
        == frozen
    )
    moments = [a.shape for a in jax.tree.leaves(train_state["opt"])]
    assert frozen not in moments
    args = (train_state, 0, jax.random.key(0), batch)
    jaxpr = jax.make_jaxpr(step)(*args)
    made = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars]
    assert frozen not in made
    new, _ = jax.jit(step)(*args)
    before, after = (flat_paths(s["params"]) for s in (train_state, new))
    for name in before:
        same = bool(jnp.all(before[name] == after[name]))
        assert same == ("/adapters/" not in name), name


def chain(folder, base, name, adapters):
    """Run directories of runs that each go on from the one before, from `base` on."""
    found = [base]
    for number, adapter in enumerate(adapters):
        run = folder / f"{name}{number}"
        own = (f"init_from={found[-1]}", f"model.adapter={adapter}", "steps=3")
        runs.train(folder, run, *own, "eval.every=0")
        found.append(run)
    return found


def kept(run):
    return flat_paths(jax.tree.map(np.asarray, load_run(run).params))


@pytest.mark.slow
def test_three_runs_that_train_other_parameters_keep_those_of_the_runs_before(
    folder, base, tmp_path
):
    own = "LoRA(rank=2, alpha=4.0, targets=('attention',), also_train={})"
    adapters = [own.format(also) for also in ("('router',)", "('norm_ffn',)", "()")]
    found = chain(folder, base, "also", adapters)
    for number, trained in enumerate(("router", "norm_ffn", "adapters")):
        before, after = kept(found[number]), kept(found[number + 1])
        changed = {n for n in before if not np.array_equal(before[n], after[n])}
        assert any(trained in name for name in changed), trained
        assert all(trained in n or "adapters" in n for n in changed), changed
    said = []
    export_adapter(found[3], tmp_path / "files", say=said.append)
    assert sum("trained by a run before" in line for line in said) >= 2
    import_adapter(base, tmp_path / "files", tmp_path / "run", say=said.append)
    again, last = kept(tmp_path / "run"), kept(found[3])
    assert again.keys() == last.keys()
    for name, array in last.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


@pytest.mark.slow
def test_three_tasks_of_atoms_on_a_base_in_int8(folder, base, tmp_path):
    own = (
        "MoRAM(rank=2, alpha=4.0, k=2, bank={}, base_dtype='int8', "
        "targets=('attention', 'experts'))"
    )
    found = chain(folder, base, "int8bank", [own.format(bank) for bank in (0, 2, 4)])
    first, last = kept(found[1]), kept(found[3])
    small = [name for name in last if name.endswith("/values")]
    assert small and all(last[name].dtype == np.int8 for name in small)
    for name in {*first} - {n for n in first if "adapters" in n}:
        np.testing.assert_array_equal(last[name], first[name], err_msg=name)
    for before, after in pairwise(found[1:]):
        atoms = flat_paths(consolidated(load_run(before).params, 2.0))
        now = kept(after)
        for name in (n for n in atoms if "bank_" in n):
            np.testing.assert_array_equal(now[name], atoms[name], err_msg=name)
    assert any(last[n].shape[-1] == 4 for n in last if n.endswith("bank_a_INM"))
    export_adapter(found[3], tmp_path / "files", say=lambda line: None)
    run = tmp_path / "run"
    import_adapter(base, tmp_path / "files", run, say=lambda line: None)
    again = kept(run)
    for name, array in last.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    options = {"max_new_tokens": 6, "temperature": 0, "seed": 0}
    assert write_text(run, ["the cat"], **options) == write_text(
        found[3], ["the cat"], **options
    )
