"""Schedules, decay mask, factors by path, Muon on stacks of matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from moex.config.base import ConfigError, check
from moex.config.schedule import Schedule
from moex.model.optim import (
    AdamW,
    Muon,
    Optim,
    decays,
    make_optimizer,
    path_factors,
    schedule_frac,
)
from moex.model.paths import flat_paths
from moex.model.spec import ParamInfo
from tests.helpers import assert_equal_trees
from tests.tolerances import assert_close

# Two stacked layers of three experts, a router, a norm and an embedding.
INFO = {
    "layer/experts/w_EDF": ParamInfo(("expert", "embed", "mlp"), matrix=((1,), (2,))),
    "layer/experts/w_ED2F": ParamInfo(
        ("expert", "embed", None, "mlp"), matrix=((1,), (3,))
    ),
    "layer/router/w_DE": ParamInfo(("embed", None)),
    "layer/norm/scale_D": ParamInfo(("embed",)),
    "w_embed_VD": ParamInfo(("vocab", "embed")),
}
SHAPES = {
    "layer": {
        "experts": {"w_EDF": (2, 3, 4, 5), "w_ED2F": (2, 3, 4, 2, 5)},
        "router": {"w_DE": (2, 4, 3)},
        "norm": {"scale_D": (2, 4)},
    },
    "w_embed_VD": (6, 4),
}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


PARAMS, GRADS = random_tree(0), random_tree(1)


def update(steps=1, **fields):
    """(parameters after `steps` equal gradients, optimizer state)."""
    defaults = {"rule": AdamW(), "lr": 0.1, "schedule": "constant", "clip": None}
    cfg = Optim(**defaults | fields)
    tx, _ = make_optimizer(cfg, 100, PARAMS, INFO)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def moved(params):
    return {k: flat_paths(params)[k] - v for k, v in flat_paths(PARAMS).items()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # Cosine from 1 at step 19, the last of the warm-up, to 0.1 at step 99: 80
        # intervals, whose middle is 0.55. Step 20 is 1 / 80 of the way:
        # 0.1 + 0.9 (1 + cos(pi / 80)) / 2.
        (
            {"schedule": "cosine", "warmup_steps": 20},
            {0: 0.05, 9: 0.5, 19: 1, 20: 0.99965306, 59: 0.55, 99: 0.1},
        ),
        # 99 intervals: step 33 is a third of the way, 0.1 + 0.9 (1 + 1 / 2) / 2.
        ({"schedule": "cosine"}, {0: 1, 33: 0.775, 66: 0.325, 99: 0.1}),
        ({"schedule": "constant", "warmup_steps": 2}, {0: 0.5, 1: 1, 2: 1, 99: 1}),
        # 20 steps of 1 / 20 each, of which the last is the last step: 80 to 99.
        (
            {"schedule": "wsd", "warmup_steps": 10, "final_lr_frac": 0.0},
            {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 0.95, 89: 0.5, 98: 0.05, 99: 0},
        ),
        ({"schedule": "wsd", "decay_frac": 1.0}, {0: 1, 33: 0.7, 66: 0.4, 99: 0.1}),
        # Warm-up and decay share the run: 50 steps up, 50 down.
        (
            {"schedule": "wsd", "warmup_steps": 50, "decay_frac": 0.5},
            {0: 0.02, 49: 1, 50: 0.982, 74: 0.55, 99: 0.1},
        ),
        ({"schedule": "cosine", "warmup_steps": 99}, {0: 1 / 99, 98: 1, 99: 0.1}),
        ({"schedule": "constant", "warmup_steps": 100}, {0: 0.01, 99: 1}),
    ],
)
def test_schedules_by_hand(fields, expected):
    frac = schedule_frac(Optim(rule=AdamW(), lr=1.0, **fields), 100)
    for step, value in expected.items():
        assert_close(frac(step), value, "float32", f"step {step}")


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(
    ("steps", "warmup", "final"),
    [(2, 0, 0.1), (2, 1, 0.37), (7, 5, 0.0), (97, 1, 0.1), (400, 20, 0.0)]
    + [(1000, 50, 1.0)],
)
def test_every_schedule_arrives(schedule, steps, warmup, final):
    """The peak and the final value are reached exactly, in every length of run."""
    cfg = Optim(
        rule=AdamW(),
        lr=1.0,
        schedule=schedule,
        warmup_steps=warmup,
        final_lr_frac=final,
        decay_frac=(steps - warmup) / steps,
    )
    cfg.validate_steps(steps, "config.optim")
    # Compiled with the rest of a step: XLA then divides by constants inexactly.
    frac = jax.jit(jax.vmap(schedule_frac(cfg, steps)))(jnp.arange(steps))
    assert frac[max(cfg.warmup_steps - 1, 0)] == 1 == frac.max()
    assert frac[-1] == np.float32(final)
    assert frac[0] > 0
    before, after = np.split(np.asarray(frac), [cfg.warmup_steps])
    assert np.all(np.diff(before) > 0) and np.all(np.diff(after) <= 0)


def test_a_run_that_is_resumed_with_other_steps_ends_at_their_final_value():
    cfg = Optim(rule=AdamW(), lr=0.5, schedule="wsd", decay_frac=0.5)
    for steps in (10, 30, 6):
        _, lr = make_optimizer(cfg, steps, PARAMS, INFO)
        assert lr(steps - 1) == np.float32(0.05)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        (
            {"schedule": "wsd", "warmup_steps": 90, "decay_frac": 0.5},
            "steps - decay = 100 - 50 = 50, for the decay of decay_frac = 0.5 of the "
            "steps comes last.",
        ),
        (
            {"schedule": "wsd", "warmup_steps": 81},
            "steps - decay = 100 - 20 = 80, for ",
        ),
        ({"warmup_steps": 100}, "steps - 1 = 99, or nothing decays."),
        ({"schedule": "constant", "warmup_steps": 101}, "steps = 100."),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(fields, allowed):
    cfg = Optim(rule=AdamW(), lr=1.0, **fields)
    expected = f"config.optim.warmup_steps = {cfg.warmup_steps}: must be at most "
    with pytest.raises(ConfigError) as error:
        cfg.validate_steps(100, "config.optim")
    assert str(error.value).startswith(expected + allowed)
    cfg.warmup_steps -= {90: 40, 81: 1, 100: 1, 101: 1}[cfg.warmup_steps]
    cfg.validate_steps(100, "config.optim")


def test_decay_steps_are_rounded_from_the_number_that_was_written():
    """0.575 of 100 is a half, 57.5, which float64 puts below it; even 58 is taken."""
    optim = functools.partial(Optim, rule=AdamW(), lr=1.0)
    assert 0.575 * 100 < 57.5
    assert optim(decay_frac=0.575).decay_steps(100) == 58
    assert optim(decay_frac=0.001).decay_steps(10) == 1


def test_the_schedule_is_in_units_of_lr():
    cfg = Optim(rule=AdamW(), lr=0.3, warmup_steps=2)
    _, lr = make_optimizer(cfg, 10, PARAMS, INFO)
    assert_close(lr(0), 0.15, "float32")


def test_adamw_is_that_of_optax_with_decay_on_matrices_only():
    params, _ = update(steps=3, weight_decay=0.2)
    for path, value in flat_paths(PARAMS).items():
        decay = 0.0 if path.endswith("scale_D") else 0.2
        tx = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay)
        state = tx.init(value)
        for _ in range(3):
            step, state = tx.update(flat_paths(GRADS)[path], state, value)
            value = value + step
        assert_close(flat_paths(params)[path], value, "order", path)


def test_stacked_vectors_do_not_decay():
    info = {
        "ffn/experts/bias_in_E2F": ParamInfo(("expert", None, "mlp")),
        "ffn/zero/v_JD": ParamInfo((None, "embed")),
        "ffn/zero/w_JD2": ParamInfo((None, "embed", None)),
        "ffn/norm/scale_D": ParamInfo(("embed",)),
        "attention/sink_GR": ParamInfo(("kv_heads", None)),
    }
    kept = [name for name in info if decays(name, info)]
    assert kept == ["ffn/zero/w_JD2"]


def test_first_adamw_step_by_hand():
    """The first step of Adam is the sign of the gradient; decay is 0.2 * w."""
    params, _ = update(weight_decay=0.2)
    expected = jax.tree.map(
        lambda p, g: p - 0.1 * (jnp.sign(g) + 0.2 * p), PARAMS, GRADS
    )
    actual = params["layer"]["router"]["w_DE"]
    assert_close(actual, expected["layer"]["router"]["w_DE"], "float32")


def test_clipping_is_by_the_global_norm():
    norm = float(np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(GRADS))))
    small = jax.tree.map(lambda g: g * 0.5 / norm, GRADS)
    rule = AdamW(eps=1.0)  # so that the size of the gradient matters
    clipped, _ = update(rule=rule, clip=0.5)
    cfg = Optim(rule=rule, lr=0.1, schedule="constant", clip=None)
    tx, _ = make_optimizer(cfg, 100, PARAMS, INFO)
    updates, _ = tx.update(small, tx.init(PARAMS), PARAMS)
    for path, step in flat_paths(updates).items():
        assert_close(moved(clipped)[path], step, "order", path)


def test_a_frozen_parameter_keeps_its_bits_and_holds_no_state():
    params, state = update(
        steps=2, weight_decay=0.2, lr_factors=(("router", 0.0), ("embed", 0.0))
    )
    assert_equal_trees(params["layer"]["router"], PARAMS["layer"]["router"])
    assert_equal_trees({"w": params["w_embed_VD"]}, {"w": PARAMS["w_embed_VD"]})
    assert jnp.all(params["layer"]["norm"]["scale_D"] != _norm_scale())
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (2, 4, 3) not in shapes
    assert (6, 4) not in shapes
    assert shapes.count((2, 4)) == 2  # both moments of the norm


def _norm_scale():
    return PARAMS["layer"]["norm"]["scale_D"]


@pytest.mark.parametrize("rule", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_a_factor_scales_the_update(rule):
    plain, _ = update(rule=rule, weight_decay=0.1)
    halved, _ = update(rule=rule, weight_decay=0.1, lr_factors=(("experts", 0.5),))
    for path, step in moved(plain).items():
        factor = 0.5 if "experts" in path else 1.0
        assert_close(moved(halved)[path], factor * step, "order", path)


def test_a_scheduled_factor_freezes_for_a_while():
    """Factor 1 at steps 0 and 1, then 0; experts go on."""
    stop = Schedule(points=((1, 1.0), (2, 0.0)))
    two, _ = update(steps=2, weight_decay=0.1)
    frozen, _ = update(steps=4, weight_decay=0.1, lr_factors=(("router", stop),))
    four, _ = update(steps=4, weight_decay=0.1)
    router = ("layer", "router", "w_DE")
    for tree, expected, path in (
        (frozen, two, router),
        (frozen, four, ("layer", "experts", "w_EDF")),
    ):
        a, b = (functools.reduce(dict.get, path, t) for t in (tree, expected))
        np.testing.assert_array_equal(a, b)
    assert jnp.any(four["layer"]["router"]["w_DE"] != two["layer"]["router"]["w_DE"])


def test_the_last_pattern_wins_and_globs_match_whole_paths():
    cfg = Optim(rule=AdamW(), lr=1.0, lr_factors=(("layer/*", 0.5), ("router", 0.1)))
    assert path_factors(cfg, PARAMS, INFO) == {
        "layer/experts/w_EDF": 0.5,
        "layer/experts/w_ED2F": 0.5,
        "layer/router/w_DE": 0.1,
        "layer/norm/scale_D": 0.5,
        "w_embed_VD": 1.0,
    }


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="'ruoter'.*Did you mean 'router'"):
        update(lr_factors=(("ruoter", 0.1),))


def test_muon_orthogonalises_each_expert_of_each_layer_alone():
    params, _ = update(rule=Muon(), lr=0.1, steps=2)
    tx = muon(0.1, ns_steps=5, beta=0.95)

    @jax.jit
    def alone(w_DF, g_DF):
        state, value = tx.init(w_DF), w_DF
        for _ in range(2):
            step, state = tx.update(g_DF, state, value)
            value = value + step
        return value

    for name, axis in (("w_EDF", None), ("w_ED2F", 3)):
        path = f"layer/experts/{name}"
        w, g, after = (flat_paths(t)[path] for t in (PARAMS, GRADS, params))
        # Layers, experts and the gate/up pair are all batch dims.
        if axis is not None:
            w, g, after = (jnp.moveaxis(a, axis, 2) for a in (w, g, after))
        w, g, after = (a.reshape(-1, 4, 5) for a in (w, g, after))
        expected = jnp.stack([alone(*pair) for pair in zip(w, g, strict=True)])
        assert_close(after, expected, "step", path)
        singular = jnp.linalg.svd(after - w, compute_uv=False)
        assert jnp.all(singular > 0.02), "no direction is left out"


def test_muon_leaves_embeddings_routers_and_norms_to_adam():
    params, _ = update(rule=Muon(adam_lr=0.01), weight_decay=0.5)
    for path in ("layer/router/w_DE", "layer/norm/scale_D", "w_embed_VD"):
        # optax.contrib.muon gives Nesterov momentum to its Adam part as well.
        tx, grad = (
            optax.nadamw(0.01, b2=0.95, weight_decay=0.0),
            flat_paths(GRADS)[path],
        )
        value = flat_paths(PARAMS)[path]
        step, _ = tx.update(grad, tx.init(value), value)
        assert_close(moved(params)[path], step, "step", path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": Optim(rule=AdamW(), lr=1.0)}, "rule = 'Optim': must be AdamW"),
        ({"lr": 0.0}, "lr = 0.0: must be above 0"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"decay_frac": 0.0}, "decay_frac = 0.0"),
        ({"final_lr_frac": 1.5}, "final_lr_frac = 1.5"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"clip": 0.0}, "clip = 0.0: must be above 0, or None"),
        ({"spike_factor": -1.0}, "spike_factor = -1.0"),
        ({"lr_factors": (("x", -1.0),)}, r"lr_factors\['x'\] = -1.0"),
        ({"rule": AdamW(b2=1.0)}, r"rule.b2 = 1.0: must be in \[0, 1\)"),
        ({"rule": AdamW(eps=0.0)}, "rule.eps = 0.0"),
        ({"rule": Muon(ns_steps=0)}, "rule.ns_steps = 0"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(Optim(**{"rule": AdamW(), "lr": 1.0} | fields), "config.optim")
