"""The router contract; the list is the registration.

T tokens · D model width · E experts · K slots per token
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moex.config.base import ConfigError, ConfigWarning, check, from_dict, to_dict
from moex.config.schedule import Schedule
from moex.moe.balance import Controller
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.forced import Forced, forced_experts
from moex.moe.routers.hash import Hash, hashed_experts
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP, keep_until, standardize
from moex.moe.routing import ExpertRouting, Routing, kept_softmax, router_scores
from tests.helpers import context, split_module
from tests.marks import thorough_but_for
from tests.moe import oracle
from tests.tolerances import assert_close

PAIRS = Groups(num=3, keep=2, score="top2")
RAMP = Schedule(points=((0, 0.5), (10, 0.3)))
# What each one should do is said in float64 by `oracle.route`.
ROUTERS = {
    "topk": TopK(k=2, init_std=0.5),
    "topk, k = 1, raw": TopK(k=1, normalize="none", init_std=0.5),
    "topk, k = E": TopK(k=6, init_std=0.5),
    "topk, sigmoid, bias": TopK(
        k=3, score="sigmoid", scale=2.5, bias_rate=0.1, init_std=0.5
    ),
    "topk, sigmoid, before": TopK(
        k=2, score="sigmoid", normalize="before", init_std=0.5
    ),
    "topk, sqrt softplus": TopK(k=2, score="sqrt_softplus", init_std=0.5),
    "topk, groups": TopK(
        k=2, groups=Groups(num=3, keep=1), bias_rate=0.1, init_std=0.5
    ),
    "topk, groups of two": TopK(k=3, groups=PAIRS, score="sigmoid", init_std=0.5),
    "topp": TopP(p=0.4, init_std=0.5),
    "topp, k_max, after": TopP(
        p=0.7, k_max=3, k_min=2, normalize="after", init_std=0.5
    ),
    "topp, p = 1": TopP(p=1.0, init_std=0.5),
    "topp, scheduled": TopP(p=RAMP, k_max=4, init_std=0.5),
    "topp, steered": TopP(
        p=0.3, k_max=5, control=Controller(target=2.0), logit_norm=True, init_std=0.5
    ),
    "expert choice": ExpertChoice(k=1.5, init_std=0.5),
    "hash": Hash(k=2, seed=3),
    "soft": Soft(init_std=0.5),
    "soft, sigmoid": Soft(score="sigmoid", init_std=0.5),
    "forced, balanced": Forced(k=2, init_std=0.5),
    "forced, adversarial": Forced(k=2, load="adversarial", init_std=0.5),
}
# Routers whose choice the tokens have no part in.
FIXED = ("hash", "forced, balanced", "forced, adversarial")
T, D, E = 11, 5, 6

routers = pytest.mark.parametrize("name", ROUTERS)


@functools.cache
def make(name, seed=0):
    """(config, function (params, state, x_TD) -> routing, params, state)."""
    cfg = ROUTERS[name]
    graphdef, params, state = split_module(cfg.make(D, E, nnx.Rngs(params=seed)))

    @jax.jit
    def run(params, state, x_TD, **fields):
        ctx = context(1, x_TD.shape[0], token_BL=TOKEN_T[None], **fields)
        return nnx.merge(graphdef, params, state)(x_TD, ctx)

    return cfg, run, params, state


TOKEN_T = jnp.asarray(np.random.default_rng(5).integers(0, 1000, T), jnp.int32)


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (T, D))


@jax.jit
def dense(routing):
    """(gate_TE, chosen_TE): a routing of either layout as a table."""
    T, E = routing.probs_TE.shape
    if isinstance(routing, Routing):
        where = (jnp.arange(T)[:, None], routing.expert_TK)
        gate, keep = routing.gate_TK, routing.keep_TK
    else:
        where = (routing.token_EC, jnp.arange(E)[:, None])
        gate, keep = routing.gate_EC, routing.keep_EC
    gate_TE = jnp.zeros((T, E)).at[where].add(gate)
    return gate_TE, jnp.zeros((T, E), jnp.int32).at[where].add(keep.astype(jnp.int32))


def truth(cfg, x_TD, params, state):
    """The same tables, with logits and probabilities, from the oracle."""
    gates, logits_TE, probs_TE = oracle.route(
        cfg, x_TD, params | {"num_experts": E}, state=state, token_T=TOKEN_T
    )
    gate_TE = np.array([[row.get(e, 0.0) for e in range(E)] for row in gates])
    chosen_TE = np.array([[e in row for e in range(E)] for row in gates])
    return gate_TE, chosen_TE, logits_TE, probs_TE


def biased(state):
    """A selection bias that changes choices, where there is one."""
    if "bias_E" in state:
        return state | {"bias_E": jnp.linspace(-0.3, 0.3, E)}
    return state


@routers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_ranges_and_no_repeats(name, dtype):
    cfg, run, params, state = make(name)
    routing = run(params, state, tokens().astype(dtype))
    kinds = {"logits_TE": ((T, E), "float32"), "probs_TE": ((T, E), "float32")}
    if isinstance(routing, Routing):
        K = cfg.slots(E)
        ids, limit, suffix, slots = routing.expert_TK, E, "TK", (T, K)
        kinds["expert_TK"] = (slots, "int32")
    else:
        ids, limit, suffix = routing.token_EC, T, "EC"
        slots = (E, int(np.ceil(cfg.k * T / E)))
        kinds["token_EC"] = (slots, "int32")
    kinds[f"gate_{suffix}"] = (slots, "float32")
    kinds[f"keep_{suffix}"] = (slots, "bool")
    for field, (shape, kind) in kinds.items():
        array = getattr(routing, field)
        assert (array.shape, array.dtype.name) == (shape, kind), field
    assert jnp.all((ids >= 0) & (ids < limit))
    gate_TE, chosen_TE = dense(routing)
    assert jnp.all(chosen_TE <= 1), "an expert is chosen twice"
    assert jnp.all(jnp.where(chosen_TE == 1, 0.0, gate_TE) == 0)
    assert jnp.all(gate_TE >= 0)
    assert_close(jnp.sum(routing.probs_TE, axis=1), np.ones(T), "float32")


@routers
def test_values_are_those_of_the_oracle(name):
    cfg, run, params, state = make(name)
    state = biased(state)
    routing = run(params, state, tokens())
    gate_TE, chosen_TE = dense(routing)
    expected = truth(cfg, tokens(), params, state)
    np.testing.assert_array_equal(chosen_TE, expected[1])
    assert_close(gate_TE, expected[0], "float32")
    assert_close(routing.logits_TE, expected[2], "float32")
    assert_close(routing.probs_TE, expected[3], "float32")


@routers
def test_bfloat16_tokens_are_routed_in_float32(name):
    """Rounded tokens, exact arithmetic: bfloat16 logits would be off by 2**-8."""
    cfg, run, params, state = make(name)
    rounded = tokens().astype(jnp.bfloat16)
    routing = run(params, biased(state), rounded)
    expected = truth(cfg, np.asarray(rounded, np.float64), params, biased(state))
    np.testing.assert_array_equal(dense(routing)[1], expected[1])
    assert_close(dense(routing)[0], expected[0], "float32")
    assert_close(routing.logits_TE, expected[2], "float32")


@routers
def test_gradients_are_those_of_the_oracle(name):
    cfg, run, params, state = make(name)
    if not params:
        pytest.skip("nothing is learned")
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=(T, E)) for _ in range(3)]

    def loss(params, x_TD):
        routing = run(params, state, x_TD)
        outputs = (dense(routing)[0], routing.logits_TE, routing.probs_TE)
        pairs = zip(weights, outputs, strict=True)
        return sum(jnp.sum(jnp.asarray(w, jnp.float32) * y) for w, y in pairs)

    def true_loss(arguments):
        x_TD = arguments["x_TD"]
        own = {k: v for k, v in arguments.items() if k != "x_TD"}
        gate_TE, _, logits_TE, probs_TE = truth(cfg, x_TD, own, state)
        outputs = (gate_TE, logits_TE, probs_TE)
        return sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True))

    dparams, dx_TD = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, tokens())
    arguments = params | {"x_TD": tokens()}
    for leaf, gradient in (dparams | {"x_TD": dx_TD}).items():
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            slope = oracle.slope(true_loss, arguments, leaf, direction)
            assert_close(np.sum(gradient * direction), slope, "difference", leaf)


@routers
def test_permuting_tokens_permutes_the_routing(name):
    _, run, params, state = make(name)
    if name in FIXED:
        pytest.skip("the choice depends on place or id, not on the token")
    order_T = np.random.default_rng(0).permutation(T)
    gate_TE, chosen_TE = dense(run(params, state, tokens()))
    permuted_TE, permuted_chosen_TE = dense(run(params, state, tokens()[order_T]))
    np.testing.assert_array_equal(permuted_chosen_TE, chosen_TE[order_T])
    assert_close(permuted_TE, gate_TE[order_T], "order")


@routers
def test_permuting_experts_renames_them(name):
    _, run, params, state = make(name)
    if name in FIXED or "groups" in name:
        pytest.skip("which expert is which matters by design")
    order_E = np.random.default_rng(0).permutation(E)
    state = biased(state)
    gate_TE, chosen_TE = dense(run(params, state, tokens()))
    renamed_TE, renamed_chosen_TE = dense(
        run(
            params | {"w_DE": params["w_DE"][:, order_E]},
            {k: v[order_E] if k == "bias_E" else v for k, v in state.items()},
            tokens(),
        )
    )
    np.testing.assert_array_equal(renamed_chosen_TE, chosen_TE[:, order_E])
    assert_close(renamed_TE, gate_TE[:, order_E], "order")


@routers
def test_ties_go_to_the_lowest(name):
    cfg, run, params, state = make(name)
    if name in FIXED:
        pytest.skip("there are no ties")
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, chosen_TE = dense(run(zeros, state, tokens()))
    _, expected_TE, *_ = truth(cfg, tokens(), zeros, state)
    np.testing.assert_array_equal(chosen_TE, expected_TE)
    if isinstance(cfg, TopK) and cfg.groups is None:
        lowest_E = jnp.where(jnp.arange(E) < cfg.k, 1, 0)
        assert jnp.all(chosen_TE == lowest_E[None])


@pytest.mark.parametrize(
    "name", thorough_but_for(ROUTERS, "topk", "topk, sigmoid, bias", "expert choice")
)
def test_a_replayed_assignment_has_live_gates(name):
    _, run, params, state = make(name)
    first = run(params, state, tokens(1))
    forced = first.trace()
    again = run(params, state, tokens(2), forced=forced)
    np.testing.assert_array_equal(dense(again)[1], dense(first)[1])
    if not params:
        return
    assert jnp.any(dense(again)[0] != dense(first)[0]) or "k = 1" in name

    def loss(params):
        routing = run(params, state, tokens(2), forced=forced)
        return jnp.sum(dense(routing)[0] ** 2)

    gradient = jax.grad(loss)(params)["w_DE"]
    assert jnp.any(gradient != 0)


def test_a_replay_of_another_shape_is_refused():
    _, run, params, state = make("topk")
    forced = {"expert": jnp.zeros((T, 3), jnp.int32), "keep": jnp.ones((T, 3), bool)}
    with pytest.raises(ValueError, match=r"\(11, 2\); it was recorded with \(11, 3\)"):
        run(params, state, tokens(), forced=forced)
    _, run, params, state = make("expert choice")
    with pytest.raises(ValueError, match=r"token ids .* it was recorded with None"):
        run(params, state, tokens(), forced=forced)


# Top-k.


@pytest.mark.parametrize("normalize", ["after", "before", "none"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gates_sum_to_one_where_they_should(score, normalize):
    router = TopK(k=2, score=score, normalize=normalize, scale=1.5, init_std=0.5)
    routing = router.make(D, E, nnx.Rngs(params=0))(tokens(), context(1, T))
    total_T = jnp.sum(routing.gate_TK, axis=1)
    if normalize == "after":
        assert_close(total_T, np.full(T, 1.5), "float32")
    elif normalize == "before" or score == "softmax":
        assert jnp.all(total_T < 1.5)
    else:
        assert jnp.any(total_T > 1.5 / 2)


def test_the_bias_selects_and_does_nothing_else():
    cfg, run, params, _ = make("topk, sigmoid, bias")
    state = {"bias_E": jnp.zeros(E).at[4].set(9.0)}
    routing = run(params, state, tokens())
    assert jnp.all(routing.expert_TK[:, 0] == 4)
    score_TE = jax.nn.sigmoid(routing.logits_TE)
    gate_TK = jnp.take_along_axis(score_TE, routing.expert_TK, axis=1)
    gate_TK = cfg.scale * gate_TK / jnp.sum(gate_TK, axis=1, keepdims=True)
    assert_close(routing.gate_TK, gate_TK, "float32")

    def loss(state):
        routing = run(params, state, tokens())
        return jnp.sum(routing.gate_TK**2) + jnp.sum(routing.probs_TE**2)

    assert jnp.all(jax.grad(loss)(state)["bias_E"] == 0)


@pytest.mark.parametrize("field", ["jitter", "noise"])
def test_noise_is_for_training_only(field):
    router = TopK(k=2, init_std=0.5, **{field: 0.5})
    module = router.make(D, E, nnx.Rngs(params=0))
    quiet = module(tokens(), context(1, T))
    loud, again, other = (
        module(tokens(), context(1, T, key=jax.random.key(n))) for n in (0, 0, 1)
    )
    plain = TopK(k=2, init_std=0.5).make(D, E, nnx.Rngs(params=0))
    np.testing.assert_array_equal(quiet.gate_TK, plain(tokens(), context(1, T)).gate_TK)
    np.testing.assert_array_equal(loud.gate_TK, again.gate_TK)
    assert jnp.any(loud.gate_TK != quiet.gate_TK)
    assert jnp.any(loud.gate_TK != other.gate_TK)
    np.testing.assert_array_equal(loud.logits_TE, quiet.logits_TE)


def test_groups_keep_to_few_groups():
    """DeepSeek-V2: 6 experts in 3 groups, one allowed: both choices share a group."""
    _, run, params, state = make("topk, groups")
    group_TK = run(params, state, tokens()).expert_TK // 2
    assert jnp.all(group_TK[:, 0] == group_TK[:, 1])


# Top-p.

# Rows and counts of core.md 2g: the authors' function, executed.
ROWS = {
    "a": [0.5, 0.25, 0.15, 0.1],
    "b": [0.3, 0.3, 0.2, 0.2],
    "c": [0.4, 0.3, 0.2, 0.1],
    "u": [0.25, 0.25, 0.25, 0.25],
}
COUNTS = {
    1e-6: (1, 1, 1, 1),
    0.2: (1, 1, 1, 1),
    0.4: (1, 2, 2, 2),
    0.5: (2, 2, 2, 3),
    0.8: (3, 4, 3, 4),
    0.999: (4, 4, 4, 4),
    1.0: (4, 4, 4, 4),
}


@pytest.mark.parametrize("p", COUNTS)
def test_the_authors_table_of_selections(p):
    keep_TK = keep_until(jnp.array(list(ROWS.values())), jnp.float32(p))
    assert tuple(jnp.sum(keep_TK, axis=1).tolist()) == COUNTS[p]


def test_p_of_070_by_the_authors_table():
    """Row c is left out there: it hinges on the rounding of 0.4 + 0.3."""
    rows = [ROWS[name] for name in "abu"]
    assert jnp.sum(keep_until(jnp.array(rows), 0.7), axis=1).tolist() == [2, 3, 3]


def test_p_of_one_keeps_all_of_many_experts():
    """The float32 running sum of 256 probabilities passes or misses 1 by rounding."""
    probs_TE = jax.nn.softmax(jax.random.normal(jax.random.key(0), (50, 256)))
    sorted_TE = -jnp.sort(-probs_TE, axis=1)
    assert jnp.all(keep_until(sorted_TE, jnp.float32(1.0)))


@given(
    p=st.floats(0.01, 1.0),
    k_min=st.integers(1, 3),
    k_max=st.integers(3, 6),
    seed=st.integers(0, 99),
)
def test_top_p_is_the_shortest_prefix_that_passes_p(p, k_min, k_max, seed):
    rng = np.random.default_rng(seed)
    probs_TE = -np.sort(-rng.dirichlet(np.full(6, 0.5), 7), axis=1)
    keep_TK = np.asarray(keep_until(jnp.asarray(probs_TE[:, :k_max]), p, k_min))
    count_T = keep_TK.sum(axis=1)
    assert np.all(keep_TK == (np.arange(k_max) < count_T[:, None])), "not a prefix"
    assert np.all((count_T >= k_min) & (count_T <= k_max))
    mass_TK = np.cumsum(probs_TE, axis=1)
    for mass_K, count in zip(mass_TK, count_T, strict=True):
        if k_min < count:
            assert mass_K[count - 2] <= p + 1e-6
        if count < k_max:
            assert mass_K[count - 1] > p - 1e-6 or p == 1


def test_small_p_is_top_one_and_p_one_is_soft():
    one = TopP(p=1e-3, k_max=E, init_std=0.5).make(D, E, nnx.Rngs(params=0))
    every = TopP(p=1.0, k_max=E, init_std=0.5).make(D, E, nnx.Rngs(params=0))
    first = TopK(k=1, normalize="none", init_std=0.5).make(D, E, nnx.Rngs(params=0))
    soft = Soft(init_std=0.5).make(D, E, nnx.Rngs(params=0))
    for router, expected in ((one, first), (every, soft)):
        routing, wanted = (m(tokens(), context(1, T)) for m in (router, expected))
        for table, wanted_table in zip(dense(routing), dense(wanted), strict=True):
            assert_close(table, wanted_table, "order")


def test_uniform_routing_keeps_floor_p_e_plus_one():
    """core.md 2f: 16 experts at p = 0.4 give 7, which is also what a plan expects."""
    router = TopP(p=0.4, k_max=16, init_std=0.0)
    routing = router.make(D, 16, nnx.Rngs(params=0))(tokens(), context(1, T))
    assert jnp.all(jnp.sum(routing.keep_TK, axis=1) == 7)
    assert router.expected_slots(16) == 7
    assert TopP(p=0.3, k_max=10).expected_slots(10) == 4
    assert TopP(p=0.29, k_max=100).expected_slots(100) == 30  # 0.29 * 100 < 29


def test_p_by_layer():
    router = TopP(p=(0.2, 0.9), k_max=E, init_std=0.5)
    module = router.make(D, E, nnx.Rngs(params=0))
    for layer, p in enumerate(router.p):
        routing = module(tokens(), context(1, T, layer=jnp.int32(layer)))
        alone = TopP(p=p, k_max=E, init_std=0.5).make(D, E, nnx.Rngs(params=0))
        expected = alone(tokens(), context(1, T))
        np.testing.assert_array_equal(routing.keep_TK, expected.keep_TK)


# Others.


def test_expert_choice_takes_no_padding_and_does_not_decode():
    module = ExpertChoice(k=6.0, init_std=0.5).make(D, E, nnx.Rngs(params=0))
    routing = module(tokens(), context(1, T, num_padding=4))
    assert jnp.all(routing.keep_EC == (routing.token_EC < T - 4))
    with pytest.raises(ValueError, match="ExpertChoice cannot decode"):
        module(tokens(), context(1, T, mode="decode"))


def test_hashes_are_spread_and_fixed():
    token_T = jnp.arange(20_000, dtype=jnp.int32)
    expert_TK = hashed_experts(token_T, 8, 2)
    np.testing.assert_array_equal(expert_TK, hashed_experts(token_T, 8, 2))
    share_E = np.bincount(np.ravel(expert_TK), minlength=8) / expert_TK.size
    # Five deviations of a share of 1/8 over 40,000 draws: 5 * 0.0017.
    assert np.all(abs(share_E - 1 / 8) < 0.0083)
    assert jnp.any(expert_TK != hashed_experts(token_T, 8, 2, seed=1))


def test_forced_loads():
    tokens, E, k, key = 4096, 8, 2, jax.random.key(0)
    loads = {
        load: np.bincount(
            np.ravel(forced_experts(tokens, E, k, load, key=key)), minlength=E
        )
        for load in ("balanced", "random", "skewed", "adversarial")
    }
    assert np.all(loads["balanced"] == tokens * k / E)
    assert loads["adversarial"].tolist() == [tokens, tokens, 0, 0, 0, 0, 0, 0]
    # Each expert is one of k = 2 of 8: 1024 expected, deviation sqrt(4096 * 3/16) = 28.
    assert np.all(abs(loads["random"] - 1024) < 5 * 28)
    assert np.all(np.diff(loads["skewed"]) < 0), loads["skewed"]
    flat = np.ravel(forced_experts(tokens, E, k, "skewed", skew=0.0, key=key))
    flat = np.bincount(flat)
    assert np.all(abs(flat - 1024) < 5 * 28)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_scores_far_below_zero_stay_normalised(score):
    """A floor in a quotient would let a router switch its balance loss off."""
    low_TE = jnp.array(
        [[-120.0, -119.0, -118.0], [-60.0, -60.0, -60.0], [90.0, 0, -90]]
    )

    def total(logits_TE):
        scores = router_scores(logits_TE, score)
        return jnp.sum(scores.probs_TE[:, 0] + scores.score_TE[:, 1]), scores

    gradient_TE, scores = jax.grad(total, has_aux=True)(low_TE)
    assert jnp.all(jnp.isfinite(gradient_TE))
    assert_close(jnp.sum(scores.probs_TE, axis=1), np.ones(3), "float32")
    assert_close(scores.probs_TE[1], np.full(3, 1 / 3), "float32")
    assert scores.probs_TE[0, 2] > scores.probs_TE[0, 0]


def test_softmax_over_kept_slots():
    log_TK = jnp.array([[-300.0, -300.0, 500.0], [0.0, 1.0, 2.0]])
    keep_TK = jnp.array([[True, True, False], [False, False, False]])
    assert kept_softmax(log_TK, keep_TK).tolist() == [[0.5, 0.5, 0], [0, 0, 0]]
    gradient_TK = jax.grad(lambda x: kept_softmax(x, keep_TK)[0, 0])(log_TK)
    assert gradient_TK.tolist() == [[0.25, -0.25, 0], [0, 0, 0]]


def test_by_row_is_every_slot_with_its_token():
    routing = ExpertRouting(
        token_EC=jnp.array([[2, 0], [1, 2]]),
        gate_EC=jnp.array([[0.5, 0.4], [0.3, 0.2]]),
        keep_EC=jnp.array([[True, True], [True, False]]),
        logits_TE=jnp.zeros((3, 2)),
        probs_TE=jnp.full((3, 2), 0.5),
    )
    token_N, rows = routing.by_row()
    assert token_N.tolist() == [2, 0, 1, 2]
    assert rows.expert_TK.tolist() == [[0], [0], [1], [1]]
    assert rows.keep_TK.tolist() == [[True], [True], [True], [False]]


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TopK(k=0), r"router.k = 0: must be at least 1"),
        (TopK(k=9), r"router.k = 9: must be at most num_experts = 4"),
        (TopK(k=2, score="softmx"), r"must be one of .* Did you mean 'softmax'"),
        (TopK(k=2, normalize="afer"), r"must be one of .* Did you mean 'after'"),
        (TopK(k=2, scale=0.0), r"router.scale = 0.0: must be above 0"),
        (TopK(k=2, bias_rate=-1.0), r"router.bias_rate = -1.0: must be >= 0"),
        (TopK(k=2, bias_rule="sgn"), r"router.bias_rule = 'sgn'.*Did you mean 'sign'"),
        (TopK(k=2, jitter=1.0), r"router.jitter = 1.0: must be in \[0, 1\)"),
        (
            TopK(k=2, groups=Groups(num=3, keep=1)),
            r"groups.num = 3: must be a divisor of num_experts = 4",
        ),
        (
            TopK(k=3, groups=Groups(num=2, keep=1)),
            r"groups.keep = 1: must be enough groups for k = 3",
        ),
        (
            TopK(k=1, groups=Groups(num=2, keep=3)),
            r"groups.keep = 3: must be in \[1, num = 2\]",
        ),
        (
            TopK(k=1, groups=Groups(num=4, keep=1, score="top2")),
            r"groups.score = 'top2': must be 'max' for groups of one",
        ),
        (TopP(p=0.0, k_max=2), r"router.p = 0.0: must be in \(0, 1\]"),
        (TopP(p=1.5, k_max=2), r"router.p = 1.5: must be in \(0, 1\]"),
        (TopP(p=(0.5, 0.0), k_max=2), r"router.p = 0.0: must be in \(0, 1\]"),
        (
            TopP(p=Schedule(points=((0, 0.5), (9, 1.1))), k_max=2),
            r"router.p = 1.1: must be in \(0, 1\]",
        ),
        (TopP(p=0.5, k_max=5), r"router.k_max = 5: must be at most num_experts = 4"),
        (TopP(p=0.5, k_max=1, k_min=2), r"k_max = 1: must be at least k_min = 2"),
        (
            TopP(p=0.5, k_max=2, control=Controller(target=3.0)),
            r"control.target = 3.0: must be in \[k_min, k_max\] = \[1, 2\]",
        ),
        (
            TopP(p=RAMP, k_max=2, control=Controller(target=1.5)),
            r"must be one number, where a controller starts",
        ),
        (ExpertChoice(k=0.0), r"router.k = 0.0: must be above 0"),
        (ExpertChoice(k=5.0), r"router.k = 5.0: must be at most num_experts = 4"),
        (Hash(k=5), r"router.k = 5: must be at most num_experts = 4"),
        (Forced(k=5), r"router.k = 5: must be at most num_experts = 4"),
        (Forced(k=1, load="skew"), r"Did you mean 'skewed'"),
        (Soft(score="max"), r"router.score = 'max': must be one of"),
    ],
    ids=str,
)
def test_refusals(router, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        with pytest.raises(ConfigError, match=message):
            check(MoE(num_experts=4, router=router, experts=Glu(hidden=2)), "config.f")


@pytest.mark.parametrize("cfg", [Hash(k=2), Forced(k=2, load="random")], ids=str)
def test_blocks_and_rounds_draw_their_own_assignment(cfg):
    module = cfg.make(D, E, nnx.Rngs(params=0))

    @functools.partial(jax.jit, static_argnums=1)
    def choice(depth, chain_round):
        ctx = context(1, T, token_BL=TOKEN_T[None], depth=depth)
        ctx = dataclasses.replace(ctx, chain_round=chain_round)
        return module(tokens(), ctx).expert_TK

    places = [(depth, t) for depth in range(4) for t in range(3)]
    found = {np.asarray(choice(jnp.int32(d), t)).tobytes() for d, t in places}
    assert len(found) == len(places)
    assert np.asarray(choice(jnp.int32(3), 2)).tobytes() in found


def test_hashes_of_saved_configs_stay_as_they_were():
    """Layers hashed alike, and the rounds of a chain with seed + round."""
    before = to_dict(Hash(k=2, seed=5))
    before.pop("by_layer")
    old = from_dict(before)
    assert old == Hash(k=2, seed=5, by_layer=False)
    assert from_dict(to_dict(Hash(k=2))) == Hash(k=2, by_layer=True)
    module = old.make(D, E, nnx.Rngs(params=0))
    for depth, t in ((0, 0), (3, 0), (1, 2)):
        ctx = context(1, T, token_BL=TOKEN_T[None], depth=depth, chain_round=t)
        expected = hashed_experts(TOKEN_T, E, 2, 5 + t)
        np.testing.assert_array_equal(module(tokens(), ctx).expert_TK, expected)


def test_expert_choice_takes_its_share_of_real_tokens():
    """k = 1.5 of 7 real tokens among 6 experts: ceil(1.75) = 2 each, not 3 of 11."""
    module = ExpertChoice(k=1.5, init_std=0.5).make(D, E, nnx.Rngs(params=0))
    routing = module(tokens(), context(1, T, num_padding=4))
    assert jnp.sum(routing.keep_EC, axis=1).tolist() == [2] * E
    assert jnp.all(routing.token_EC[:, :2] < 7)


@pytest.mark.thorough
@pytest.mark.parametrize("num_padding", [0, 6])
def test_expert_choice_of_a_decimal_k_rounds_nothing(num_padding):
    """1.1 * 90 / 3 = 33, and 33.00000000000001 in float64: of 90 and of 96 - 6."""
    x_TD = jax.random.normal(jax.random.key(1), (90 + num_padding, D))
    module = ExpertChoice(k=1.1, init_std=0.5).make(D, 3, nnx.Rngs(params=0))
    ctx = context(1, 90 + num_padding, num_padding=num_padding)
    keep_EC = module(x_TD, ctx).keep_EC
    assert keep_EC.shape[1] == (33 if num_padding == 0 else 36)  # of 96: 35.2
    assert jnp.sum(keep_EC, axis=1).tolist() == [33] * 3


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TopK(k=1), r"normalize = 'after': with k = 1 every gate is 1"),
        (TopP(p=0.5), r"k_max = None: rows for all experts"),
        (ExpertChoice(k=1.0), r"ExpertChoice reads later tokens"),
    ],
    ids=str,
)
def test_cautions(router, message):
    with pytest.warns(ConfigWarning, match=message):
        check(MoE(num_experts=4, router=router, experts=Glu(hidden=2)), "config.ffn")


@pytest.mark.filterwarnings("ignore:.*ExpertChoice reads later tokens")
def test_a_capacity_does_not_fit_expert_choice():
    moe = MoE(num_experts=4, router=TopK(k=1), experts=Glu(hidden=2))
    moe = dataclasses.replace(moe, router=ExpertChoice(k=1.0), capacity_factor=1.0)
    with pytest.raises(ConfigError, match=r"capacity_factor = 1.0: must be None"):
        check(moe, "config.ffn")


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -3.3e-3, 1e3, 1.7e5, -1e30])
@pytest.mark.parametrize("num_experts", [1, 3, 7, 60])
def test_standardized_logits_that_are_equal_are_zero(value, num_experts):
    """The mean of 7 times 1000 is not 1000 in float32: that gave 0.06."""
    equal_TE = jnp.full((3, num_experts), value, jnp.float32)
    assert np.all(np.asarray(standardize(equal_TE)) == 0)
    gradient = jax.grad(lambda x: jnp.sum(standardize(x) ** 2))(equal_TE)
    assert np.all(np.asarray(gradient) == 0)


@pytest.mark.thorough
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_standardized_logits_are_those_of_float64(offset):
    """An offset of all logits changes nothing, as far as they hold their digits."""
    logit_TE = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32) + offset
    logit_TE = logit_TE.astype(np.float32)
    exact_TE = np.float64(logit_TE)
    exact_TE -= exact_TE.mean(axis=1, keepdims=True)
    exact_TE /= np.sqrt((exact_TE**2).mean(axis=1, keepdims=True) + 1e-6)
    assert np.max(abs(standardize(jnp.asarray(logit_TE)) - exact_TE)) < 1e-5
