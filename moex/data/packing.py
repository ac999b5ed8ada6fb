"""Fixed-length sequences, read from token streams.

Sequences are built from the memory-mapped stream when they are asked for: `Windows`
cuts it into overlapping or adjoining pieces, `Rows` packs whole examples. Both are
indexable, so the order of the data is a function of one integer.

Not here: the streams (`stream.py`), the order of training (`batches.py`).

Shapes: L length of a sequence.
"""

import json
from pathlib import Path

import numpy as np

from moex.config.base import ConfigError
from moex.data.batches import Dataset, Example, count_windows
from moex.data.stream import Stream

OPEN_ROWS = 256  # the last rows in which first-fit packing looks for room


def blank_example(length: int) -> Example:
    """Make a sequence of padding only: segment 0 and loss_mask 0 everywhere."""
    names = ("tokens", "targets", "segment", "position", "num_bytes")
    example: Example = {name: np.zeros(length, np.int32) for name in names}
    example["loss_mask"] = np.zeros(length, np.float32)
    return example | {"domain": np.int32(0), "example_id": np.int32(-1)}


class Windows(Dataset):
    """A stream cut into sequences of `seq_len`, each target scored exactly once.

    Sequence i starts at token `i * (seq_len - overlap)` of the stream. Only targets
    that no earlier sequence scored have loss_mask 1, so with an overlap they see at
    least that much context. Documents longer than a sequence continue in the next one
    as a new segment: attention does not look back past a sequence's start.

    Args:
      stream: the tokens.
      seq_len: L, number of inputs of a sequence.
      overlap: inputs that a sequence repeats from the one before, in [0, seq_len).
      domain: index of the source, copied into every example.
      partial: pad a last sequence that is not full, instead of dropping it.
    """

    def __init__(
        self,
        stream: Stream,
        seq_len: int,
        *,
        overlap: int = 0,
        domain: int = 0,
        partial: bool = False,
    ):
        self.stream, self.seq_len, self.overlap = stream, seq_len, overlap
        self._stride = seq_len - overlap
        self._arange = np.arange(seq_len, dtype=np.int32)
        targets = len(stream.tokens) - 1
        super().__init__(count_windows(targets, seq_len, self._stride, partial), domain)

    def sequence(self, index: int) -> Example:
        """A sequence: int32[L] arrays and float32[L] loss_mask."""
        stream, example = self.stream, blank_example(self.seq_len)
        start = index * self._stride
        stop = min(start + self.seq_len, len(stream.tokens) - 1)
        n = stop - start
        example["tokens"][:n] = stream.tokens[start:stop]
        example["targets"][:n] = stream.tokens[start + 1 : stop + 1]
        example["num_bytes"][:n] = stream.num_bytes(start + 1, stop + 1)
        first, last = np.searchsorted(stream.starts, (start + 1, stop))
        inner = stream.starts[first:last] - start
        example["segment"][inner] = 1
        example["segment"][:n] = 1 + np.cumsum(example["segment"][:n])
        begin = np.zeros(n, np.int32)
        begin[inner] = inner
        example["position"][:n] = self._arange[:n] - np.maximum.accumulate(begin)
        example["loss_mask"][self.overlap if index else 0 : n] = 1
        return example


class Rows(Dataset):
    """Whole examples packed into sequences of `seq_len`; none is cut in two.

    An example is `[doc, prompt, response]` with targets `[prompt, response, doc]`;
    loss_mask is 1 where the target belongs to the response or ends it, or where
    `learned` of the stream says so.

    Args:
      stream: the tokens, a stream that has `prompts`.
      seq_len: L, number of inputs of a sequence.
      domain: index of the source, copied into every example.
    """

    def __init__(self, stream: Stream, seq_len: int, *, domain: int = 0):
        self.stream, self.seq_len = stream, seq_len
        self._order = np.load(stream.directory / "order.npy")
        self._bounds = np.load(stream.directory / "rows.npy")
        self._ends = np.r_[stream.starts[1:], len(stream.tokens) - 1]
        super().__init__(len(self._bounds) - 1, domain)

    @property
    def has_targets(self) -> bool:
        """Whether there is any token to learn or score."""
        return self.num_cut < len(self.stream.starts)

    @property
    def num_cut(self) -> int:
        """The number of examples whose prompt fills a sequence and leaves no target."""
        if self.stream.prompts is None:
            return 0
        return int(np.sum(self.stream.prompts >= self.seq_len))

    def sequence(self, index: int) -> Example:
        """A sequence as in `Windows`; segment is the number of the example in it."""
        stream, row = self.stream, blank_example(self.seq_len)
        at = 0
        members = self._order[self._bounds[index] : self._bounds[index + 1]]
        for segment, example in enumerate(members, start=1):
            start = int(stream.starts[example])
            stop = min(int(self._ends[example]), start + self.seq_len)
            to = at + stop - start
            row["tokens"][at:to] = stream.tokens[start:stop]
            row["targets"][at:to] = stream.tokens[start + 1 : stop + 1]
            row["num_bytes"][at:to] = stream.num_bytes(start + 1, stop + 1)
            row["segment"][at:to] = segment
            row["position"][at:to] = np.arange(to - at)
            if stream.learned is not None:
                row["loss_mask"][at:to] = stream.learned[start + 1 : stop + 1]
            else:
                first = 0 if stream.prompts is None else int(stream.prompts[example])
                row["loss_mask"][at + first : to] = 1
            at = to
        if stream.visual is not None:  # each such example has a sequence of its own
            row["visual"] = np.array(stream.visual[members[0]])
            row["has_visual"] = np.int32(1)
        return row


def pack_rows(directory: Path, seq_len: int, truncate: bool, where: str) -> None:
    """Assign the examples of a stream to rows by first fit; write the assignment.

    Raises:
      ConfigError: for examples longer than `seq_len`, unless they may be truncated.
    """
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    starts = np.load(directory / "starts.npy")
    lengths = np.diff(np.r_[starts, meta["tokens"] - 1]) if len(starts) else starts
    long = lengths > seq_len
    if long.any() and not truncate:
        raise ConfigError(
            f"{where}: {int(long.sum())} of {len(lengths)} examples do not fit into "
            f"seq_len={seq_len} (the longest has {int(lengths.max())} tokens). Raise "
            f"config.seq_len, or cut them off with {where}.truncate=True."
        )
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for i, length in enumerate(np.minimum(lengths, seq_len)):
        fits = np.flatnonzero(room[-OPEN_ROWS:] >= length)
        if len(fits) and "visual" not in meta:
            row = max(len(room) - OPEN_ROWS, 0) + int(fits[0])
            rows[row].append(i)
            room[row] -= length
        else:
            rows.append([i])
            room = np.append(room, seq_len - length)
    order = np.array([i for row in rows for i in row], np.int64)
    bounds = np.cumsum([0] + [len(row) for row in rows])
    np.save(directory / "order.npy", order)
    np.save(directory / "rows.npy", bounds)
