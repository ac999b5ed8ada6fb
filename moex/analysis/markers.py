"""Markers: the positions of a text at which a token stands, or of a span of tokens.

N tokens · R markers
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moex.config.base import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Marker:
    """A token, or all positions strictly between two tokens.

    A span that is not closed goes on to the end of its document.
    """

    begin: str  # the text of a token, as the vocabulary writes it
    end: str | None = None  # the token that ends the span; None: no span

    def __str__(self) -> str:
        return self.begin if self.end is None else f"{self.begin} ... {self.end}"


def token_ids(texts: Sequence[str], vocabulary: Sequence[str], where) -> np.ndarray:
    """int64[R] token ids of texts that are one token each; '#12' is the token 12.

    Args:
      vocabulary: the text of each token id; empty where tokens have no text.
      where: names the file of the tokens in errors.

    Raises:
      ConfigError: for another text.
    """
    if texts and not vocabulary:
        raise ConfigError(f"{texts[0]!r}: the tokens of {where} have no text.")
    index = {piece: i for i, piece in reversed(list(enumerate(vocabulary)))}
    numbers = {f"#{i}": i for i in range(len(vocabulary))}
    known = {piece: i for piece, i in index.items() if piece}
    for text in texts:
        if text not in known and text not in numbers:
            raise ConfigError(
                f"{text!r}: not one token of the vocabulary of {where}."
                f"{nearest(text, known)} Of a text of several tokens give the first; "
                "'#12' is the token with id 12."
            )
    return np.array([known.get(t, numbers.get(t)) for t in texts], np.int64)


class MarkerFinder:
    """Finds markers in the tokens of a text that comes in pieces.

    Args:
      markers: the markers.
      vocabulary, where: as for `token_ids`.
      start: the text of a token: what stands before the first of them in a document is
        its prompt, and does not count; None: all tokens count.

    Raises:
      ConfigError: for a marker that is no token.
    """

    def __init__(
        self,
        markers: Sequence[Marker],
        vocabulary: Sequence[str],
        where,
        start: str | None = None,
    ):
        self.markers = tuple(markers)
        begins = [marker.begin for marker in markers]
        self._begin_R = token_ids(begins, vocabulary, where)
        ends = [m.begin if m.end is None else m.end for m in markers]
        self._end_R = token_ids(ends, vocabulary, where)
        for marker, begin, end in zip(markers, self._begin_R, self._end_R, strict=True):
            if marker.end is not None and begin == end:
                told = "a span must begin and end with different tokens"
                raise ConfigError(f"{str(marker)!r}: {told}.")
        starts = [] if start is None else [start]
        self._start = [int(i) for i in token_ids(starts, vocabulary, where)]
        self._open_R = np.zeros(len(begins), bool)
        self._started, self._document = False, -1

    def __call__(self, token_N, document_N) -> tuple[np.ndarray, np.ndarray]:
        """Positions of each marker, bool[R, N], and those that count, bool[N].

        Args:
          token_N: token ids.
          document_N: the number of each token's document; those of one document stand
            together, and one that goes on in the next piece keeps its number.
        """
        found_RN = np.zeros((len(self.markers), len(token_N)), bool)
        counted_N = np.ones(len(token_N), bool)
        if len(token_N) == 0:
            return found_RN, counted_N
        first_N = np.diff(document_N, prepend=self._document) != 0
        for r, marker in enumerate(self.markers):
            begins_N = token_N == self._begin_R[r]
            if marker.end is None:
                found_RN[r] = begins_N
                continue
            ends_N = first_N | (token_N == self._end_R[r])
            inside_N = _inside(begins_N, ends_N, self._open_R[r])
            found_RN[r], self._open_R[r] = inside_N & ~begins_N, inside_N[-1]
        for token in self._start:
            counted_N = _inside(token_N == token, first_N, self._started)
            self._started = bool(counted_N[-1])
        self._document = int(document_N[-1])
        return found_RN & counted_N, counted_N


def _inside(begins_N, ends_N, is_open: bool) -> np.ndarray:
    """bool[N]: whether the last event up to here is a begin; `is_open`: before all."""
    event_N = np.where(begins_N, 1, np.where(ends_N, 0, -1))
    place_N = np.where(event_N >= 0, np.arange(len(event_N)), -1)
    place_N = np.maximum.accumulate(place_N)
    return np.where(place_N >= 0, event_N[place_N] == 1, is_open)
