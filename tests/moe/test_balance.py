"""The rules that move a router's state, by hand and in closed loops.

E experts · T tokens
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.config.schedule import Schedule, value_at
from moex.moe.balance import Controller, ControlP, ScheduledValue, SignBias, bias_rule
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP, keep_until
from moex.train.step import router_sums, update_state
from tests.helpers import context
from tests.tolerances import assert_close

RAMP = Schedule(points=((2, 0.1), (4, 0.3)))


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.1), (2, 0.1), (3, 0.2), (4, 0.3), (99, 0.3)]
)
def test_schedules_are_straight_lines(step, value):
    assert_close(value_at(RAMP, step), value, "float32")
    assert_close(value_at(RAMP.points, jnp.int32(step)), value, "float32")
    assert value_at(0.5, step) == 0.5


@pytest.mark.parametrize(
    ("points", "message"),
    [((), "not empty"), (((3, 1.0), (3, 2.0)), "with rising steps")],
)
def test_schedules_that_are_refused(points, message):
    with pytest.raises(ConfigError, match=message):
        check(Schedule(points=points), "config.loss.z")


def test_rules_can_be_hashed_and_rates_follow_schedules():
    rule = bias_rule("sign", RAMP, 2, "softmax")
    assert rule == SignBias(((2.0, 0.1), (4.0, 0.3)))
    hash(rule)
    assert hash(bias_rule("quantile", RAMP, 2, "sigmoid")) != hash(rule)
    stats = {"load_E": jnp.array([1.0, 3.0])}
    assert_close(rule(jnp.zeros(2), stats, 3), [0.2, -0.2], "float32")
    frozen = bias_rule("sign", Schedule(points=((0, 0.1), (1, 0.0))), 2, "softmax")
    assert frozen(jnp.ones(2), stats, 1).tolist() == [1, 1]


def test_scheduled_values_hold_what_the_next_step_uses():
    rule = ScheduledValue(RAMP.points)
    assert_close(rule(jnp.zeros(3), {}, 2), [0.2, 0.2, 0.2], "float32")


def test_the_controller_by_hand():
    rule = ControlP(target=2.0, kp=0.2, ki=0.1, shared=False)
    stats = {
        "load_E": jnp.zeros((2, 4)),
        "num_slots": jnp.array([40.0, 10.0]),
        "num_tokens": jnp.array([10.0, 10.0]),
    }
    # Means 4 and 1: errors -2/4 and 1/4; p + 0.2 * (e - before) + 0.1 * e.
    state = jnp.array([[0.5, 0.0], [0.5, 0.25]])
    moved = rule(state, stats, 0)
    assert_close(moved, [[0.35, -0.5], [0.525, 0.25]], "float32")
    shared = ControlP(target=2.0, kp=0.0, ki=0.1, shared=True)
    # The mean of both layers is 2.5: error -0.125 for each.
    assert_close(shared(state, stats, 0)[:, 0], [0.4875, 0.4875], "float32")
    for p, limit in ((0.0, 1e-3), (1.5, 1.0)):
        clipped = rule(state.at[:, 0].set(p).at[0, 1].set(-0.5), stats, 0)
        assert abs(clipped[0, 0] - limit) < 0.06


def test_a_controller_never_turns_to_all_experts():
    """A router that is sure keeps one expert below p = 1 and all of them at 1."""
    rule = ControlP(target=2.0, kp=0.2, ki=0.5, shared=False)
    state, mean = jnp.array([0.9, 0.0]), 1.0
    for _ in range(50):
        stats = {
            "load_E": jnp.zeros(8),
            "num_slots": jnp.float32(mean * 100),
            "num_tokens": jnp.float32(100),
        }
        state = rule(state, stats, 0)
        sure_TK = jnp.array([[1 - 7e-7, *[1e-7] * 7]])
        mean = float(jnp.sum(keep_until(sure_TK, state[0])))
        assert mean < 8
    still = rule(state, jax.tree.map(jnp.zeros_like, stats), 0)
    np.testing.assert_array_equal(still, state)


def closed_loop(cfg, num_experts, steps, key=0):
    """Route batches of skewed tokens and let the rule move the state each time."""
    module = cfg.make(6, num_experts, nnx.Rngs(params=0))
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    (path, variable), *_ = nnx.to_flat_state(state)
    rule, value = variable.get_metadata()["rule"], variable[...]
    mean_D = jax.random.normal(jax.random.key(9), (6,))

    @jax.jit
    def step(value, i):
        x_TD = jax.random.normal(jax.random.fold_in(jax.random.key(key), i), (512, 6))
        moved = jax.tree.map(lambda _: value, state)
        routing = nnx.merge(graphdef, params, moved)(
            x_TD + mean_D[None], context(1, 512)
        )
        kept = (
            jax.nn.one_hot(routing.expert_TK, num_experts)
            * routing.keep_TK.astype(jnp.float32)[..., None]
        )
        load_E = jnp.sum(kept, axis=(0, 1))
        stats = {
            "load_E": load_E,
            "num_slots": jnp.sum(load_E),
            "num_tokens": jnp.float32(512),
        } | routing.sums
        return rule(value, stats, i), load_E

    loads = []
    for i in range(steps):
        value, load_E = step(value, i)
        loads.append(np.asarray(load_E))
    return np.array(loads), value


def test_the_bias_balances_a_skewed_router():
    cfg = TopK(k=2, score="sigmoid", bias_rate=0.02, init_std=0.7)
    loads, _ = closed_loop(cfg, 8, 60)
    violation = loads.max(axis=1) / loads.mean(axis=1) - 1
    assert violation[0] > 1.0
    assert np.mean(violation[-3:]) < 0.35


@pytest.mark.parametrize(("target", "start"), [(1.5, 0.8), (4.0, 0.3)])
def test_the_controller_reaches_its_target(target, start):
    cfg = TopP(p=start, k_max=8, control=Controller(target=target), init_std=0.4)
    loads, _ = closed_loop(cfg, 8, 150)
    mean = loads.sum(axis=1) / 512
    assert abs(mean[0] - target) > 1
    assert np.all(abs(mean[-5:] - target) < 0.2), mean


def test_sums_go_to_the_router_they_belong_to():
    """A plain layer [repeat], and chains [repeat, C] with own and shared routers."""
    chain = {
        "num_tokens": jnp.ones((2, 3)),
        "load_E": jnp.arange(12.0).reshape(2, 3, 2),
    }
    layers = {
        "a/ffn": {"num_tokens": jnp.ones(2), "load_E": jnp.ones((2, 2))},
        "b/ffn": chain,
    }
    plain = router_sums(layers, "a/ffn/router/bias_E")
    assert plain["load_E"].shape == (2, 2)
    own = router_sums(layers, "b/ffn/routers/1/bias_E")
    np.testing.assert_array_equal(own["load_E"], [[2, 3], [8, 9]])
    shared = router_sums(layers, "b/ffn/router/bias_E")
    np.testing.assert_array_equal(shared["load_E"], [[6, 9], [24, 27]])

    class Info:
        rule, frozen = SignBias(1.0), False

    class Spec:
        info = {"b/ffn/router/bias_E": Info}

    state = {"b": {"ffn": {"router": {"bias_E": jnp.zeros((2, 2))}}}}
    moved = update_state(Spec, state, layers, 0)
    assert moved["b"]["ffn"]["router"]["bias_E"].tolist() == [[1, -1], [1, -1]]
