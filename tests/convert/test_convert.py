"""Conversion to latent experts: of a whole layer, and of a whole run.

B batch · L length · D model width · R copies of a layer · C chain rounds
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex import cli
from moex.config.base import ConfigError, to_dict
from moex.convert import apply, kinds
from moex.convert.calibrate import second_moments
from moex.convert.kinds.latent import ToLatent
from moex.convert.to_latent import convert_params, latent_model
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.narrow import Narrow
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.train.job import make_job
from tests import documented, runs
from tests.helpers import (
    TASK,
    XLA,
    assert_equal_trees,
    built,
    context,
    random_batch,
    tiny_lm,
    tiny_moe,
)
from tests.tolerances import assert_close

# The tiny run's experts are as wide as its model: latent ones save nothing.
pytestmark = pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")

# A whole layer.


@pytest.mark.thorough
def test_a_layer_at_full_width_is_the_plain_layer():
    """With a short last group; the width of the layer is 16."""
    moe = tiny_moe(4)
    cfg = tiny_lm(Segment(pattern=(moe,)))
    options = ToLatent(latent=16, group=3, ops=("gate", "up", "down"))
    spec, params, state = built(cfg)
    made = latent_model(cfg, options)
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    ctx = context(2, 8, compute=XLA)

    def layer(spec, params):
        def run(params):
            segment = spec.merge(params, state).segments[0]
            return jax.tree.map(lambda a: a[0], segment).blocks[0].ffn(x_BLD, ctx)[0]

        return jax.jit(run)(params)

    expected = layer(spec, params)
    found = layer(model_spec(made), convert_params(params, made, options, {})[0])
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    assert not np.array_equal(found, expected)


# A whole run.

CONVERT = ("--to=latent", "--group=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a `run`: one MoE layer, quick to compile, random weights."""
    folder = tmp_path_factory.mktemp("convert")
    cfg = runs.config(folder, "checkpoint.every=0", "eval.every=0")
    cfg.model = dataclasses.replace(cfg.model, layers=cfg.model.layers[1:])
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        state = jax.tree.map(lambda a: a + jnp.linspace(0, 1, a.size)[None], state)
        runs.write(job, {"params": params, "state": state}, folder / "run")
        yield folder


