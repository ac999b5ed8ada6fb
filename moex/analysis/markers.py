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

    Raises:
      ConfigError: for a marker that is no token.
    """

    def __init__(self, markers: Sequence[Marker], vocabulary: Sequence[str], where):
        self.markers = tuple(markers)
        begins = [marker.begin for marker in markers]
        self._begin_R = token_ids(begins, vocabulary, where)
        ends = [m.begin if m.end is None else m.end for m in markers]
        self._end_R = token_ids(ends, vocabulary, where)
        for marker, begin, end in zip(markers, self._begin_R, self._end_R, strict=True):
            if marker.end is not None and begin == end:
                raise ConfigError(
                    f"{str(marker)!r}: a span must begin and end with different tokens."
                )
        self._open_R = np.zeros(len(begins), bool)
        self._document = -1

    def __call__(self, token_N, document_N) -> np.ndarray:
        """bool[R, N]: the positions of each marker in the next piece.

        Args:
          token_N: token ids.
          document_N: the number of each token's document; those of one document stand
            together, and one that goes on in the next piece keeps its number.
        """
        found_RN = np.zeros((len(self.markers), len(token_N)), bool)
        if len(token_N) == 0:
            return found_RN
        first_N = np.diff(document_N, prepend=self._document) != 0
        for r, marker in enumerate(self.markers):
            if marker.end is None:
                found_RN[r] = token_N == self._begin_R[r]
            else:
                found_RN[r] = self._span(r, token_N, first_N)
        self._document = int(document_N[-1])
        return found_RN

    def _span(self, r: int, token_N, first_N) -> np.ndarray:
        begins_N = token_N == self._begin_R[r]
        ends_N = token_N == self._end_R[r]
        # The last of these events before a token, or at it, says whether it is inside.
        event_N = np.where(begins_N, 1, np.where(ends_N | first_N, 0, -1))
        place_N = np.maximum.accumulate(
            np.where(event_N >= 0, np.arange(len(event_N)), -1)
        )
        open_N = np.where(place_N >= 0, event_N[place_N] == 1, self._open_R[r])
        self._open_R[r] = open_N[-1]
        return open_N & ~begins_N
