"""Coefficients meet losses: scopes, scales, layers, schedules, by hand.

E experts · C chain rounds
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.schedule import Schedule
from moex.model.losses import routing_losses
from moex.model.optim import AdamW, Optim
from moex.nn.context import Compute
from moex.runs.keys import Loss
from moex.train.step import make_train_step
from tests.helpers import TASK, XLA, built, lm_loss, random_batch, tiny_lm
from tests.tolerances import assert_close

# Sums that the figures want and these tests do not look at.
FULL = {
    k: jnp.ones(1)
    for k in (
        *("num_zero", "num_kept", "num_lost", "real_sq_sum", "num_unrouted"),
        *("entropy_sum", "router_z_sum", "sequence_balance_sum", "num_sequences"),
        *("top_gate_sum", "logit_sq_sum", "output_sq_sum"),
    )
} | {"slots_S": jnp.ones((1, 3))}
# Of the whole step, of which a microbatch has three tokens and one sequence.
COUNTS = {"targets": 5.0, "tokens": 12.0, "sequences": 4.0}


def layer(prob_sum, shape=(1,), **sums):
    """Sums of a layer with loads 4 and 2; every array has leading dims `shape`.

    Its load-balance loss is 2 * (2/3 * P_0 + 1/3 * P_1), where P = prob_sum / 3.
    """
    names = ("router_z_sum", "entropy_sum", "sequence_balance_sum")
    single = dict.fromkeys(names, 0) | {"num_tokens": 3.0, "num_slots": 6.0} | sums
    return {
        **{name: jnp.full(shape, value) for name, value in single.items()},
        "load_E": jnp.broadcast_to(jnp.array([4.0, 2.0]), (*shape, 2)),
        "prob_sum_E": jnp.broadcast_to(jnp.array(prob_sum), (*shape, 2)),
    }


LAYERS = {  # load-balance losses 1 and 4/3, importance 0 and 1
    "a": layer((1.5, 1.5), (2,), router_z_sum=6.0, sequence_balance_sum=3.0),  # copies
    "b": layer((3.0, 0.0), (1, 2), entropy_sum=3.0),  # a chain of two rounds
}


def test_layers_and_rounds_are_added():
    """Sums are over the tokens of the step; the others over its two microbatches."""
    found = routing_losses(LAYERS, Loss(), COUNTS, 2)
    expected = {"load_balance": 7 / 3, "router_z": 1, "entropy": 0.5, "importance": 1}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected)


def test_or_averaged():
    found = routing_losses(LAYERS, Loss(over_layers="mean"), COUNTS, 2)
    assert float(found["load_balance"]) == pytest.approx(7 / 3 / 4)
    assert float(found["entropy"]) == 0.5 / 4


def test_the_scale_of_papers_counts_slots_per_token():
    even = layer((1.5, 1.5))
    found = routing_losses({"a": even}, Loss(balance_scale="count"), COUNTS)
    assert float(found["load_balance"]) == 6.0 / 3.0


def test_sequence_scope_takes_the_loss_by_sequence():
    found = routing_losses(LAYERS, Loss(balance_scope="sequence"), COUNTS, 2)
    assert float(found["load_balance"]) == 2 * 3.0 / 4  # of the sequences of the step


def test_step_scope_adds_the_load_before():
    """f = (4 + 0, 2 + 6) / 12, P = (2, 1) / 3: 2 * (1/3 * 2/3 + 2/3 * 1/3) = 8/9.

    Without the load before f = (4, 2) / 6: 2 * (2/3 * 2/3 + 1/3 * 1/3) = 10/9.
    """
    before = {"a": jnp.array([[0.0, 6.0]])}
    step = Loss(balance_scope="step")
    own = {"a": layer((2.0, 1.0))}
    found = routing_losses(own, step, COUNTS, 2, load_before=before)
    assert_close(found["load_balance"], 4 / 9, "float32")
    first = routing_losses(own, step, COUNTS, 2)
    assert_close(first["load_balance"], 5 / 9, "float32")


def test_no_layers_no_losses():
    assert routing_losses({}, Loss(), COUNTS) == {}


@pytest.fixture(scope="module")
def model():
    spec, params, state = built(tiny_lm())
    batch = random_batch(4, 8)
    ctx = TASK.context(batch, mode="train", compute=XLA)

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
    options = {"counts": COUNTS, "num_microbatches": 2, "num_domains": 2}
    loss, sums = lm_loss(run, ctx, batch, coefs, step=5, **options)
    raw = routing_losses(sums["layers"], coefs, COUNTS, 2)
    assert_close(sums["weighted"]["load_balance"], 0.3 * raw["load_balance"], "order")
    assert_close(sums["weighted"]["entropy"], 0.3 * raw["entropy"], "order")
    assert_close(sums["weighted"]["z"], 0.1 * sums["z"] / 5, "order")
    assert sums["weighted"]["importance"] == 0
    total = sums["nll"] / 5 + sum(sums["weighted"].values())
    assert_close(loss, total, "order")
    later, _ = lm_loss(run, ctx, batch, coefs, step=99, **options)
    assert_close(later - loss, 0.1 * raw["load_balance"], "float32")


def test_microbatches_of_a_step_share_their_load():
    """The second microbatch sees the load of both, the first only its own.

    A stub stands for the model: tokens 0 and 1 are the experts that they go to, and
    P is the parameter. Rows are dealt out in turn.
    """

    def model(ctx):
        load_E = jnp.stack([jnp.sum(ctx.token_BL == e) for e in (0, 1)])
        tokens = jnp.float32(ctx.token_BL.size)
        stats = {"load_E": load_E.astype(jnp.float32), "prob_sum_E": prob_E * tokens}
        stats |= {"num_tokens": tokens, "num_slots": tokens}
        aux = {"load": stats["load_E"][None]}
        aux["stats"] = FULL | {k: v[None] for k, v in stats.items()}
        return jnp.zeros((*ctx.token_BL.shape, 2)), {"ffn": aux}

    prob_E = jnp.array([0.75, 0.25])
    tokens = np.repeat([[0, 0], [1, 1], [0, 1], [1, 1]], 4, axis=1)
    batch = random_batch(4, 8, vocab=2) | {"tokens": tokens}
    spec = types.SimpleNamespace(merge=lambda *_: model, params={}, info={})
    still = types.SimpleNamespace(update=lambda grads, state, params: (grads, state))
    step = make_train_step(
        TASK,
        spec,
        still,
        Loss(load_balance=1.0, router_z=0.0, balance_scope="step"),
        grad_accum=2,
        num_domains=2,
        optim=Optim(rule=AdamW(), lr=1.0),
        compute=Compute(),
    )
    guard = {"accepted": 0, "grad_norm_mean": 0.0, "skipped": 0, "skipped_in_row": 0}
    guard = jax.tree.map(jnp.asarray, guard)
    state = {"params": {}, "state": {}, "opt": {}, "guard": guard}
    _, metrics = jax.jit(step)(state, 0, jax.random.key(0), batch)
    # Rows 0 and 2: f = (3, 1) / 4. With rows 1 and 3 after them: (3, 5) / 8.
    first = 2 * (3 / 4 * 0.75 + 1 / 4 * 0.25)
    second = 2 * (3 / 8 * 0.75 + 5 / 8 * 0.25)
    weighted = metrics["weighted"]["load_balance"]
    assert_close(weighted, (first + second) / 2, "float32")
