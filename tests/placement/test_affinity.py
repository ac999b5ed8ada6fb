"""Affinity from traces and sums: counts by loops over tokens, splits, the control."""

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.placement import affinity as counts
from moex.placement.affinity import Affinity, Layer, Term
from tests.analysis import oracle

# Layer 1, layer 3 twice (a chain), layer 4 with fewer experts; layer 2 is dense.
INFOS = oracle.INFOS


def write_trace(file, infos=INFOS, n=400, seed=0):
    """A random trace; (tokens, slots by label)."""
    rng = np.random.default_rng(seed)
    tokens = oracle.random_tokens(rng, n)
    slots = {own.label: oracle.random_slots(rng, n, own) for own in infos}
    oracle.write(file, [(tokens, slots)], layers=infos)
    return tokens, slots


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("trace") / "t.parquet"
    return file, *write_trace(file)


def top(slots, i, E):
    """The kept expert of greatest gate; None: there is none, or it computes nothing."""
    kept = [j for j in range(slots.keep_NK.shape[1]) if slots.keep_NK[i, j]]
    if not kept:
        return None
    best = max(kept, key=lambda j: slots.gate_NK[i, j])
    e = int(slots.expert_NK[i, best])
    return e if e < E else None


def test_transitions_are_those_of_a_loop_over_tokens(written):
    file, tokens, slots = written
    own, held = counts.read(file, every=4)
    assert [layer.number for layer in own.layers] == [1, 3, 4]
    assert [layer.experts for layer in own.layers] == [5, 5, 2]
    assert [(term.a, term.b) for term in own.terms] == [(0, 1), (1, 1), (1, 2)]
    sizes = {info.label: info.num_experts for info in INFOS}
    labels = list(sizes)
    for part, wanted in ((own, False), (held, True)):
        assert part.tokens == sum((e % 4 == 3) == wanted for e in tokens.example_N)
        for term, a, b in zip(part.terms, labels, labels[1:], strict=False):
            expected = np.zeros((sizes[a], sizes[b]), int)
            for i, example in enumerate(tokens.example_N):
                if (example % 4 == 3) != wanted:
                    continue
                ends = top(slots[a], i, sizes[a]), top(slots[b], i, sizes[b])
                if None not in ends:
                    expected[ends] += 1
            np.testing.assert_array_equal(term.count_AB, expected)
    assert own.total > 100


def test_coactivation_and_load_are_those_of_a_loop_over_tokens(written):
    file, tokens, slots = written
    found, none = counts.read(file, objective="coactivation")
    assert none is None
    assert [(term.a, term.b) for term in found.terms] == [
        (0, 0),
        (1, 1),
        (1, 1),
        (2, 2),
    ]
    load = [np.zeros(layer.experts, int) for layer in found.layers]
    at = {1: 0, 3: 1, 4: 2}
    for term, info in zip(found.terms, INFOS, strict=True):
        own, E = slots[info.label], info.num_experts
        expected = np.zeros((E, E), int)
        for i in range(len(tokens)):
            mine = sorted(e for e in own.expert_NK[i][own.keep_NK[i]] if e < E)
            for j, e in enumerate(mine):
                load[at[info.layer]][e] += 1
                for f in mine[j + 1 :]:
                    expected[e, f] += 1
        np.testing.assert_array_equal(term.count_AB, expected)
    for one, expected in zip(found.load, load, strict=True):
        np.testing.assert_array_equal(one, expected)


def test_devices_of_a_token_are_those_of_a_loop(written):
    file, tokens, slots = written
    device = {1: np.array([0, 1, 2, 0, 1]), 3: np.array([0, 0, 1, 1, 2])}
    device[4] = np.array([1, 0])
    sums = {False: [], True: []}
    for info in INFOS:
        own = slots[info.label]
        for i, example in enumerate(tokens.example_N):
            mine = [e for e in own.expert_NK[i][own.keep_NK[i]] if e < info.num_experts]
            sums[example % 4 == 3].append(len({device[info.layer][e] for e in mine}))
    found = counts.devices_per_token(file, device, every=4)
    np.testing.assert_allclose(found, [np.mean(sums[False]), np.mean(sums[True])])


