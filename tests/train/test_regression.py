"""A task that is no language model: trained, resumed, scored, compared and reported."""

import json
import math
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moex import cli
from moex.analysis.record import trace_run
from moex.analysis.trace import Trace
from moex.config.base import ConfigError
from moex.config.flags import load_config
from moex.moe.routers.hash import Hash
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.tasks.base import Task
from moex.train import loop, training
from tests import documented, runs

STEPS = 6

CONFIG = """
from moex.configs import regression
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.series import SeriesModel
from moex.nn.stack import Segment
from moex.runs.keys import Checkpoint, Eval, Log


def get_config(arg=""):
    cfg = regression.get_config()
    moe = MoE(num_experts=4, router=TopK(k=2, bias_rate=0.01), experts=Glu(hidden=8))
    cfg.model = SeriesModel(
        dim=16, attention=Attention(heads=2), layers=(Segment(pattern=(moe,)),)
    )
    cfg.data.paths, cfg.data.patch, cfg.data.time = (SERIES,), 2, None
    cfg.steps, cfg.batch_size, cfg.seq_len = 6, 4, 8
    cfg.kernels = "xla"  # the quickest to compile
    cfg.optim.schedule, cfg.optim.warmup_steps = "constant", 1
    cfg.eval = Eval(every=3, sequences=None, overlap=4)
    cfg.checkpoint = Checkpoint(every=2, keep=4, keep_best=1)
    cfg.log = Log(every=1, images_every=6)
    return cfg
"""


