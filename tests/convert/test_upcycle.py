"""Upcycling: of one layer, of the segments of a model, and of a whole run.

B batch · L length · D model width · F hidden width · E experts · g slices of a copy
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError
from moex.convert.kinds.moe import Upcycle
from moex.convert.latent import Factoring, factor_experts
from moex.convert.to_moe import moe_model, pieces, upcycle_params, upcycled_layers
from moex.convert.upcycle import layer_of_dense, moe_of_dense
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.train.job import make_job
from tests import runs
from tests.helpers import (
    TASK,
    XLA,
    assert_equal_trees,
    built,
    context,
    random_batch,
    split_module,
    tiny_lm,
    tiny_moe,
)
from tests.marks import thorough, thorough_but_for

# Latent experts of the model's width save nothing; one copy leaves the router alone.
pytestmark = pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")

DENSE = Dense(hidden=24)


def assert_same(found, expected):
    """Equal up to float32, by the scale of the whole."""
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


# One layer, of width 16.


def dense_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w_in_D2F": (16, 2, 24), "w_out_FD": (24, 16)}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def compiled(layer, x_BLD):
    """The layer of a config, as a function of its parameters and `x_BLD`."""
    graphdef, _, state = split_module(layer.make(16, nnx.Rngs(params=0)))
    ctx = context(*x_BLD.shape[:2], compute=XLA)
    return jax.jit(lambda p, x: nnx.merge(graphdef, p, state)(x, ctx)[0])


def moe_output(options, params, x_BLD):
    return compiled(moe_of_dense(DENSE, options, "ffn"), x_BLD)(params, x_BLD)


@pytest.mark.parametrize(
    ("experts", "k", "split", "scale"),
    [
        thorough(4, 1, 1, "gates"),
        thorough(4, 3, 1, "gates"),
        (3, 1, 2, "gates"),
        thorough(5, 2, 4, "gates"),
        thorough(5, 2, 4, "weights"),
        (2, 2, 3, "weights"),
    ],
)
def test_the_layer_computes_what_the_dense_one_did(experts, k, split, scale):
    """For routers that prefer copies, and for ties: of the zero token, and of all."""
    options = Upcycle(experts=experts, k=k, split=split, scale=scale)
    weights = dense_weights()
    x_BLD = np.random.default_rng(1).normal(size=(4, 32, 16)).astype(np.float32)
    x_BLD[0, 0] = 0
    expected = compiled(DENSE, x_BLD)(weights, x_BLD)
    params = layer_of_dense(weights, options, number=3)
    moe = compiled(moe_of_dense(DENSE, options, "ffn"), x_BLD)
    for strength in (1, 100, 0):
        w_DE = params["router"]["w_DE"] * strength
        found = moe(params | {"router": {"w_DE": w_DE}}, x_BLD)
        assert_same(found, expected)


@pytest.mark.thorough
def test_without_the_scale_or_whole_copies_it_does_not():
    """What the test above would see: each condition is needed."""
    options = Upcycle(experts=3, k=1, split=2)
    params = layer_of_dense(dense_weights(), options, number=0)
    x_BLD = np.random.default_rng(1).normal(size=(2, 32, 16)).astype(np.float32)
    whole = moe_output(options, params, x_BLD)
    unscaled = moe_output(dataclasses.replace(options, scale="weights"), params, x_BLD)
    assert_same(2 * unscaled, whole)
    w_DE = np.random.default_rng(2).normal(size=(16, 6)).astype(np.float32)
    mixed = moe_output(options, params | {"router": {"w_DE": w_DE}}, x_BLD)
    assert float(jnp.abs(mixed - whole).max()) > 0.1 * float(jnp.abs(whole).max())


def test_experts_are_the_slices_in_order():
    options = Upcycle(experts=2, k=1, split=3)
    weights = dense_weights()
    params = layer_of_dense(weights, options, number=0)
    w_in, w_out = params["experts"]["w_in_ED2F"], params["experts"]["w_out_EFD"]
    assert w_in.shape == (6, 16, 2, 8)
    for e in range(6):
        at = slice(8 * (e % 3), 8 * (e % 3) + 8)
        np.testing.assert_array_equal(w_in[e], weights["w_in_D2F"][:, :, at])
        np.testing.assert_array_equal(w_out[e], weights["w_out_FD"][at])
    w_DE = params["router"]["w_DE"]
    np.testing.assert_array_equal(w_DE, np.repeat(w_DE[:, ::3], 3, axis=1))
    assert w_DE[:, ::3].std() == pytest.approx(TopK(k=1).init_std, rel=0.5)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}
    by_weights = dataclasses.replace(options, scale="weights")
    scaled = layer_of_dense(weights, by_weights, number=0)
    np.testing.assert_array_equal(scaled["experts"]["w_out_EFD"], 3 * w_out)
    assert moe_of_dense(DENSE, options, "").router.scale == 3
    assert moe_of_dense(DENSE, by_weights, "").router.scale == 1


def test_latent_factors_of_copies_are_those_of_one():
    """A group of three copies of two slices loses what one copy does."""
    weights = dense_weights()
    shared = []
    for copies in (1, 3):
        options = Upcycle(experts=copies, k=1, split=2)
        experts = layer_of_dense(weights, options, number=0)["experts"]
        how = Factoring(latent=6, group=2 * copies)
        shared.append(factor_experts(experts["w_in_ED2F"][:, :, 0], how)[2][0].error)
    assert shared[0] > 0.1
    assert shared[1] == pytest.approx(shared[0], rel=1e-6)


def test_seeds_and_layers_have_their_own_numbers():
    options = Upcycle(experts=4, k=2, noise=0.1, reinit=0.5)
    other_seed = dataclasses.replace(options, seed=1)
    weights = dense_weights()
    base = flat_paths(layer_of_dense(weights, options, number=2))
    assert_equal_trees(layer_of_dense(weights, options, number=2), base)
    for changed in (
        layer_of_dense(weights, options, number=3),
        layer_of_dense(weights, other_seed, number=2),
    ):
        for name, value in flat_paths(changed).items():
            assert np.mean(value != base[name]) > 0.5, name


def test_noise_is_relative_to_each_matrix():
    options = Upcycle(experts=8, k=2, split=2, noise=0.05)
    exact = dataclasses.replace(options, noise=0)
    assert exact.exact
    assert not options.exact
    weights = dense_weights()
    weights["w_in_D2F"] *= np.array([[1.0], [10.0]], np.float32)  # gate, up
    weights["w_out_FD"] *= 100
    plain = layer_of_dense(weights, exact, number=0)
    noisy = layer_of_dense(weights, options, number=0)
    np.testing.assert_array_equal(noisy["router"]["w_DE"], plain["router"]["w_DE"])
    added = jax.tree.map(np.subtract, noisy["experts"], plain["experts"])
    for e in range(16):
        gate, up = added["w_in_ED2F"][e].swapaxes(0, 1)
        for part, scale in ((gate, 1), (up, 10), (added["w_out_EFD"][e], 100)):
            assert part.std() == pytest.approx(0.05 * scale, rel=0.25)
    first, second = added["w_out_EFD"][0], added["w_out_EFD"][2]  # of one slice
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.3


def test_columns_are_drawn_again_in_all_three_matrices():
    options = Upcycle(experts=4, k=2, split=2, reinit=0.25)  # 3 of 12 columns
    weights = dense_weights()
    weights["w_in_D2F"] *= np.array([[1.0], [10.0]], np.float32)
    plain = layer_of_dense(weights, dataclasses.replace(options, reinit=0), number=0)
    drawn = layer_of_dense(weights, options, number=0)
    np.testing.assert_array_equal(drawn["router"]["w_DE"], plain["router"]["w_DE"])
    changed = jax.tree.map(np.not_equal, drawn["experts"], plain["experts"])
    in_ED2F, out_EFD = changed["w_in_ED2F"], changed["w_out_EFD"]
    column_EF = out_EFD.any(axis=2)
    assert (column_EF.sum(axis=1) == 3).all()
    np.testing.assert_array_equal(out_EFD, np.repeat(column_EF[:, :, None], 16, 2))
    at_EDF = np.repeat(column_EF[:, None], 16, axis=1)
    np.testing.assert_array_equal(in_ED2F[:, :, 0], at_EDF)
    np.testing.assert_array_equal(in_ED2F[:, :, 1], at_EDF)
    assert len({row.tobytes() for row in column_EF}) > 1  # each expert has its own
    new_ED2F = drawn["experts"]["w_in_ED2F"]
    assert new_ED2F[:, :, 0][at_EDF].std() == pytest.approx(1, rel=0.1)
    assert new_ED2F[:, :, 1][at_EDF].std() == pytest.approx(10, rel=0.1)
    every = layer_of_dense(weights, dataclasses.replace(options, reinit=1), number=0)
    assert (every["experts"]["w_out_EFD"] != plain["experts"]["w_out_EFD"]).all()


# The segments of a model.


def depth(*repeats):
    return tiny_lm(*(Segment(pattern=(DENSE,), repeat=r) for r in repeats))


@pytest.mark.parametrize(
    ("repeat", "layers", "expected"),
    [
        (6, "all", ["M*6"]),
        (6, "every:2", ["DM*3"]),
        (7, "every:2", ["DM*3", "D*1"]),
        (6, "every:3", ["DDM*2"]),
        (6, "last:2", ["D*4", "M*2"]),
        (4, "0", ["M*1", "D*3"]),
        (4, "2,1", ["D*1", "M*2", "D*1"]),
        (1, "last:1", ["M*1"]),
    ],
)
def test_a_segment_is_cut_into_few(repeat, layers, expected):
    def text(segment):
        names = ["M" if isinstance(f, MoE) else "D" for f in segment.pattern]
        return "".join(names) + f"*{segment.repeat}"

    options = Upcycle(experts=2, k=2, layers=layers)
    model = moe_model(depth(repeat), options)
    assert [text(s) for s in model.layers] == expected
    assert model.num_layers() == repeat


def test_layers_are_counted_over_segments_and_patterns():
    pattern = (DENSE, tiny_moe(4), DENSE)
    model = tiny_lm(
        Segment(pattern=(tiny_moe(4),)),
        Segment(pattern=pattern, repeat=2),
        Segment(pattern=(DENSE,), repeat=2),
    )
    assert upcycled_layers(model, "all") == [1, 3, 4, 6, 7, 8]
    assert upcycled_layers(model, "every:2") == [3, 6, 8]
    assert upcycled_layers(model, "last:3") == [6, 7, 8]
    assert upcycled_layers(model, "8,1,1") == [1, 8]
    assert [p.number for p in pieces(model, "8,1")] == [0, 1, 4, 7, 8]


def logits(cfg, params, state):
    """Of the valid tokens: padding is not routed, and dense layers compute it."""
    spec, batch = model_spec(cfg), random_batch(2, 16)

    @jax.jit
    def run(params, state):
        ctx = TASK.context(batch, mode="eval", compute=XLA)
        return spec.merge(params, state)(ctx)[0]

    return run(params, state)[batch["segment"] > 0]


@pytest.mark.slow
def test_a_model_of_which_some_layers_change():
    """Its segments are cut; order, router state and own attention stay."""
    moe = tiny_moe(4, shared=None)
    top_p = tiny_moe(4, shared=None, router=TopP(p=(0.2, 0.6, 0.9), init_std=0.5))
    cfg = tiny_lm(
        Segment(
            pattern=(DENSE, moe, top_p),
            repeat=3,
            attention=(
                Attention(heads=4),
                Attention(heads=2),
                Attention(heads=4, kv_heads=1),
            ),
        ),
        Segment(pattern=(Dense(hidden=8),), repeat=4),
    )
    _, params, state = built(cfg)
    state = jax.tree.map(lambda a: a + jnp.arange(a.size).reshape(a.shape), state)
    expected = logits(cfg, params, state)
    before = jax.device_get({"params": params, "state": state})
    options = Upcycle(experts=3, k=2, split=2, layers="3,10,12")
    model = moe_model(cfg, options)
    assert [s.repeat for s in model.layers] == [1, 1, 1, 2]
    assert [s.pattern[2].router.p for s in model.layers[:3]] == [(0.2,), (0.6,), (0.9,)]
    new_params, new_state = upcycle_params(params, state, cfg, options)
    spec = model_spec(model)
    for tree, abstract in ((new_params, spec.params), (new_state, spec.state)):
        found = jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert found == jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
    found = logits(model, new_params, new_state)
    assert_same(found, expected)
    assert_equal_trees({"params": params, "state": state}, before)
    bias_RE = before["state"]["segments"]["0"]["blocks"]["1"]["ffn"]["router"]["bias_E"]
    for r in range(3):
        block = new_state["segments"][str(r)]["blocks"]["1"]
        np.testing.assert_array_equal(block["ffn"]["router"]["bias_E"][0], bias_RE[r])


@pytest.mark.parametrize("layers", thorough_but_for(["all", "every:2"], "every:2"))
def test_a_repeated_layer(layers):
    cfg = depth(4)
    _, params, state = built(cfg)
    options = Upcycle(experts=3, k=1, split=4, layers=layers)
    model = moe_model(cfg, options)
    assert len(model.layers) == 1
    found = logits(model, *upcycle_params(params, state, cfg, options))
    assert_same(found, logits(cfg, params, state))


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "--experts = 0: must be at least 1."),
        ({"k": 5}, "--k = 5: must be at most --experts = 4."),
        ({"split": 0}, "--split = 0: must be at least 1."),
        ({"split": 5}, "--split = 5: must be a divisor of config.model.layers[0]."),
        ({"noise": -0.1}, "--noise = -0.1: must be finite and >= 0."),
        ({"noise": float("inf")}, "--noise = inf: must be finite and >= 0."),
        ({"reinit": 1.5}, "--reinit = 1.5: must be in [0, 1]."),
        ({"scale": "gate"}, "--scale = 'gate': must be one of 'gates', 'weights'."),
        ({"seed": -1}, "--seed = -1: must be >= 0."),
        ({"layers": "3"}, "--layers = 3: must be among the dense layers, 0, 1, 2."),
        ({"layers": "some"}, "--layers = 'some': must be all, every:N, last:N or"),
        ({"layers": "1,-1"}, "--layers = '1,-1': must be all, every:N, last:N or"),
        ({"layers": "every:0"}, "--layers = 'every:0': must be every:N with N in [1"),
        ({"layers": "last:4"}, "--layers = 'last:4': must be last:N with N in [1, 3]"),
        ({"layers": "last:"}, "--layers = 'last:': must be last:N with N in [1, 3]"),
    ],
)
def test_options_that_will_not_do(options, message):
    made = Upcycle(**{"experts": 4, "k": 2} | options)
    with pytest.raises(ConfigError) as error:
        made.check()
        moe_model(depth(3), made)
    assert str(error.value).startswith(message)


def test_models_without_dense_layers():
    model = tiny_lm(Segment(pattern=(tiny_moe(4), Narrow(latent=8, inner=DENSE))))
    with pytest.raises(ConfigError, match=r"config\.model: has no dense layer; "):
        moe_model(model, Upcycle(experts=4, k=2))


# A whole run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a `run`: two dense layers, random weights."""
    folder = tmp_path_factory.mktemp("upcycle")
    cfg = runs.config(folder, "checkpoint.every=0", "eval.every=0")
    layers = (Segment(pattern=(Dense(hidden=64),), repeat=2),)
    cfg.model = dataclasses.replace(cfg.model, layers=layers)
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        runs.write(job, {"params": params, "state": state}, folder / "run")
        yield folder