def test_sums_give_their_transitions_without_what_computes_nothing(tmp_path):
    sums = oracle.random_sums()
    sums.save(tmp_path / "s.npz")
    found, none = counts.read(tmp_path / "s.npz", every=4)
    assert none is None
    assert [(own.number, own.experts) for own in found.layers] == [(1, 4), (2, 4)]
    assert [(term.a, term.b) for term in found.terms] == [(0, 1), (1, 1)]
    first, second, third = sums.layers.values()
    np.testing.assert_array_equal(found.terms[0].count_AB, first.transitions_AB[:4, :4])
    np.testing.assert_array_equal(
        found.terms[1].count_AB, second.transitions_AB[:4, :4]
    )
    np.testing.assert_array_equal(found.load[0], first.count_E[:4])
    np.testing.assert_array_equal(found.load[1], second.count_E[:4] + third.count_E[:4])
    assert (found.run, found.step, found.base) == ("runs/a", 7, "abc")
    with pytest.raises(ConfigError, match="sums do not count pairs .* give a trace"):
        counts.read(tmp_path / "s.npz", objective="coactivation")


def affinity(*terms, sizes, objective="transitions", **fields):
    layers = tuple(Layer(i, E) for i, E in enumerate(sizes))
    made = tuple(Term(a, b, np.asarray(n)) for a, b, n in terms)
    load = tuple(np.ones(E, int) for E in sizes)
    facts = {"layers": layers, "terms": made, "load": load, "tokens": 1}
    return Affinity(**facts, objective=objective, **fields)


def test_the_control_keeps_popularity_and_nothing_else():
    rng = np.random.default_rng(0)
    tight_AB = 1000 * np.eye(6, dtype=int)[rng.permutation(6)]
    own = affinity((0, 1, tight_AB), sizes=(6, 6))
    null_AB = own.shuffled(1).terms[0].count_AB
    np.testing.assert_array_equal(null_AB.sum(0), tight_AB.sum(0))
    np.testing.assert_array_equal(null_AB.sum(1), tight_AB.sum(1))
    assert abs(null_AB - 1000 / 6).max() < 60  # five deviations of about 11
    np.testing.assert_array_equal(null_AB, own.shuffled(1).terms[0].count_AB)
    assert (null_AB != own.shuffled(2).terms[0].count_AB).any()


def test_the_control_within_a_layer_is_the_product_of_popularities():
    pairs_EE = np.zeros((4, 4), int)
    pairs_EE[0, 1] = pairs_EE[2, 3] = 600
    own = affinity((0, 0, pairs_EE), sizes=(4,), objective="coactivation")
    null_EE = own.shuffled(0).terms[0].count_AB
    np.testing.assert_array_equal(null_EE, np.triu(np.full((4, 4), 200), 1))


def test_sets_of_weights_are_placed_where_experts_share_them():
    count_AB = np.arange(16).reshape(4, 4)
    own = affinity((0, 1, count_AB), sizes=(4, 4))
    told = own.told({0: np.array([1, 0, 1, 0])}, {1: (2,)})
    assert [(layer.experts, layer.blocks) for layer in told.layers] == [
        (2, ()),
        (4, (2,)),
    ]
    sums = [count_AB[[1, 3]].sum(0), count_AB[[0, 2]].sum(0)]
    np.testing.assert_array_equal(told.terms[0].count_AB, sums)
    assert told.load[0].tolist() == [2, 2]


def test_what_cannot_be_placed_by_is_said(written, tmp_path):
    with pytest.raises(ConfigError, match="--by = 'load'"):
        counts.read(written[0], objective="load")
    one = tmp_path / "one.parquet"
    write_trace(one, INFOS[:1], n=20)
    with pytest.raises(ConfigError, match="one MoE layer"):
        counts.read(one)[0].check(one)
    counts.read(one, objective="coactivation")[0].check(one)
    few = tmp_path / "few.parquet"
    write_trace(few, n=7)  # one example
    with pytest.raises(ConfigError, match="no example is held out if one of 4"):
        counts.read(few, every=4)
    empty = affinity((0, 1, np.zeros((4, 4), int)), sizes=(4, 4))
    with pytest.raises(ConfigError, match="no token has experts in two consecutive"):
        empty.check("t")
