"""Traces of random numbers, and every statistic again, by loops over tokens.

N tokens · K slots · E experts
"""

import collections
import math

import numpy as np

from moex.analysis.markers import Marker
from moex.analysis.sums import LayerSums, Sums
from moex.analysis.trace import Header, LayerInfo, Slots, Tokens
from moex.analysis.writer import TraceWriter

VOCABULARY = ("a", "b", "<think>", " c", "d", "")
DOMAINS = ("text", "code", "empty")


def info(layer=1, chain_round=0, experts=5, zero=1, slots=3, **fields):
    return LayerInfo(
        layer=layer,
        round=chain_round,
        num_experts=experts,
        num_choices=experts + zero,
        slots=slots,
        router="TopP",
        **fields,
    )


INFOS = (info(1), info(3, 1), info(3, 2), info(4, experts=2, zero=0, slots=2))


def random_tokens(rng, n) -> Tokens:
    columns = {
        "example": np.arange(n) // 7,
        "position": rng.integers(0, 9, n),
        "document": np.arange(n) // 3,
        "token": rng.integers(0, 4, n),
        "domain": rng.integers(0, 2, n),
    }
    return Tokens(**{f"{k}_N": v.astype(np.int32) for k, v in columns.items()})


def random_slots(rng, n, of: LayerInfo, *, logits=False) -> Slots:
    """Any number of experts for each token, in falling order of logits; often none."""
    logits_NE = rng.normal(size=(n, of.num_choices)).astype(np.float32)
    order_NK = np.argsort(-logits_NE, axis=1)[:, : of.slots]
    keep_NK = np.arange(of.slots) < rng.integers(0, of.slots + 1, n)[:, None]
    logit_NK = np.take_along_axis(logits_NE, order_NK, axis=1)
    gate_NK = rng.random(order_NK.shape).astype(np.float32)
    return Slots(
        expert_NK=np.where(keep_NK, order_NK, 0).astype(np.int32),
        keep_NK=keep_NK,
        gate_NK=np.where(keep_NK, gate_NK, 0),
        logit_NK=np.where(keep_NK, logit_NK, 0),
        prob_NK=np.where(keep_NK, gate_NK / 2, 0),
        logits_NE=logits_NE if logits else None,
    )


def header(**fields) -> Header:
    defaults = {
        "run": "runs/x",
        "step": 7,
        "layers": INFOS,
        "tokenizer": {"doc_id": 0},
        "vocabulary": VOCABULARY,
        "domains": DOMAINS,
        "data": {},
    }
    return Header(**defaults | fields)


def write(path, chunks, **fields):
    """A trace of `(tokens, {label: slots})`."""
    with TraceWriter(path, header(**fields)) as writer:
        for chunk in chunks:
            writer.write(*chunk)
    return path


def random_chunk(rng, n, *, logits=False):
    layers = {i.label: random_slots(rng, n, i, logits=logits) for i in INFOS}
    return random_tokens(rng, n), layers


# Sums.

SUMMED = {"001": 4, "002.1": 6, "002.2": 6}


def layer_sums(label: str, after: int | None, rng, *, whole=True) -> LayerSums:
    """Random sums of 50 tokens, for a layer of width 3 and two markers."""
    number, _, chain_round = label.partition(".")
    E = SUMMED[label]
    info = LayerInfo(
        layer=int(number),
        round=int(chain_round or 0),
        num_experts=4,
        num_choices=E,
        slots=2,
        router="TopK",
    )
    floats = ("gate_E", "norm_E", "gate_norm_E", "logit_E", "tcess_E", "peu_E")
    own: dict = {name: rng.normal(size=E) for name in floats}
    if whole:
        own |= {
            "gram_EE": rng.normal(size=(E, E)),
            "output_ED": rng.normal(size=(E, 3)),
        }
        if after is not None:
            own["transitions_AB"] = rng.integers(0, 9, (E, after))
    return LayerSums(
        info=info,
        tokens=50,
        count_E=rng.integers(0, 50, E),
        marker_count_RE=rng.integers(0, 9, (2, E)),
        marker_total_R=np.array([9, 10]),
        threshold=0.75,
        **own,
    )


