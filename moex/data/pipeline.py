"""From configs to batches: prepare once (cached), then read in a fixed global order.

`prepare` encodes and packs every source into a cache on disk. `train_iterator` is a
deterministic function of one global index, so a run continues exactly, with any number
of processes. `eval_batches` covers every held-out sequence once.

Not here: reading files (`sources.py`), the cache (`cache.py`).

Shapes: B batch (of this process) · L length.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from moex.config import Config, ConfigError, check, require
from moex.data import cache
from moex.data.files import unit_hash
from moex.data.packing import Rows, Windows, blank_example
from moex.data.shared import check_shared
from moex.data.sources import PythonStdlib, Source
from moex.data.stream import SPLITS, Stream
from moex.data.tokenizer import TOKENIZERS, Bpe, Tokenizer
from moex.json_files import digest

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True, slots=True)
class Data(Config):
    """What a run reads: a mixture of sources, and how text becomes tokens."""

    sources: tuple[Source, ...] = (PythonStdlib(),)
    tokenizer: Config = dataclasses.field(default_factory=Bpe)
    cache_dir: str | None = None  # None: $MOEX_CACHE, else ~/.cache/moex
    threads: int = 1  # threads that build batches ahead; 0 builds them when asked
    prefetch: int = 2  # batches built ahead, >= 1

    def validate(self, path: str) -> None:
        """Check the counts and the names of the sources."""
        require(len(self.sources) > 0, f"{path}.sources", self.sources, "not empty")
        ok = isinstance(self.tokenizer, TOKENIZERS)
        require(ok, f"{path}.tokenizer", self.tokenizer, "a tokenizer of moex.data")
        require(self.threads >= 0, f"{path}.threads", self.threads, ">= 0")
        require(self.prefetch >= 1, f"{path}.prefetch", self.prefetch, ">= 1")
        names = [source.label() for source in self.sources]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(
                    f"{path}.sources[{i}].name = {name!r}: also the name of sources"
                    f"[{names.index(name)}]; give one of them another name."
                )


@dataclasses.dataclass(slots=True)
class Prepared:
    """Data ready to be read: one packed dataset per source and split.

    Attributes:
      config: the `Data` config it was made from.
      seq_len: L, inputs per sequence.
      tokenizer: the runtime tokenizer.
      train: per source, an indexable dataset of full sequences.
      eval: per source, an indexable dataset that scores each held-out target once.
      domains: names of the sources; `domain` in a batch indexes them.
      manifest: per source name, what was read and how much; plain data.
    """

    config: Data
    seq_len: int
    tokenizer: Tokenizer
    train: list[Windows | Rows]
    eval: list[Windows | Rows]
    domains: tuple[str, ...]
    manifest: dict[str, Any]


def prepare(
    config: Data,
    seq_len: int,
    *,
    overlap: int = 0,
    scoring: bool = False,
    log=print,
    where: str = "data",
) -> Prepared:
    """Read, encode and pack all sources, or find them in the cache.

    Args:
      config: sources and tokenizer.
      seq_len: L, number of inputs of a sequence, >= 1.
      overlap: tokens that a held-out sequence repeats from the one before as context,
        in [0, seq_len).
      scoring: only `eval_batches` will be read, so training data may be missing.
      log: called with one line per step of the work.
      where: the path of `config`, for error messages.

    Raises:
      ConfigError: for files that cannot be used, and for a source with less training
        data than one sequence, unless it is only scored (holdout 1).
    """
    check(config, where)
    require(
        scoring or any(source.holdout < 1 for source in config.sources),
        f"{where}.sources[0].holdout",
        config.sources[0].holdout,
        "below 1 for one source at least, or there is nothing to train on",
    )
    require(seq_len >= 1, "seq_len", seq_len, ">= 1")
    require(0 <= overlap < seq_len, "overlap", overlap, f"in [0, seq_len={seq_len})")
    root = cache.cache_root(config.cache_dir)
    named = [(f"{where}.sources[{i}]", s) for i, s in enumerate(config.sources)]
    if not scoring:
        check_shared(named, log)
    scans = [cache.scan(source, here, log) for here, source in named]
    all_files = digest([s["sha256"] for s in scans])
    total = sum(s["bytes"] for s in scans)
    corpus = (lambda limit: _sample(named, total, limit), all_files)
    choice: Any = config.tokenizer
    tokenizer = choice.make(f"{where}.tokenizer", corpus, root, log)
    domains = tuple(s.label() for s in config.sources)
    prepared = Prepared(config, seq_len, tokenizer, [], [], domains, {})
    for i, ((here, source), scan) in enumerate(zip(named, scans, strict=True)):
        made = cache.prepared(source, scan, tokenizer, seq_len, root, here, log)
        prepared.manifest[source.label()] = made.manifest
        streams = [Stream(made.directory / s, tokenizer.token_bytes) for s in SPLITS]
        if source.content() == "pairs":
            train: Windows | Rows = Rows(streams[0], seq_len, domain=i)
            held_out: Windows | Rows = Rows(streams[1], seq_len, domain=i)
        else:
            train = Windows(streams[0], seq_len, domain=i)
            held_out = Windows(
                streams[1], seq_len, overlap=overlap, domain=i, partial=True
            )
        _check_sizes(train, held_out, source, here, log, scoring)
        _check_targets(train, held_out, source, here, log, scoring)
        prepared.train.append(train)
        prepared.eval.append(held_out)
    return prepared


def _check_sizes(train, held_out, source: Source, where: str, log, scoring) -> None:
    counts = train.stream.counts
    if source.holdout == 1:
        if len(held_out) == 0:
            raise ConfigError(
                f"{where} ({source.label()!r}): there is no text in it to score."
            )
        return
    if len(train) == 0 and not scoring:
        raise ConfigError(
            f"{where} ({source.label()!r}): seq_len={train.seq_len} is longer than the "
            f"training data ({counts['tokens']} tokens in {counts['documents']} "
            "documents). Use a smaller seq_len, less holdout or more data."
        )
    if len(held_out) == 0 and source.holdout > 0:
        log(
            f"data: warning: none of the {counts['documents']} documents of "
            f"{source.label()!r} is held out for evaluation; raise holdout or give "
            "more, smaller documents"
        )


def _check_targets(train, held_out, source: Source, where: str, log, scoring) -> None:
    """Say how many prompts leave no room for a response; refuse to learn nothing."""
    for split, data in zip(SPLITS, (train, held_out), strict=True):
        if not isinstance(data, Rows) or data.num_cut == 0:
            continue
        count = f"{data.num_cut} of {len(data.stream.starts)} examples for {split}"
        why = f"have a prompt that fills a sequence, seq_len={data.seq_len}"
        needed = source.holdout == 1 if split == "eval" else not scoring
        if needed and not data.has_targets:
            raise ConfigError(
                f"{where} ({source.label()!r}): {count} {why}: no target is left. "
                "Raise seq_len, or shorten the prompts."
            )
        log(
            f"data: warning: {count} in {source.label()!r} {why}: nothing of their "
            "responses is left; raise seq_len or shorten the prompts"
        )


def _sample(named, total: int, limit: int) -> list[str]:
    """Training texts of about `limit` bytes in all, chosen by the hash of their key.

    Of a large document the beginning is taken. The share is raised where files hold
    less text than their size says.
    """
    share = min(1.0, limit / total)
    while True:
        texts = list(_draw(named, share, limit))
        if share == 1 or sum(map(len, texts)) >= limit // 2:
            return texts
        share = min(1.0, 4 * share)


def _draw(named, share: float, limit: int) -> Iterator[str]:
    taken = 0
    for where, source in named:
        if source.content() == "tokens":
            continue
        for key, value in source.documents("train", where):
            for text in value if isinstance(value, tuple) else (value or "",):
                if len(text) > limit // 8:
                    text = text[: int(share * len(text))]
                elif unit_hash(key, "moex.sample") >= share:
                    continue
                if taken < 2 * limit and text:
                    taken += len(text)
                    yield text


def train_iterator(
    prepared: Prepared,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Endless training batches, from the global sequence index `start` on.

    Sequence g of the whole job depends on `seed` and g alone. Global batch b is the
    sequences `start + b * batch_size ...`; each process gets the rows that its devices
    hold. Each source is reshuffled every epoch; sources are mixed by their weights.

    Args:
      prepared: from `prepare`.
      batch_size: sequences per batch over all processes.
      seed: of the order, >= 0.
      start: sequences that the whole job consumed before.
      rows: which rows of each batch to read, rising; None: all.

    Returns:
      Iterator of dicts: [b, L] arrays, and [b] for domain and example_id, of the b rows
      read. An error in the reading thread is raised by `next`.
    """
    rows = _checked_rows(rows, batch_size)
    require(start >= 0, "start", start, ">= 0")
    parts, weights = [], []
    for i, source in enumerate(prepared.config.sources):
        if source.holdout < 1:
            part = grain.MapDataset.source(prepared.train[i]).seed(seed + i)
            parts.append(part.shuffle().repeat())
            weights.append(source.weight)
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    local = mixed[start:]
    if len(rows) < batch_size:
        local = grain.MapDataset.source(_Rows(local, batch_size, rows))
    local = local.batch(len(rows), drop_remainder=True, batch_fn=stack)
    options = grain.ReadOptions(
        num_threads=prepared.config.threads,
        prefetch_buffer_size=prepared.config.prefetch,
    )
    return iter(local.to_iter_dataset(options))


