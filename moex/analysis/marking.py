"""Counts of experts at markers, and the steering that follows from them.

N tokens · E experts (zero-computation ones included) · R markers
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moex.analysis import scores
from moex.analysis import statistics as stats
from moex.analysis.header import LayerInfo
from moex.analysis.markers import Marker, MarkerFinder
from moex.analysis.sums import LayerSums, Sums
from moex.analysis.trace import Chunk, Trace
from moex.config.base import ConfigError, nearest
from moex.model.steering import LayerSteering, Steering

# The share of a marker's positions that an expert must have, where its weight is above
# 0: at one token in each text luck decides much, and in a span little.
SUPPORT = {"token": 0.5, "span": 0.1}


@dataclasses.dataclass(kw_only=True)
class Counts:
    """The counts of one layer; those of the rounds of a chain are added up."""

    tokens: int  # N that count, once for each round
    load_E: np.ndarray  # int64, tokens that have each expert
    hits_RE: np.ndarray  # int64, those of them at each marker
    total_R: np.ndarray  # int64, positions of each marker, once for each round

    def add(self, other: "Counts") -> None:
        """Add the counts of another text, or of another round."""
        for f in dataclasses.fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


def read_counts(
    path, markers: Sequence[Marker], start: str | None
) -> dict[int, Counts]:
    """The counts of each layer, by its number, from a trace or from sums (.npz).

    Args:
      path: the file.
      markers: tokens and spans; sums have those that were recorded.
      start: as for `MarkerFinder`; for traces.

    Raises:
      ConfigError: if it is neither, or does not have these markers.
    """
    if str(path).endswith(".npz"):
        return _recorded(Sums.read(path), path, markers, start)
    with Trace.open(path) as trace:
        finder = MarkerFinder(markers, trace.vocabulary, path, start)
        found = count_chunks(trace.layers.values(), trace.chunks(values=()), finder)
    if not any(own.tokens for own in found.values()):
        missing = "no tokens" if start is None else f"no token {start!r}"
        raise ConfigError(f"{path}: the trace has {missing}.")
    return found


def _recorded(sums: Sums, path, markers, start) -> dict[int, Counts]:
    if start is not None:
        raise ConfigError(f"{path}: sums count all tokens; --from is for traces.")
    known = [str(marker) for marker in sums.markers]
    for marker in map(str, markers):
        if marker not in known:
            raise ConfigError(
                f"{path}: the sums do not count {marker!r}.{nearest(marker, known)} "
                "`moex trace --sums --marker` says which markers are counted."
            )
    rows = [known.index(str(marker)) for marker in markers]
    found = count_sums(sums.layers)
    for own in found.values():
        own.hits_RE, own.total_R = own.hits_RE[rows], own.total_R[rows]
    return found


def count_chunks(
    infos: Iterable[LayerInfo], chunks: Iterable[Chunk], finder: MarkerFinder
) -> dict[int, Counts]:
    """The counts of each layer, by its number, in the chunks of a trace."""
    found: dict[int, Counts] = {}
    infos = list(infos)
    for chunk in chunks:
        mark_RN, counted_N = finder(chunk.tokens.token_N, chunk.tokens.document_N)
        for info in infos:
            slots = chunk.layers[info.label]
            E = info.num_choices

            def load(at_N, slots=slots, E=E):
                return stats.load_counts(slots.expert_NK[at_N], slots.keep_NK[at_N], E)

            _add(
                found,
                info.layer,
                Counts(
                    tokens=int(counted_N.sum()),
                    load_E=load(counted_N),
                    hits_RE=np.array([load(m) for m in mark_RN]).reshape(-1, E),
                    total_R=mark_RN.sum(axis=1),
                ),
            )
    return found


def count_sums(layers: Mapping[str, LayerSums]) -> dict[int, Counts]:
    """The same from sums, which have counts of all tokens."""
    found: dict[int, Counts] = {}
    for own in layers.values():
        counts = Counts(
            tokens=own.tokens,
            load_E=own.count_E,
            hits_RE=own.marker_count_RE,
            total_R=own.marker_total_R,
        )
        _add(found, own.layer, counts)
    return found


def _add(found: dict[int, Counts], layer: int, counts: Counts) -> None:
    if layer in found:
        found[layer].add(counts)
    else:
        found[layer] = counts


def marker_scores(
    counts: Mapping[int, Counts],
    markers: Sequence[Marker],
    weights: Sequence[float],
    support: float | None = None,
) -> dict[int, np.ndarray]:
    """`scores.combined_npmi` of each layer: float64[E] by its number.

    Args:
      markers: those that were counted.
      weights: the weight of each.
      support: of a marker with a weight above 0; None: `SUPPORT` of its kind.

    Raises:
      ConfigError: for a marker that does not occur.
    """
    for r, marker in enumerate(markers):
        if not all(own.total_R[r] for own in counts.values()):
            raise ConfigError(f"{str(marker)!r}: does not occur in the text.")
    kinds = ["token" if marker.end is None else "span" for marker in markers]
    return {
        layer: scores.combined_npmi(
            own.hits_RE,
            own.total_R,
            own.load_E,
            own.tokens,
            weight_M=weights,
            support_M=[SUPPORT[k] if support is None else support for k in kinds],
        )
        for layer, own in counts.items()
    }


def risk_scores(
    counts: Mapping[int, Counts], other: Mapping[int, Counts]
) -> dict[int, np.ndarray]:
    """`scores.risk_difference` of each layer of two texts: float64[E] by its number.

    Raises:
      ConfigError: if their models differ.
    """
    sizes = [
        {layer: len(own.load_E) for layer, own in c.items()} for c in (counts, other)
    ]
    if sizes[0] != sizes[1]:
        raise ConfigError("the two texts were read by models of other experts.")
    return {
        layer: scores.risk_difference(own.load_E, own.tokens, *_rate(other[layer]))
        for layer, own in counts.items()
    }


def _rate(counts: Counts) -> tuple[np.ndarray, int]:
    return counts.load_E, counts.tokens


def scaled(score: Mapping[int, np.ndarray], top: int, factor: float) -> Steering:
    """The steering that multiplies the gates of the `top` experts of highest score."""
    chosen = scores.best(score, top)
    return Steering(
        layers=tuple(
            LayerSteering(
                layer=layer,
                experts=len(score_E),
                scale={one.expert: factor for one in chosen if one.layer == layer},
            )
            for layer, score_E in score.items()
            if any(one.layer == layer for one in chosen)
        )
    )


def switched(score: Mapping[int, np.ndarray], top: int) -> Steering:
    """The steering that forces experts of positive score and bans those of negative.

    They are the `top` experts of greatest absolute score, as SteerMoE chooses them. A
    score of 0 says nothing.
    """
    size = {layer: np.abs(score_E) for layer, score_E in score.items()}
    found: dict[int, tuple[list[int], list[int]]] = {}
    for one in scores.best(size, top):
        if one.score == 0:
            continue
        force, ban = found.setdefault(one.layer, ([], []))
        (force if score[one.layer][one.expert] > 0 else ban).append(one.expert)
    return Steering(
        layers=tuple(
            LayerSteering(
                layer=layer,
                experts=len(score[layer]),
                force=tuple(force),
                ban=tuple(ban),
            )
            for layer, (force, ban) in sorted(found.items())
        )
    )
