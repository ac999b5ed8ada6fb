"""Latent conversion: the mathematics in float64, a whole layer, a whole run.

E experts · G groups · D model width · F expert width · Z latent width
"""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex import cli
from moex.compress.calibrate import input_moments
from moex.compress.convert import ToLatent, convert_params, latent_model
from moex.compress.latent import Factoring, factor_experts
from moex.config import ConfigError, to_dict
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.narrow import Narrow
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.optim import flat_paths
from moex.train.job import LoadedRun, load_config, load_run
from moex.train.losses import make_context
from moex.train.state import model_spec
from tests import runs
from tests.helpers import (
    assert_equal_trees,
    built,
    context,
    mesh_of,
    random_batch,
    tiny_lm,
    tiny_moe,
)

# The tiny run's experts are as wide as its model: latent ones save nothing.
pytestmark = pytest.mark.filterwarnings("ignore::moex.config.ConfigWarning")

E, D, F, GROUP = 4, 32, 8, 4


def random_experts(kind="random", seed=0):
    """float64[E, D, F]: all different, or mostly one shared matrix."""
    rng = np.random.default_rng(seed)
    w_EDF = rng.normal(size=(E, D, F))
    if kind == "shared":
        w_EDF = rng.normal(size=(D, F)) + 0.3 * w_EDF
    return w_EDF


