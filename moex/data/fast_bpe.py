"""A fast way to encode ASCII text with a byte-level BPE.

A BPE encodes each word by itself, and a text repeats most of its words: of the 2.6
million words of the standard library 50 thousand differ. So each word is encoded once
and the ids are gathered: this takes a third of the processor time of encoding all.

Not here: the tokenizer (`encoding.py`), which also encodes text that is not ASCII.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

# The words of the ByteLevel pre-tokenizer, restricted to ASCII.
WORDS = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    re.ASCII,
)


class _Index(dict):
    """Numbers words in the order of their first look-up."""

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        return number


def encode_ascii(
    texts: Sequence[str], encode_words: Callable[[list[str]], list[np.ndarray]]
) -> list[np.ndarray]:
    """Encode ASCII texts to int32[n] ids each; every different word is encoded once.

    Args:
      texts: texts of ASCII characters only.
      encode_words: encodes each word of a list to int32[n] ids.
    """
    index = _Index()
    numbers = [
        np.fromiter(map(index.__getitem__, WORDS.findall(text)), np.int64)
        for text in texts
    ]
    codes = encode_words(list(index))
    sizes = np.array([len(c) for c in codes], np.int64)
    table = np.concatenate([np.zeros(0, np.int32), *codes])
    starts = np.cumsum(sizes) - sizes
    return [_gather(table, starts[n], sizes[n]) for n in numbers]


def _gather(table: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Join the pieces `table[start : start + size]`."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return table[np.arange(total) + np.repeat(starts - (ends - sizes), sizes)]
