"""Distillation: its loss and gradient in float64, and a run that learns from another.

B batch · L length · V vocabulary
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert.apply import convert_run
from moex.convert.kinds.lowrank import ToLowRank
from moex.model.paths import flat_paths
from moex.runs.base import Teacher
from moex.runs.directory import RunDir
from moex.runs.keys import Loss
from moex.runs.open import load_run
from moex.tasks.distillation import Distillation, divergence
from tests import runs
from tests.helpers import XLA, built, random_batch, tiny_lm
from tests.marks import slow
from tests.tolerances import assert_close

B, L = 4, 8
ALONE = Loss(load_balance=0.0, router_z=0.0)


def slow_divergence(teacher_V, student_V, temperature):
    """By its definition, in float64."""
    p, q = (np.exp(z / temperature) for z in (teacher_V, student_V))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_that_of_the_definition(temperature):
    random = np.random.default_rng(0)
    teacher_BLV, student_BLV = random.normal(0, 3, (2, 2, 3, 7)).astype(np.float32)
    found = divergence(teacher_BLV, student_BLV, temperature)
    for b, t in np.ndindex(2, 3):
        pair = (a[b, t].astype(np.float64) for a in (teacher_BLV, student_BLV))
        assert_close(found[b, t], slow_divergence(*pair, temperature), "float32")


@pytest.fixture(scope="module")
def models():
    """The specs, parameters and states of a student and of its teacher, and a batch."""
    cfg = tiny_lm()
    spec, params, state = built(cfg)
    _, taught, _ = built(cfg, seed=1)
    batch = random_batch(B, L)
    batch["segment"][0, 5:] = 0  # padding is not scored
    batch["loss_mask"] = batch["loss_mask"] * (batch["segment"] > 0)
    return spec, params, taught, state, batch


def loss_of(task, models, params, taught):
    spec, _, _, state, batch = models
    ctx = task.context(batch, mode="train", compute=XLA)
    teacher = {}
    if isinstance(task, Distillation):
        teacher = {"teacher": spec.merge(taught, state)}
    student = spec.merge(params, state)
    return task.loss(student, ctx, batch, ALONE, num_domains=2, **teacher)


def logits(models, params):
    spec, _, _, state, batch = models
    task = Distillation(teacher="t")
    ctx = task.context(batch, mode="eval", compute=XLA)
    return np.asarray(jax.jit(lambda p: spec.merge(p, state)(ctx)[0])(params), "f8")


@pytest.mark.thorough
@pytest.mark.parametrize("over", [slow("tokens"), "sequences"])
def test_it_is_added_to_the_cross_entropy(models, over):
    _, params, taught, _, batch = models
    task = Distillation(teacher="t", weight=0.3, temperature=2.0, over=over)
    plain = Distillation(teacher="t", weight=0.0)
    loss, sums = jax.jit(lambda p: loss_of(task, models, p, taught))(params)
    alone, _ = jax.jit(lambda p: loss_of(plain, models, p, taught))(params)
    theirs, ours = logits(models, taught), logits(models, params)
    scored = np.asarray(batch["loss_mask"], "f8")
    count = scored.sum()
    if over == "sequences":
        scored, count = np.asarray(batch["segment"] > 0, "f8"), B
    total = sum(
        scored[i] * slow_divergence(theirs[i], ours[i], 2.0)
        for i in np.ndindex(B, L)
        if scored[i]
    )
    assert total / count > 0.01
    assert_close(loss - alone, 0.3 * total / count, "float32")
    assert_close(sums["weighted"]["distillation"], 0.3 * total / count, "float32")


@pytest.mark.thorough
def test_its_gradient_is_that_of_differences_and_the_teacher_has_none(models):
    _, params, taught, _, _ = models
    task = Distillation(teacher="t", weight=1.0)

    def told(params, taught):
        return loss_of(task, models, params, taught)[1]["weighted"]["distillation"]

    own, its = jax.jit(jax.grad(told, (0, 1)))(params, taught)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(its))
    name = "w_logits_DV"
    gradient = np.asarray(flat_paths(own)[name], "f8")
    side = np.random.default_rng(0).normal(size=gradient.shape)
    side /= np.linalg.norm(side)
    move = jax.jit(lambda e: told(params | {name: params[name] + e * side}, taught))
    slope = (float(move(1e-2)) - float(move(-1e-2))) / 2e-2
    assert slope == pytest.approx(np.vdot(gradient, side), rel=0.02, abs=1e-5)


def test_a_student_that_is_its_teacher_has_no_divergence(models):
    _, params, _, _, _ = models
    task = Distillation(teacher="t")
    run = jax.jit(lambda p: loss_of(task, models, p, p)[1]["weighted"])
    assert abs(float(run(params)["distillation"])) < 1e-7


def distilled(folder, teacher, *overrides):
    cfg = runs.config(folder, *overrides)
    cfg.task = Distillation(teacher=str(teacher), weight=1.0)
    cfg.optim = dataclasses.replace(cfg.optim, lr_factors=(("*router*", 0.0),))
    return cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained run `teacher`."""
    folder = tmp_path_factory.mktemp("distillation")
    with runs.one_device():
        runs.train(folder, folder / "teacher", "eval.every=0")
    return folder


