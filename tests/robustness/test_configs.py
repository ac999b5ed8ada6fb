"""Run configs with anything in them: a line that names the field, or they train.

A config that passes `--dry-run` is traced as the training step of a job; of those some
are compiled and train a step.
"""

import json

import jax
import numpy as np
import pytest

from moex.configs import deepseek_v3, moe_1b, moe_8x7b, moe_100m, quickstart
from moex.data.pipeline import Data
from moex.data.sources import Text
from moex.data.tokenizer import Bytes
from moex.runs.directory import RunDir
from moex.runs.keys import check_run
from moex.runs.open import load_run
from moex.runs.score import eval_step
from moex.sharding import MeshConfig, shard_batch
from moex.train import training
from moex.train.job import make_job
from tests.robustness import drawn
from tests.robustness.attacks import (
    SECONDS,
    at,
    attempt,
    check_no_traceback,
    check_refused,
    moex,
    snapshot,
    some,
)

SHIPPED = (quickstart, moe_100m, moe_1b, moe_8x7b, deepseek_v3)
# Larger jobs are checked and traced only if they are about as small as those drawn.
MOST_PARAMS, MOST_TOKENS = 500_000, 2048
PLAUSIBLE = {f"plausible-{i}": i for i in range(120)}
HOSTILE = {f"hostile-{i}": i for i in range(300)}
TRAINED = {f"trained-{i}": i for i in range(1000, 1024)}


def plausible(corpus, i):
    return drawn.plausible(drawn.rng_of("plausible", i), corpus)


