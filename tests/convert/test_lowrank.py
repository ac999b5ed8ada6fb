"""Experts as U V + S: the conversion, pruning while training, and compact residuals.

E experts · D model width · F expert width
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert.kinds.lowrank import ToLowRank
from moex.convert.lowrank import (
    RESIDUALS,
    compact_arrays,
    compact_model,
    factored,
    factors,
    lowrank_model,
    stable_rank,
    stored_rows,
)
from moex.model.paths import flat_paths, nested
from moex.model.pruning import PruneRows
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.lowrank_glu import LowRankGlu
from moex.moe.narrow import Narrow
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.open import load_run
from moex.sharding import MeshConfig
from moex.train import training
from tests import runs
from tests.helpers import XLA, built, context, random_batch, tiny_lm, tiny_moe
from tests.marks import slow
from tests.moe.test_parallel import moe as moe_on_mesh
from tests.moe.test_parallel import values
from tests.tolerances import assert_close


def test_factors_are_the_nearest_and_the_rest_makes_them_exact():
    w_EIO = np.random.default_rng(0).normal(size=(3, 6, 5))
    a, b, rest = factors(w_EIO, 2)
    assert_close(a @ b + rest, w_EIO, "order")
    for w, left in zip(w_EIO, rest, strict=True):
        tail = np.linalg.svd(w, compute_uv=False)[2:]
        assert np.linalg.norm(left) == pytest.approx(np.linalg.norm(tail))
    for a_IR, b_RO in zip(a, b, strict=True):  # they share the singular values
        assert_close(a_IR.T @ a_IR, b_RO @ b_RO.T, "order")


def test_the_stable_rank():
    assert stable_rank(np.eye(4)) == pytest.approx(4)
    assert stable_rank(np.ones((3, 5))) == pytest.approx(1)
    assert stable_rank(np.diag([2.0, 1.0])) == pytest.approx(1.25)
    assert stable_rank(np.zeros((2, 2))) == 0


LAYERS = {
    "copies": Segment(pattern=(tiny_moe(4),), repeat=2),
    "chain, narrow": Segment(
        pattern=(
            Chain(moe=tiny_moe(4, shared=None), iterations=2),
            Narrow(latent=8, inner=tiny_moe(3)),
        )
    ),
}


def logits(cfg, params, state):
    batch = random_batch(2, 8)
    ctx = context(2, 8, token_BL=jnp.asarray(batch["tokens"]), compute=XLA)
    spec = model_spec(cfg)
    return jax.jit(lambda p, s: spec.merge(p, s)(ctx)[0])(params, state)


@pytest.mark.parametrize("layers", ["copies", slow("chain, narrow")])
def test_no_step_changes_the_function(layers):
    """Whole residuals are exact; dropping rows of 0 changes only the order of sums."""
    cfg = tiny_lm(LAYERS[layers])
    _, params, state = built(cfg)
    made = lowrank_model(cfg, 3)
    whole, errors = factored(params, made)
    before = logits(cfg, params, state)
    scale = float(jnp.abs(before).max())
    assert_close(logits(made, whole, state) / scale, before / scale, "step")
    assert {row["op"] for row in errors} == {"gate", "up", "down"}
    assert all(0 < row["error"] < 1 for row in errors)

    flat, rng = flat_paths(whole), np.random.default_rng(0)
    for name in [n for n in flat if n.endswith(RESIDUALS)]:
        array = np.array(flat[name])
        keep = rng.random((*array.shape[:2], *array.shape[3:])) < 0.3
        flat[name] = array * np.expand_dims(keep, 2)
    pruned = nested(flat)
    rows = stored_rows(pruned, made)
    small = compact_model(made, rows)
    few, places = compact_arrays(pruned, state, small)
    expected = logits(made, pruned, state)
    assert float(jnp.max(jnp.abs(expected - before))) > 1e-3 * scale
    assert_close(logits(small, few, places) / scale, expected / scale, "step")
    sizes = [sum(a.size for a in jax.tree.leaves(p)) for p in (pruned, few)]
    assert sizes[1] < sizes[0]


@pytest.mark.thorough
def test_no_row_at_all_may_be_left():
    cfg = lowrank_model(tiny_lm(LAYERS["copies"]), 3)
    _, params, state = built(cfg)
    flat = flat_paths(params)
    flat |= {n: 0 * a for n, a in flat.items() if n.endswith(RESIDUALS)}
    params = nested(flat)
    rows = stored_rows(params, cfg)
    assert set(rows.values()) == {(0, 0)}
    small = compact_model(cfg, rows)
    few, places = compact_arrays(params, state, small)
    expected = logits(cfg, params, state)
    scale = float(jnp.abs(expected).max())
    found = logits(small, few, places)
    assert_close(found / scale, expected / scale, "step")


@pytest.mark.thorough
@pytest.mark.parametrize("rows", [None, (3, 2)], ids=["whole", "stored"])
@pytest.mark.parametrize(
    "sizes",
    [{"expert": 2, "tensor": 2, "fsdp": 2}, slow({"expert": 4, "fsdp": 2})],
    ids=str,
)
def test_a_mesh_changes_nothing(rows, sizes):
    cfg = moe_on_mesh(experts=LowRankGlu(hidden=4, rank=2, rows=rows))
    mesh_cfg = MeshConfig(**{"data": 1} | sizes)
    for found, expected in zip(values(cfg, mesh_cfg), values(cfg, None), strict=True):
        jax.tree.map(lambda a, b: assert_close(a, b, "order"), found, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained `run` of one MoE layer."""
    folder = tmp_path_factory.mktemp("lowrank")
    with runs.one_device():
        runs.train(folder, folder / "run", "eval.every=0")
        yield folder


