"""Which experts merge, and how: against the authors' results and plain definitions.

E experts · F expert width · D model width · T tokens
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moex.convert.align import matching, mean, merged, one_expert, reordered
from moex.convert.kinds.merged import ALIGN
from moex.convert.merge import (
    adaptive_groups,
    error_bound,
    greedy_groups,
    nearest_groups,
    similarity,
    usage,
)
from moex.convert.plans import Merge
from tests.moe import oracle

# Results of the authors' grouper for Mixtral on this usage and similarity.
USAGE = ((0.40, 0.25, 0.15, 0.10, 0.06, 0.04), (0.22, 0.20, 0.18, 0.16, 0.14, 0.10))
UPPER = (0.9, 0.1, 0.2, 0.8, 0.3, 0.5, 0.6, 0.1, 0.7, 0.95, 0.4, 0.2, 0.3, 0.1, 0.55)


def symmetric(upper, size):
    full = np.eye(size)
    full[np.triu_indices(size, 1)] = upper
    return np.maximum(full, full.T)


def labels(groups, size):
    found = np.zeros(size, int)
    for g, members in enumerate(groups):
        found[members] = g
    return found.tolist()


@pytest.mark.parametrize(
    ("groups", "counts"), [(1, [1, 1]), (2, [2, 2]), (3, [2, 4]), (4, [3, 5])]
)
def test_the_budget_of_layers_is_that_of_the_authors(groups, counts):
    assert adaptive_groups(USAGE, groups) == counts


def test_groups_are_those_of_the_authors():
    found = [
        labels(nearest_groups(usage_E, symmetric(UPPER, 6), count), 6)
        for usage_E, count in zip(USAGE, (2, 4), strict=True)
    ]
    assert found == [[0, 1, 1, 1, 0, 1], [0, 1, 2, 3, 0, 1]]


def test_ties_fill_the_budget_evenly():
    """The authors' rule alone gives one group a layer here, whatever the budget."""
    even = [np.full(6, 1 / 6)] * 2
    assert [adaptive_groups(even, g) for g in (1, 3, 5)] == [[1, 1], [3, 3], [5, 5]]
    unused = [np.array([0.6, 0.4, 0, 0]), np.array([0.25] * 4)]
    assert adaptive_groups(unused, 3) == [2, 4]
    assert adaptive_groups(unused, 4) == [4, 4]
    assert adaptive_groups([np.zeros(3), np.ones(5) / 5], 2) == [1, 3]


