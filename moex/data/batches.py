"""Batches of datasets, in a fixed global order.

`train_iterator` is a deterministic function of one global index, so a run continues
exactly, with any number of processes. `eval_batches` covers every held-out sequence
once.

Not here: making the sequences (`packing.py`, `series.py`).

Shapes: B batch (of this process) · L length.
"""

import abc
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moex.config.base import Config, require

Example = dict[str, Any]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True, slots=True)
class Reading(Config):
    """The base of data configs: how batches are built while the model trains."""

    threads: int = 1  # threads that build batches ahead; 0: build each when needed
    prefetch: int = 2  # batches built ahead, >= 1
    one_source: bool = False  # all sequences of a training batch are of one source
    given: tuple[str, ...] = ()  # the paths of `moex train --data`; (): none were given

    def validate(self, path: str) -> None:
        """Check both counts."""
        require(self.threads >= 0, f"{path}.threads", self.threads, ">= 0")
        require(self.prefetch >= 1, f"{path}.prefetch", self.prefetch, ">= 1")


class Dataset(abc.ABC):
    """A list of sequences by index; all examples of a run have the same fields.

    Args:
      length: number of sequences.
      domain: index of the source, copied into every example.

    Attributes:
      defaults: the fields of all sequences that have none of their own.
    """

    def __init__(self, length: int, domain: int):
        self._length, self.domain = length, domain
        self.defaults: Example = {}

    @abc.abstractmethod
    def sequence(self, index: int) -> Example:
        """Make a sequence: all fields but `domain` and `example_id`."""

    @property
    def has_targets(self) -> bool:
        """Whether there is any target to learn or score."""
        return self._length > 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(index)
        common = {"domain": np.int32(self.domain), "example_id": np.int32(index)}
        return self.defaults | self.sequence(int(index)) | common


def count_windows(targets: int, window: int, stride: int, partial: bool) -> int:
    """Count the windows over a row of targets, each `stride` after the one before.

    Args:
      targets: how many there are; < 1 counts as none.
      window: targets of a window.
      stride: targets from the start of one window to that of the next.
      partial: whether a last window that is not full counts.
    """
    full = 0 if targets < window else 1 + (targets - window) // stride
    covered = window + (full - 1) * stride if full else 0
    return full + int(partial and covered < targets)


@dataclasses.dataclass(kw_only=True, slots=True)
class Datasets:
    """Data that is ready to be read: one dataset per domain and split.

    Every example has "segment", "position" (int32[L]), "loss_mask" (float32[L]),
    "domain" and "example_id" (int32), and the fields that its task adds.
    """

    config: Reading  # the config that it was made from
    train: Sequence[Dataset]  # per domain, sequences to train on
    # Per domain, sequences that score each held-out target once.
    eval: Sequence[Dataset]
    # Per domain, its share of the training mixture; 0: it is only scored.
    weights: tuple[float, ...]
    # The names of domains; `domain` in a batch is an index into them.
    domains: tuple[str, ...]
    # Per domain, {"sha256", "files": [name, bytes, sha256], ...} of the files that were
    # read; plain data.
    manifest: dict[str, Any]

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out data with something to score."""
        return any(examples.has_targets for examples in self.eval)


def train_iterator(
    data: Datasets,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Make endless training batches, from the global sequence index `start` on.

    Sequence g of the whole job depends on `seed` and g alone. Global batch b begins
    with sequence `start + b * batch_size`; each process gets the rows that its devices
    hold. Each source is reshuffled every epoch; sources are mixed by their weights.

    Args:
      data: the data to read.
      batch_size: sequences per batch over all processes.
      seed: the seed of the order, >= 0.
      start: sequences that the whole job consumed before.
      rows: which rows of each batch to read, ascending; None: all.

    Returns:
      Iterator of dicts of b rows: arrays [b, L], and [b] for domain and example_id. An
      error in the reading thread is raised by `next`.
    """
    rows = _checked_rows(rows, batch_size)
    require(start >= 0, "start", start, ">= 0")
    parts, weights = [], []
    for i, (examples, weight) in enumerate(zip(data.train, data.weights, strict=True)):
        if weight > 0:
            part = grain.MapDataset.source(examples).seed(seed + i)
            parts.append(part.shuffle().repeat())
            weights.append(weight)
    if len(parts) == 1:
        mixed = parts[0]
    elif data.config.one_source:
        told = f"a multiple of batch_size = {batch_size}, as batches have one source"
        require(start % batch_size == 0, "start", start, told)
        mixed = grain.MapDataset.source(_Blocks(parts, weights, batch_size))
    else:
        mixed = grain.MapDataset.mix(parts, weights)
    local = mixed[start:]
    if len(rows) < batch_size:
        local = grain.MapDataset.source(_Rows(local, batch_size, rows))
    local = local.batch(len(rows), drop_remainder=True, batch_fn=stack)
    options = grain.ReadOptions(
        num_threads=data.config.threads,
        prefetch_buffer_size=data.config.prefetch,
    )
    return iter(local.to_iter_dataset(options))


