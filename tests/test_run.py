"""The run config: its keys, its checks, and every config file of this repository."""

import dataclasses
import importlib
import pathlib
import re
import sys

import ml_collections
import pytest

from moex import cli, project
from moex.config import base as config
from moex.config import shipped
from moex.config.base import Config, ConfigError, ConfigWarning
from moex.config.flags import load_config
from moex.config.schedule import Schedule
from moex.configs import base
from moex.model.optim import AdamW, Optim
from moex.model.spec import model_spec
from moex.runs.directory import RunDir
from moex.runs.keys import (
    RUN_KEYS,
    Checkpoint,
    Eval,
    Log,
    Loss,
    check_run,
    kernel_names,
)
from tests.helpers import tiny_lm

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
RUNS = [n for n in NAMES if n not in ("__init__", "base", "lm_data", "parse")]


def run_config(**keys):
    cfg = base.get_config()
    values = {key: cfg[key] for key in cfg} | {"model": tiny_lm()} | keys
    return ml_collections.ConfigDict(values, convert_dict=False)


def test_the_keys_of_a_run():
    """Adding a key is a decision: think about whether it belongs to a part instead."""
    assert list(RUN_KEYS) == [
        *("seed", "steps", "batch_size", "seq_len", "grad_accum", "eval", "checkpoint"),
        *("log", "precision", "remat", "scan_layers", "kernels", "nan_limit"),
        *("init_from", "task", "model", "optim", "data", "mesh", "loss"),
    ]


def test_base_has_every_key_but_the_model():
    assert set(base.get_config()) == set(RUN_KEYS) - {"model"}
    check_run(run_config())


@pytest.mark.parametrize("name", RUNS)
def test_every_config_file_is_good(name):
    """It passes its checks, survives JSON, and its model builds abstractly."""
    cfg = importlib.import_module(f"moex.configs.{name}").get_config()
    check_run(cfg)
    again = config.from_dict(config.to_dict(cfg))
    assert all(again[key] == cfg[key] for key in RUN_KEYS)
    size = cfg.model.num_outputs or 1000
    setattr(cfg.model, cfg.model.SIZE, size)
    spec = model_spec(cfg.model)
    inputs = {"w_embed_VD", "w_in_ND"} & spec.params.keys()
    assert [spec.params[n].shape for n in inputs] == [(size, cfg.model.dim)]


def test_the_configs_that_come_with_moex_are_listed_by_name(capsys):
    assert list(shipped.shipped()) == RUNS
    cli.main(["config", "--list"])
    listed = capsys.readouterr().out
    for name in RUNS:
        assert re.search(rf"^{name} +[A-Z0-9].*(\n  .*)*[.]$", listed, re.M), name
    assert max(map(len, listed.splitlines()[:-1])) <= 80


def test_a_config_of_moex_is_found_by_its_name_in_any_folder(tmp_path, monkeypatch):
    by_file = load_config([f"--config={ROOT}/configs/quickstart.py:router=topp"])
    monkeypatch.chdir(tmp_path)
    project.use(None)
    by_name = load_config(["--config=quickstart:router=topp"])
    assert config.to_dict(by_name) == config.to_dict(by_file)
    assert project.folder() == tmp_path  # classes of one's own are looked for here
    text = "def get_config(arg=''):\n    raise KeyError('a file')\n"
    (tmp_path / "quickstart").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="a file"):  # goes before the name
        load_config(["--config=quickstart"])
    project.use(None)


def test_a_config_file_without_the_package_configs_is_told_where_it_is(
    tmp_path, monkeypatch
):
    # Other tests may have left a folder with configs on the path.
    elsewhere = [p for p in sys.path if not (pathlib.Path(p) / "configs").is_dir()]
    monkeypatch.setattr("sys.path", elsewhere)
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    file = tmp_path / "own.py"
    file.write_text("from configs import base\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"come with moex are in moex.configs\)"):
        load_config([f"--config={file}"])
    project.use(None)