@pytest.mark.parametrize("seed", range(40))
def test_random_layers_are_grouped_as_loops_over_experts_do(seed):
    """Ties, unused experts, and layers of different sizes among them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 8, size=rng.integers(1, 5)).tolist()
    counts = [rng.integers(0, 6 if seed % 2 else 600, size=E) for E in sizes]
    usages = [usage(count_E) for count_E in counts]
    G = int(rng.integers(1, max(sizes)))
    found = adaptive_groups(usages, G)
    # The authors' rule, and the ties that it leaves out.
    pool = []
    for layer, usage_E in enumerate(usages):
        first = next(e for e, u in enumerate(usage_E) if u == max(usage_E))
        pool += [(1.0 if e == first else u, layer) for e, u in enumerate(usage_E)]
    pool.sort(reverse=True)
    budget = min(G * len(sizes), len(pool))
    threshold = pool[min(budget, len(pool) - 1)][0]
    above, tied = ([0] * len(sizes) for _ in range(2))
    for value, layer in pool:
        above[layer] += value > threshold
        tied[layer] += value == threshold
    assert sum(found) == budget
    more = [n - a for n, a in zip(found, above, strict=True)]
    assert all(0 <= m <= t for m, t in zip(more, tied, strict=True))
    full = [m for m, t in zip(more, tied, strict=True) if m < t]
    assert not full or max(more) <= min(full) + 1  # as many in each layer
    for count_E, usage_E, groups in zip(counts, usages, found, strict=True):
        E = len(count_E)
        similar = symmetric(rng.integers(0, 4, size=E * (E - 1) // 2) / 4, E)
        largest = -(-E // groups) + int(rng.integers(0, 2))
        order = sorted(range(E), key=lambda e, count_E=count_E: (-count_E[e], e))
        expected = [[e] for e in order[:groups]]
        for e in order[groups:]:
            room = [g for g in expected if len(g) < largest]
            best = max(similar[e, g[0]] for g in room)
            next(g for g in room if similar[e, g[0]] == best).append(e)
        assert nearest_groups(usage_E, similar, groups, largest) == expected
        taken, rest = [], order[groups:]
        for dominant in order[:groups]:
            near = sorted(rest, key=lambda e, d=dominant: (-similar[d, e], e))
            taken.append([dominant, *near[: largest - 1]])
            rest = [e for e in rest if e not in taken[-1]]
        assert greedy_groups(usage_E, similar, groups, largest) == taken
        own = glu_weights(E=E, D=2, F=3, seed=seed)
        made = merged(
            own,
            Merge(
                layer=0,
                experts=E,
                groups=tuple(map(tuple, expected)),
                dominant=tuple(order[:groups]),
                weights=tuple(map(float, usage_E)),
            ),
            "none",
        )
        for g, members in enumerate(expected):
            whole = sum(usage_E[e] for e in members)
            share = {
                e: usage_E[e] / whole if whole else 1 / len(members) for e in members
            }
            for name, value in own.items():
                mixed = sum(share[e] * np.float64(value[e]) for e in members)
                np.testing.assert_allclose(made[name][g], mixed, rtol=1e-5, atol=1e-6)


def test_usage_and_similarity_are_their_definitions():
    np.testing.assert_allclose(usage([3, 1, 0]), [0.75, 0.25, 0])
    np.testing.assert_array_equal(usage([0, 0]), [0, 0])
    logits_TE = np.random.default_rng(0).normal(size=(50, 4)) + 1
    logits_TE[:, 2] = 0  # nothing is known of it: half of the way
    found = similarity(logits_TE.T @ logits_TE)
    for i in range(4):
        for j in range(4):
            a, b = logits_TE[:, i], logits_TE[:, j]
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            expected = 0.5 if norms == 0 else (a @ b / norms + 1) / 2
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_a_full_group_takes_no_more():
    similar = symmetric([0.9, 0.1, 0.2, 0.8, 0.3, 0.4], 4)
    score = [0.4, 0.3, 0.2, 0.1]
    assert nearest_groups(score, similar, 2, largest=2) == [[0, 3], [1, 2]]
    similar = symmetric([0.1, 0.9, 0.8, 0.2, 0.3, 0.4], 4)
    assert nearest_groups(score, similar, 2) == [[0, 2, 3], [1]]
    assert nearest_groups(score, similar, 2, largest=2) == [[0, 2], [1, 3]]


def test_the_first_take_their_like():
    similar = symmetric([0.9, 0.1, 0.2, 0.8, 0.5, 0.95, 0.7, 0.6, 0.9, 0.4], 5)
    score = [0.1, 0.5, 0.2, 0.4, 0.3]  # the dominant ones are 1 and 3
    assert greedy_groups(score, similar, 2, largest=5) == [[1, 0, 4, 2], [3]]
    assert greedy_groups(score, similar, 2, largest=3) == [[1, 0, 4], [3, 2]]


def test_ties_go_to_the_lowest_expert_and_the_higher_score():
    flat = np.full((4, 4), 0.5)
    assert nearest_groups([0.25] * 4, flat, 2) == [[0, 2, 3], [1]]
    assert greedy_groups([0.25] * 4, flat, 2, largest=2) == [[0, 2], [1, 3]]


def test_the_error_bound_is_the_least_error_of_one_expert_for_two():
    """Found by a search over mixtures, for outputs that do not depend on gates."""
    rng = np.random.default_rng(0)
    T, D = 4000, 3
    gates = rng.uniform(size=(T, 2)) * (rng.uniform(size=(T, 2)) < 0.7)
    outputs = np.array([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0]])
    f_TED = np.broadcast_to(outputs, (T, 2, D))
    found = error_bound(0, 1, gates.T @ gates, outputs @ outputs.T, T)

    def error(a):
        h_TD = a * f_TED[:, 0] + (1 - a) * f_TED[:, 1]
        y_TD = np.einsum("te,ted->td", gates, f_TED)
        return np.mean(np.sum((y_TD - gates.sum(1)[:, None] * h_TD) ** 2, axis=1))

    least = min(map(error, np.linspace(0, 1, 2001)))
    assert found == pytest.approx(least, rel=1e-5) and found > 0.1
    ratio = np.stack([gates[:, 0], 3 * gates[:, 0]], axis=1)
    assert error_bound(0, 1, ratio.T @ ratio, outputs @ outputs.T, T) < 1e-12
    assert error_bound(0, 1, np.zeros((2, 2)), outputs @ outputs.T, T) == 0.0


# The weights.


def glu_weights(E=4, D=5, F=8, bias=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w_in_ED2F": (E, D, 2, F), "w_out_EFD": (E, F, D)}
    if bias:
        shapes |= {"bias_in_E2F": (E, 2, F), "bias_out_ED": (E, D)}
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


@pytest.mark.parametrize("bias", [False, True])
def test_a_planted_order_of_hidden_units_is_found_again(bias):
    weights, rng = glu_weights(bias=bias), np.random.default_rng(1)
    like = one_expert(weights, 0)
    planted_F = rng.permutation(8)
    shuffled = reordered(like, planted_F)
    noisy = {n: w + 0.1 * rng.normal(size=w.shape) for n, w in shuffled.items()}
    found_F = matching(like, noisy)
    np.testing.assert_array_equal(planted_F[found_F], np.arange(8))
    back = reordered(shuffled, found_F)
    assert all(np.array_equal(back[name], like[name]) for name in like)


class Cfg:
    bias, activation = True, "silu"


def test_an_order_of_hidden_units_does_not_change_the_function():
    weights = glu_weights(bias=True)
    order_F = matching(one_expert(weights, 0), one_expert(weights, 1))
    assert (order_F != np.arange(8)).any()
    moved = {
        n: np.stack([v]) for n, v in reordered(one_expert(weights, 1), order_F).items()
    }
    x_D = np.random.default_rng(2).normal(size=5)
    before = oracle.glu_expert(Cfg, x_D, weights, 1)
    after = oracle.glu_expert(Cfg, x_D, moved, 0)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def layer(groups, dominant, weights):
    return Merge(layer=0, experts=4, groups=groups, dominant=dominant, weights=weights)


def test_experts_of_a_group_become_their_weighted_mean():
    weights = glu_weights()
    plan = layer(((2, 0), (3,), (1,)), (2, 3, 1), (0.1, 0.2, 0.3, 0.4))
    found = merged(weights, plan, "none")
    for name, value in weights.items():
        mixed = 0.25 * np.float64(value[0]) + 0.75 * np.float64(value[2])
        np.testing.assert_allclose(found[name][0], mixed, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found[name][1:], value[[3, 1]])
        assert found[name].dtype == np.float32


def test_a_group_that_nobody_used_becomes_the_plain_mean():
    experts = [one_expert(glu_weights(), e) for e in range(2)]
    for name, value in mean(experts, [0.0, 0.0]).items():
        expected = (experts[0][name] + experts[1][name]) / 2
        np.testing.assert_allclose(value, expected, atol=1e-6)
    for name, value in mean(experts, [1.5e308, 0.5e308]).items():  # their sum overflows
        expected = 0.75 * experts[0][name] + 0.25 * experts[1][name]
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("align", ALIGN)
def test_copies_with_other_orders_merge_to_the_same_expert_if_aligned(align):
    weights, rng = glu_weights(), np.random.default_rng(3)
    for e in (1, 2, 3):
        copy = reordered(one_expert(weights, 0), rng.permutation(8))
        for name in weights:
            weights[name][e] = copy[name]
    plan = layer(((0, 3), (2, 1)), (3, 2), (1.0, 2.0, 3.0, 4.0))
    found = merged(weights, plan, align)
    x_D = rng.normal(size=5)

    class Plain(Cfg):
        bias = False

    expected = oracle.glu_expert(Plain, x_D, weights, 0)
    errors = [
        np.abs(oracle.glu_expert(Plain, x_D, found, g) - expected).max() for g in (0, 1)
    ]
    assert (max(errors) < 1e-5) == (align != "none")


def test_bfloat16_weights_are_matched_and_averaged_in_float32():
    weights = {n: jnp.asarray(v, jnp.bfloat16) for n, v in glu_weights().items()}
    found = merged(weights, layer(((0, 1), (2, 3)), (0, 2), (1.0,) * 4), "dominant")
    assert all(value.dtype == np.float32 for value in found.values())