@pytest.mark.thorough
def test_a_dense_run_becomes_one_of_experts_and_trains_on(moex, folder, tmp_path):
    new = tmp_path / "new"
    args = ("--to=moe", "--experts=3", "--k=2", "--split=2", "--layers=last:1")
    text = moex("convert", folder / "run", *args, f"--workdir={new}")
    report = json.loads((new / "convert.json").read_text())
    loss = report["loss"]
    assert loss["after"] == pytest.approx(loss["before"], rel=1e-6)
    assert "dense layers that became MoE layers: 1\n" in text
    assert "6 experts, each 1/2 of a copy; 4 per token\n" in text
    assert f"parameters of the experts: 0 -> {3 * 3 * 32 * 64:,}\n" in text
    assert f"moex train --workdir={new}" in text
    assert (report["to"], report["upcycled"]) == ("moe", [1])
    assert (report["experts"], report["k"], report["split"]) == (3, 2, 2)
    cfg = RunDir(new).config()
    assert [type(s.pattern[0]) for s in cfg.model.layers] == [Dense, MoE]
    moe = cfg.model.layers[1].pattern[0]
    assert moe.router == TopK(k=4, scale=2.0)

    moex("train", f"--config={new}", f"--workdir={new}", "--config.steps=3")
    trained = load_run(new)
    assert trained.step == 3
    ffn = trained.params["segments"]["1"]["blocks"]["0"]["ffn"]
    w_DE = np.asarray(ffn["router"]["w_DE"][0])
    assert np.any(w_DE[:, 0] != w_DE[:, 1])  # slices of a copy part
    w_EFD = np.asarray(ffn["experts"]["w_out_EFD"][0])
    assert np.any(w_EFD[0] != w_EFD[2])  # and so do copies
    first = runs.records(new)[0]
    assert first["nll"] == pytest.approx(loss["before"], rel=0.05)