def hostile(corpus, i):
    """A shipped or a drawn config with one or two hostile values; says which."""
    rng = drawn.rng_of("hostile", i)
    if i % 5 == 0:
        cfg = SHIPPED[i // 5 % len(SHIPPED)].get_config()
        text = Text(paths=(str(corpus),), delimiter="\n\n", holdout=0.1)
        cfg.data = Data(sources=(text,), tokenizer=Bytes())
        cfg.mesh = MeshConfig()
    else:
        cfg = drawn.plausible(rng, corpus)
        cfg.mesh = MeshConfig(data=-1)
        while dry_run(cfg).code != 0:
            cfg = drawn.plausible(rng, corpus)
            cfg.mesh = MeshConfig(data=-1)
    return cfg, [drawn.mutate(rng, cfg) for _ in range(rng.choice((1, 1, 2)))]


def dry_run(cfg):
    return attempt(lambda: training.train(cfg, None, dry_run=True))


def trace(cfg):
    """Trace the training step and the evaluation of a checked config."""
    job = make_job(cfg, log=lambda line: None)
    size = sum(leaf.size for leaf in jax.tree.leaves(job.spec.params))
    if size > MOST_PARAMS or cfg.batch_size * cfg.seq_len > MOST_TOKENS:
        return
    batch = next(job.batches(0))
    with jax.set_mesh(job.mesh):
        args = (np.int32(0), jax.random.key(0), batch)
        jax.eval_shape(job.train_step(), job.abstract_state(), *args)
        if job.holds_out:
            held = next(iter(job.eval_batches(1)))
            state = job.abstract_state()
            jax.eval_shape(eval_step(job), state["params"], state["state"], held)


def train_once(cfg):
    """One real step; its figures are finite."""
    job = make_job(cfg, log=lambda line: None)
    with jax.set_mesh(job.mesh):
        batch = shard_batch(next(job.batches(0)), job.mesh)
        step = job.train_step()
        _, metrics = step(job.init_state(), np.int32(0), jax.random.key(0), batch)
    for name in ("loss", "nll", "grad_norm"):
        assert np.isfinite(metrics[name]), name


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    """Where a hostile relative path, such as that of the cache, makes its files."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def corpus(folder):
    return folder / "corpus.txt"


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", jax.local_devices)
    monkeypatch.setattr(jax, "device_count", jax.local_device_count)


def check(cfg, use, *told):
    """Check that a config is refused in a line, or that it can be used."""
    outcome = dry_run(cfg)
    if outcome.code != 0:
        line = check_refused(outcome)
        assert "config" in line, (line, *told)
        return line
    check_no_traceback(outcome)
    used = attempt(lambda: use(cfg), seconds=5 * SECONDS)
    assert used.code == 0, (*told, used)
    return ""


def test_there_are_many_cases():
    assert len(PLAUSIBLE) + len(HOSTILE) >= 400


@pytest.mark.parametrize("i", some(PLAUSIBLE, 3))
def test_plausible_values_are_traced_or_refused(i, corpus, eight_devices):
    check(plausible(corpus, i), trace)


@pytest.mark.parametrize("i", some(TRAINED, 0))
def test_what_passes_the_dry_run_trains(i, corpus, request):
    """On eight devices, or on one: that compiles in less time."""
    if i % 4 == 0:
        request.getfixturevalue("eight_devices")
    rng, cfg = drawn.rng_of("trained", i), None
    while cfg is None or dry_run(cfg).code != 0:
        cfg = drawn.plausible(rng, corpus)
        if i % 4:
            cfg.mesh = MeshConfig()
    assert check(cfg, train_once) == ""


@pytest.mark.parametrize("i", some(HOSTILE, 6))
def test_hostile_values_are_refused_by_name_or_traced(i, corpus):
    cfg, changes = hostile(corpus, i)
    line = check(cfg, trace, *changes)
    names = [change.split(" = ")[0].rpartition(".")[2] for change in changes]
    names.append("config.model: parameters and optimizer take")  # as they are shipped
    assert not line or any(name in line for name in names), (line, changes)


# The command line.

TEXTS = (
    *("", " ", "None", "nan", "1e999", "-1", "1.5", "[", "(1,", "{'a': 1}", "'", "\\"),
    *("__import__('os').system('x')", "9" * 5000, "(" * 10_000, "\0", "é", "True"),
)
FIELDS = (
    *("steps", "seed", "precision", "scan_layers", "optim.lr", "optim.lr_factors"),
    *("model.dim", "model.vocab", "model.layers", "data.sources[0].paths"),
    *("model.layers[1].pattern[0].router.k", "loss.load_balance", "eval.sequences"),
)
PATHS = (
    *("", ".", "..", "model..dim", "model.layers[99].repeat", "model.layers[-9]"),
    *("model.layers[x]", "[0]", "model.__class__", "model.validate", "model.dim.real"),
    *("model.layers[0", "x" * 100_000, "steps[0]", "model.layers[0][0]", "a b", "é"),
)
WORDS = {f"{f}={t[:12]}": f"--config.{f}={t}" for f in FIELDS for t in TEXTS}
WORDS |= {f"path-{path[:20]}": f"--config.{path}=1" for path in PATHS}


@pytest.mark.parametrize("word", some(WORDS, 6))
def test_any_text_on_the_command_line(word, folder):
    outcome = moex("config", f"--config={folder / 'tiny.py'}", word)
    check_no_traceback(outcome)
    if outcome.code != 0:
        check_refused(outcome)


# The saved config.


def whole(text):
    return lambda data: text


TAG = "__config__"
SAVED = {
    **{"nothing": whole(""), "empty": whole("{}"), "null": whole("null")},
    **{"list": whole("[]"), "number": whole("7"), "text": whole('"x"')},
    **{"deep": whole("[" * 100_000), "deep-objects": whole('{"a":' * 100_000)},
    **{"digits": whole('{"seed": ' + "9" * 5000 + "}"), "cut": whole('{"seed": 0,')},
    **{"twice": whole('{"seed": 0, "seed": 1}'), "bad-utf8": whole(b'{"\xff": 1}')},
    **{
        "nan": at("optim", "lr", value=float("nan")),
        "no-model": at("model", value=...),
    },
    **{
        "dim-text": at("model", "dim", value="64"),
        "dim-null": at("model", "dim", value=None),
    },
    "dim-list": at("model", "dim", value=[64]),
    "dim-gone": at("model", "dim", value=...),
    "dim-other": at("model", "dim", value=64),
    "model-null": at("model", value=None),
    "model-list": at("model", value=[]),
    "model-of-another-class": at("model", TAG, value="moex.nn.mlp.Dense"),
    "class-unknown": at("model", TAG, value="moex.nn.lm.LMM"),
    "class-of-os": at("model", TAG, value="os.system"),
    "class-no-config": at("model", TAG, value="moex.nn.lm.LanguageModel"),
    "class-a-list": at("model", TAG, value=["moex.nn.lm.LM"]),
    "class-null": at("model", TAG, value=None),
    "class-dots": at("model", TAG, value="moex...LM"),
    "class-gone": at("model", TAG, value=...),
    "layers-text": at("model", "layers", value="x"),
    "layers-empty": at("model", "layers", value=[]),
    "layers-numbers": at("model", "layers", value=[1, 2]),
    "layers-object": at("model", "layers", value={"0": 1}),
    "attention-null": at("model", "attention", value=None),
    "attention-object": at("model", "attention", value={"heads": 2}),
    "vocab-other": at("model", "vocab", value=300),
    "vocab-huge": at("model", "vocab", value=2**62),
    "field-unknown": at("model", "dims", value=3),
    "key-unknown": at("stepz", value=3),
    "key-numbers": at("0", value=3),
    "seq-len-text": at("seq_len", value="32"),
    "seq-len-true": at("seq_len", value=True),
    "data-null": at("data", value=None),
    "data-empty": at("data", value={}),
    "sources-null": at("data", "sources", value=None),
    "sources-empty": at("data", "sources", value=[]),
    "sources-texts": at("data", "sources", value=["corpus.txt"]),
    "tokenizer-null": at("data", "tokenizer", value=None),
    "mesh-null": at("mesh", value=None),
    "mesh-other": at("mesh", "data", value=3),
    "precision-number": at("precision", value=16),
}


@pytest.mark.thorough
@pytest.mark.parametrize("change", some(SAVED, 5))
def test_a_saved_config_edited_by_hand(change, run):
    file = run / "config.json"
    made = change(json.loads(file.read_text()))
    if not isinstance(made, (str, bytes)):
        made = json.dumps(made)
    file.write_bytes(made.encode() if isinstance(made, str) else made)
    before = snapshot(run)

    def read():
        cfg = RunDir(run).config()
        check_run(cfg)
        load_run(run)

    page = run.parent / "page.html"
    uses = (lambda: moex("report", run, f"--out={page}"), lambda: attempt(read))
    for use in uses:
        outcome = use()
        check_no_traceback(outcome)
        if outcome.code != 0:
            check_refused(outcome, "config")
        assert snapshot(run) == before
