"""Pruning of rows: its schedule, its choice, and its updates against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError, check
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.pruning import PruneRows, kept_rows, prune_rows
from moex.model.spec import ParamInfo
from tests.tolerances import assert_close


def test_the_share_follows_its_formula():
    """With w = 2, T = 20: all up to step 2, then a cubic, and the least from 12 on."""
    cfg = PruneRows(keep=0.1, warmup=2)
    found = [float(cfg.kept(jnp.int32(t), 20)) for t in range(20)]
    want = []
    for t in range(1, 21):
        left = 1 - (t - 2) / (20 - 10)
        want.append(1.0 if t < 2 else 0.1 if t >= 12 else 0.1 + 0.9 * left**3)
    assert_close(np.array(found), np.array(want), "float32")
    assert found[:2] == [1.0, 1.0] and found[11] == pytest.approx(0.1)


rows = st.lists(st.integers(0, 4), min_size=1, max_size=7)


@pytest.mark.thorough
@given(rows, rows, st.floats(0, 1))
def test_the_best_rows_that_fit_are_kept(first, second, share):
    values = {"b": np.array(first, "f4"), "a": np.array(second, "f4")}
    sizes = {"a": 3, "b": 2}
    found = kept_rows({k: jnp.asarray(v) for k, v in values.items()}, sizes, share)
    every = [(-v, n, i) for n in ("a", "b") for i, v in enumerate(values[n])]
    total, held, kept = 3 * len(second) + 2 * len(first), 0, set()
    for _, name, i in sorted(every):
        held += sizes[name]
        if held / total > share + 1e-6:
            break
        kept.add((name, i))
    assert {(n, int(i)) for n in found for i in np.flatnonzero(found[n])} == kept


INFO = {
    "a/residual_in_ED2F": ParamInfo(
        ("expert", "embed", None, "mlp"), matrix=((1,), (3,))
    ),
    "a/residual_out_EFD": ParamInfo(("expert", "mlp", "embed"), matrix=((1,), (2,))),
    "a/w_DE": ParamInfo(("embed", None)),
}
# A stack of two copies; E = 2, D = 3, F = 4.
SHAPES = {
    "residual_in_ED2F": (2, 2, 3, 2, 4),
    "residual_out_EFD": (2, 2, 4, 3),
    "w_DE": (2, 3, 2),
}


def test_updates_are_those_of_a_loop():
    steps, lr, decay = 16, 0.05, 0.5
    cfg = PruneRows(keep=0.25, warmup=2, decay=decay)
    rng = np.random.default_rng(0)
    params = {"a": {n: rng.normal(size=s).astype("f4") for n, s in SHAPES.items()}}
    target = {"a": {n: rng.normal(size=s).astype("f4") for n, s in SHAPES.items()}}
    tx = prune_rows(optax.sgd(lr), cfg, steps, params, INFO, set(), "config")
    own, state = jax.tree.map(jnp.asarray, params), tx.init(params)
    update = jax.jit(tx.update)
    slow = {n: a.astype("f8") for n, a in params["a"].items()}
    axis = {"residual_in_ED2F": 2, "residual_out_EFD": 2}
    smooth = {n: 0.0 for n in axis}
    for t in range(1, steps + 1):
        grads = jax.tree.map(lambda p, w: p - w, own, target)
        updates, state = update(grads, state, own)
        own = optax.apply_updates(own, updates)

        slopes = {n: slow[n] - target["a"][n] for n in slow}
        every = []
        for n, along in axis.items():
            size = slow[n].shape[along]
            now = np.abs(slow[n] * slopes[n]).mean(axis=along)
            smooth[n] = decay * smooth[n] + (1 - decay) * now
            every += [(-v, n, i, size) for i, v in np.ndenumerate(smooth[n])]
        slow = {n: slow[n] - lr * slopes[n] for n in slow}
        left = min(max(1 - (t - 2) / (steps - 10), 0), 1)
        share, held = 0.25 + 0.75 * left**3, 0
        total = sum(size for *_, size in every)
        for _, n, i, size in sorted(every):
            held += size
            if share < 1 and held / total > share + 1e-6:
                slow[n][i[:2] + (slice(None),) + i[2:]] = 0
        for n, array in slow.items():
            assert_close(own["a"][n], array, "float32", f"{n} after {t}")
    zero = sum(float(jnp.sum(own["a"][n] == 0)) for n in axis)
    assert zero / sum(own["a"][n].size for n in axis) >= 0.75
    assert jnp.all(own["a"]["w_DE"] != 0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keep": 0.0}, r"prune.keep = 0.0: must be in \(0, 1\]"),
        ({"warmup": -1}, "prune.warmup = -1"),
        ({"decay": 1.0}, "prune.decay = 1.0"),
        ({"warmup": 4}, "prune.warmup = 4: must be below steps / 5 = 4"),
        (
            {"pattern": "residual_on_ED2F"},
            "matches no parameter. Did you mean.*residual_in",
        ),
        ({"pattern": "w_DE"}, "prune.pattern = 'w_DE': a/w_DE is no matrix"),
        ({"pattern": "*_out_*"}, "a/residual_out_EFD is frozen"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, told):
    cfg = Optim(
        rule=AdamW(),
        lr=0.1,
        lr_factors=(("*_out_*", 0.0),),
        prune=PruneRows(**{"warmup": 1, "pattern": "*_in_*"} | fields),
    )
    params = {"a": {n: jnp.zeros(s) for n, s in SHAPES.items()}}
    with pytest.raises(ConfigError, match=told):
        check(cfg, "config.optim")
        cfg.validate_steps(20, "config.optim")
        make_optimizer(cfg, 20, params, INFO)