@pytest.mark.slow
def test_a_run_is_factored_pruned_and_made_compact(folder, tmp_path, moex):
    low, pruned, small = (tmp_path / n for n in ("low", "pruned", "small"))
    args = ("--to=lowrank", "--factor-rank=4", f"--workdir={low}")
    text = moex("convert", folder / "run", *args)
    assert "stable rank" in text and "    1 down " in text
    loss = json.loads((low / "convert.json").read_text())["loss"]
    assert loss["after"] == pytest.approx(loss["before"], rel=1e-5)

    def go_on(workdir, *overrides):
        cfg = runs.config(folder, "steps=12", "eval.every=0", *overrides)
        cfg.model = load_run(low).cfg.model
        cfg.init_from = str(low)
        prune = PruneRows(keep=0.2, warmup=1)
        cfg.optim = dataclasses.replace(cfg.optim, prune=prune)
        training.train(cfg, workdir, say=lambda line: None)
        return load_run(workdir)

    whole = go_on(pruned)
    flat = flat_paths(whole.params)
    rest = [flat[n] for n in flat if n.endswith(RESIDUALS)]
    kept = sum(int(np.count_nonzero(a)) for a in rest) / sum(a.size for a in rest)
    assert 0.1 < kept <= 0.2
    # A run that stops and goes on is the same to the bit.
    parts = tmp_path / "parts"
    cfg = ("checkpoint.every=6",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moex.train.loop.Run._should_stop", lambda run: run.step >= 6)
        go_on(parts, *cfg)
    runs.assert_same_arrays(go_on(parts, *cfg).params, whole.params)

    text = moex("convert", pruned, "--to=lowrank", "--compact", f"--workdir={small}")
    assert "rows of gate and up" in text
    report = json.loads((small / "convert.json").read_text())
    assert report["loss"]["after"] == pytest.approx(report["loss"]["before"], rel=1e-4)
    sizes = report["expert_params"]
    assert sizes["after"] < sizes["before"]
    said = moex("generate", small, "--prompt=the", "--max-new-tokens=3")
    assert said.startswith("the")


@pytest.mark.parametrize(
    ("cfg", "how", "told"),
    [
        (tiny_lm(Segment(pattern=(Dense(hidden=8),))), {}, "has no MoE layer"),
        (
            tiny_lm(Segment(pattern=(tiny_moe(2, experts=Glu(hidden=4, bias=True)),))),
            {},
            r"layers\[0\].pattern\[0\].experts = .*bias",
        ),
        (tiny_lm(LAYERS["copies"]), {"factor_rank": 9}, "factor-rank=9: .* at most 8"),
        (tiny_lm(LAYERS["copies"]), {"compact": True}, "no whole residuals"),
        (lowrank_model(tiny_lm(LAYERS["copies"]), 2), {}, "drop rows of S with --comp"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(cfg, how, told):
    class Source:
        model = cfg

    with pytest.raises(ConfigError, match=told):
        ToLowRank(**how).ready(Source).model(cfg)


def test_flags_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="--factor-rank: is for"):
        ToLowRank.from_flags({"factor_rank": 3, "compact": True})
