"""Stores of patterns: which task a prompt is of, and reading its experts alone."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert import source
from moex.convert.apply import convert_run, report_text
from moex.convert.kinds.subset import Subset
from moex.convert.load_kept import load_kept
from moex.convert.plans import Keep, Plan
from moex.convert.store import Pattern, Store, marked_mean
from moex.convert.to_pruned import Pruned
from moex.model.steering import LayerSteering, Steering
from moex.moe.routers.topk import TopK
from moex.nn.stack import Segment
from moex.runs.base import base_hash
from moex.runs.checkpoint import CheckpointError
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.serve.experts import first_query, load_experts, queries
from tests.helpers import assert_equal_trees, tiny_lm, tiny_moe


def store(**changes):
    patterns = tuple(
        Pattern(
            task=task,
            keys={"000": [x, 0.0], "001": [0.0, 2 * x]},
            layers=(Keep(layer=0, experts=2, keep=(n,)),),
        )
        for n, (task, x) in enumerate((("code", 1.0), ("prose", -1.0)))
    )
    facts = {
        "run": "runs/a",
        "step": 3,
        "base": "0",
        "pool": 1,
        "how": {"score": "peu"},
    }
    return Store(**facts | {"patterns": patterns} | changes)


def test_a_query_is_the_mean_of_the_greatest_logits():
    """Section 2h of the paper notes; of equal logits the first expert counts."""
    logits_NE = [[3, 1, 2], [-1, -3, -2], [0, 5, 1]]
    np.testing.assert_allclose(marked_mean(logits_NE, 1), [2 / 3, 5 / 3, 0])
    np.testing.assert_allclose(marked_mean(logits_NE, 2), [2 / 3, 5 / 3, 1 / 3])
    np.testing.assert_allclose(marked_mean([[1, 2, 2]], 1), [0, 2, 0])


def test_the_nearest_task_is_found_and_the_first_of_equals():
    found = store().find({"000": np.array([0.5, 0.0])})
    assert found == ("code", 0.25, {"code": 0.25, "prose": 2.25})
    found = store().find({"000": np.array([0.5, 0.0]), "001": np.array([0.0, -2.0])})
    assert found == ("prose", 2.25, {"code": 16.25, "prose": 2.25})
    assert store().find({"000": np.zeros(2)}).task == "code"


def test_a_store_is_read_as_it_was_written_and_gives_plans(tmp_path):
    file = tmp_path / "store.json"
    store().save(file)
    assert Store.read(file) == store()
    plan = store().plan("prose")
    assert plan.layers == (Keep(layer=0, experts=2, keep=(1,)),)
    assert plan.how == {"score": "peu", "task": "prose"}
    with pytest.raises(
        ConfigError, match="the store: no task 'prosa'.*Did you mean 'prose'"
    ):
        store().plan("prosa")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d | {"kind": "keep"}, "kind = 'keep': must be 'store'"),
        (lambda d: d | {"pool": 0}, "pool = 0: must be at least 1"),
        (lambda d: d | {"tasks": []}, "tasks"),
        (lambda d: d | {"tasks": d["tasks"] * 2}, "task code stands there twice"),
        (
            lambda d: d | {"tasks": [d["tasks"][0] | {"task": "auto"}]},
            "another name than 'auto', 'all'",
        ),
        (
            lambda d: d | {"tasks": [d["tasks"][0] | {"keys": {"000": []}}]},
            "task code: keys[000]",
        ),
        (
            lambda d: d | {"tasks": [d["tasks"][0] | {"keys": {"000": [1e39, 0]}}]},
            "task code: keys[000] = [1e+39, 0]: must be up to 3.4e+38",
        ),
        (lambda d: d | {"task": []}, "no such field: 'task'. Did you mean 'tasks'"),
        (
            lambda d: d | {"tasks": [d["tasks"][0] | {"layers": []}]},
            "task code: layers",
        ),
    ],
)
def test_a_mistake_in_a_store_is_one_line_that_names_the_task(tmp_path, change, told):
    file = tmp_path / "store.json"
    store().save(file)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ConfigError) as error:
        Store.read(file)
    assert str(error.value).startswith(str(file))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_are_checked_against_the_routers_of_the_model():
    def model(experts, repeat=2):
        moe = tiny_moe(num_experts=experts, router=TopK(k=1))
        return tiny_lm(Segment(pattern=(moe,), repeat=repeat))

    store().check(model(2))
    with pytest.raises(ConfigError, match="pool = 3: must be at most 2"):
        store(pool=3).check(model(2))
    for other in (model(3), model(2, repeat=1)):
        with pytest.raises(ConfigError, match="the store: task code: keys"):
            store().check(other)


# A run.

KEEPS = ((0, 2), (3,))


def plan_of(run, *keeps):
    model = RunDir(run).config().model
    layers = tuple(Keep(layer=n, experts=4, keep=k) for n, k in enumerate(keeps))
    facts = {"kind": "keep", "run": str(run), "step": 0, "base": base_hash(model)}
    return Plan(layers=layers, **facts)


@pytest.mark.thorough
def test_only_the_experts_of_a_plan_are_read_from_the_disk(moe_run):
    """Every expert is a piece of the files here; copies keep other numbers of them."""
    sizes = {}
    whole = load_run(moe_run)
    for keeps in (KEEPS, ((0, 1, 2, 3),) * 2):
        plan = plan_of(moe_run, *keeps)
        kept = load_kept(moe_run, plan)
        pruned = Pruned.of(whole.cfg.model, plan)
        assert_equal_trees(kept.run.params, pruned.arrays(whole.params))
        assert_equal_trees(kept.run.state, pruned.arrays(whole.state))
        sizes[keeps] = kept.bytes_read
    few, every = sizes.values()
    experts = 3 * 32 * 32 * 4  # bytes of one of the 8 experts
    # Random numbers compress to about 0.93 of their bytes.
    assert 0.85 * 5 * experts < every - few < 1.0 * 5 * experts


@pytest.mark.slow
def test_a_subset_is_written_without_the_other_experts_being_read(
    moe_run, tmp_path, monkeypatch
):
    def whole(*args, **kwargs):
        raise AssertionError("the whole run is read")

    plan, quiet = plan_of(moe_run, (0, 2), (3, 1)), {"say": lambda line: None}
    expected = load_kept(moe_run, plan)
    monkeypatch.setattr(source, "load_run", whole)
    report = convert_run(moe_run, tmp_path / "new", [Subset(plan=plan)], **quiet)
    assert report["bytes_read"] == expected.bytes_read
    assert report["loss"]["before"] is None and report["loss"]["after"] > 0
    assert report["kept"] == {"0": [2, 4], "1": [2, 4]}
    monkeypatch.undo()
    made = load_run(tmp_path / "new")
    assert_equal_trees(made.params, expected.run.params)
    assert_equal_trees(made.state, expected.run.state)
    text = report_text(report, [Subset(plan=plan)])
    assert f"read {expected.bytes_read:,} bytes of the checkpoint" in text
    assert "held-out loss, nats per token: " in text and "None" not in text


@pytest.mark.thorough
def test_a_prompt_finds_its_task_without_the_experts_being_read(moe_run, tmp_path):
    model = RunDir(moe_run).config().model
    run = load_run(moe_run)
    ids = run.tokenizer.prompt("the cat sees a dog")
    every = queries(run, ids, 1)
    first = first_query(RunDir(moe_run), ids, 1)
    assert list(first) == ["000"]
    np.testing.assert_allclose(first["000"], every["000"], atol=1e-5)
    patterns = tuple(
        Pattern(
            task=task,
            keys={name: (key + shift).tolist() for name, key in every.items()},
            layers=plan_of(moe_run, *keeps).layers,
        )
        for task, shift, keeps in (("far", 1.0, ((0,), (1,))), ("near", 0.1, KEEPS))
    )
    file = tmp_path / "store.json"
    store(run=str(moe_run), base=base_hash(model), patterns=patterns).save(file)
    for word in ("auto", "all", "near"):
        said = []
        found = load_experts(moe_run, f"{word}:{file}", ids, say=said.append)
        expected = load_kept(moe_run, plan_of(moe_run, *KEEPS)).run
        assert_equal_trees(found.run.params, expected.params)
        if word != "near":
            distance = 0.04 if word == "auto" else 0.08  # of 4 experts, and of 8
            assert said[0].startswith("experts of near: squared distance ")
            assert float(said[0].split()[5].rstrip(";")) == pytest.approx(distance)
        assert any("bytes of a checkpoint" in line for line in said)
    for asked, told in {
        "near": "must be TASK:STORE",
        f"nera:{file}": "no task 'nera'",
        f"near:{tmp_path / 'no.json'}": "no.json",
    }.items():
        with pytest.raises(ConfigError, match=told):
            load_experts(moe_run, asked, ids)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        load_experts(moe_run, f"auto:{file}", [])
    other = store(run="other", patterns=patterns)
    other.save(file)
    with pytest.raises(ConfigError, match="the plan is for another model"):
        load_experts(moe_run, f"near:{file}", ids)


def test_a_damaged_checkpoint_is_told(moe_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(moe_run, copy)
    for file in (copy / "checkpoints" / "0" / "params").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_kept(copy, plan_of(moe_run, *KEEPS))


@pytest.mark.thorough
def test_a_task_of_a_store_is_generated_with_and_converted(moex, moe_run, tmp_path):
    file, new = tmp_path / "store.json", tmp_path / "new"
    to = ("convert", moe_run, "--to=subset")
    made = moex(*to, "--keep=2", "--calibration=4", f"--write-store={file}")
    task = Store.read(file).patterns[0].task
    assert f"a store of the tasks {task}" in made
    moex(*to, f"--store={file}", f"--task={task}", f"--workdir={new}")
    greedy = ("--prompt=the cat", "--max-new-tokens=6", "--temperature=0")
    expected = moex("generate", new, *greedy)
    for asked in (task, "auto"):
        assert (
            moex("generate", moe_run, *greedy, f"--experts={asked}:{file}") == expected
        )
    keep = Store.read(file).plan(task).layers[0].keep
    gone = min({0, 1, 2, 3} - set(keep))
    steer, whole = tmp_path / "steer.json", tmp_path / "whole.json"
    own = LayerSteering(layer=0, scale={keep[0]: 3.0}, force=(keep[1],))
    Steering(layers=(own,)).save(steer)
    bans = tuple(
        LayerSteering(layer=x.layer, ban=tuple({0, 1, 2, 3} - set(x.keep)))
        for x in Store.read(file).plan(task).layers
    )
    first = dataclasses.replace(own, ban=bans[0].ban)
    Steering(layers=(first, *bans[1:])).save(whole)
    generate, experts = ("generate", moe_run, *greedy), f"--experts={task}:{file}"
    found = moex(*generate, experts, f"--steer={steer}")
    assert found == moex(*generate, f"--steer={whole}") != expected
    Steering(layers=(LayerSteering(layer=0, force=(gone,)),)).save(steer)
    told = moex(*generate, experts, f"--steer={steer}")
    assert f"force = {gone}: must be an expert that the task {task} of {file}" in told
    for flags, told in {
        (f"--store={file}",): "--task: missing; whose experts stay?",
        (f"--task={task}",): "--task: is a task of --store; give both.",
        ("--keep=2",): "needs --store and --task",
        (): "--store: missing",
    }.items():
        assert told in moex(*to, *flags, f"--workdir={tmp_path / 'no'}")