@pytest.fixture(scope="module", autouse=True)
def setting():
    with runs.one_device(), runs.one_trace_of_equal_configs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config file and its series: two waves and their sum."""
    folder = tmp_path_factory.mktemp("regression")
    t = np.arange(400)
    a, b = np.sin(t / 3), np.cos(t / 7)
    rows = [f"{x:.6f},{y:.6f},{x + y:.6f}" for x, y in zip(a, b, strict=True)]
    (folder / "waves.csv").write_text("\n".join(["a,b,both", *rows]) + "\n")
    text = CONFIG.replace("SERIES", repr(str(folder / "waves.csv")))
    (folder / "waves.py").write_text(text)
    return folder


def config(folder, *overrides):
    file = f"--config={folder / 'waves.py'}"
    return load_config([file, *(f"--config.{o}" for o in overrides)])


def train(folder, workdir, *overrides):
    return training.train(config(folder, *overrides), workdir, say=lambda line: None)


@pytest.fixture(scope="module")
def straight(folder):
    """(workdir, result) of an undisturbed run."""
    return folder / "straight", train(folder, folder / "straight")


@pytest.fixture
def moex(capsys):
    def moex(*args):
        """(exit code, stdout, stderr) of a command."""
        capsys.readouterr()  # of what was trained before
        code = 0
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return moex


@pytest.mark.thorough
def test_experts_of_a_series_can_wait_in_a_bank(straight, moex, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEX_CACHE", str(tmp_path))
    code, want, said = moex("eval", straight[0], "--json")
    assert code == 0, said
    code, own, said = moex("eval", straight[0], "--json", "--offload=1")
    assert code == 0, said
    want, own = json.loads(want), json.loads(own)
    assert own.keys() == want.keys() and own["tokens"] == want["tokens"]
    for name in ("mse", "mae", "naive_mse"):
        assert own[name] == pytest.approx(want[name], rel=1e-5), name
    for flag in ("--offload-host", "--offload-prefetch=impact"):
        code, _, said = moex("eval", straight[0], "--offload=1", flag)
        assert code == 2 and "needs a run whose tokens are text" in said


@pytest.mark.thorough
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, straight):
    workdir = folder / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        look = loop.Run._look

        def looked(run, at, *args):
            look(run, at, *args)
            run.stop_asked |= at == 3

        patch.setattr(loop.Run, "_look", looked)
        left = train(folder, workdir)
    assert left["stopped"] and 3 <= left["step"] < STEPS
    train(folder, workdir)
    cfg = config(folder)
    states = [runs.saved_state_of(cfg, path) for path in (straight[0], workdir)]
    assert states[0][0] == STEPS
    runs.assert_same_state(*states)
    for kind in ("train", "eval"):
        logs = [runs.records(path, kind) for path in (straight[0], workdir)]
        assert logs[0] and logs[0] == logs[1]


def test_its_figures_are_logged_and_the_loss_falls(straight):
    workdir, result = straight
    lines = runs.records(workdir)
    assert {"mse", "mae", "naive_mse", "naive_mae"} <= lines[0].keys()
    assert not {"nll", "bits_per_byte"} & lines[0].keys()
    assert lines[-1]["mse"] < lines[0]["mse"]
    assert lines[-1]["moe/experts_per_token"] == 2
    held = runs.records(workdir, "eval")[-1]
    assert held["mse"] == result["eval_mse"]
    assert held["tokens"] == 80 // 2 - 1  # each held-out token but the first, once


def test_the_naive_figures_are_those_of_repeating_the_last_step(folder, straight):
    text = (folder / "waves.csv").read_text().splitlines()[1:]
    value_TC = np.array([[float(x) for x in line.split(",")] for line in text])
    scaled = (value_TC - value_TC[:320].mean(0)) / value_TC[:320].std(0)
    token_LPC = scaled[320:].reshape(40, 2, 3)
    off = token_LPC[1:] - token_LPC[:-1, -1:]
    result = straight[1]
    assert result["eval_naive_mse"] == pytest.approx(np.mean(off**2), rel=1e-5)
    assert result["eval_naive_mae"] == pytest.approx(np.mean(np.abs(off)), rel=1e-5)


def test_routing_is_in_tensorboard(straight):
    events = EventAccumulator(str(straight[0] / "tb"), size_guidance={"images": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"basics/loss", "scores/mae_held_out", "moe/max_violation_mean"} <= tags
    assert "moe/expert_load" in events.Tags()["images"]
    assert (straight[0] / "routing.jsonl").read_text().count("\n") >= STEPS


def test_eval_tells_its_own_scores(straight, moex, folder):
    workdir, result = straight
    code, out, _ = moex("eval", workdir)
    assert code == 0
    assert re.search(rf"\n  MSE +{result['eval_mse']:.4f}\n", out)
    assert "MAE of repeating the last step" in out and "perplexity" not in out
    code, out, _ = moex("eval", workdir, "--data", folder / "waves.csv", "--json")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 400 // 2 - 1
    assert found["naive_mse"] != result["eval_naive_mse"]


@pytest.fixture(scope="module")
def traced(folder, straight):
    """The trace of the run."""
    made = folder / "t.parquet"
    cfg = RunDir(straight[0]).config()
    assert trace_run(straight[0], cfg, made)["tokens"] == 80 // 2 - 1
    return made


def test_its_routing_is_traced_and_analysed_without_token_ids(traced, moex, folder):
    with Trace.open(traced) as trace:
        assert trace.header.tokenizer is None and trace.vocabulary == ()
        (chunk,) = trace.chunks()
        assert not chunk.tokens.token_N.any()
        assert chunk.layers["000"].keep_NK.sum() == 2 * len(chunk.tokens)
    code, out, error = moex("analyse", traced, "--json")
    assert code == 0, error
    row = json.loads(out)["layers"]["000"]
    assert row["experts_per_token"] == 2
    assert row["vocabulary_specialisation"] is None
    code, _, error = moex("analyse", traced, "--token=a")
    assert code == 2 and "'a': the tokens of" in error and "have no text" in error


def test_traces_of_other_series_are_not_compared(straight, traced, moex, folder):
    """No token ids tell that the data differ, so the configs of the data must agree."""
    copy = folder / "copy" / "waves.csv"  # its domain has the same name
    copy.parent.mkdir()
    copy.write_bytes((folder / "waves.csv").read_bytes())
    other = RunDir(straight[0]).config()
    other.data.paths = (str(copy),)
    made = folder / "other.parquet"
    trace_run(straight[0], other, made)
    code, _, error = moex("analyse", traced, f"--compare={made}")
    assert code == 2 and "traces of other data; their config.data differ" in error


@pytest.mark.slow
def test_params_compare_and_report_show_it(straight, moex, folder, traced):
    workdir, _ = straight
    code, out, _ = moex("params", f"--config={folder / 'waves.py'}")
    assert code == 0 and "MoE(4, TopK, Glu)" in out
    train(folder, folder / "short", "steps=3")
    code, out, error = moex("compare", workdir, folder / "short", "--json")
    assert code == 0, error
    (group, _) = json.loads(out)["groups"]
    assert group["runs"][0]["best_eval_mse"] <= group["runs"][0]["last_eval_mse"]
    code, out, _ = moex("compare", workdir, folder / "short")
    assert "best mae" in out and "MSE of the last training line" in out
    code, out, error = moex("report", workdir, f"--trace={traced}")
    assert code == 0, error
    text = (workdir / "report.html").read_text()
    assert "MSE of repeating the last step" in text and "Bits per byte" not in text


TEXT_VERBS = {
    "generate": ("generate", "RUN", "--prompt=a"),
    "eval --tasks": ("eval", "RUN", "--tasks=hellaswag"),
    "export-hf": ("export-hf", "RUN", "--out=OUT"),
}


@pytest.mark.parametrize("verb", TEXT_VERBS)
def test_verbs_of_text_refuse_it_in_one_line(straight, moex, tmp_path, verb):
    words = {"RUN": straight[0], "--out=OUT": f"--out={tmp_path / 'out'}"}
    code, _, error = moex(*(words.get(a, a) for a in TEXT_VERBS[verb]))
    assert code == 2
    assert error.count("\n") == 1 and f"moex {verb}: needs a run whose tokens" in error


def test_inspecting_the_data_as_text_is_refused(moex, folder):
    code, _, error = moex("data", "inspect", f"--config={folder / 'waves.py'}")
    assert code == 2 and "moex data inspect: needs a run whose tokens" in error


def test_what_it_was_trained_with_may_not_change(folder, straight):
    lines = (folder / "waves.csv").read_text().splitlines()[:-5]
    (folder / "other.csv").write_text("\n".join(lines))
    other = f"data.paths=({str(folder / 'other.csv')!r},)"
    for change, name in ((other, "data.scale"), ("data.patch=4", "data.patch")):
        with pytest.raises(ConfigError, match=rf"holds a run with config.{name} = "):
            train(folder, straight[0], change, "steps=7")


MISTAKES = {
    "loss.z=0.1": "config.loss.z = 0.1: must be 0: Regression has no such loss",
    "model.numbers=5": "config.model.numbers = 5: must be 6, columns of the data times",
    "data.time=day": "config.data.time = 'day': .* has no such column",
}


@pytest.mark.parametrize("change", MISTAKES)
def test_a_wrong_config_is_told_in_one_line(folder, tmp_path, change):
    with pytest.raises(ConfigError, match=MISTAKES[change]):
        train(folder, tmp_path / "run", change)


def test_models_and_data_of_another_task_are_refused(folder, tmp_path):
    cfg = runs.config(tmp_path)
    cfg.task = config(folder).task
    said = "config.model = 'LM': must be SeriesModel, which Regression takes"
    with pytest.raises(ConfigError, match=said):
        training.train(cfg, tmp_path / "run")
    both = config(folder)
    both.data = runs.config(tmp_path).data
    with pytest.raises(ConfigError, match="config.data = 'Data': must be Series"):
        training.train(both, tmp_path / "run")


def test_a_router_that_needs_token_ids_is_refused(folder, tmp_path):
    cfg = config(folder)
    cfg.model.layers[0].pattern[0].router = Hash(k=2)
    said = r"config.model.layers\[0\].pattern\[0\].router = 'Hash': must be another"
    with pytest.raises(ConfigError, match=said):
        training.train(cfg, tmp_path / "run")


def test_the_score_of_a_task_is_its_first_figure(folder):
    task: Task = config(folder).task
    assert task.score == "mse"
    assert task.brief({"mse": math.nan}) == "no target"


@pytest.mark.thorough
def test_the_task_of_the_documentation_trains_and_is_scored(folder, tmp_path, moex):
    """A loss of one's own, in a folder of one's own."""
    code = documented.files()["robust.py"]
    (tmp_path / "robust.py").write_text(code, encoding="utf-8")
    own = "    cfg.task = Robust(delta=0.5)\n    return cfg"
    made = (folder / "waves.py").read_text().replace("    return cfg", own)
    (tmp_path / "own.py").write_text(f"from robust import Robust\n{made}")
    workdir = tmp_path / "run"
    options = ("--config.steps=2", f"--workdir={workdir}")
    status, out, error = moex("train", f"--config={tmp_path / 'own.py'}", *options)
    assert status == 0, error
    assert "huber" in out and "held-out Huber loss" in out
    status, out, error = moex("eval", workdir, f"--project={tmp_path}", "--json")
    assert status == 0, error
    found = json.loads(out)
    assert 0 < found["huber"] < 0.5 * found["mae"]


CONVERSIONS = {
    "latent": ("--group=2", "--latent=4"),
    "moe": ("--experts=4", "--k=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_run_is_converted_and_trained_on(folder, straight, tmp_path, moex, kind):
    old = straight[0]
    if kind == "moe":  # it makes dense layers sparse
        old, cfg = tmp_path / "dense", config(folder)
        cfg.model.layers = (Segment(pattern=(Dense(hidden=8),)),)
        training.train(cfg, old, say=lambda line: None)
    new = tmp_path / "new"
    words = ("convert", old, f"--to={kind}", *CONVERSIONS[kind], f"--workdir={new}")
    code, out, error = moex(*words)
    assert code == 0, error
    assert f"moex train --config={new} --workdir={new}" in out
    code, out, error = moex("train", f"--config={new}", f"--workdir={new}")
    assert code == 0, error
    assert RunDir(new).saved_steps()[-1] == STEPS