@pytest.mark.thorough
def test_a_run_learns_from_another_and_resumes_to_the_bit(folder, tmp_path):
    said: list[str] = []
    teacher = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", teacher)

    def go_on(workdir, *overrides):
        cfg = distilled(folder, teacher, "eval.every=0", *overrides)
        cfg.init_from = str(folder / "teacher")
        runs.training.train(cfg, workdir, say=said.append)

    with runs.one_device():
        go_on(tmp_path / "whole")
        go_on(tmp_path / "parts", "steps=4")
        go_on(tmp_path / "parts")
        whole, parts = (load_run(tmp_path / n) for n in ("whole", "parts"))
    runs.assert_same_arrays(parts.params, whole.params)
    assert f"learning from {teacher} at step 8" in said
    kept = json.loads((tmp_path / "whole" / "teacher.json").read_text())
    assert kept["step"] == 8 and kept["run"] == "../teacher"
    lines = runs.records(tmp_path / "whole")
    told = [line["loss/distillation"] for line in lines if line["kind"] == "train"]
    # It begins as its teacher, and the data alone moves it away.
    assert len(told) == 8 and abs(told[0]) < 1e-6 < told[-1]

    # Another teacher in its place is noticed, and so is one that is gone.
    logged = (tmp_path / "parts" / "metrics.jsonl").read_bytes()
    shutil.rmtree(teacher)
    with runs.one_device():
        with pytest.raises(ConfigError, match=r"config.task.teacher.*no run directory"):
            go_on(tmp_path / "parts", "steps=10")
        low = [ToLowRank(factor_rank=4)]  # a conversion needs no teacher
        options = {"sequences": 0, "say": said.append}
        convert_run(tmp_path / "whole", tmp_path / "low", low, **options)
        assert load_run(tmp_path / "low").cfg.task.teacher == str(teacher)
        runs.train(folder, teacher, "seed=3", "eval.every=0")
        with pytest.raises(ConfigError, match="learns from step 8.* not the same"):
            go_on(tmp_path / "parts", "steps=10")
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == logged


def test_a_teacher_is_looked_at_before_any_work(folder, tmp_path, monkeypatch):
    """Before data are read: it is gone, has no checkpoint, or is not the same."""
    monkeypatch.setattr(runs.training, "make_job", None)
    teacher, run = RunDir(tmp_path / "teacher"), RunDir(tmp_path / "run")
    cfg = distilled(folder, teacher.path)

    def told(dry_run=False):
        with pytest.raises(ConfigError) as error:
            runs.training.train(cfg, run, dry_run=dry_run, say=lambda line: None)
        return str(error.value)

    assert told() == told(dry_run=True)
    assert told().endswith("teacher': is no run directory.")
    teacher.path.mkdir()
    shutil.copy(folder / "teacher" / "config.json", teacher.config_file)
    assert told().endswith("teacher': the run has no checkpoint yet.")
    assert not run.path.exists()
    (teacher.checkpoints / "8").mkdir(parents=True)
    run.path.mkdir()
    shutil.copy(teacher.config_file, run.config_file)
    Teacher(teacher, 7, None).save(run)
    assert "learns from step 7 of" in told() and "no such checkpoint any" in told()
    Teacher(teacher, 8, "other").save(run)
    assert "whose parameters are not the same any more" in told()


@pytest.mark.slow
def test_a_run_that_never_began_may_take_another_teacher(folder, tmp_path):
    """Killed between teacher.json and config.json; then the config names another."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    Teacher(RunDir(tmp_path / "gone"), 3, None).save(run)
    cfg, said = distilled(folder, folder / "teacher", "steps=2", "eval.every=0"), []
    with runs.one_device():
        runs.training.train(cfg, run.path, say=said.append)
    assert f"learning from {folder / 'teacher'} at step 8" in said
    assert Teacher.read(run).folder.path == (folder / "teacher").absolute()


@pytest.mark.parametrize(
    ("teacher", "overrides", "told"),
    [
        ("nowhere", (), r"config.task.teacher = .*nowhere.*no run directory"),
        ("teacher", ("model.vocab=300",), "vocabulary has 257 tokens, .* 300"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(folder, teacher, overrides, told):
    cfg = distilled(folder, folder / teacher, *overrides)
    with runs.one_device(), pytest.raises(ConfigError, match=told):
        runs.training.train(cfg, None, dry_run=True, say=lambda line: None)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"teacher": ""}, "task.teacher"),
        ({"teacher": "t", "weight": -1.0}, "task.weight"),
        ({"teacher": "t", "temperature": 0.0}, "task.temperature"),
        ({"teacher": "t", "over": "batch"}, "task.over"),
    ],
)
def test_fields_out_of_range_are_refused(folder, fields, told):
    cfg = runs.config(folder)
    cfg.task = Distillation(**fields)
    with pytest.raises(ConfigError, match=told):
        runs.training.train(cfg, None, dry_run=True, say=lambda line: None)


def test_a_dry_run_traces_the_step_and_reads_no_teacher(folder, monkeypatch):
    monkeypatch.setattr("moex.train.teacher.load_run", None)
    said: list[str] = []
    with runs.one_device():
        cfg = distilled(folder, folder / "teacher")
        runs.training.train(cfg, None, dry_run=True, say=said.append)
    assert said[-1].startswith("dry run: the config is good")