@pytest.mark.thorough
def test_a_run_at_full_width_scores_the_same_and_trains_on(moex, folder, tmp_path):
    new = tmp_path / "full"
    text = moex("convert", folder / "run", *CONVERT, "--latent=32", f"--workdir={new}")
    report = json.loads((new / "convert.json").read_text())
    loss = report["loss"]
    assert loss["after"] == pytest.approx(loss["before"], rel=1e-5)
    assert max(row["error"] for row in report["errors"]) < 1e-12
    assert f"nats per token: {loss['before']:.4f} -> {loss['after']:.4f}" in text
    rows = [(row["layer"], row["op"], row["group"]) for row in report["errors"]]
    assert rows == [(0, "gate", 0), (0, "gate", 1), (0, "up", 0), (0, "up", 1)]

    result = json.loads(moex("eval", new, "--json"))
    assert result["step"] == 0
    assert result["nll"] == loss["after"]
    assert moex("generate", new, "--prompt=the ", "--max-new-tokens=3").startswith(
        "the "
    )
    converted = load_run(new)
    config_file = f"--config={new}"
    moex("train", config_file, f"--workdir={new}", "--config.steps=3")
    trained = load_run(new)
    assert trained.step == 3
    experts = trained.params["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]
    old = converted.params["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]
    for name in ("b_gate_GDZ", "a_gate_EZF", "w_down_EFD"):
        assert np.any(experts[name] != np.asarray(old[name])), name

    other = (f"--workdir={tmp_path / 'other'}", f"--config.init_from={new}")
    assert "the config is good" in moex("train", config_file, *other, "--dry-run")


def test_what_is_kept_and_what_is_written(moex, folder, tmp_path, monkeypatch):
    new = tmp_path / "new"
    options = ("--whiten", "--calibration=8", "--ops=down,gate", "--rank=3")
    score = lambda *args, **kw: {"nll": 2.0, "tokens": 5}  # noqa: E731
    monkeypatch.setattr(apply, "score_run", score)  # another test has the real one
    text = moex("convert", folder / "run", *CONVERT, *options, f"--workdir={new}")
    assert "    0 down      0   0." in text
    assert "held-out loss, nats per token: 2.0000 -> 2.0000 (5 tokens)" in text
    assert f"go on training: moex train --workdir={new}" in text
    assert not list(new.rglob("*.py"))  # nothing in a run directory is code
    old_run, new_run = load_run(folder / "run"), load_run(new)
    old, found = flat_paths(old_run.params), flat_paths(new_run.params)
    kept = [name for name in old if "experts" not in name]
    assert len(kept) > 5
    assert kept == [name for name in found if "experts" not in name]
    for name in kept:
        np.testing.assert_array_equal(found[name], old[name], err_msg=name)
    assert_equal_trees(new_run.state, old_run.state)
    prefix = "segments/0/blocks/0/ffn/experts/"
    up_EDF = found[prefix + "w_up_EDF"]
    np.testing.assert_array_equal(up_EDF, old[prefix + "w_in_ED2F"][:, :, :, 1])
    assert found[prefix + "b_down_GZD"].shape == (1, 2, 32, 32)

    report = json.loads((new / "convert.json").read_text())
    by_op = {row["op"]: row for row in report["errors"]}
    assert by_op["gate"]["output_error"] < by_op["gate"]["error"]
    assert by_op["down"]["output_error"] is None
    assert report["step"] == 0
    assert report["from"] == str(folder / "run")
    for name, run in (("before", old_run), ("after", new_run)):
        sizes = [leaf.size for leaf in jax.tree.leaves(run.params)]
        assert report["params"][name] == sum(sizes)
    # Apart from the experts the config is the same.
    old_cfg, new_cfg = RunDir(folder / "run").config(), RunDir(new).config()
    experts = new_cfg.model.layers[0].pattern[0].experts
    assert experts == Latent(hidden=32, latent=32, group=2, ops=("down", "gate"))
    new_cfg.model.layers[0].pattern[0].experts = Glu(hidden=32)
    assert to_dict(new_cfg) == to_dict(old_cfg)


@pytest.mark.thorough
def test_second_moments_are_those_of_the_inputs():
    """Of all valid tokens, per copy of a layer, over all rounds of a chain."""
    moe = tiny_moe(4, shared=None)
    narrow = Narrow(latent=8, inner=moe)
    cfg = tiny_lm(Segment(pattern=(Chain(moe=moe, iterations=2), narrow), repeat=2))
    spec, params, state = built(cfg)
    batch = random_batch(2, 16)
    batch["segment"][1, 3:] = 0

    @jax.jit
    def run(params, state):
        ctx = TASK.context(batch, mode="eval", collect=True, compute=XLA)
        aux = spec.merge(params, state)(ctx)[1]
        return aux["segments"]["0"]["blocks"], second_moments(aux, ctx.valid_BL)

    blocks, found = run(params, state)
    valid_BL = batch["segment"] > 0
    x_CBLD = np.float64(blocks["0"]["ffn"]["inputs"][1])
    assert x_CBLD.shape == (2, 2, 16, 16)
    x_ND = x_CBLD[:, valid_BL].reshape(-1, 16)
    moment_DD = found["segments/0/blocks/0/ffn"][1]
    assert_close(moment_DD, x_ND.T @ x_ND / len(x_ND), "float32")
    x_NZ = np.float64(blocks["1"]["ffn"]["inner"]["inputs"][0])[valid_BL]
    moment_ZZ = found["segments/0/blocks/1/ffn/inner"][0]
    assert_close(moment_ZZ, x_NZ.T @ x_NZ / len(x_NZ), "float32")


def test_chains_and_narrow_layers_are_converted():
    moe = tiny_moe(4)  # width 16, experts of width 8
    cfg = tiny_lm(
        Segment(pattern=(Dense(hidden=8), Chain(moe=moe, iterations=2)), repeat=2),
        Segment(pattern=(Narrow(latent=12, inner=moe),)),
    )
    spec, params, _ = built(cfg)
    options = ToLatent(group=3)
    model = latent_model(cfg, options)
    assert spec.params.keys() == model_spec(cfg).params.keys()
    new, errors = convert_params(params, model, options, {})
    shapes = jax.tree.map(lambda leaf: leaf.shape, model_spec(model).params)
    assert jax.tree.map(np.shape, new) == shapes
    seen = [(row["layer"], row["op"], row["group"]) for row in errors]
    parts = [(op, group) for op in ("gate", "up") for group in (0, 1)]
    assert seen == [(layer, *part) for layer in (1, 3, 4) for part in parts]
    assert isinstance(cfg.layers[1].pattern[0].inner.experts, Glu)  # a copy was changed


def test_what_cannot_be_converted():
    biased = tiny_moe(4, experts=Glu(hidden=8, bias=True))
    cfg = tiny_lm(Segment(pattern=(tiny_moe(4), Chain(moe=biased, iterations=2))))
    with pytest.raises(ConfigError) as error:
        latent_model(cfg, ToLatent(group=2))
    where = r"config\.model\.layers\[0\]\.pattern\[1\]\.moe\.experts = Glu\("
    error.match(where + r".*bias=True\): must be Glu\(activation='silu', bias=False\)")
    with pytest.raises(ConfigError, match="config.model: has no MoE layer"):
        latent_model(tiny_lm(Segment(pattern=(Dense(hidden=8),))), ToLatent(group=2))


@pytest.mark.thorough
def test_a_new_kind_is_one_file(moex, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "kinds").mkdir()
    file = documented.files()["moex/convert/kinds/fewer.py"]
    (tmp_path / "kinds" / "fewer.py").write_text(file, encoding="utf-8")
    folders = [*kinds.__path__, str(tmp_path / "kinds")]
    monkeypatch.setattr(kinds, "__path__", folders)
    score = lambda *args, **kw: {"nll": 2.0, "tokens": 5}  # noqa: E731
    monkeypatch.setattr(apply, "score_run", score)
    new = tmp_path / "new"
    to = ("convert", folder / "run", f"--workdir={new}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fewer: the first experts of every MoE layer stay. folded: LoRA" in text
    assert "to fewer: --stay STAY experts that stay; needed" in text
    assert "--stay: missing; how many experts stay?" in moex(*to, "--to=fewer")
    assert "--stay = 1: must be at least 2." in moex(*to, "--to=fewer", "--stay=1")
    said = moex(*to, "--to=latent", "--group=2", "--stay=2")
    assert "--stay: is for --to=fewer." in said
    assert not new.exists()
    assert "experts that stay: 2\n" in moex(*to, "--to=fewer", "--stay=2")
    report = json.loads((new / "convert.json").read_text())
    assert (report["to"], report["stay"], report["errors"]) == ("fewer", 2, [])
    old, made = (flat_paths(load_run(run).params) for run in (folder / "run", new))
    name = "segments/0/blocks/0/ffn/experts/w_out_EFD"
    np.testing.assert_array_equal(made[name], old[name][:, :2])
    del sys.modules["moex.convert.kinds.fewer"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--latent=33",), "experts.latent = 33: must be at most the model width, 32."),
        (("--group=5",), "experts.group = 5: must be at most num_experts = 4."),
        (("--ops=gate,dwon",), "experts.ops = 'dwon': must be one of 'gate', 'up', "),
        (("--ops=up,up",), "experts.ops = ('up', 'up'): must be without repeats."),
        (("--rank=0",), "--rank: must be at least 1, not 0"),
        (("--calibration=4",), "--calibration: is for --whiten; give both."),
        (("--refit",), "--refit: is for --rank; give both."),
        (("--whiten", "--ops=down"), "--whiten: is for gate and up; --ops has nei"),
        (("--config.steps=1",), "convert takes the config of the run."),
        (("--to=small",), "--to: invalid choice: 'small'"),
        (("--to=moe",), "--group: is for --to=latent."),
    ],
)
def test_refusals(moex, folder, tmp_path, args, message):
    new = tmp_path / "new"
    assert message in moex(
        "convert", folder / "run", *CONVERT, f"--workdir={new}", *args
    )
    assert not new.exists()


def test_folders_that_will_not_do(moex, folder, tmp_path):
    (tmp_path / "mine").write_text("x")
    said = moex("convert", folder / "run", *CONVERT, f"--workdir={tmp_path}")
    assert f"--workdir={tmp_path}: exists already; must be new or an empty" in said
    said = moex("convert", tmp_path, *CONVERT, f"--workdir={tmp_path / 'new'}")
    assert f"{tmp_path}: not a run directory" in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