def random_sums(seed=0) -> Sums:
    rng = np.random.default_rng(seed)
    following = dict(zip(SUMMED, [6, 6, None], strict=True))

    def every(**options):
        return {n: layer_sums(n, k, rng, **options) for n, k in following.items()}

    return Sums(
        run="runs/a",
        step=7,
        digest=None,
        base="abc",
        data={"seq_len": 8},
        domains=("web", "code/*.py"),
        markers=(Marker("<think>"), Marker("<think>", "</think>")),
        pool=None,
        layers=every(),
        by_domain={name: every(whole=False) for name in ("web", "code/*.py")},
    )


# One list of (expert, gate, logit) for each token; what follows is plain loops.


def lists(slots: Slots) -> list[list[tuple]]:
    return [
        [
            (
                int(slots.expert_NK[n, k]),
                slots.gate_NK[n, k],
                float(slots.logit_NK[n, k]),
            )
            for k in range(slots.expert_NK.shape[1])
            if slots.keep_NK[n, k]
        ]
        for n in range(len(slots.expert_NK))
    ]


def experts(slots: Slots) -> list[list[int]]:
    return [[e for e, _, _ in row] for row in lists(slots)]


def grouped(group_N, slots, groups, num_experts):
    count = np.zeros((groups, num_experts), int)
    for g, row in zip(group_N, experts(slots), strict=True):
        for e in row:
            count[g, e] += 1
    return count


def pairs(one, two, num_a, num_b):
    count = np.zeros((num_a, num_b), int)
    for row, other in zip(experts(one), experts(two), strict=True):
        for a in row:
            for b in other:
                count[a, b] += 1
    return count


def tops(slots):
    return [
        max(row, key=lambda slot: slot[1])[0] if row else -1 for row in lists(slots)
    ]


def sizes(group_N, slots, groups, num_experts):
    count = np.zeros((groups, slots.expert_NK.shape[1] + 1), int)
    for g, row in zip(group_N, experts(slots), strict=True):
        count[g, sum(e < num_experts for e in row)] += 1
    return count


def overlap(one, two):
    """Mean of |A & B| / max(|A|, |B|) over tokens with an expert in one of both."""
    ratios = []
    for row, other in zip(experts(one), experts(two), strict=True):
        if row or other:
            most = max(len(row), len(other))
            ratios.append(len(set(row) & set(other)) / most)
    return sum(ratios) / len(ratios) if ratios else math.nan


def selection_scores(slots, group_N, groups, num_experts, size, threshold, positive):
    """TCESS or PEU, token by token; a pool is the `size` largest logits."""
    total, tokens = np.zeros((groups, num_experts)), collections.Counter()
    for n, g in enumerate(group_N):
        tokens[g] += 1
        picked = pool_of(slots, n, size)
        norm = sum(math.exp(logit) for _, logit in picked)
        for e, logit in picked:
            if threshold is not None and math.exp(logit) / norm < threshold[g] - 1e-12:
                continue
            score = max(logit, 1 / (1 + math.exp(-logit))) if positive else logit
            total[g, e] += score
    return np.array([total[g] / max(tokens[g], 1) for g in range(groups)])


def pool_of(slots, n, size):
    if slots.logits_NE is not None:
        candidates = [(e, float(v)) for e, v in enumerate(slots.logits_NE[n])]
        size = int(slots.keep_NK[n].sum()) if size is None else size
    else:
        candidates = [(e, logit) for e, _, logit in lists(slots)[n]]
    return sorted(candidates, key=lambda c: -c[1])[:size]


def thresholds(slots, group_N, groups, size):
    tops_G = collections.defaultdict(list)
    for n, g in enumerate(group_N):
        picked = [math.exp(v) for _, v in pool_of(slots, n, size)]
        tops_G[g].append(max(picked) / sum(picked) if picked else 0.0)
    return [sum(tops_G[g]) / max(len(tops_G[g]), 1) for g in range(groups)]


def npmi(token_N, slots, marker, num_experts):
    """From probabilities, base 2, as the paper writes it."""
    T, rows = len(token_N), experts(slots)
    M = sum(t == marker for t in token_N)
    out = []
    for e in range(num_experts):
        K = sum(e in row for row in rows)
        k = sum(e in row for t, row in zip(token_N, rows, strict=True) if t == marker)
        if k == 0:
            out.append(-1.0)
        elif k == T:
            out.append(1.0)
        else:
            out.append((math.log2(k / M) + math.log2(T / K)) / math.log2(T / k))
    return out