@pytest.mark.slow
def test_a_dense_run_becomes_one_of_latent_experts(moex, folder, tmp_path):
    """All copies are one: groups of one copy lose alike, at full width nothing."""
    new = tmp_path / "new"
    args = ("--to=latent", "--experts=2", "--k=1", "--split=4", "--group=4")
    more = ("--latent=32", "--whiten", "--calibration=4")
    text = moex("convert", folder / "run", *args, *more, f"--workdir={new}")
    assert "    0 gate      0   0.0000     0.0000\n" in text
    assert "dense layers that became MoE layers: 0, 1\n" in text
    report = json.loads((new / "convert.json").read_text())
    assert (report["to"], report["experts"], report["group"]) == ("latent", 2, 4)
    assert report["loss"]["after"] == pytest.approx(report["loss"]["before"], rel=1e-5)
    assert len(report["errors"]) == 2 * 2 * 2  # layers, operators, groups
    made = load_run(new)
    experts = made.params["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]
    assert experts["b_gate_GDZ"].shape == (2, 2, 32, 32)
    b_GDZ = np.asarray(experts["b_gate_GDZ"][0])
    np.testing.assert_allclose(b_GDZ[0], b_GDZ[1], atol=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--to=moe", "--k=2"), "--experts: missing; dense layers need it."),
        (("--to=moe", "--experts=2"), "--k: missing; dense layers need it."),
        (("--to=moe", "--experts=2", "--k=3"), "--k = 3: must be at most --experts"),
        (
            ("--to=moe", "--experts=2", "--k=1", "--scale=gates"),
            "--scale: is for --spl",
        ),
        (("--to=moe", "--experts=2", "--k=1", "--rank=3"), "--rank: is for --to=late"),
        (("--to=latent", "--experts=2", "--k=1"), "--group: missing; how many"),
        (("--to=latent", "--group=2", "--split=2"), "--experts: missing; dense"),
        (("--to=latent", "--group=2"), "config.model: has no MoE layer; there is"),
    ],
)
def test_refusals(moex, folder, tmp_path, args, message):
    new = tmp_path / "new"
    said = moex("convert", folder / "run", *args, f"--workdir={new}")
    assert message in said
    assert said.count("\n") == 1
    assert not new.exists()
