"""Figures of random traces again from their definitions: means over tokens or slots.

The loops know tokens and their experts, not the counts that the figures are made of.

N tokens · E experts · G groups · V token ids · R rows · A, B experts of two routers
"""

import collections
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moex.analysis import output
from moex.analysis import statistics as stats
from moex.analysis.summary import analyse
from moex.analysis.trace import Trace
from tests.analysis import oracle

CHOICES, COMPUTING = 6, 5  # of the large routers of `oracle.INFOS`; the last is free
DOMAINS, IDS = 3, 4
EXPERTS = range(CHOICES)
SEEDS = hypothesis.given(seed=st.integers(0, 10**6), n=st.integers(0, 30))
FEW = hypothesis.settings(max_examples=25)


def made(seed, n):
    """(rng, tokens, slots by label)."""
    rng = np.random.default_rng(seed)
    return rng, *oracle.random_chunk(rng, n)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def of(slots):
    return slots.expert_NK, slots.keep_NK


def mean(values, empty=0.0):
    values = list(values)
    return sum(values) / len(values) if values else empty


# Definitions. A row is the experts of one token; a pair, what two routers gave a token.


def specialisation(group_N, rows, group, expert):
    """P(e | group): the share of its tokens that have the expert."""
    return mean(
        expert in row for g, row in zip(group_N, rows, strict=True) if g == group
    )


def by_token(group_N, rows, expert):
    """The mean of P(e | group) over the slots of an expert."""
    return mean(
        (
            specialisation(group_N, rows, g, expert)
            for g, row in zip(group_N, rows, strict=True)
            if expert in row
        ),
        empty=math.nan,
    )


def entropy(slots):
    """The mean surprise of a slot, which is a list of what they are slots of."""
    return mean(-math.log(mean(b == a for b in slots)) for a in slots)


def information(pairs):
    """The mean of log P(a, b) / P(a) P(b) over pairs."""
    return mean(
        math.log(
            mean(pair == (a, b) for pair in pairs)
            / mean(x == a for x, _ in pairs)
            / mean(y == b for _, y in pairs)
        )
        for a, b in pairs
    )


def best_guess(known, guessed):
    """Share of right guesses by who says what came most often with what is known."""
    seen = collections.defaultdict(collections.Counter)
    for a, b in zip(known, guessed, strict=True):
        seen[a][b] += 1
    says = {a: count.most_common(1)[0][0] for a, count in seen.items()}
    return mean(says[a] == b for a, b in zip(known, guessed, strict=True))


def repeated(rows, others):
    return mean(e in b for a, b in zip(rows, others, strict=True) for e in a)


def loads(rows, experts=EXPERTS):
    return [sum(e in row for row in rows) for e in experts]


def violation(rows, experts=EXPERTS):
    load = loads(rows, experts)
    return max(load) / (sum(load) / len(load)) - 1 if any(load) else 0.0


def size_figures(rows, computing):
    """Experts that compute: their mean, and the root of their mean square from it."""
    sizes = [sum(e < computing for e in row) for row in rows]
    middle = mean(sizes)
    return middle, math.sqrt(mean((size - middle) ** 2 for size in sizes))


def top_pairs(one, two):
    """Experts of greatest gate of the tokens that have experts in both."""
    pairs = zip(oracle.tops(one), oracle.tops(two), strict=True)
    return [pair for pair in pairs if min(pair) >= 0]


# Figures of counts.


