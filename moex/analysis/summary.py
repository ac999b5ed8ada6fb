"""Everything that a trace tells, in one go: `analyse`, and `compare` for two traces.

N tokens · E experts (zero-computation ones included) · D domains · P buckets of
positions · V token ids · R ids shown for an expert · K slots per token · M markers ·
A, B experts of two layers or rounds
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from moex.analysis import scores
from moex.analysis import statistics as stats
from moex.analysis.header import LayerInfo
from moex.analysis.markers import token_ids
from moex.analysis.trace import Chunk, Slots, Tokens, Trace
from moex.config.base import ConfigError

MOST_IDS = 8192  # most frequent token ids, whose experts are counted one by one
BUCKETS = 33  # buckets of positions, enough for 32 bits


@dataclasses.dataclass(kw_only=True)
class LayerAnalysis:
    """One router; int64 counts of kept slots unless it says otherwise."""

    info: LayerInfo  # which one
    load_E: np.ndarray  # slots of each expert
    gate_E: np.ndarray  # float64, their summed gates
    # domain_DE, position_PE: slots of each expert from each domain, each bucket of
    # positions.
    domain_DE: np.ndarray
    position_PE: np.ndarray
    # [D, K + 1] tokens of a domain that use 0, 1, ... experts that compute.
    size_DK: np.ndarray
    # Tokens that two experts have in common; the diagonal is the load.
    coactivation_EE: np.ndarray
    # vocabulary_E, id_ER, share_ER, count_ER: specialisation_E and so on of
    # `statistics.vocabulary_figures`; ids are token ids, of the `Analysis.num_ids` that
    # were counted.
    vocabulary_E: np.ndarray
    count_E: np.ndarray  # slots of tokens with these ids
    id_ER: np.ndarray
    share_ER: np.ndarray
    count_ER: np.ndarray
    # tcess_DE, peu_DE, threshold_D: from `scores.score_sums` per token, with domains as
    # tasks, and the adaptive threshold of PEU.
    tcess_DE: np.ndarray
    peu_DE: np.ndarray
    threshold_D: np.ndarray
    hits_ME: np.ndarray  # tokens that are a marker and have the expert
    npmi_ME: np.ndarray  # float64, of `scores.npmi`


@dataclasses.dataclass(kw_only=True)
class Step:
    """The step from one router to the next one in the model; int64 counts of tokens."""

    # source, target: their labels.
    source: str
    target: str
    kind: str  # "round" inside a chain, else "layer"
    top_AB: np.ndarray  # tokens by their experts of greatest gate
    pairs_AB: np.ndarray  # tokens that have expert a there and b here, of all slots


@dataclasses.dataclass(kw_only=True)
class Analysis:
    """The result of `analyse`."""

    # run, step: the run and the step that were traced.
    run: str
    step: int
    num_tokens: int  # N
    domains: tuple[str, ...]  # names of the D domains
    # tokens_D, tokens_P, tokens_V: int64, tokens of each domain, bucket of positions,
    # token id.
    tokens_D: np.ndarray
    tokens_P: np.ndarray
    tokens_V: np.ndarray
    positions: tuple[str, ...]  # the P buckets for people, such as "4-7"
    # The markers as they were given; marker_ids: their token ids.
    markers: tuple[str, ...]
    marker_ids: np.ndarray
    num_ids: int  # how many token ids were counted one by one
    vocabulary: tuple[str, ...]  # the text of each token id; empty without ids
    layers: dict[str, LayerAnalysis]  # by label, in the order of the model
    steps: list[Step]  # between routers that follow each other


def analyse(
    trace: Trace,
    *,
    markers: Sequence[str] = (),
    pool: int | None = None,
    min_count: int = 10,
    rows: int = 10,
) -> Analysis:
    """Compute every statistic of a trace, in two passes and in bounded memory.

    Args:
      markers: tokens, as the vocabulary writes them, for the nPMI of experts.
      pool: experts of a token that TCESS and PEU look at, see `scores.pool`; None: as
        many as were chosen.
      min_count: token ids with fewer occurrences are not shown with experts.
      rows: R, ids to show for an expert.

    Raises:
      ConfigError: for an empty trace, a marker that is no token or does not occur, or
        a pool that the trace cannot give.
    """
    if trace.num_tokens == 0:
        raise ConfigError(f"{trace.path}: the trace has no tokens.")
    marker_ids = token_ids(markers, trace.vocabulary, trace.path)
    _check_pool(trace, pool)
    _check_room(trace, len(markers))
    first = _FirstPass(trace, pool)
    for marker, i in zip(markers, marker_ids, strict=True):
        if first.tokens_V[i] == 0:
            raise ConfigError(f"{marker!r}: does not occur in {trace.path}.")
    ids = np.argsort(-first.tokens_V, kind="stable")[:MOST_IDS]
    ids = ids[first.tokens_V[ids] >= min_count]
    if not trace.vocabulary:
        ids = ids[:0]
    sums = {
        label: _LayerSums(info, len(trace.domains), len(ids), len(markers))
        for label, info in trace.layers.items()
    }
    steps = _steps(trace.layers)
    row_V = np.full(len(first.tokens_V), -1, np.int32)
    row_V[ids] = np.arange(len(ids))
    wide = trace.header.logits
    for chunk in trace.chunks(values=("gate", "logit"), logits=wide):
        tops = {}
        for label, slots in chunk.layers.items():
            own = sums[label]
            own.add(chunk.tokens, slots, row_V, marker_ids)
            own.add_scores(chunk.tokens, slots, pool, first.threshold_D[label])
            tops[label] = stats.top_expert(
                slots.expert_NK, slots.keep_NK, slots.gate_NK
            )
        for step in steps:
            a, b = step.source, step.target
            shape = step.top_AB.shape
            step.top_AB += stats.top_pair_counts(tops[a], tops[b], *shape)
            step.pairs_AB += _pairs(chunk.layers[a], chunk.layers[b], shape)
    num_buckets = int(np.flatnonzero(first.tokens_P)[-1]) + 1
    markers_M = first.tokens_V[marker_ids]
    layers = {
        label: own.finish(first, label, num_buckets, ids, rows, markers_M)
        for label, own in sums.items()
    }
    return Analysis(
        run=trace.header.run,
        step=trace.header.step,
        num_tokens=trace.num_tokens,
        domains=trace.domains,
        tokens_D=first.tokens_D,
        tokens_P=first.tokens_P[:num_buckets],
        tokens_V=first.tokens_V,
        positions=tuple(map(stats.bucket_label, range(num_buckets))),
        markers=tuple(markers),
        marker_ids=marker_ids,
        num_ids=len(ids),
        vocabulary=trace.vocabulary,
        layers=layers,
        steps=steps,
    )


def _check_pool(trace: Trace, pool: int | None) -> None:
    for label, info in trace.layers.items():
        most = info.num_choices if trace.header.logits else info.slots
        if pool is not None and not 1 <= pool <= most:
            raise ConfigError(
                f"pool = {pool}: layer {label} allows 1 to {most} in {trace.path}; "
                "a trace with the logits of all experts (--logits) allows all."
            )


MOST_COUNTS = 2**33  # numbers of 8 bytes that an analysis may keep: 64 GiB


def _check_room(trace: Trace, markers: int) -> None:
    """Check that the counts of a trace fit into memory, before any is made."""
    groups = 4 * len(trace.domains) + BUCKETS + MOST_IDS // 2 + markers
    sizes = [info.num_choices for info in trace.layers.values()]
    pairs = [2 * a * b for a, b in itertools.pairwise(sizes)]
    counts = sum(pairs) + sum(E * (E + groups) for E in sizes)
    if counts > MOST_COUNTS:
        raise ConfigError(
            f"{trace.path}: {len(trace.domains):,} domains and routers of up to "
            f"{max(sizes):,} experts: counting needs {counts * 8 / 2**30:,.0f} GiB, "
            f"and at most {MOST_COUNTS * 8 / 2**30:.0f} are allowed."
        )


def _steps(layers: dict[str, LayerInfo]) -> list[Step]:
    steps = []
    for a, b in itertools.pairwise(layers.values()):
        kind = "round" if a.layer == b.layer else "layer"
        top_AB, pairs_AB = np.zeros((2, a.num_choices, b.num_choices), np.int64)
        about = {"source": a.label, "target": b.label, "kind": kind}
        steps.append(Step(**about, top_AB=top_AB, pairs_AB=pairs_AB))
    return steps


def _pairs(a: Slots, b: Slots, shape) -> np.ndarray:
    return stats.pair_counts(a.expert_NK, a.keep_NK, b.expert_NK, b.keep_NK, *shape)


class _FirstPass:
    """Sums that the second pass needs: tokens of each kind, thresholds of PEU."""

    def __init__(self, trace: Trace, pool: int | None):
        domains = len(trace.domains)
        self.tokens_D = np.zeros(domains, np.int64)
        self.tokens_P = np.zeros(BUCKETS, np.int64)
        self.tokens_V = np.zeros(max(len(trace.vocabulary), 1), np.int64)
        sums = {label: np.zeros(domains) for label in trace.layers}
        for chunk in trace.chunks(values=("logit",), logits=trace.header.logits):
            tokens = chunk.tokens
            self.tokens_D += np.bincount(tokens.domain_N, minlength=domains)
            bucket_N = stats.position_bucket(tokens.position_N)
            self.tokens_P += np.bincount(bucket_N, minlength=BUCKETS)
            self.tokens_V += np.bincount(tokens.token_N, minlength=len(self.tokens_V))
            for label, slots in chunk.layers.items():
                _, logit_NP, valid_NP = scores.pool(slots, pool)
                sums[label] += scores.threshold_sums(
                    logit_NP, valid_NP, tokens.domain_N, domains
                )
        count_D = np.maximum(self.tokens_D, 1)
        self.threshold_D = {label: total / count_D for label, total in sums.items()}


class _LayerSums:
    """The counts of one router, added up over chunks."""

    def __init__(self, info: LayerInfo, domains: int, ids: int, markers: int):
        E = info.num_choices
        self.info = info
        self.gate_E = np.zeros(E)
        self.domain_DE = np.zeros((domains, E), np.int64)
        self.position_PE = np.zeros((BUCKETS, E), np.int64)
        self.size_DK = np.zeros((domains, info.slots + 1), np.int64)
        self.coactivation_EE = np.zeros((E, E), np.int64)
        self.token_VE = np.zeros((ids, E), np.int32)
        self.hits_ME = np.zeros((markers, E), np.int64)
        self.tcess_DE, self.peu_DE = np.zeros((2, domains, E))

    def add(self, tokens: Tokens, slots: Slots, row_V, marker_ids) -> None:
        """Count one chunk."""
        E, expert_NK, keep_NK = self.info.num_choices, slots.expert_NK, slots.keep_NK
        assert slots.gate_NK is not None
        gate = slots.gate_NK[keep_NK]
        self.gate_E += np.bincount(expert_NK[keep_NK], gate, minlength=E)
        domain_N, D = tokens.domain_N, len(self.domain_DE)
        self.domain_DE += stats.group_counts(domain_N, D, expert_NK, keep_NK, E)
        bucket_N = stats.position_bucket(tokens.position_N)
        self.position_PE += stats.group_counts(bucket_N, BUCKETS, expert_NK, keep_NK, E)
        self.size_DK += stats.size_counts(
            expert_NK, keep_NK, self.info.num_experts, domain_N, D
        )
        row_N = row_V[tokens.token_N]
        counted_NK = keep_NK & (row_N >= 0)[:, None]
        V = len(self.token_VE)
        self.token_VE += stats.group_counts(row_N, V, expert_NK, counted_NK, E)
        for m, i in enumerate(marker_ids):
            at = tokens.token_N == i
            self.hits_ME[m] += stats.load_counts(expert_NK[at], keep_NK[at], E)
        self.coactivation_EE += _pairs(slots, slots, (E, E))

    def add_scores(self, tokens: Tokens, slots: Slots, pool, threshold_D) -> None:
        """Add TCESS, without a threshold, and PEU."""
        groups = (tokens.domain_N, *self.tcess_DE.shape)
        picked = scores.pool(slots, pool)
        self.tcess_DE += scores.score_sums(*picked, *groups)
        self.peu_DE += scores.score_sums(
            *picked, *groups, threshold_G=threshold_D, positive=True
        )

    def finish(self, first: _FirstPass, label, num_buckets, ids, rows, markers_M):
        """The figures, once all chunks are counted."""
        load_E = self.domain_DE.sum(axis=0)
        vocabulary = stats.vocabulary_figures(self.token_VE, first.tokens_V[ids], rows)
        tokens = int(first.tokens_D.sum())
        return LayerAnalysis(
            info=self.info,
            load_E=load_E,
            gate_E=self.gate_E,
            domain_DE=self.domain_DE,
            position_PE=self.position_PE[:num_buckets],
            size_DK=self.size_DK,
            coactivation_EE=self.coactivation_EE,
            vocabulary_E=vocabulary["specialisation_E"],
            count_E=vocabulary["slots_E"],
            id_ER=np.append(ids, -1)[vocabulary["id_ER"]],  # -1 stays -1
            share_ER=vocabulary["share_ER"],
            count_ER=vocabulary["count_ER"],
            tcess_DE=stats.specialisation(self.tcess_DE, first.tokens_D),
            peu_DE=stats.specialisation(self.peu_DE, first.tokens_D),
            threshold_D=first.threshold_D[label],
            hits_ME=self.hits_ME,
            npmi_ME=scores.npmi(self.hits_ME, markers_M, load_E, tokens),
        )


def compare(trace: Trace, other: Trace) -> dict[str, np.ndarray]:
    """How far two models route the same data alike: {label: float64[D, 2]}.

    The values are the sums of `statistics.overlap_sums` for each domain, which
    `statistics.saturation` takes: for two checkpoints of a run, how far routing has
    settled. Add the domains for the whole layer.

    Raises:
      ConfigError: if the traces differ in their routers or in their data.
    """
    theirs = other.layers
    for label, info in trace.layers.items():
        if label not in theirs or theirs[label].num_choices != info.num_choices:
            raise ConfigError(
                f"{trace.path} and {other.path}: routers of other models; layer "
                f"{label} has {info.num_choices} experts in one of them only."
            )
    if set(theirs) != set(trace.layers) or trace.domains != other.domains:
        raise ConfigError(
            f"{trace.path} and {other.path}: other layers or domains; trace two "
            "checkpoints of one model on the same data."
        )
    domains = len(trace.domains)
    sums = {label: np.zeros((domains, 2)) for label in trace.layers}
    data = [t.header.data.get("config") for t in (trace, other)]
    if not trace.vocabulary and data[0] != data[1]:
        raise ConfigError(
            f"{trace.path} and {other.path}: traces of other data; their config.data "
            "differ."
        )
    if trace.num_tokens != other.num_tokens:
        raise ConfigError(
            f"{trace.path} has {trace.num_tokens:,} tokens and {other.path} "
            f"{other.num_tokens:,}; trace the same data twice."
        )
    done = 0
    for a, b in zip(trace.chunks(values=()), other.chunks(values=()), strict=True):
        _check_same(a, b, done, trace, other)
        done += len(a.tokens)
        for label, info in trace.layers.items():
            here_NE, there_NE = (
                stats.multi_hot(s.expert_NK, s.keep_NK, info.num_choices)
                for s in (a.layers[label], b.layers[label])
            )
            domain_N = a.tokens.domain_N
            sums[label] += stats.overlap_sums(here_NE, there_NE, domain_N, domains)
    return sums


def _check_same(a: Chunk, b: Chunk, done: int, trace: Trace, other: Trace) -> None:
    for field in dataclasses.fields(Tokens):
        one, two = (getattr(chunk.tokens, field.name) for chunk in (a, b))
        differs = np.flatnonzero(one != two)
        if len(differs):
            raise ConfigError(
                f"{trace.path} and {other.path}: traces of other data; the first "
                f"difference is the {field.name.removesuffix('_N')} of token "
                f"{done + differs[0]:,}."
            )