def stack(examples: list[dict[str, np.ndarray]]) -> Batch:
    """Examples as one batch."""
    return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Only these rows of every run of `batch_size` examples, as a Grain source."""

    examples: Any
    batch_size: int
    rows: tuple[int, ...]

    def __len__(self):
        return len(self.examples) // self.batch_size * len(self.rows)

    def __getitem__(self, i):
        batch, row = divmod(i, len(self.rows))
        return self.examples[batch * self.batch_size + self.rows[row]]


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
    prepared: Prepared,
    *,
    batch_size: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of every held-out sequence exactly once, in a fixed order.

    The last batch is filled up with rows of segment 0, loss_mask 0 and example_id -1.
    All processes get the same number of batches; each gets the rows of its devices.

    Args:
      prepared: from `prepare`.
      batch_size: sequences per batch over all processes.
      limit: at most so many sequences, spread evenly over all sources; None: all.
      rows: which rows of each batch to read, rising; None: all.
    """
    rows = _checked_rows(rows, batch_size)
    chosen = [
        (data, int(i))
        for data, take in zip(prepared.eval, _quotas(prepared.eval, limit), strict=True)
        for i in np.arange(take) * len(data) // max(take, 1)
    ]
    for first in range(0, len(chosen), batch_size):
        here = [first + row for row in rows if first + row < len(chosen)]
        examples = [data[i] for data, i in (chosen[at] for at in here)]
        blank = blank_example(prepared.seq_len, 0, -1)
        yield stack(examples + [blank] * (len(rows) - len(examples)))


def _quotas(datasets: list, limit: int | None) -> list[int]:
    """How many sequences of each dataset to take: in proportion, but at least one."""
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
