"""Sums of one layer and the figures made of them, by hand and by loops over tokens.

B sequences · T tokens · E experts · K slots per token · C slots per expert
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.moe import metrics
from moex.moe.routing import ExpertRouting, Routing
from tests.marks import thorough
from tests.tolerances import assert_close

# Compiled: one by one the operations of a single call are 60 programs.
loads = jax.jit(lambda routing, *sizes: routing.loads(*sizes), static_argnums=(1, 2))
routing_stats = jax.jit(metrics.routing_stats, static_argnums=6)
layer_metrics = jax.jit(metrics.layer_metrics)


def example():
    """Three tokens and a padding token among two experts, k = 1.

    Probabilities of expert 0: 0.5, 0.75, 0.25; NaN at the padding.
    """
    probs_TE = jnp.array([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    expert_TK = jnp.array([[0], [0], [1], [0]], jnp.int32)
    valid_T = jnp.array([True, True, True, False])
    routing = Routing(
        expert_TK=expert_TK,
        gate_TK=jnp.ones((4, 1)),
        keep_TK=valid_T[:, None],
        logits_TE=jnp.log(probs_TE),
        probs_TE=probs_TE,
    )
    load_BE, real_T = loads(routing, (2, 2), 2)
    computed, lost = jnp.float32(2), jnp.float32(1)
    # Lengths 5, 0 and 13; what stands at the padding is not read.
    y_TD = jnp.array([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0], [jnp.nan, 1.0]])
    valid_BL = valid_T.reshape(2, 2)
    return routing_stats(routing, valid_BL, load_BE, real_T, computed, lost, 2, y_TD)


def test_sums_leave_padding_out():
    stats = example()
    # Entropies: log 2 = 0.693147; -(0.75 log 0.75 + 0.25 log 0.25) = 0.562335, twice.
    # Logits are log probabilities, so their log-sum-exp is 0.
    expected = {
        "load_E": [2, 1],
        "prob_sum_E": [1.5, 1.5],
        "num_tokens": 3,
        # Sequence 0: all to expert 0, whose mean probability is 5/8: 2 * 5/8. Sequence
        # 1: one token of probability 3/4 at its expert 1: 2 * 3/4.
        "sequence_balance_sum": 1.25 + 1.5,
        "num_sequences": 2,
        "num_slots": 3,
        "num_zero": 0,
        "num_kept": 2,
        "num_lost": 1,
        "real_sq_sum": 3,
        "num_unrouted": 0,
        "entropy_sum": 0.693147 + 2 * 0.562335,
        "router_z_sum": 0,
        "top_gate_sum": 0.5 + 0.75 + 0.75,
        # log 0.5 twice; log 0.75 and log 0.25, twice.
        "logit_sq_sum": 0.960906 + 2 * (0.082761 + 1.921812),
        "output_sq_sum": 25 + 169,
        "slots_S": [0, 3],
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        assert stats[name].dtype == jnp.float32
        assert_close(stats[name], value, "float32", name)


def test_figures():
    figures = layer_metrics(example())
    # Load shares (2/3, 1/3): entropy 0.636514, exp of it 1.889882, over 2 experts.
    expected = {
        "load_frac_E": [2 / 3, 1 / 3],
        "max_violation": 1 / 3,
        "dead_frac": 0,
        "effective_frac": 0.944941,
        "entropy": 1.817817 / 3,
        "load_balance": 1,  # both mean probabilities are 1/2
        "sequence_balance": 2.75 / 2,
        "router_z": 0,
        "importance": 0,
        "confidence": 2 / 3,
        "experts_per_token": 2 / 3,
        "experts_per_token_std": 0,
        "unrouted_frac": 0,
        "zero_frac": 0,
        "lost_frac": 1 / 3,
        "dropped_frac": 1 / 3,
        "logit_norm": (4.970052 / 3) ** 0.5,
        "output_norm": (194 / 3) ** 0.5,
        "slots_hist_S": [0, 1],
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(figures[name], value, "float32", name)


def test_one_expert_takes_all():
    stats = example() | {"load_E": jnp.array([3.0, 0.0])}
    figures = layer_metrics(stats)
    assert_close(figures["max_violation"], 1, "float32")
    assert_close(figures["dead_frac"], 0.5, "float32")
    assert_close(figures["effective_frac"], 0.5, "float32")


def test_figures_of_sums_are_those_of_all_tokens():
    stats = example()
    doubled = jax.tree.map(lambda a: a + a, stats)
    for name, value in layer_metrics(doubled).items():
        assert_close(value, layer_metrics(stats)[name], "float32", name)


def test_a_mean_over_no_token_is_no_figure():
    nothing = jax.tree.map(jnp.zeros_like, example())
    figures = layer_metrics(nothing)
    without = {name for name, value in figures.items() if np.all(np.isnan(value))}
    assert without == {
        *("load_balance", "sequence_balance", "router_z", "entropy", "importance"),
        *("confidence", "experts_per_token", "experts_per_token_std", "unrouted_frac"),
        *("logit_norm", "output_norm"),
    }
    # Of no slots none is dropped, and no expert has more than others.
    assert figures["dropped_frac"] == figures["max_violation"] == 0
    assert not np.any(figures["slots_hist_S"]) and not np.any(figures["load_frac_E"])


def test_zero_computation_slots_are_counted_apart():
    """Four tokens among two experts and one that costs nothing (id 2), k = 2."""
    expert_TK = jnp.array([[0, 1], [0, 2], [2, 1], [2, 0]], jnp.int32)
    keep_TK = jnp.array([[True, True], [True, True], [True, False], [True, True]])
    uniform_TE = jnp.full((4, 3), 1 / 3)
    routing = Routing(
        expert_TK=expert_TK,
        gate_TK=jnp.ones((4, 2)),
        keep_TK=keep_TK,
        logits_TE=jnp.zeros((4, 3)),
        probs_TE=uniform_TE,
    )
    load_BE, real_T = loads(routing, (2, 2), 2)
    assert load_BE.tolist() == [[2, 1, 1], [1, 0, 2]]
    assert real_T.tolist() == [2, 1, 0, 1]
    valid_BL = jnp.ones((2, 2), bool)
    # Capacity dropped one of the four real slots.
    kept, y_TD = jnp.float32(3), jnp.zeros((4, 1))
    stats = routing_stats(
        routing, valid_BL, load_BE, real_T, kept, jnp.float32(0), 2, y_TD
    )
    figures = layer_metrics(stats)
    # Real slots per token 2, 1, 0, 1: mean 1, variance 1/2.
    expected = {
        "experts_per_token": 3 / 4,
        "experts_per_token_std": 0.5**0.5,
        "unrouted_frac": 1 / 4,
        "zero_frac": 3 / 7,
        "dropped_frac": 1 / 7,
        "slots_hist_S": [1 / 4, 2 / 4, 1 / 4],
    }
    for name, value in expected.items():
        assert_close(figures[name], value, "float32", name)


def test_loads_of_experts_that_choose():
    """Two rows of two tokens; expert 1 takes token 2 and a slot that is not kept."""
    routing = ExpertRouting(
        token_EC=jnp.array([[0, 1], [2, 3]]),
        gate_EC=jnp.ones((2, 2)),
        keep_EC=jnp.array([[True, True], [True, False]]),
        logits_TE=jnp.zeros((4, 2)),
        probs_TE=jnp.full((4, 2), 0.5),
    )
    load_BE, real_T = loads(routing, (2, 2), 2)
    assert load_BE.tolist() == [[2, 0], [0, 1]]
    assert real_T.tolist() == [1, 1, 1, 0]


def random_case(seed, T=12, E=6, K=4, D=3):
    """(routing, valid_T, y_TD) with slots and tokens left out.

    If `seed` is odd nobody wants expert 1: its probabilities are exactly 0.
    """
    rng = np.random.default_rng(seed)
    logits_TE = rng.normal(size=(T, E)).astype(np.float32)
    logits_TE[:, 1] -= 200 * (seed % 2)
    expert_TK = np.argsort(-logits_TE, axis=1)[:, :K].astype(np.int32)
    valid_T = rng.random(T) < 0.8
    keep_TK = (rng.random((T, K)) < 0.6) & valid_T[:, None]
    routing = Routing(
        expert_TK=jnp.asarray(expert_TK),
        gate_TK=jnp.ones((T, K)),
        keep_TK=jnp.asarray(keep_TK),
        logits_TE=jnp.asarray(logits_TE),
        probs_TE=jax.nn.softmax(logits_TE),
    )
    return routing, valid_T, rng.normal(size=(T, D)).astype(np.float32)


def chosen_by_experts(seed, C=5):
    """The same where experts choose; expert 1 takes nobody if `seed` is odd."""
    routing, valid_T, y_TD = random_case(seed)
    rng = np.random.default_rng(seed)
    T, E = routing.logits_TE.shape
    token_EC = np.array([rng.permutation(T)[:C] for _ in range(E)], np.int32)
    keep_EC = (rng.random((E, C)) < 0.6) & valid_T[token_EC]
    keep_EC[1] &= seed % 2 == 0
    chosen = ExpertRouting(
        token_EC=jnp.asarray(token_EC),
        gate_EC=jnp.ones((E, C)),
        keep_EC=jnp.asarray(keep_EC),
        logits_TE=routing.logits_TE,
        probs_TE=routing.probs_TE,
    )
    return chosen, valid_T, y_TD


def figures_of(routing, valid_T, y_TD, num_experts, kept=0, lost=0, sequences=1):
    """The sums of one call, as the layer makes them."""
    valid_BL = jnp.asarray(valid_T).reshape(sequences, -1)
    load_BE, real_T = loads(routing, valid_BL.shape, num_experts)
    rows = jnp.float32(kept), jnp.float32(lost)
    rest = (load_BE, real_T, *rows, num_experts, jnp.asarray(y_TD))
    return routing_stats(routing, valid_BL, *rest)


def experts_of(routing):
    """The experts of every token, as lists."""
    rows = [[] for _ in range(len(routing.logits_TE))]
    if isinstance(routing, ExpertRouting):
        token_EC = np.asarray(routing.token_EC)
        for e, c in np.argwhere(routing.keep_EC):
            rows[token_EC[e, c]].append(int(e))
    else:
        expert_TK = np.asarray(routing.expert_TK)
        for t, k in np.argwhere(routing.keep_TK):
            rows[t].append(int(expert_TK[t, k]))
    return rows


def log_sums_of(logits_TE):
    return [math.log(sum(map(math.exp, row))) for row in logits_TE]


def entropy(share):
    return -sum(p * math.log(p) for p in share if p > 0)


def by_definition(rows, fates, logits_TE, probs_TE, y_TD, num_experts):
    """The figures of some tokens, none of them padding.

    Args:
      rows: the experts of each token.
      fates: what became of the slots at experts that compute.
    """
    n, E = len(rows), probs_TE.shape[1]
    load = [sum(e in row for row in rows) for e in range(E)]
    sizes = [sum(e < num_experts for e in row) for row in rows]
    slots, middle = sum(load), sum(sizes) / n
    most = max(len(row) for row in rows)
    prob_sum_E = probs_TE.sum(axis=0)
    balance = E * sum(c / slots * p / n for c, p in zip(load, prob_sum_E, strict=True))
    return {
        "load_frac_E": [count / slots for count in load],
        "max_violation": max(load) / (slots / E) - 1,
        "dead_frac": sum(count == 0 for count in load) / E,
        "effective_frac": math.exp(entropy([c / slots for c in load])) / E,
        "entropy": sum(map(entropy, probs_TE)) / n,
        **dict.fromkeys(("load_balance", "sequence_balance"), balance),
        "router_z": sum(z**2 for z in log_sums_of(logits_TE)) / n,
        "importance": np.var(prob_sum_E) / np.mean(prob_sum_E) ** 2,
        "confidence": sum(map(max, probs_TE)) / n,
        "experts_per_token": fates.count("computed") / n,
        "experts_per_token_std": math.sqrt(sum((s - middle) ** 2 for s in sizes) / n),
        "unrouted_frac": sum(s == 0 for s in sizes) / n,
        "zero_frac": sum(e >= num_experts for row in rows for e in row) / slots,
        "lost_frac": fates.count("lost") / slots,
        "dropped_frac": (fates.count("dropped") + fates.count("lost")) / slots,
        "logit_norm": math.sqrt(sum(np.linalg.norm(x) ** 2 for x in logits_TE) / n),
        "output_norm": math.sqrt(sum(np.linalg.norm(y) ** 2 for y in y_TD) / n),
        "slots_hist_S": [sum(s == i for s in sizes) / n for i in range(most + 1)],
    }


@pytest.mark.parametrize("make", [random_case, chosen_by_experts])
@pytest.mark.parametrize(
    ("seed", "num_experts"),
    [thorough(0, 4), thorough(1, 4), thorough(2, 4), (3, 6)],
)
def test_figures_are_those_of_a_loop_over_tokens(make, num_experts, seed):
    """Ids from `num_experts` to 5 cost nothing; some slots find no room."""
    routing, valid_T, y_TD = make(seed)
    y_TD[~valid_T] = np.nan
    rng = np.random.default_rng(seed)
    rows = experts_of(routing)
    real = sum(e < num_experts for row in rows for e in row)
    fates = rng.choice(["computed", "dropped", "lost"], real, p=[0.7, 0.2, 0.1])
    fates = fates.tolist()
    rest = num_experts, fates.count("computed"), fates.count("lost")
    sums = figures_of(routing, valid_T, y_TD, *rest)
    figures = layer_metrics(sums)
    valid = np.flatnonzero(valid_T)
    logits_TE, probs_TE, y_TD = (
        np.asarray(a, np.float64)[valid]
        for a in (routing.logits_TE, routing.probs_TE, y_TD)
    )
    own = [rows[t] for t in valid]
    want = by_definition(own, fates, logits_TE, probs_TE, y_TD, num_experts)
    assert figures.keys() == want.keys()
    for name, value in want.items():
        got = figures[name]
        if name == "slots_hist_S":  # bins for more experts than any token has
            value = value + [0] * (len(got) - len(value))
        assert_close(got, value, "float32", name)
    assert_close(
        sums["router_z_sum"], sum(z**2 for z in log_sums_of(logits_TE)), "float32"
    )
    assert_close(sums["prob_sum_E"], sum(probs_TE), "float32")


@pytest.mark.parametrize("make", [random_case, chosen_by_experts])
def test_loads_are_those_of_a_loop_over_sequences(make):
    """Three sequences of four tokens; ids 4 and 5 cost nothing."""
    routing, *_ = make(0)
    rows = experts_of(routing)
    load_BE, real_T = loads(routing, (3, 4), 4)
    for b, load_E in enumerate(np.asarray(load_BE)):
        own = rows[4 * b : 4 * b + 4]
        assert load_E.tolist() == [sum(e in row for row in own) for e in range(6)]
    assert real_T.tolist() == [sum(e < 4 for e in row) for row in rows]


def test_sums_of_halves_add_up_to_those_of_all_tokens():
    routing, valid_T, y_TD = random_case(0)
    whole = figures_of(routing, valid_T, y_TD, 6, sequences=2)
    halves = []
    for rows in (slice(0, 6), slice(6, 12)):
        fields = ("expert_TK", "gate_TK", "keep_TK", "logits_TE", "probs_TE")
        half = Routing(**{name: getattr(routing, name)[rows] for name in fields})
        halves.append(figures_of(half, valid_T[rows], y_TD[rows], 6))
    for name, value in jax.tree.map(jnp.add, *halves).items():
        assert_close(value, whole[name], "float32", name)


def test_the_histogram_of_slots_is_bounded():
    """40 experts choose: every token has all; bins end at 32 or more."""
    T, E = 3, 40
    routing = ExpertRouting(
        token_EC=jnp.tile(jnp.arange(T)[None], (E, 1)),
        gate_EC=jnp.ones((E, T)),
        keep_EC=jnp.ones((E, T), bool),
        logits_TE=jnp.zeros((T, E)),
        probs_TE=jnp.full((T, E), 1 / E),
    )
    stats = figures_of(routing, np.ones(T, bool), np.zeros((T, 1), np.float32), E)
    assert stats["slots_S"].tolist() == [0] * 32 + [3]