@FEW
@SEEDS
def test_experts_of_groups(seed, n):
    _, tokens, layers = made(seed, n)
    slots, group_N = layers["001"], tokens.domain_N
    rows = oracle.experts(slots)
    count_GE = stats.group_counts(group_N, DOMAINS, *of(slots), CHOICES)
    tokens_G = np.bincount(group_N, minlength=DOMAINS)
    close(
        stats.specialisation(count_GE, tokens_G),
        [
            [specialisation(group_N, rows, g, e) for e in EXPERTS]
            for g in range(DOMAINS)
        ],
    )
    close(stats.uniform_share(count_GE, tokens_G), mean(map(len, rows)) / CHOICES)
    both = [(g, e) for g, row in zip(group_N, rows, strict=True) for e in row]
    for axis, alike in (
        (None, lambda g, e: both),
        (0, lambda g, e: [slot for slot in both if slot[1] == e]),
        (1, lambda g, e: [slot for slot in both if slot[0] == g]),
    ):
        want = [
            [mean(slot == (g, e) for slot in alike(g, e)) for e in EXPERTS]
            for g in range(DOMAINS)
        ]
        close(stats.share(count_GE, axis=axis), want)
    close(stats.mutual_information(count_GE), information(both))


@FEW
@SEEDS
def test_how_even_a_load_is(seed, n):
    rng, _, layers = made(seed, n)
    slots = layers["001"]
    # Often fewer than there are, so that some are dead in long traces too.
    alive = int(rng.integers(1, CHOICES + 1))
    keep_NK = slots.keep_NK & (slots.expert_NK < alive)
    rows = [[e for e in row if e < alive] for row in oracle.experts(slots)]
    load_E = stats.load_counts(slots.expert_NK, keep_NK, CHOICES)
    close(stats.entropy(load_E), entropy(sum(rows, [])))
    figures = stats.load_figures(load_E)
    close(figures["max_violation"], violation(rows))
    dead = mean(not any(e in row for row in rows) for e in EXPERTS)
    close(figures["dead_frac"], dead)
    close(figures["effective_frac"], math.exp(entropy(sum(rows, []))) / CHOICES)


@FEW
@SEEDS
def test_experts_of_a_token(seed, n):
    _, tokens, layers = made(seed, n)
    slots, group_N = layers["001"], tokens.domain_N
    rows = oracle.experts(slots)
    count_GK = stats.size_counts(*of(slots), COMPUTING, group_N, DOMAINS)
    for g, count_K in enumerate(count_GK):
        own = [row for h, row in zip(group_N, rows, strict=True) if h == g]
        figures = stats.size_figures(count_K)
        close([figures["mean"], figures["std"]], size_figures(own, COMPUTING))
    count_EE = stats.pair_counts(*of(slots), *of(slots), CHOICES, CHOICES)
    together = [
        [mean(j in row for row in rows if i in row) for j in EXPERTS] for i in EXPERTS
    ]
    close(stats.coactivation(count_EE), together)


@FEW
@SEEDS
def test_from_one_router_to_the_next(seed, n):
    _, _, layers = made(seed, n)
    slots, small = layers["001"], layers["004"]  # of 6 and 2 choices
    pairs = top_pairs(slots, small)
    tops = (stats.top_expert(*of(s), s.gate_NK) for s in (slots, small))
    count_AB = stats.top_pair_counts(*tops, CHOICES, 2)
    after = [
        [mean(b == j for a, b in pairs if a == i) for j in (0, 1)] for i in EXPERTS
    ]
    close(stats.affinity(count_AB), after)
    known, guessed = [a for a, _ in pairs], [b for _, b in pairs]
    figures = stats.predictability(count_AB)
    close(figures["given"], best_guess(known, guessed))
    close(figures["blind"], best_guess([0] * len(known), guessed))
    close(figures["information"], information(pairs))


@FEW
@SEEDS
def test_rounds_that_repeat_an_expert(seed, n):
    _, _, layers = made(seed, n)
    one, two = layers["003.1"], layers["003.2"]
    pair_EE = stats.pair_counts(*of(one), *of(two), CHOICES, CHOICES)
    load_E = stats.load_counts(*of(one), CHOICES)
    want = repeated(*map(oracle.experts, (one, two)))
    close(stats.repeats(pair_EE, load_E), want)