def product(b_GDZ, a_EZF, group):
    """The weights that factors stand for."""
    return np.stack([b_GDZ[e // group] @ a_ZF for e, a_ZF in enumerate(a_EZF)])


def relative_error(w_EDF, **how):
    """Of the factors themselves, not as they are reported."""
    b_GDZ, a_EZF, _ = factor_experts(w_EDF, Factoring(**how))
    rest_EDF = w_EDF - product(b_GDZ, a_EZF, how["group"])
    return np.linalg.norm(rest_EDF) / np.linalg.norm(w_EDF)


def factor(w_EDF, moment_DD=None, **how):
    return factor_experts(w_EDF, Factoring(**{"group": GROUP} | how), moment_DD)


# The factors.


def test_experts_with_a_common_space_are_converted_exactly():
    rng = np.random.default_rng(1)
    w_EDF = rng.normal(size=(1, D, 6)) @ rng.normal(size=(E, 6, F))
    assert relative_error(w_EDF, latent=6, group=GROUP) < 1e-14
    assert relative_error(w_EDF, latent=8, group=GROUP) < 1e-14  # zeros are no harm
    assert relative_error(w_EDF, latent=5, group=GROUP) > 0.01


@pytest.mark.parametrize("kind", ["random", "shared"])
@pytest.mark.parametrize("latent", [1, 8, 31])
def test_the_error_is_the_tail(kind, latent):
    w_EDF = random_experts(kind)
    _, _, [error] = factor(w_EDF, latent=latent)
    found = relative_error(w_EDF, latent=latent, group=GROUP)
    s = np.linalg.svd(np.hstack(list(w_EDF)), compute_uv=False)
    expected = np.linalg.norm(s[latent:]) / np.linalg.norm(s)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(error.error, expected, rtol=1e-12)
    np.testing.assert_allclose(error.tail, expected, rtol=1e-12)
    assert error.output_error is None


def test_the_whole_width_is_exact():
    assert relative_error(random_experts(), latent=D, group=GROUP) < 1e-14


def test_one_expert_a_group_is_exact_at_its_own_width():
    assert relative_error(random_experts(), latent=F, group=1) < 1e-14


@pytest.mark.parametrize("kind", ["random", "shared"])
def test_cutting_first_never_helps(kind):
    w_EDF = random_experts(kind)
    direct = relative_error(w_EDF, latent=F, group=GROUP)
    cut = [relative_error(w_EDF, latent=F, group=GROUP, rank=r) for r in (1, 3, 6)]
    assert min(cut) > direct
    for rank in (F, F + 5, 1000):  # clamped
        full = relative_error(w_EDF, latent=F, group=GROUP, rank=rank)
        np.testing.assert_allclose(full, direct, rtol=1e-12)


@pytest.mark.parametrize("kind", ["random", "shared"])
def test_refitting_after_a_cut_never_hurts(kind):
    w_EDF = random_experts(kind)
    for rank in (1, 3, 6):
        how = {"latent": F, "group": GROUP, "rank": rank}
        assert relative_error(w_EDF, **how, refit=True) < relative_error(w_EDF, **how)
    b_GDZ, _, _ = factor(w_EDF, latent=F, rank=3, gauge="experts")
    _, a_EZF, _ = factor(w_EDF, latent=F, rank=3, gauge="experts", refit=True)
    fitted = np.stack([np.linalg.lstsq(b_GDZ[0], w, rcond=None)[0] for w in w_EDF])
    np.testing.assert_allclose(a_EZF, fitted, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_gauge_does_not_change_the_product(rank):
    # At rank 2 with latent 16, half of the directions have no weight.
    w_EDF = random_experts()
    how = {"latent": 16, "group": GROUP, "rank": rank}
    b_GDZ, a_EZF, _ = factor(w_EDF, **how, gauge="balanced")
    ortho_GDZ, own_EZF, _ = factor(w_EDF, **how, gauge="experts")
    expected = product(ortho_GDZ, own_EZF, GROUP)
    np.testing.assert_allclose(product(b_GDZ, a_EZF, GROUP), expected, atol=1e-12)
    np.testing.assert_allclose(ortho_GDZ[0].T @ ortho_GDZ[0], np.eye(16), atol=1e-12)
    norm_Z = np.linalg.norm(b_GDZ[0], axis=0)
    if rank is None:
        np.testing.assert_allclose(norm_Z, np.linalg.norm(a_EZF, axis=(0, 2)))
    assert norm_Z.min() > 0.02 * norm_Z.max()  # a direction of no weight can learn


def test_a_short_last_group():
    w_EDF = random_experts()
    b_GDZ, a_EZF, errors = factor(w_EDF, latent=16, group=3)
    assert b_GDZ.shape == (2, D, 16)
    assert a_EZF.shape == (E, 16, F)
    # The last expert has rank 8: alone in a space of 16 it is exact.
    assert errors[1].error < 1e-14
    assert errors[0].error > 0.1
    np.testing.assert_allclose(product(b_GDZ, a_EZF, 3)[3], w_EDF[3], atol=1e-12)


# Whitening.


def anisotropic(seed=3):
    """A second moment whose eigenvalues fall over four decades, and its root."""
    rng = np.random.default_rng(seed)
    q_DD, _ = np.linalg.qr(rng.normal(size=(D, D)))
    root_DD = q_DD * np.logspace(0, -2, D)
    return root_DD @ root_DD.T, root_DD


def test_whitening_lowers_the_error_of_outputs():
    w_EDF = random_experts()
    moment_DD, root_DD = anisotropic()
    x_TD = np.random.default_rng(4).normal(size=(5000, D)) @ root_DD.T

    def output_error(b_GDZ, a_EZF):
        rest_EDF = w_EDF - product(b_GDZ, a_EZF, GROUP)
        return np.linalg.norm(x_TD @ rest_EDF) / np.linalg.norm(x_TD @ w_EDF)

    b_GDZ, a_EZF, [plain] = factor(w_EDF, latent=F)
    b2_GDZ, a2_EZF, [white] = factor(w_EDF, moment_DD, latent=F)
    assert output_error(b2_GDZ, a2_EZF) < 0.5 * output_error(b_GDZ, a_EZF)
    # The report is of the moment, the measure of 5000 inputs with it.
    np.testing.assert_allclose(
        output_error(b2_GDZ, a2_EZF), white.output_error, rtol=0.1
    )
    assert white.error > plain.error  # which is the least there is
    np.testing.assert_allclose(white.tail, white.output_error, rtol=0.05)


def test_whitening_is_the_best_factoring_for_its_moment():
    """No step away from it has a smaller error; plain weights' factors do."""
    w_EDF = random_experts()
    moment_DD, root_DD = anisotropic()
    b_GDZ, a_EZF, [error] = factor(w_EDF, moment_DD, latent=F)
    s = np.linalg.svd(np.hstack(list(root_DD.T @ w_EDF)), compute_uv=False)
    best = np.linalg.norm(s[F:]) / np.linalg.norm(s)
    assert best <= error.output_error < 1.02 * best  # above it by the ridge alone


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_whitening_by_the_identity_changes_nothing(scale):
    w_EDF = random_experts()
    plain = factor(w_EDF, latent=F)
    white = factor(w_EDF, scale * np.eye(D), latent=F)
    expected, found = (product(b, a, GROUP) for b, a, _ in (plain, white))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert white[2][0].output_error == pytest.approx(plain[2][0].error)


def test_whitening_with_fewer_inputs_than_dims():
    w_EDF = random_experts()
    x_TD = np.random.default_rng(5).normal(size=(5, D))
    b_GDZ, a_EZF, [error] = factor(w_EDF, x_TD.T @ x_TD / 5, latent=F)
    assert np.isfinite(b_GDZ).all()
    assert np.isfinite(a_EZF).all()
    assert error.output_error < 1e-3  # 5 directions fit in a space of 8
    _, _, [nothing] = factor(w_EDF, np.zeros((D, D)), latent=F)
    assert nothing.error == factor(w_EDF, latent=F)[2][0].error


# A whole layer.


def test_a_layer_at_full_width_is_the_plain_layer():
    """With a short last group; the width of the layer is 16."""
    moe = tiny_moe(4)
    cfg = tiny_lm(Segment(pattern=(moe,)))
    options = ToLatent(latent=16, group=3, ops=("gate", "up", "down"))
    spec, params, state = built(cfg)
    made = latent_model(cfg, options)
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    ctx = context(2, 8, kernels="xla")

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
    folder = tmp_path_factory.mktemp("convert")
    with runs.shared_programs(), runs.one_device():
        runs.train(folder, folder / "run")  # as other tests do: compiled once
        yield folder


@pytest.fixture
def moex(capsys):
    """`moex(*args)`: what it prints; a mistake gives its line."""

    def moex(*args):
        capsys.readouterr()
        try:
            cli.main([str(a) for a in args])
        except SystemExit as stop:
            assert stop.code == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1
            return err
        return capsys.readouterr().out

    return moex


def test_a_run_at_full_width_scores_the_same_and_trains_on(moex, folder, tmp_path):
    new = tmp_path / "full"
    text = moex("convert", folder / "run", *CONVERT, "--latent=32", f"--workdir={new}")
    report = json.loads((new / "convert.json").read_text())
    loss = report["loss"]
    assert loss["after"] == pytest.approx(loss["before"], rel=1e-5)
    assert max(row["error"] for row in report["errors"]) < 1e-12
    assert f"nats per token: {loss['before']:.4f} -> {loss['after']:.4f}" in text
    rows = [(row["layer"], row["op"], row["group"]) for row in report["errors"]]
    assert rows == [(1, "gate", 0), (1, "gate", 1), (1, "up", 0), (1, "up", 1)]

    result = json.loads(moex("eval", new, "--json"))
    assert result["step"] == 0
    assert result["nll"] == loss["after"]
    assert moex("generate", new, "--prompt=the ", "--max-new-tokens=3").startswith(
        "the "
    )
    converted = load_run(new)
    config_file = f"--config={new / 'config.py'}"
    moex("train", config_file, f"--workdir={new}", "--config.steps=3")
    trained = load_run(new)
    assert trained.step == 3
    experts = trained.params["segments"]["1"]["blocks"]["0"]["ffn"]["experts"]
    old = converted.params["segments"]["1"]["blocks"]["0"]["ffn"]["experts"]
    for name in ("b_gate_GDZ", "a_gate_EZF", "w_down_EFD"):
        assert np.any(experts[name] != np.asarray(old[name])), name

    other = (f"--workdir={tmp_path / 'other'}", f"--config.init_from={new}")
    assert "the config is good" in moex("train", config_file, *other, "--dry-run")


def test_what_is_kept_and_what_is_written(moex, folder, tmp_path):
    new = tmp_path / "new"
    calibration = ("--whiten", "--calibration=8", "--ops=down,gate", "--rank=3")
    text = moex("convert", folder / "run", *CONVERT, *calibration, f"--workdir={new}")
    assert "    1 down      0   0." in text
    assert f"moex train --config={new / 'config.py'} --workdir={new}" in text
    old_run, new_run = load_run(folder / "run"), load_run(new)
    old, found = flat_paths(old_run.params), flat_paths(new_run.params)
    kept = [name for name in old if "experts" not in name]
    assert len(kept) > 10
    assert kept == [name for name in found if "experts" not in name]
    for name in kept:
        np.testing.assert_array_equal(found[name], old[name], err_msg=name)
    assert_equal_trees(new_run.state, old_run.state)
    assert np.any(np.asarray(jax.tree.leaves(old_run.state)[0]))
    prefix = "segments/1/blocks/0/ffn/experts/"
    up_EDF = found[prefix + "w_up_EDF"]
    np.testing.assert_array_equal(up_EDF, old[prefix + "w_in_ED2F"][:, :, :, 1])
    assert found[prefix + "b_down_GZD"].shape == (1, 2, 32, 32)

    report = json.loads((new / "convert.json").read_text())
    by_op = {row["op"]: row for row in report["errors"]}
    assert by_op["gate"]["output_error"] < by_op["gate"]["error"]
    assert by_op["down"]["output_error"] is None
    assert report["step"] == 8
    assert report["from"] == str(folder / "run")
    for name, run in (("before", old_run), ("after", new_run)):
        sizes = [leaf.size for leaf in jax.tree.leaves(run.params)]
        assert report["params"][name] == sum(sizes)
    # Apart from the experts the config is the same.
    old_cfg, new_cfg = load_config(folder / "run"), load_config(new)
    experts = new_cfg.model.layers[1].pattern[0].experts
    assert experts == Latent(hidden=32, latent=32, group=2, ops=("down", "gate"))
    new_cfg.model.layers[1].pattern[0].experts = Glu(hidden=32)
    assert to_dict(new_cfg) == to_dict(old_cfg)


def test_second_moments_are_those_of_the_inputs():
    """Of all valid tokens, per copy of a layer, over all rounds of a chain."""
    moe = tiny_moe(4, shared=None)
    cfg = tiny_lm(
        Segment(pattern=(Chain(moe=moe, iterations=2),), repeat=2),
        Segment(pattern=(Narrow(latent=8, inner=tiny_moe(4)),)),
    )
    spec, params, state = built(cfg)
    batch = random_batch(2, 16)
    batch["segment"][1, 3:] = 0

    def record(params, state):
        ctx = make_context(batch, mode="eval", collect=True, kernels="xla")
        return spec.merge(params, state)(ctx)[1]

    aux = jax.jit(record)(params, state)["segments"]
    valid_BL = batch["segment"] > 0

    class OneBatch:
        cfg = SimpleNamespace(batch_size=2)
        mesh = mesh_of()

        def static(self, *, train):
            return {"kernels": "xla"}

        def batches(self, start):
            return iter([batch, batch, batch])

    run = LoadedRun(None, None, spec, None, 0, params, state)
    found = input_moments(run, OneBatch(), 3)
    chain = np.float64(aux["0"]["blocks"]["0"]["ffn"]["inputs"])  # [R, C, B, L, D]
    assert chain.shape == (2, 2, 2, 16, 16)
    x_ND = chain[1][:, valid_BL].reshape(-1, 16)
    path = "segments/0/blocks/0/ffn"
    np.testing.assert_allclose(found[path][1], x_ND.T @ x_ND / len(x_ND), rtol=1e-4)
    narrow = np.float64(aux["1"]["blocks"]["0"]["ffn"]["inner"]["inputs"])
    x_NZ = narrow[0][valid_BL]
    path = "segments/1/blocks/0/ffn/inner"
    np.testing.assert_allclose(found[path][0], x_NZ.T @ x_NZ / len(x_NZ), rtol=1e-4)


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--latent=33",), "experts.latent = 33: must be at most the model width, 32."),
        (("--group=5",), "experts.group = 5: must be at most num_experts = 4."),
        (("--ops=gate,dwon",), "experts.ops = 'dwon': must be one of 'gate', 'up', "),
        (("--ops=up,up",), "experts.ops = ('up', 'up'): must be without repeats."),
        (("--rank=0",), "--rank: must be at least 1, not 0"),
        (("--calibration=4",), "--calibration: is for --whiten; give both."),
        (("--config.steps=1",), "convert takes the config of the run."),
        (("--to=moe",), "--to: invalid choice: 'moe'"),
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
    assert f"--workdir={tmp_path}: must be new or an empty folder." in said
    said = moex("convert", tmp_path, *CONVERT, f"--workdir={tmp_path / 'new'}")
    assert f"{tmp_path}: not a run directory" in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
