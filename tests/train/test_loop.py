"""Training as a whole, in this process: resume, guards, branches, what is written."""

import json
import os
import re
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moex.config.base import ConfigError
from moex.data.sources import PythonStdlib
from moex.runs.checkpoint import Checkpointer
from moex.runs.directory import RunDir
from moex.train import loop, resume, training
from moex.train.charts import layout
from moex.train.job import Job, make_job
from tests import runs

STEPS = 8
RICH = (
    *("log.tensorboard=True", "log.detail=detailed", "log.images_every=4"),
    "log.sample_tokens=4",
)


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture
def train(folder):
    def train(workdir, *overrides, **options):
        return runs.train(folder, workdir, *overrides, **options)

    return train


def ask_to_stop(patch, looked_at):
    """SIGTERM when the metrics of a step are looked at.

    That is while the next step runs, or at once where a checkpoint is due.
    """
    look = loop.Run._look

    def looked(run, at, *args):
        look(run, at, *args)
        if at == looked_at:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(loop.Run, "_look", looked)


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """(workdir, result, batches) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("straight") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches = runs.watch_batches(patch)
        result = runs.train(folder, workdir, *RICH)
    return workdir, result, batches


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """(workdir, result, batches, lines said) of a run of four sessions.

    It is stopped at step 3, where a checkpoint is due anyway, and at step 4, where
    none is; then the checkpoint of step 4 loses a bit and step 3 is taken instead.
    """
    workdir, batches, said = tmp_path_factory.mktemp("interrupted"), [], []
    options = (*RICH, "checkpoint.every=3")
    handler = signal.getsignal(signal.SIGTERM)
    for looked_at, stops_at in ((2, 3), (4, 4)):
        with pytest.MonkeyPatch.context() as patch:
            ask_to_stop(patch, looked_at)
            seen = runs.watch_batches(patch)
            result = runs.train(folder, workdir, *options, said=said)
        batches += seen
        assert result["stopped"]
        assert result["step"] == stops_at
    assert signal.getsignal(signal.SIGTERM) == handler
    runs.flip_bit(workdir / "checkpoints" / "4" / "params")
    batches = batches[:3]
    for name in ("metrics.jsonl", "routing.jsonl"):
        with (workdir / name).open("a") as log:
            log.write('{"kind": "train", "step": 6, "loss": 99}\n{"kind": "tr')
    with pytest.MonkeyPatch.context() as patch:
        seen = runs.watch_batches(patch)
        result = runs.train(folder, workdir, *options, said=said)
    return workdir, result, batches + seen, said


def test_resume_gives_the_same_bits(folder, straight, interrupted):
    expected = runs.saved_state(folder, straight[0])
    actual = runs.saved_state(folder, interrupted[0])
    assert expected[0] == STEPS
    tokens = 4 * STEPS * 32
    data = {"sequences": 4 * STEPS, "tokens": tokens, "targets": tokens}
    assert expected[2] == data
    runs.assert_same_state(actual, expected)
    (bias_E,) = jax.tree.leaves(expected[1]["state"])
    assert np.any(bias_E)


def test_resume_gives_the_same_batches(straight, interrupted):
    assert len(straight[2]) == len(interrupted[2])
    for expected, actual in zip(straight[2], interrupted[2], strict=True):
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_resume_gives_the_same_log(straight, interrupted):
    for kind in ("train", "eval"):
        expected = runs.records(straight[0], kind)
        assert runs.records(interrupted[0], kind) == expected
    assert [r["step"] for r in runs.records(straight[0])] == list(range(1, STEPS + 1))
    assert [r["step"] for r in expected] == [4, STEPS]
    logs = [run[0] / "routing.jsonl" for run in (straight, interrupted)]
    assert logs[0].read_text() == logs[1].read_text()
    same = {k: v for k, v in straight[1].items() if not k.startswith("perf/")}
    assert same.items() <= interrupted[1].items()


def test_a_damaged_checkpoint_is_set_aside_with_a_warning(interrupted):
    workdir, _, _, said = interrupted
    (warning,) = [line for line in said if "warning" in line]
    assert "checkpoint 4 is damaged and set aside" in warning
    assert (workdir / "corrupt" / "4" / "params").is_dir()
    resumed = [line for line in said if line.startswith("resuming")]
    assert [line.split()[-1] for line in resumed] == ["3", "3"]


def test_the_loss_falls(straight):
    losses = [r["nll"] for r in runs.records(straight[0])]
    # Bytes at random: log(257) = 5.5 nats. Eight steps learn which letters there are.
    assert 5.3 < losses[0] < 6.5
    assert losses[-1] < losses[0] - 1.5


def test_all_held_out_targets_are_scored_once_at_the_end(folder, straight):
    data = make_job(runs.config(folder), log=lambda line: None).data
    masks = [data.eval[0][i]["loss_mask"] for i in range(len(data.eval[0]))]
    assert len(masks) % 4, "the last batch should be filled up"
    _, last = runs.records(straight[0], "eval")
    assert last["tokens"] == np.sum(masks)
    assert last["nll"] == straight[1]["eval_nll"]
    assert last["bits_per_byte"] == straight[1]["eval_bits_per_byte"]
    # A byte is a token, and the token that ends a document stands for no bytes.
    assert 0.9 * last["tokens"] < last["bytes"] < last["tokens"]


def test_the_routing_of_every_logged_step_and_evaluation_is_written(straight):
    """One MoE layer, number 1, of 4 experts with k = 2, and the bias of each moves."""
    text = (straight[0] / "routing.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = {
        kind: [line["step"] for line in lines if line["kind"] == kind]
        for kind in ("train", "eval")
    }
    assert steps == {"train": list(range(1, STEPS + 1)), "eval": [4, STEPS]}
    for line, record in zip(
        [line for line in lines if line["kind"] == "train"],
        runs.records(straight[0]),
        strict=True,
    ):
        (figures,) = line["layers"].values()
        assert list(line["layers"]) == ["001"]
        assert len(figures["load_frac"]) == 4
        assert sum(figures["load_frac"]) == pytest.approx(1, abs=1e-5)
        assert figures["slots_hist"] == [0, 0, 1]
        for name in ("entropy", "max_violation", "logit_norm", "output_norm"):
            assert figures[name] == pytest.approx(record[f"moe/{name}"], rel=1e-5)


def test_the_parts_of_a_step_sum_to_its_time(straight):
    """Data, dispatch, waiting for the device, and the rest of what the host does."""
    text = (straight[0] / "metrics.jsonl").read_text()
    found = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert len(found) == STEPS
    for line in found:
        parts = [line[f"perf/{p}_s"] for p in ("data", "dispatch", "wait", "other")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(line["perf/step_s"], rel=1e-6)
        assert line["perf/train_flops_per_token"] > 1000
        groups = [v for k, v in line.items() if k.startswith("grad_norm/")]
        assert np.linalg.norm(groups) == pytest.approx(line["grad_norm"], rel=1e-5)


def test_a_chart_of_the_layout_shows_every_series(straight, folder):
    _, found = tags(straight[0])
    page = layout(runs.config(folder, "log.detail=detailed"), num_domains=1)
    patterns = [p for charts in page.values() for _, ps in charts.values() for p in ps]
    # Counts, and the loss of one domain, which is all the data.
    apart = {"train/tokens_seen", "train/targets_seen"}
    apart |= {"perf/train_flops_per_token", "scores/nll_held_out/corpus"}
    for tag in set(found["scalars"]) - apart:
        assert any(re.match(pattern, tag) for pattern in patterns), tag
    assert {"moe/load", "moe_layers/load/layer_001"} < set(found["histograms"])


def tags(workdir):
    events = EventAccumulator(str(workdir / "tb"), size_guidance={"tensors": 0})
    return events.Reload(), events.Tags()


def test_tensorboard_has_all_pages(straight):
    events, found = tags(straight[0])
    scalars = {"basics/loss", "basics/loss_held_out", "basics/lr", "train/grad_norm"}
    scalars |= {"scores/bits_per_byte_held_out", "perf/tokens_per_s"}
    names = ("max_violation", "entropy")
    scalars |= {f"moe_layers/{name}/layer_001" for name in names}
    assert scalars <= set(found["scalars"])
    assert all(len(events.Scalars(tag)) > 1 for tag in found["scalars"])
    assert found["images"] == ["moe/expert_load"]
    assert [e.step for e in events.Images("moe/expert_load")] == [4, 8]
    texts = {"custom_scalars__config__", "sample/text_summary", "config/text_summary"}
    assert texts <= set(found["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    (sample,) = events.Tensors("sample/text_summary")
    assert b"The " in sample.tensor_proto.string_val[0]
    (layout,) = events.Tensors("custom_scalars__config__")
    assert b"Max violation" in layout.tensor_proto.string_val[0]


def test_what_a_report_needs_is_there(straight, interrupted):
    (sample,) = runs.records(straight[0], "sample")
    assert sample["step"] == 8 and sample["texts"][0].startswith("The ")
    starts = json.loads((interrupted[0] / "environment.json").read_text())
    assert len(starts) > 1 and starts[0]["step"] == 0 < starts[-1]["step"]


@pytest.mark.parametrize("tag", ["basics/loss", "moe_layers/entropy/layer_001"])
def test_tensorboard_has_every_step_once_after_a_resume(straight, interrupted, tag):
    expected, actual = (tags(run[0])[0].Scalars(tag) for run in (straight, interrupted))
    assert [e.step for e in expected] == list(range(1, STEPS + 1))
    assert [(e.step, e.value) for e in actual] == [(e.step, e.value) for e in expected]


def test_a_complete_run_is_left_alone(train, straight, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight[0], workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(Job, "train_step", never)
    monkeypatch.setattr(loop, "eval_step", never)
    result = train(workdir)
    assert {k: result[k] for k in result} == {
        k: straight[1][k] for k in ("step", "eval_nll", "eval_bits_per_byte")
    }
    assert "it has taken 8 steps and config.steps is 8" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def never(*args, **kwargs):
    raise AssertionError("must not be called")


def test_a_complete_run_goes_on_with_more_steps(train, straight, tmp_path):
    workdir, said = tmp_path / "run", []
    shutil.copytree(straight[0], workdir)
    kept = json.loads((workdir / "data.json").read_text())
    (name,) = kept
    kept[name][0][2] = "the hash of another text"
    (workdir / "data.json").write_text(json.dumps(kept))
    result = train(workdir, "steps=10", said=said)
    assert result["step"] == 10
    changed = "resuming with changed data: files of 'corpus': 1 changed (corpus.txt); "
    assert any(line.startswith(changed) for line in said)
    again = []
    train(workdir, "steps=10", said=again)
    assert not any("changed data" in line for line in again)
    assert "resuming with a changed config: config.steps: 8 -> 10" in said
    assert [r["step"] for r in runs.records(workdir)] == list(range(1, 11))


def test_where_a_kind_changes_its_fields_are_not_told(straight):
    run = RunDir(straight[0])
    cfg, data = run.config(), types.SimpleNamespace(tokenizer=run.tokenizer())
    cfg.data.sources, cfg.steps = (PythonStdlib(),), 10
    assert resume.check_resume(cfg, run, data) == [
        "config.data.sources[0]: 'Text' -> 'PythonStdlib'",
        "config.steps: 8 -> 10",
    ]


@pytest.mark.thorough
def test_init_from_takes_parameters_only(
    train, folder, straight, tmp_path, monkeypatch
):
    """A decay phase is branched from the run: another schedule, from step 0."""
    began = {}
    start = training._start

    def started(*args):
        run = start(*args)
        began.update(jax.tree.map(np.asarray, run.state), step=run.step)
        return run

    monkeypatch.setattr(training, "_start", started)
    said = []
    branch = ("steps=2", "optim.schedule=wsd", "optim.decay_frac=0.5", "grad_accum=2")
    branch += ("optim.warmup_steps=1",)
    workdir = tmp_path / "branch"
    train(workdir, f"init_from={straight[0]}", *branch, said=said)
    assert began["step"] == 0
    _, saved, _ = runs.saved_state(folder, straight[0])
    for name in ("params", "state"):
        jax.tree.map(np.testing.assert_array_equal, began[name], saved[name])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(began["opt"]))
    assert not any(map(np.any, began["guard"].values()))
    first, second = runs.records(workdir)
    before = runs.records(straight[0])
    assert first["nll"] < before[STEPS // 2]["nll"]
    # One step of warm-up to the peak, and one of decay to a tenth of it.
    assert [first["lr"], second["lr"]] == pytest.approx([0.01, 0.001])
    assert f"starting from the parameters of {straight[0]} at step 8" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers[1].pattern[0].num_experts=8", "architecture: segments/1"),
        ("model.layers[1].repeat=2", "architecture: segments/1"),
        ("model.tied_embeddings=True", "architecture: w_logits_DV"),
    ],
)
def test_init_from_another_architecture(
    train, straight, tmp_path, monkeypatch, override, message
):
    monkeypatch.setattr(Job, "init_state", never)
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", f"init_from={straight[0]}", override)


def test_init_from_what_is_no_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "init_state", never)
    with pytest.raises(ConfigError, match="config.init_from = .*not a run directory"):
        train(tmp_path / "run", f"init_from={tmp_path}")


def test_a_dry_run_writes_nothing(train, tmp_path, monkeypatch):
    monkeypatch.setattr(Job, "init_state", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("not of moex")
    said = []
    assert train(None, said=said, dry_run=True) == {}
    assert train(tmp_path / "run", dry_run=True) == {}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert any("GFLOP per trained token" in line for line in said)
    assert said[-1] == "dry run: the config is good; nothing was trained"


@pytest.mark.thorough
def test_text_without_a_held_out_part_trains(train, tmp_path, capsys):
    said = []
    result = train(
        tmp_path, "data.sources[0].holdout=0.0", "steps=2", "eval.every=1", said=said
    )
    assert "no data is held out: nothing will be evaluated" in said
    assert result["step"] == 2
    assert "eval_nll" not in result
    watch = Checkpointer(tmp_path, read_only=True)
    assert watch.steps() == [2]
    watch.close()


@pytest.mark.thorough
def test_a_profile_of_some_steps(train, tmp_path, capsys):
    result = train(tmp_path, "steps=4", "eval.every=0", profile="1:3")
    assert result["step"] == 4
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert f"wrote the trace of steps 1:3 to {tmp_path}" in capsys.readouterr().out
    # The same command goes on after the steps, and says so.
    train(tmp_path, "steps=5", "eval.every=0", profile="1:3")
    assert "the run is at step 4; nothing is traced" in capsys.readouterr().out


BAD_PROFILES = ("3", "3:", "a:b", "-1:2", "2:2", "3:2", "0:9", "1:2:3")


@pytest.mark.parametrize("wrong", BAD_PROFILES)
def test_a_bad_profile_is_said_before_any_work(train, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(training, "make_job", never)
    message = f"--profile={wrong}: must be START:STOP .* config.steps = 8"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", profile=wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_step_that_is_not_due_is_looked_at_steps_later(train, tmp_path, monkeypatch):
    """Steps 1, 6 and 12 are due; the others when 4 more were dispatched, or with those.

    Step 1 is looked at after step 2 was dispatched; step 6 after step 7, and with it
    what is left; step 12 is the last.
    """
    seen, look = [], loop.Run._look

    def looked(run, step, metrics, due):
        seen.append((step, run.step))
        look(run, step, metrics, due)

    monkeypatch.setattr(loop.Run, "_look", looked)
    options = ("steps=12", "log.every=6", "eval.every=0", "checkpoint.every=0")
    train(tmp_path, *options)
    assert seen == [
        *((1, 2), (2, 6), (3, 7), (4, 7), (5, 7), (6, 7)),
        *((7, 11), (8, 12), (9, 12), (10, 12), (11, 12), (12, 12)),
    ]
