"""The training step: accumulation, skipping, meshes, router biases.

B batch · L length · V vocabulary · E experts
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.configs import base
from moex.model import spec as states
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.paths import flat_paths
from moex.moe.balance import SignBias
from moex.nn.attention import Attention
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.runs.score import make_eval_step
from moex.sharding import shard_batch
from moex.tasks.lm import token_losses
from moex.train.job import Training
from moex.train.profiler import SCOPES
from moex.train.step import SPIKE_WARMUP, gradient_norms, guard_update, make_train_step
from tests.helpers import (
    TASK,
    XLA,
    assert_equal_trees,
    built,
    lm_loss,
    mesh_of,
    random_batch,
    tiny_lm,
    tiny_moe,
)
from tests.marks import slow, thorough, thorough_but_for
from tests.tolerances import assert_close

# A large epsilon, because Adam's first step is otherwise the sign of the gradient and
# turns rounding of a gradient near 0 into a step of full size. The gradient norm is
# near 1 here, so that clipping at 0.1 acts.
OPTIM = Optim(
    rule=AdamW(eps=1e-3), lr=0.1, schedule="constant", weight_decay=0.1, clip=0.1
)
ATTENTION = Attention(heads=4, kv_heads=2)
MODEL = tiny_lm(
    Segment(pattern=(tiny_moe(8, shared=None),)),
    Segment(pattern=(tiny_moe(4, shared=None),), repeat=2),
    attention=ATTENTION,
)
SMALL = tiny_lm(Segment(pattern=(tiny_moe(8),)), attention=ATTENTION)
BATCH = random_batch(8, 8)
# The microbatches of an accumulated step get very different numbers of tokens and
# targets: rows 0 and 4 all of them, rows 1 and 5 one token and no target, and so on.
KEPT = np.arange(8) < np.array([8, 1, 3, 2, 8, 1, 2, 3])[:, None]
UNEVEN = BATCH | {"segment": BATCH["segment"] * KEPT}
UNEVEN["loss_mask"] = BATCH["loss_mask"] * KEPT * (np.arange(8)[:, None] % 4 != 1)
KEY = jax.random.key(0)


@functools.cache
def trainer(name, loss, grad_accum=1):
    """(spec, fresh train state, compiled step) of one of the models above."""
    cfg = {"model": MODEL, "small": SMALL}[name]
    spec, params, state = built(cfg)
    tx, _ = make_optimizer(OPTIM, 100, spec.params, spec.info)
    train_state = {
        "params": params,
        "state": state,
        "opt": tx.init(params),
        "guard": states.init_guard(),
    }
    step = make_train_step(
        TASK,
        spec,
        tx,
        Loss(**dict(loss)),
        grad_accum=grad_accum,
        num_domains=2,
        optim=OPTIM,
        compute=XLA,
    )
    return spec, train_state, jax.jit(step).lower(train_state, 0, KEY, BATCH).compile()


BALANCED = (("load_balance", 0.5), ("router_z", 0.1), ("z", 0.01))
# Means over the tokens of the step. The balance loss of a microbatch is no such mean.
TOKEN_ONLY = (("load_balance", 0.0), ("router_z", 0.3), ("entropy", 0.2), ("z", 0.1))
# Means over the sequences of the step.
BY_SEQUENCE = (("load_balance", 0.5), ("balance_scope", "sequence"), ("z", 0.1))


@functools.cache
def one_step():
    spec, train_state, step = trainer("small", BALANCED)
    return step(train_state, 0, KEY, BATCH)


def compare(actual, expected, kind):
    actual, expected = (_named(tree) for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert_close(actual[path], value, kind, path)


def _named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    "loss",
    [slow(TOKEN_ONLY, id="tokens"), thorough(BY_SEQUENCE, id="rows")],
)
def test_microbatches_add_up_to_the_batch(loss):
    """Parameters, optimizer, every loss and every figure of the routing."""
    _, train_state, whole = trainer("small", loss)
    _, _, accumulated = trainer("small", loss, grad_accum=4)
    expected, expected_metrics = whole(train_state, 0, KEY, UNEVEN)
    actual, metrics = accumulated(train_state, 0, KEY, UNEVEN)
    compare(actual, expected, "step")
    compare(metrics, expected_metrics, "step")


@pytest.mark.parametrize("grad_accum", thorough_but_for([1, 4], 4))
def test_figures_of_a_step_are_means_over_its_tokens(grad_accum):
    """Against a float64 loop over the logits of the router, of uneven microbatches."""
    spec, train_state, step = trainer("small", TOKEN_ONLY, grad_accum)
    _, metrics = step(train_state, 0, KEY, UNEVEN)
    ctx = TASK.context(UNEVEN, mode="train", collect=True, compute=XLA)
    aux = spec.merge(train_state["params"], train_state["state"])(ctx)[1]
    logits_TE = np.asarray(
        aux["segments"]["0"]["blocks"]["0"]["ffn"]["scores"]["logits"][0], np.float64
    )
    z, entropy = [], []
    for logits_E, segment in zip(logits_TE, UNEVEN["segment"].reshape(-1), strict=True):
        if segment:
            total = np.sum(np.exp(logits_E))
            prob_E = np.exp(logits_E) / total
            z.append(np.log(total) ** 2)
            entropy.append(-np.sum(prob_E * np.log(prob_E)))
    assert len(z) < UNEVEN["segment"].size / 2
    (layer,) = metrics["layers"].values()
    assert_close(layer["router_z"], [np.mean(z)], "float32")
    assert_close(layer["entropy"], [np.mean(entropy)], "float32")
    assert_close(metrics["weighted"]["router_z"], 0.3 * np.mean(z), "float32")
    assert metrics["padding"] == UNEVEN["segment"].size - len(z)


def test_clipping_and_decay_act_on_the_step():
    (_, train_state, _), (_, metrics) = trainer("small", BALANCED), one_step()
    assert metrics["grad_norm"] > 2 * OPTIM.clip
    assert metrics["loss"] > metrics["nll"]
    after = one_step()[0]
    for path, before in flat_paths(train_state["params"]).items():
        assert jnp.any(flat_paths(after["params"])[path] != before), path


def test_gradient_norms_by_hand():
    """3 and 4 in attention, 12 in a router, 84 in an expert of the same layer."""
    grads = {
        "w_embed_VD": jnp.array([[0.0]]),
        "segments": {
            "0": {
                "attention": {"w_q": jnp.array([[3.0]]), "bias": jnp.array([4.0])},
                "ffn": {
                    "router": {"w_DE": jnp.array([[12.0]])},
                    "experts": {"w_out_EFD": jnp.array([[84.0]])},
                },
            }
        },
    }
    total, groups = gradient_norms(grads)
    assert total == 85
    assert groups == {"embedding": 0, "attention": 5, "router": 12, "experts": 84}


def test_gradient_norms_of_a_step():
    """Of the whole model, and the groups are all there and make up the whole."""
    _, metrics = one_step()
    groups = metrics["grad_norms"]
    expected = {"embedding", "attention", "router", "experts", "dense", "norms"}
    assert groups.keys() == expected | {"logits"}
    assert_close(np.linalg.norm(list(groups.values())), metrics["grad_norm"], "float32")


def test_the_parts_of_a_step_have_names_in_a_profile():
    """Every scope is in the compiled step, and in its backward pass if it has one."""
    _, _, step = trainer("small", BALANCED)
    found = {
        (name, "transpose(" in path)
        for path in re.findall(r'op_name="([^"]*)"', step.as_text())
        for name in re.split(r"[/()]", path)
    }
    for name in SCOPES:
        assert (name, False) in found, name
        assert name == "optimizer" or (name, True) in found, name


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(poison):
    _, train_state, step = trainer("small", BALANCED)
    mask = BATCH["loss_mask"].copy()
    mask[2, 1] = poison
    after, metrics = step(train_state, 0, KEY, dict(BATCH, loss_mask=mask))
    for name in ("params", "state"):
        assert_equal_trees(after[name], train_state[name])
    jax.tree.map(np.testing.assert_array_equal, after["opt"], train_state["opt"])
    assert not np.isfinite(metrics["loss"])
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)
    after, metrics = step(after, 1, KEY, BATCH)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 0)
    compare(after["params"], one_step()[0]["params"], "order")


def test_a_spike_is_skipped():
    _, train_state, step = trainer("small", BALANCED)
    usual = float(one_step()[1]["grad_norm"])
    for factor, skipped in ((0.9, 1), (1.1, 0)):
        guard = states.init_guard() | {
            "accepted": jnp.int32(SPIKE_WARMUP),
            "grad_norm_mean": jnp.float32(usual / OPTIM.spike_factor * factor),
        }
        after, metrics = step(train_state | {"guard": guard}, 0, KEY, BATCH)
        assert metrics["skipped"] == skipped
        equal = jnp.all(after["params"]["norm"]["scale_D"] == _scale(train_state))
        assert equal == bool(skipped)


def _scale(train_state):
    return train_state["params"]["norm"]["scale_D"]


def test_guard_by_hand():
    guard = states.init_guard()
    # The first means are plain: 1, then (1 + 3) / 2.
    for norm, mean in ((1.0, 1.0), (3.0, 2.0)):
        ok, guard = guard_update(guard, jnp.float32(0), jnp.float32(norm), 10.0)
        assert ok
        assert guard["grad_norm_mean"] == mean
    for loss, norm in ((0.0, np.inf), (np.nan, 1.0), (np.inf, 1.0), (0.0, np.nan)):
        ok, after = guard_update(guard, jnp.float32(loss), jnp.float32(norm), None)
        assert not ok
        assert after["grad_norm_mean"] == 2.0
        assert (after["accepted"], after["skipped"]) == (2, 1)
    # Too early to call a spike; then 20 is not above 10 * 2 and 20.1 is.
    assert guard_update(guard, jnp.float32(0), jnp.float32(1e6), 10.0)[0]
    guard = guard | {"accepted": jnp.int32(SPIKE_WARMUP)}
    for norm, accepted in ((20.0, True), (20.1, False)):
        ok, after = guard_update(guard, jnp.float32(0), jnp.float32(norm), 10.0)
        assert ok == accepted
    assert guard_update(guard, jnp.float32(0), jnp.float32(1e6), None)[0]
    # From the hundredth on the mean is exponential: 2 + 0.01 * (12 - 2).
    guard = guard | {"accepted": jnp.int32(5000)}
    _, after = guard_update(guard, jnp.float32(0), jnp.float32(12), 10.0)
    assert_close(after["grad_norm_mean"], 2.1, "float32")


def guarded(tail, *, factor=10.0, before=1.0, **options):
    """(accepted, number of the tenth skip in a row or None, means) of some norms.

    Sixty norms `before` come first; of them only the means are told.
    """

    def step(guard, norm):
        ok, guard = guard_update(guard, jnp.float32(1), norm, factor, **options)
        return guard, (ok, guard["skipped_in_row"], guard["grad_norm_mean"])

    norms = np.r_[np.full(60, before), tail].astype(np.float32)
    _, (ok, in_row, mean) = jax.lax.scan(step, states.init_guard(), norms)
    stop = np.flatnonzero(in_row >= 10)
    return np.asarray(ok)[60:], stop[0] - 60 if len(stop) else None, np.asarray(mean)


@pytest.mark.parametrize("level", [15.0, 1e3, 1e6, 1e12])
def test_a_new_level_of_norms_is_followed(level):
    """Skipped three times whatever its height, then taken for good."""
    ok, stop, mean = guarded(np.full(200, level))
    assert ok.tolist() == [False] * 3 + [True] * 197
    assert stop is None
    # The mean is moved to a tenth of the level. What is missing, 0.9, shrinks by 1 / 61
    # with the third skip, by 1 / 61 to 1 / 100 with 40 updates, then by a hundredth.
    missing = 0.9 * (60 / 61) * (60 / 100) * 0.99**157
    assert_close(mean[-1] / level, 1 - missing, "step")


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_new_level_is_followed(seed):
    """Norms that differ by a third around 1, then around 100."""
    noise = np.exp(0.3 * np.random.default_rng(seed).normal(size=200))
    ok, stop, _ = guarded(100 * noise)
    assert stop is None
    assert 3 <= np.sum(~ok) <= 12
    assert np.all(ok[60:])


@pytest.mark.parametrize("growth", [1.2, 1.5, 2.0, 10.0, 1e4])
def test_norms_that_go_on_growing_are_not(growth):
    with np.errstate(over="ignore"):
        ok, stop, _ = guarded(growth ** np.arange(1.0, 150))
    first = int(np.argmin(ok))
    # All norms up to ten times the mean are taken, and not one after them.
    assert stop == first + 9
    assert not np.any(ok[first:])


def test_a_growth_that_a_mean_can_follow_is_no_spike():
    ok, *_ = guarded(1.05 ** np.arange(1.0, 150))
    assert np.all(ok)


def test_spikes_leave_the_mean_alone():
    alternating = np.where(np.arange(100) % 2 == 0, 1e3, 1.0)
    pairs = np.where(np.arange(100) % 4 < 2, 1e3, 1.0)
    for norms in (alternating, pairs):
        ok, stop, mean = guarded(norms)
        assert ok.tolist() == (norms == 1).tolist()
        assert stop is None
        np.testing.assert_array_equal(mean, 1)


def test_norms_of_frozen_parameters_are_no_measure():
    """All parameters are frozen for 60 steps: their norm, 0, is not the mean."""
    ok, stop, mean = guarded(np.full(100, 2.0), before=0.0)
    assert np.all(ok) and stop is None
    assert mean[59] == 0 and np.all(mean[60:] == 2)
    # As a guard that counted them left it in a checkpoint.
    old = states.init_guard() | {"accepted": jnp.int32(60)}
    ok, guard = guard_update(old, jnp.float32(1), jnp.float32(2), 10.0)
    assert ok and guard["grad_norm_mean"] == 2


def test_high_norms_of_a_spoiled_model_are_no_new_level():
    ok, stop, mean = guarded(np.full(20, 50.0), hopeless=True)
    assert not np.any(ok) and stop == 9
    assert mean[-1] == 1


def test_a_level_that_is_not_finite_is_never_followed():
    ok, stop, mean = guarded(np.full(20, np.inf))
    assert not np.any(ok) and stop == 9
    assert mean[-1] == 1


@pytest.mark.thorough
def test_each_router_bias_follows_the_load_of_its_own_layer():
    """Two segments with 8 and 4 experts, the second with two layers."""
    spec, train_state, step = trainer("model", BALANCED)
    after, metrics = step(train_state, 0, KEY, BATCH)
    biases, before = flat_paths(after["state"]), flat_paths(train_state["state"])
    assert len(biases) == 2
    for path, bias in biases.items():
        frac_E = metrics["layers"][path.removesuffix("/router/bias_E")]["load_frac_E"]
        assert bias.shape == frac_E.shape
        num_experts = bias.shape[-1]
        # A share of exactly 1 / E stays; shares here are multiples of 1 / slots.
        sign = np.sign(np.round(1 / num_experts - np.asarray(frac_E), 6))
        assert spec.info[path].rule == SignBias(0.01)
        assert_close(bias, before[path] + 0.01 * sign, "float32", path)
        assert np.any(sign != 0)


@pytest.mark.thorough
def test_a_clipped_step_of_the_real_optimizer_is_the_same_on_a_mesh():
    """Other layers and meshes: `tests/test_sharded.py`."""
    spec, train_state, _ = trainer("small", BALANCED)
    expected, expected_metrics = one_step()
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    tx, _ = make_optimizer(OPTIM, 100, spec.params, spec.info)
    placed = _placed(spec, tx, train_state, mesh)
    step = make_train_step(
        TASK,
        spec,
        tx,
        Loss(**dict(BALANCED)),
        grad_accum=1,
        num_domains=2,
        optim=OPTIM,
        compute=XLA,
    )
    with jax.set_mesh(mesh):
        after, metrics = jax.jit(step)(placed, 0, KEY, shard_batch(BATCH, mesh))
    compare(metrics, expected_metrics, "step")
    compare(after, expected, "step")
    assert_equal_trees(after["state"], expected["state"])
    for path, leaf in flat_paths({k: after[k] for k in ("params", "state")}).items():
        assert_replicas_agree(path, leaf)


def _placed(spec, tx, train_state, mesh):
    param_shardings, state_shardings = states.shardings(spec, mesh)
    return train_state | {
        "params": jax.device_put(train_state["params"], param_shardings),
        "state": jax.device_put(train_state["state"], state_shardings),
        "opt": jax.device_put(
            train_state["opt"], states.opt_shardings(tx, spec, param_shardings, mesh)
        ),
    }


def assert_replicas_agree(path, array):
    """Every device that holds a part of `array` holds the same part."""
    parts = {}
    assert len(array.addressable_shards) == 8, path
    for shard in array.addressable_shards:
        first = parts.setdefault(str(shard.index), shard.data)
        np.testing.assert_array_equal(shard.data, first, err_msg=path)


@pytest.mark.thorough
def test_parameters_are_made_in_their_places():
    spec = states.model_spec(SMALL)
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    cfg = base.get_config()
    cfg.model, cfg.optim = SMALL, OPTIM
    train_state = Training(cfg=cfg, mesh=mesh, spec=spec).init_state()
    expected, _ = states.shardings(spec, mesh)
    for path, sharding in flat_paths(expected).items():
        leaf = flat_paths(train_state["params"])[path]
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
    split = [p for p, s in flat_paths(expected).items() if any(s.spec)]
    assert "w_embed_VD" in split
    moments = [
        leaf
        for leaf in jax.tree.leaves(train_state["opt"])
        if leaf.shape == spec.params["w_embed_VD"].shape
    ]
    assert len(moments) == 2
    for moment in moments:
        assert moment.sharding.is_equivalent_to(expected["w_embed_VD"], 2)


def test_losses_by_hand():
    """Two rows of two tokens over V = 2, one target masked; a stub for the model."""
    # Row 0: logits (0, 0), then (log 3, 0). Row 1: (0, 0), then masked.
    logits = np.zeros((2, 2, 2), np.float32)
    logits[0, 1, 0] = np.log(3)
    logits[1, 1] = 77
    batch = random_batch(2, 4) | {
        "targets": np.array([[0, 0], [1, 1]], np.int32),
        "loss_mask": np.array([[1, 1], [1, 0]], np.float32),
        "num_bytes": np.array([[2, 3], [4, 100]], np.int32),
    }
    balance = jnp.array([1.5, 2.5])  # two stacked layers, both routed evenly
    stats = {
        "num_tokens": jnp.full(2, 6.0),
        "load_E": jnp.full((2, 2), 6.0),
        "prob_sum_E": 3 * jnp.ones((2, 2)),
        "router_z_sum": 14 * balance,
        "entropy_sum": 0 * balance,
    }
    layer = {"load": stats["load_E"], "stats": stats}
    aux = {"segments": {"0": {"blocks": {"0": {"ffn": layer}, "1": {"ffn": {}}}}}}
    loss, sums = lm_loss(
        lambda ctx: (jnp.asarray(logits), aux),
        TASK.context(batch),
        batch,
        Loss(z=0.1, load_balance=0.01, router_z=0.001),
        counts={"targets": 3.0, "tokens": 7.0, "sequences": 2.0},
        num_microbatches=2,
        num_domains=3,
    )
    # log 2, log 4 - log 3, log 2; log-normalisers log 2, log 4, log 2.
    nll = 2 * np.log(2) + np.log(4 / 3)
    z = 2 * np.log(2) ** 2 + np.log(4) ** 2
    # Both stacked layers count: 0.01 * 2 over two microbatches, 0.001 * 56 / 7.
    assert_close(loss, (nll + 0.1 * z) / 3 + 0.02 / 2 + 0.008, "float32")
    assert_close(sums["nll"], nll, "float32")
    assert_close(sums["z"], z, "float32")
    assert (sums["tokens"], sums["bytes"]) == (3, 9)
    assert sums["tokens"].dtype == sums["domain_tokens"].dtype == jnp.int32
    assert_close(sums["guess"], 3 * np.log(2), "float32")
    assert_close(sums["domain_score"], [nll - np.log(2), np.log(2), 0], "float32")
    assert sums["domain_tokens"].tolist() == [2, 1, 0]
    assert sums["layers"].keys() == {"segments/0/blocks/0/ffn"}


def test_token_losses_of_large_logits_are_finite():
    logits_BLV = jnp.array([[[1e4, -1e4]]])
    nll_BL, _ = token_losses(logits_BLV, jnp.array([[1]]))
    assert nll_BL == 2e4


def test_evaluation_scores_as_training_does():
    spec, train_state, _ = trainer("small", BALANCED)
    run = make_eval_step(TASK, spec, num_domains=2, compute=XLA)
    sums = jax.jit(run)(train_state["params"], train_state["state"], BATCH)
    assert_close(sums["nll"] / sums["tokens"], one_step()[1]["nll"], "order")


def test_a_batch_without_targets_is_harmless():
    _, train_state, step = trainer("small", BALANCED)
    batch = dict(BATCH, loss_mask=np.zeros_like(BATCH["loss_mask"]))
    after, metrics = step(train_state, 0, KEY, batch)
    # Its loss is that of the routing, and a mean over no target is no figure.
    for name in ("nll", "z", "bits_per_byte"):
        assert np.isnan(metrics[name])
    assert np.all(np.isnan(metrics["domain_score"]))
    assert_close(metrics["loss"], sum(metrics["weighted"].values()), "float32")
    assert (metrics["tokens"], metrics["skipped"]) == (0, 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))