def stack(examples: list[Example]) -> Batch:
    """Stack examples to one batch."""
    return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A Grain source of the given rows of every `batch_size` successive examples."""

    examples: Any
    batch_size: int
    rows: tuple[int, ...]

    def __len__(self):
        return len(self.examples) // self.batch_size * len(self.rows)

    def __getitem__(self, i):
        batch, row = divmod(i, len(self.rows))
        return self.examples[batch * self.batch_size + self.rows[row]]


class _Blocks:
    """A Grain source of `size` examples of one part, then `size` of one, and so on.

    The parts take turns by their weights, as examples do in `MapDataset.mix`.
    """

    def __init__(self, parts, weights, size: int):
        self.parts, self.size = parts, size
        blocks = [
            grain.MapDataset.source(_Numbers(i, len(part) // size))
            for i, part in enumerate(parts)
        ]
        self.blocks = grain.MapDataset.mix(blocks, weights)

    def __len__(self):
        return min(len(self.blocks) * self.size, sys.maxsize)

    def __getitem__(self, index):
        block, row = divmod(index, self.size)
        part, number = self.blocks[block]
        return self.parts[part][number * self.size + row]


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A Grain source of the pairs (part, number) of all blocks of a part."""

    part: int
    length: int

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        return self.part, number


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    require(batch_size >= 1, "batch_size", batch_size, ">= 1")
    if rows is None:
        return tuple(range(batch_size))
    rows = tuple(map(int, rows))
    rising = all(a < b for a, b in zip(rows, rows[1:], strict=False))
    ok = bool(rows) and rising and rows[0] >= 0 and rows[-1] < batch_size
    require(ok, "rows", rows, f"rising, in [0, batch_size={batch_size})")
    return rows


def eval_batches(
    data: Datasets,
    *,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield batches of every held-out sequence exactly once, in a fixed order.

    The last batch is padded with rows of segment 0, loss_mask 0 and example_id -1.
    All processes get the same number of batches; each gets the rows of its devices.

    Args:
      data: the data to read.
      batch_size: sequences per batch over all processes.
      limit: at most this many sequences, spread evenly over all sources; None: all.
      rows: which rows of each batch to read, ascending; None: all.
    """
    rows = _checked_rows(rows, batch_size)
    chosen = [
        (examples, int(i))
        for examples, take in zip(data.eval, _quotas(data.eval, limit), strict=True)
        for i in np.arange(take) * len(examples) // max(take, 1)
    ]
    for first in range(0, len(chosen), batch_size):
        here = [first + row for row in rows if first + row < len(chosen)]
        found = [examples[i] for examples, i in (chosen[at] for at in here)]
        if len(found) < len(rows):
            examples, i = chosen[first]
            found += [blank_like(examples[i])] * (len(rows) - len(found))
        yield stack(found)


def blank_like(example: Example) -> Example:
    """Make a sequence of padding only, with the fields of `example`."""
    blank = {name: np.zeros_like(array) for name, array in example.items()}
    return blank | {"example_id": np.int32(-1)}


def _quotas(datasets: Sequence[Dataset], limit: int | None) -> list[int]:
    """The number of sequences of each dataset: in proportion, but at least one."""
    sizes = np.array([len(d) for d in datasets])
    total = int(sizes.sum())
    if limit is None or limit >= total:
        return sizes.tolist()
    require(limit >= 1, "limit", limit, ">= 1 or None")
    ends = np.cumsum(sizes) * limit // total
    take = np.diff(ends, prepend=0)
    for i in np.flatnonzero((take == 0) & (sizes > 0)):
        if take.max() > 1:
            take[take.argmax()] -= 1
            take[i] = 1
    return take.tolist()
