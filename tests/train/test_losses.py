"""Coefficients meet losses: scopes, scales, layers, schedules, by hand.

E experts · C chain rounds
"""

import jax
import jax.numpy as jnp
import pytest

from moex.moe.losses import load_balance_loss
from moex.run import Loss
from moex.schedule import Schedule
from moex.train.losses import lm_loss, make_context, routing_losses
from moex.train.step import make_train_step
from tests.helpers import built, random_batch, tiny_lm
from tests.tolerances import assert_close

NAMES = ("load_balance", "sequence_balance", "router_z", "entropy", "importance")


def layer(load_balance, shape=(1,), slots=6.0, **losses):
    """aux of a layer; every array has leading dims `shape`."""
    values = dict.fromkeys(NAMES, 0.0) | losses | {"load_balance": load_balance}
    load_E = jnp.broadcast_to(jnp.array([4.0, 2.0]), (*shape, 2))
    return {
        "losses": {k: jnp.full(shape, v) for k, v in values.items()},
        "stats": {
            "load_E": load_E,
            "prob_sum_E": jnp.broadcast_to(jnp.array([2.0, 1.0]), (*shape, 2)),
            "num_tokens": jnp.full(shape, 3.0),
            "num_slots": jnp.full(shape, slots),
        },
    }


LAYERS = {
    "a": layer(1.0, (2,), router_z=0.5, sequence_balance=3.0),  # two copies
    "b": layer(2.0, (1, 2), entropy=0.25),  # a chain of two rounds
}


def test_layers_and_rounds_are_added():
    found = routing_losses(LAYERS, Loss())
    expected = {"load_balance": 6.0, "router_z": 1.0, "entropy": 0.5, "importance": 0}
    assert {k: float(v) for k, v in found.items()} == expected


def test_or_averaged():
    found = routing_losses(LAYERS, Loss(over_layers="mean"))
    assert float(found["load_balance"]) == 6.0 / 4
    assert float(found["entropy"]) == 0.5 / 4


def test_the_scale_of_papers_counts_slots_per_token():
    found = routing_losses({"a": layer(1.0)}, Loss(balance_scale="count"))
    assert float(found["load_balance"]) == 6.0 / 3.0


def test_sequence_scope_takes_the_loss_by_sequence():
    found = routing_losses(LAYERS, Loss(balance_scope="sequence"))
    assert float(found["load_balance"]) == 2 * 3.0


def test_step_scope_adds_the_load_before():
    """f = (4 + 0, 2 + 6) / 12, P = (2, 1) / 3: 2 * (1/3 * 2/3 + 2/3 * 1/3) = 8/9."""
    before = {"a": jnp.array([[0.0, 6.0]])}
    step = Loss(balance_scope="step")
    found = routing_losses({"a": layer(1.0)}, step, before)
    assert_close(found["load_balance"], 8 / 9, "float32")
    first = routing_losses({"a": layer(1.0)}, step)
    assert float(first["load_balance"]) == 1.0


def test_no_layers_no_losses():
    assert routing_losses({}, Loss()) == {}


@pytest.fixture(scope="module")
def model():
    spec, params, state = built(tiny_lm())
    batch = random_batch(4, 8)
    ctx = make_context(batch, mode="train", kernels="xla")

    @jax.jit
    def forward(params):
        return spec.merge(params, state)(ctx)

    outputs = forward(params)
    return lambda ctx: outputs, ctx, batch


def test_the_loss_is_the_sum_of_its_weighted_parts(model):
    """And a schedule gives the coefficient of its step."""
    run, ctx, batch = model
    coefs = Loss(
        z=0.1, load_balance=Schedule(points=((0, 0.2), (10, 0.4))), entropy=0.3
    )
    options = {"num_tokens": 5.0, "num_microbatches": 2, "num_domains": 2}
    loss, sums = lm_loss(run, ctx, batch, coefs, step=5, **options)
    raw = routing_losses({k: v for k, v in sums["layers"].items()}, coefs)
    assert_close(
        sums["weighted"]["load_balance"], 0.3 * raw["load_balance"] / 2, "order"
    )
    assert_close(sums["weighted"]["entropy"], 0.3 * raw["entropy"] / 2, "order")
    assert_close(sums["weighted"]["z"], 0.1 * sums["z"] / 5, "order")
    assert sums["weighted"]["importance"] == 0
    total = sums["nll"] / 5 + sum(sums["weighted"].values())
    assert_close(loss, total, "order")
    later, _ = lm_loss(run, ctx, batch, coefs, step=99, **options)
    assert_close(later - loss, 0.1 * raw["load_balance"] / 2, "float32")


def test_microbatches_of_a_step_share_their_load():
    """The second microbatch sees the load of both; the first only its own.

    Without an update in between, the figure logged is the mean of the two.
    """
    spec, params, state = built(tiny_lm())
    batch = random_batch(4, 8)
    coefs = Loss(load_balance=1.0, router_z=0.0, balance_scope="step")
    static = {"kernels": "xla"}
    optim = type("Still", (), {"lr_factors": (), "spike_factor": None})

    class Still:
        def update(self, grads, state, params):
            return jax.tree.map(jnp.zeros_like, grads), state

    step = make_train_step(
        spec,
        Still(),
        coefs,
        grad_accum=2,
        num_domains=2,
        optim=optim,
        static=static,
    )
    guard = {"accepted": 0, "grad_norm_mean": 0.0, "skipped": 0, "skipped_in_row": 0}
    guard = jax.tree.map(jnp.asarray, guard)
    train_state = {"params": params, "state": state, "opt": {}, "guard": guard}
    _, metrics = jax.jit(step)(train_state, 0, jax.random.key(0), batch)

    @jax.jit
    def stats_of(part):
        ctx = make_context(part, mode="train", **static)
        _, aux = spec.merge(params, state)(ctx)
        return aux["segments"]["1"]["blocks"]["0"]["ffn"]["stats"]

    halves = [stats_of(jax.tree.map(lambda a, i=i: a[i::2], batch)) for i in (0, 1)]
    load = jnp.zeros_like(halves[0]["load_E"])
    expected = 0.0
    for half in halves:
        load = load + half["load_E"]
        expected += jnp.sum(
            load_balance_loss(load, half["prob_sum_E"], half["num_tokens"])
        )
    assert_close(metrics["weighted"]["load_balance"], expected / 2, "order")
