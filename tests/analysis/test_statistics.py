"""Every statistic against loops over tokens, on random traces and by hand."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moex.analysis import scores
from moex.analysis import statistics as stats
from moex.analysis.trace import Slots
from tests.analysis import oracle

SEEDS = hypothesis.given(seed=st.integers(0, 10**6), n=st.integers(1, 30))
FEW = hypothesis.settings(max_examples=15)


def made(seed, n):
    """(rng, tokens, slots of 6 choices, slots of a layer of 2 experts)."""
    rng = np.random.default_rng(seed)
    tokens, layers = oracle.random_chunk(rng, n, logits=True)
    return rng, tokens, layers["001"], layers["004"]


def without_logits(slots):
    fields = ("expert_NK", "keep_NK", "gate_NK", "logit_NK", "prob_NK")
    return Slots(**{name: getattr(slots, name) for name in fields})


def of(slots):
    return slots.expert_NK, slots.keep_NK


@FEW
@SEEDS
def test_counts_are_what_loops_count(seed, n):
    _, tokens, slots, small = made(seed, n)
    domain_N, token_N = tokens.domain_N, tokens.token_N
    want = oracle.grouped(token_N, slots, 5, 6)
    np.testing.assert_array_equal(stats.group_counts(token_N, 5, *of(slots), 6), want)
    np.testing.assert_array_equal(stats.load_counts(*of(slots), 6), want.sum(axis=0))
    np.testing.assert_array_equal(
        stats.pair_counts(*of(slots), *of(small), 6, 2),
        oracle.pairs(slots, small, 6, 2),
    )
    both = stats.pair_counts(*of(slots), *of(slots), 6, 6)
    np.testing.assert_array_equal(both, oracle.pairs(slots, slots, 6, 6))
    np.testing.assert_array_equal(both, both.T)
    np.testing.assert_array_equal(np.diagonal(both), want.sum(axis=0))
    top = [stats.top_expert(*of(s), s.gate_NK) for s in (slots, small)]
    for got, s in zip(top, (slots, small), strict=True):
        np.testing.assert_array_equal(got, oracle.tops(s))
    want = np.zeros((6, 2), int)
    for a, b in zip(*map(oracle.tops, (slots, small)), strict=True):
        if a >= 0 and b >= 0:
            want[a, b] += 1
    np.testing.assert_array_equal(stats.top_pair_counts(*top, 6, 2), want)
    np.testing.assert_array_equal(
        stats.size_counts(*of(slots), 5, domain_N, 3),
        oracle.sizes(domain_N, slots, 3, 5),
    )


@FEW
@SEEDS
def test_counts_add_over_chunks_and_follow_renamed_experts(seed, n):
    rng, tokens, slots, small = made(seed, n)
    cut, name_E = int(rng.integers(0, n + 1)), rng.permutation(6)
    halves = slice(None, cut), slice(cut, None)

    def counted(rows, name=None):
        expert_NK = (
            slots.expert_NK[rows] if name is None else name[slots.expert_NK[rows]]
        )
        own = expert_NK, slots.keep_NK[rows]
        other = small.expert_NK[rows], small.keep_NK[rows]
        group_N = tokens.domain_N[rows]
        _, logit_NP, valid_NP = scores.pool(without_logits(slots), 3)
        return [
            stats.group_counts(group_N, 3, *own, 6).T,
            stats.pair_counts(*own, *other, 6, 2),
            scores.score_sums(
                *(*own[:1], slots.logit_NK[rows], own[1], group_N, 3, 6), positive=True
            ).T,
        ]

    whole = counted(slice(None))
    parts = zip(*map(counted, halves), strict=True)
    renamed = counted(slice(None), name_E)
    for total, (a, b), other in zip(whole, parts, renamed, strict=True):
        np.testing.assert_allclose(a + b, total, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(other[name_E], total, rtol=1e-12, atol=1e-12)


@FEW
@SEEDS
def test_overlap_of_two_choices(seed, n):
    rng, tokens, slots, _ = made(seed, n)
    other = oracle.random_slots(rng, n, oracle.INFOS[0])
    hots = [stats.multi_hot(*of(s), 6) for s in (slots, other)]
    sums = stats.overlap_sums(*hots, tokens.domain_N, 3)
    for got, one, two in (
        (stats.saturation(sums.sum(axis=0)[None])[0], slots, other),
        (stats.saturation(sums)[2], None, None),
    ):
        want = math.nan if one is None else oracle.overlap(one, two)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    same = stats.overlap_sums(hots[0], hots[0], tokens.domain_N, 3).sum(axis=0)
    assert same[0] == same[1]


@FEW
@SEEDS
def test_selection_scores(seed, n):
    _, tokens, full, _ = made(seed, n)
    tokens_G = np.bincount(tokens.domain_N, minlength=3)
    groups = tokens.domain_N, 3
    for slots in (full, without_logits(full)):
        for size in (None, 1, 2):
            picked = scores.pool(slots, size)
            sums_G = scores.threshold_sums(*picked[1:], *groups)
            limit_G = sums_G / np.maximum(tokens_G, 1)
            want = oracle.thresholds(slots, *groups, size)
            np.testing.assert_allclose(limit_G, want, rtol=1e-9)
            for options in ({}, {"threshold_G": limit_G, "positive": True}):
                sums = scores.score_sums(*picked, *groups, 6, **options)
                got = stats.specialisation(sums, tokens_G)
                want = oracle.selection_scores(
                    *(slots, *groups, 6, size),
                    options.get("threshold_G"),
                    options.get("positive", False),
                )
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@FEW
@SEEDS
def test_npmi_of_random_traces(seed, n):
    _, tokens, slots, _ = made(seed, n)
    token_N, hits = tokens.token_N, []
    markers_M = np.bincount(token_N, minlength=4)
    hits = stats.group_counts(token_N, 4, *of(slots), 6)
    got = scores.npmi(hits, markers_M, stats.load_counts(*of(slots), 6), n)
    for m in range(4):
        if markers_M[m]:
            want = oracle.npmi(token_N, slots, m, 6)
            np.testing.assert_allclose(got[m], want, rtol=1e-9, atol=1e-12)
        else:
            assert np.isnan(got[m]).all()
    assert np.nanmax(np.abs(got)) <= 1


# By hand.


def slots_of(rows, gates=None):
    """Slots from lists of experts; gates are 1, 0.9, ... unless given."""
    width = max(map(len, rows))
    keep_NK = np.array([[k < len(row) for k in range(width)] for row in rows])
    padded = [list(row) + [0] * (width - len(row)) for row in rows]
    gate_NK = np.tile(1 - 0.1 * np.arange(width), (len(rows), 1))
    if gates is not None:
        gate_NK = np.array(gates)
    return Slots(
        expert_NK=np.array(padded, np.int32),
        keep_NK=keep_NK,
        gate_NK=np.where(keep_NK, gate_NK, 0).astype(np.float32),
    )


SIX = slots_of([[0, 1], [0, 1], [0, 2], [3], [3, 2], [3, 2]])


def test_six_tokens_by_hand():
    """Domain 0 has the first three tokens; expert 4 is never chosen."""
    domain_N = np.array([0, 0, 0, 1, 1, 1])
    count = stats.group_counts(domain_N, 2, *of(SIX), 5)
    np.testing.assert_array_equal(count, [[3, 2, 1, 0, 0], [0, 0, 2, 3, 0]])
    got = stats.specialisation(count, [3, 3])
    np.testing.assert_allclose(got, [[1, 2 / 3, 1 / 3, 0, 0], [0, 0, 2 / 3, 1, 0]])
    assert stats.uniform_share(count, [3, 3]) == pytest.approx(11 / 6 / 5)
    np.testing.assert_allclose(stats.share(count, axis=0)[0], [1, 1, 1 / 3, 0, 0])
    pairs = stats.pair_counts(*of(SIX), *of(SIX), 5, 5)
    np.testing.assert_array_equal(pairs[0], [3, 2, 1, 0, 0])
    np.testing.assert_array_equal(pairs[2], [1, 0, 3, 2, 0])
    np.testing.assert_allclose(stats.coactivation(pairs)[0], [1, 2 / 3, 1 / 3, 0, 0])
    np.testing.assert_array_equal(stats.coactivation(pairs)[4], np.zeros(5))
    sizes = stats.size_counts(*of(SIX), 3, domain_N, 2)  # 3 and 4 compute nothing
    np.testing.assert_array_equal(sizes, [[0, 0, 3], [1, 2, 0]])
    figures = stats.size_figures(sizes.sum(axis=0))
    assert figures == pytest.approx({"mean": 8 / 6, "std": (20 / 36) ** 0.5})
    load = stats.load_figures(count.sum(axis=0))
    assert load["max_violation"] == pytest.approx(3 / 11 * 5 - 1)
    assert load["dead_frac"] == pytest.approx(1 / 5)


def test_even_and_empty_loads():
    even = stats.load_figures(np.full(4, 9))
    assert even == pytest.approx(
        {"max_violation": 0, "dead_frac": 0, "effective_frac": 1}
    )
    one = stats.load_figures(np.array([0, 7, 0, 0]))
    assert one == pytest.approx(
        {"max_violation": 3, "dead_frac": 0.75, "effective_frac": 0.25}
    )
    assert stats.load_figures(np.zeros(4))["max_violation"] == 0
    assert stats.size_figures(np.zeros(3)) == {"mean": 0, "std": 0}


def test_mutual_information_by_hand():
    assert stats.mutual_information([[5, 0], [0, 5]]) == pytest.approx(math.log(2))
    assert stats.mutual_information([[2, 4], [3, 6]]) == pytest.approx(0, abs=1e-12)
    assert stats.mutual_information(np.zeros((2, 2))) == 0
    want = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert stats.mutual_information([[2, 1], [0, 1]]) == pytest.approx(want)


def test_affinity_by_hand():
    """Tokens go 0 -> 0, 0 -> 0, 0 -> 1, 1 -> 1; experts 2 see none."""
    top_A, top_B = np.array([0, 0, 0, 1, -1]), np.array([0, 0, 1, 1, 2])
    count = stats.top_pair_counts(top_A, top_B, 3, 3)
    np.testing.assert_array_equal(count, [[2, 1, 0], [0, 1, 0], [0, 0, 0]])
    want = [[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(stats.affinity(count), want)
    figures = stats.predictability(count)
    assert (figures["given"], figures["blind"]) == (0.75, 0.5)
    assert stats.predictability(np.zeros((2, 2)))["given"] == 0


def test_the_top_expert_is_that_of_the_greatest_gate():
    slots = slots_of([[0, 1], [1, 0], [2]], gates=[[0.2, 0.8], [0.5, 0.5], [0.1, 9]])
    top_N = stats.top_expert(*of(slots), slots.gate_NK)
    np.testing.assert_array_equal(top_N, [1, 1, 2])


def test_rounds_that_repeat_an_expert():
    after = slots_of([[0], [2], [0], [3], [1], [2]])
    pairs = stats.pair_counts(*of(SIX), *of(after), 5, 5)
    load_E = stats.load_counts(*of(SIX), 5)
    assert stats.repeats(pairs, load_E) == pytest.approx(4 / 11)


def test_saturation_by_hand():
    other = slots_of([[1, 0], [0, 3], [4, 3], [3, 1], [0], [3, 2]])
    hots = [stats.multi_hot(*of(s), 5) for s in (SIX, other)]
    sums = stats.overlap_sums(*hots, np.array([0, 0, 0, 1, 1, 1]), 2)
    np.testing.assert_allclose(sums, [[1 + 0.5 + 0, 3], [0.5 + 0 + 1, 3]])
    np.testing.assert_allclose(stats.saturation(sums), [0.5, 0.5])


def test_buckets_of_positions():
    np.testing.assert_array_equal(
        stats.position_bucket([0, 1, 2, 3, 4, 7, 8, 1023, 1024]),
        [0, 1, 2, 2, 3, 3, 4, 10, 11],
    )
    labels = [stats.bucket_label(b) for b in range(4)]
    assert labels == ["0", "1", "2-3", "4-7"]


def test_vocabulary_by_hand():
    """Id 0 always goes to expert 0, id 1 to both in turn, id 2 has one expert 1."""
    count_VE, tokens_V = np.array([[4, 0, 0], [2, 2, 0], [0, 1, 0]]), [4, 4, 1]
    got = stats.vocabulary_figures(count_VE, tokens_V, 2)
    np.testing.assert_allclose(
        got["specialisation_E"], [(4 + 2 * 0.5) / 6, (2 * 0.5 + 1) / 3, np.nan]
    )
    np.testing.assert_array_equal(got["id_ER"], [[0, 1], [2, 1], [-1, -1]])
    np.testing.assert_allclose(got["share_ER"], [[1, 0.5], [1, 0.5], [0, 0]])
    np.testing.assert_array_equal(got["count_ER"], [[4, 2], [1, 2], [0, 0]])
    none = stats.vocabulary_figures(np.zeros((0, 3), int), np.zeros(0), 2)
    assert (none["id_ER"] == -1).all() and np.isnan(none["specialisation_E"]).all()


def test_tcess_and_peu_by_hand():
    """The worked example of PreMoe: one expert of a token, three tokens."""
    logits_NE = np.array([[3, 1, 2], [-1, -3, -2], [0, 5, 1]], np.float32)
    empty = np.zeros((3, 1), np.int32)
    slots = Slots(expert_NK=empty, keep_NK=empty == 0, logits_NE=logits_NE)
    picked = scores.pool(slots, 1)
    group_N = np.zeros(3, int)
    tcess = scores.score_sums(*picked, group_N, 1, 3) / 3
    np.testing.assert_allclose(tcess, [[2 / 3, 5 / 3, 0]])
    threshold_G = scores.threshold_sums(*picked[1:], group_N, 1) / 3
    assert threshold_G == 1
    peu = scores.score_sums(
        *picked, group_N, 1, 3, threshold_G=threshold_G, positive=True
    )
    np.testing.assert_allclose(peu / 3, [[1.0896, 1.6667, 0]], atol=5e-5)


def test_pools_that_cannot_be():
    full = oracle.random_slots(
        np.random.default_rng(0), 4, oracle.INFOS[0], logits=True
    )
    for slots, most in ((full, 6), (without_logits(full), 3)):
        scores.pool(slots, most)
        for size in (0, most + 1):
            with pytest.raises(ValueError, match=f"1 to {most} experts"):
                scores.pool(slots, size)


@pytest.mark.parametrize(
    ("hits", "markers", "load", "tokens", "want"),
    [
        (30, 30, 30, 100_000, 1),
        (3, 30, 10_000, 100_000, 0),
        (30, 30, 100_000, 100_000, 0),
        (15, 30, 200, 100_000, 0.62709),
        (1, 30, 1, 100_000, 0.70458),
        (0, 30, 50, 100_000, -1),
        (0, 30, 0, 100_000, -1),
        (7, 7, 7, 7, 1),
        (0, 0, 5, 7, math.nan),
    ],
)
def test_npmi_by_hand(hits, markers, load, tokens, want):
    got = scores.npmi([[hits]], [markers], [load], tokens)
    np.testing.assert_allclose(got, [[want]], atol=1e-5)