@FEW
@SEEDS
@pytest.mark.parametrize("R", [2, IDS + 1])
def test_token_ids_that_tell_the_experts(seed, n, R):
    _, tokens, layers = made(seed, n)
    slots, token_N = layers["001"], tokens.token_N
    rows = oracle.experts(slots)
    count_VE = stats.group_counts(token_N, IDS, *of(slots), CHOICES)
    tokens_V = np.bincount(token_N, minlength=IDS)
    got = stats.vocabulary_figures(count_VE, tokens_V, R)
    close(got["specialisation_E"], [by_token(token_N, rows, e) for e in EXPERTS])
    close(got["slots_E"], loads(rows))
    for e in EXPERTS:
        found = []
        for v in range(IDS):
            own = [row for u, row in zip(token_N, rows, strict=True) if u == v]
            share = specialisation(token_N, rows, v, e)
            found.append((-share, -sum(e in row for row in own), v))
        best = [row for row in sorted(found) if row[0]][:R]
        none = R - len(best)
        close(got["id_ER"][e], [v for *_, v in best] + [-1] * none)
        close(got["share_ER"][e], [-share for share, *_ in best] + [0] * none)
        close(got["count_ER"][e], [-count for _, count, _ in best] + [0] * none)


# Whole traces.


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_of_a_trace(seed, tmp_path):
    """What `moex analyse` prints, of 40 tokens, for every router."""
    _, tokens, layers = made(seed, 40)
    path = oracle.write(tmp_path / "trace.parquet", [(tokens, layers)])
    with Trace.open(path) as trace:
        found = output.figures(analyse(trace, min_count=1))
    after = {"001": "003.1", "003.1": "003.2", "003.2": "004"}
    assert list(found) == [*after, "004"]
    for info in oracle.INFOS:
        label, slots = info.label, layers[info.label]
        rows, experts = oracle.experts(slots), range(info.num_choices)
        middle, deviation = size_figures(rows, info.num_experts)
        domains = [
            (d, e) for d, row in zip(tokens.domain_N, rows, strict=True) for e in row
        ]
        flat, every = sum(rows, []), len(experts)
        want = {
            "experts_per_token": middle,
            "experts_per_token_std": deviation,
            "max_violation": violation(rows, experts),
            "dead_frac": mean(e not in flat for e in experts),
            "effective_frac": math.exp(entropy(flat)) / every,
            "uniform_share": len(flat) / len(rows) / every,
            "domain_specialisation": mean(
                specialisation(tokens.domain_N, rows, d, e) for d, e in domains
            ),
            "domain_information": information(domains),
            "vocabulary_specialisation": mean(
                specialisation(tokens.token_N, rows, v, e)
                for v, row in zip(tokens.token_N, rows, strict=True)
                for e in row
            ),
        }
        if label in after:
            pairs = top_pairs(slots, layers[after[label]])
            known, guessed = [a for a, _ in pairs], [b for _, b in pairs]
            want["next_given"] = best_guess(known, guessed)
            want["next_blind"] = best_guess([0] * len(known), guessed)
        if label == "003.1":
            others = oracle.experts(layers["003.2"])
            want["repeats"] = repeated(rows, others)
        assert found[label].keys() == want.keys()
        for name, value in want.items():
            assert found[label][name] == pytest.approx(value, abs=1e-12), name


# By hand.


def test_entropy_by_hand():
    """Halves and quarters have 1.5 bits; one that takes all, and none, have 0."""
    assert stats.entropy([2, 1, 0, 1]) == pytest.approx(1.5 * math.log(2))
    assert stats.entropy(np.full(8, 3)) == pytest.approx(3 * math.log(2))
    assert stats.entropy([0, 7]) == stats.entropy(np.zeros(3)) == 0


def test_repeats_by_hand():
    """Experts 0, 1 then 1, 2; 2 then 2; 1 then none: of four slots, two come again."""
    pair_EE = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 1]])
    assert stats.repeats(pair_EE, [1, 2, 1]) == 0.5
    assert stats.repeats(np.zeros((3, 3)), np.zeros(3)) == 0