def test_no_config_has_many_fields():
    for owner in (Eval, Checkpoint, Log, Loss):
        assert len(dataclasses.fields(owner)) <= 12
        assert issubclass(owner, Config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "step",
            3,
            r"config.step: no such run key. Did you mean 'steps'\? Run keys are",
        ),
        ("steps", 3.0, "config.steps = 3.0: must be int, not float"),
        ("steps", True, "config.steps = True: must be int, not bool"),
        ("steps", 0, "config.steps = 0: must be at least 1"),
        ("seed", -1, r"config.seed = -1: must be in \[0, 2\*\*31\)"),
        ("seed", 2**31, "config.seed = 2147483648: must be at most"),
        ("nan_limit", 0, "config.nan_limit = 0: must be at least 1"),
        ("precision", "bf16", "config.precision = 'bf16': must be one of 'auto', 'fl"),
        ("precision", None, "config.precision = None: must be str, not NoneType"),
        ("remat", "dot", "config.remat = 'dot': must be .* Did you mean 'dots'"),
        (
            "kernels",
            "xl",
            "config.kernels = 'xl': must be one of .* Did you mean 'xla'",
        ),
        (
            "grad_accum",
            3,
            "config.batch_size = 64: must be a multiple of grad_accum = 3",
        ),
        ("seq_len", 0, "config.seq_len = 0: must be at least 1"),
        ("eval", None, "config.eval = None: must be Eval, not NoneType"),
        ("eval", Log(), "config.eval = .*: must be Eval, not Log"),
        ("eval", Eval(every=-1), "config.eval.every = -1: must be >= 0"),
        ("eval", Eval(sequences=0), "config.eval.sequences = 0: must be >= 1, or None"),
        ("eval", Eval(batch_size=0), "config.eval.batch_size = 0: must be >= 1, or No"),
        ("eval", Eval(overlap=512), "config.eval.overlap = 512: must be below seq_len"),
        (
            "checkpoint",
            Checkpoint(keep=0),
            "config.checkpoint.keep = 0: must be at lea",
        ),
        (
            "checkpoint",
            Checkpoint(keep_best=-1),
            "checkpoint.keep_best = -1: must be >=",
        ),
        ("log", Log(every=0), "config.log.every = 0: must be at least 1"),
        ("log", Log(sample_tokens=-1), "config.log.sample_tokens = -1: must be >= 0"),
        (
            "log",
            Log(sample_prompts=(1,)),
            "log.sample_prompts = .1,.: must be tuple of",
        ),
        ("loss", Loss(z=-0.1), "config.loss.z = -0.1: must be >= 0"),
        ("loss", Loss(z=float("nan")), "config.loss.z = nan: must be"),
    ],
)
def test_what_check_run_refuses(key, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_run(run_config(**{key: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["model", "steps", "optim"])
def test_a_key_that_is_missing(key):
    cfg = run_config()
    del cfg[key]
    kind = RUN_KEYS[key].__name__
    with pytest.raises(ConfigError, match=f"config.{key}: missing; it must be {kind}."):
        check_run(cfg)


def test_warmup_longer_than_the_run():
    cfg = run_config(steps=10)
    with pytest.raises(
        ConfigError, match="warmup_steps = 50: must be at most steps - 1 = 9, or noth"
    ):
        check_run(cfg)


@pytest.mark.parametrize(
    ("points", "reached"),
    [
        (((0, 0.02), (1000, 0.0)), True),  # the last of 1001 steps is step 1000
        (((0, 0.02), (1001, 0.0)), False),
        (((0, 0.02), (400, 0.0), (2000, 0.0)), True),  # nothing changes after 400
        (((3000, 0.02),), True),  # the same at every step
        (((0, 0.0), (500, 0.1), (1500, 0.0)), False),
    ],
)
def test_a_schedule_that_is_not_reached_is_said(points, reached):
    cfg = run_config(steps=1001, loss=Loss(load_balance=Schedule(points=points)))
    if reached:
        return check_run(cfg)  # warnings are errors here
    said = (
        r"config.loss.load_balance.points: the last one, 0.0 at step \d+, is not "
        "reached: the last of 1001 steps is number 1000, with "
    )
    with pytest.warns(ConfigWarning, match=said):
        check_run(cfg)


def test_a_schedule_of_a_learning_rate_factor_is_looked_at_too():
    optim = Optim(
        rule=AdamW(),
        lr=1e-3,
        lr_factors=(("router", Schedule(points=((5, 0.0), (9, 1.0)))),),
    )
    with pytest.warns(ConfigWarning, match=r"config.optim.lr_factors\[0\]\[1\].points"):
        check_run(run_config(steps=9, optim=optim))


def test_a_run_whose_warm_up_did_not_fit_is_opened_and_not_trained_on(tmp_path):
    optim = Optim(rule=AdamW(), lr=1e-3, schedule="wsd", warmup_steps=90)
    cfg = run_config(steps=100, optim=optim)
    with pytest.raises(ConfigError, match="config.optim.warmup_steps = 90"):
        check_run(cfg)
    RunDir(tmp_path).save_config(cfg)
    assert RunDir(tmp_path).config().optim.warmup_steps == 90


@pytest.mark.parametrize("value", ["auto", "cpu", "triton,xla", "mosaic, triton,xla"])
def test_kernels_are_auto_or_names(value):
    for name in value.split(","):
        assert name.strip() in kernel_names(value)
    assert ("auto" in kernel_names(value)) == ("," not in value)
