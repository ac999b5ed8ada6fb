"""Datasets of text from a config: `prepare` encodes and packs every source once.

Not here: reading files (`sources.py`), the cache (`cache.py`), batches (`batches.py`).

Shapes: L length.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moex.cache import root as cache_root
from moex.config.base import ConfigError, check, require
from moex.data import cache
from moex.data.batches import Datasets, Reading
from moex.data.contract import Source, TokenizerConfig, texts_of
from moex.data.files import find_files, unit_hash
from moex.data.packing import Rows, Windows
from moex.data.shared import check_shared
from moex.data.sources import PythonStdlib
from moex.data.stream import SPLITS, Stream
from moex.data.tokenizer import Bpe, Tokenizer
from moex.json_files import digest
from moex.progress import phase


@dataclasses.dataclass(kw_only=True, slots=True)
class Data(Reading):
    """The text of a run: a mixture of sources, and a tokenizer."""

    # What is read, each a domain of the held-out results; at least one.
    sources: tuple[Source, ...] = (PythonStdlib(),)
    # How text becomes tokens, such as Bpe(vocab=4096).
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=Bpe)
    cache_dir: str | None = None  # None: $MOEX_CACHE, or else ~/.cache/moex

    def validate(self, path: str) -> None:
        """Check the fields and the names of the sources."""
        Reading.validate(self, path)
        require(len(self.sources) > 0, f"{path}.sources", self.sources, "not empty")
        names = [source.label() for source in self.sources]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(
                    f"{path}.sources[{i}].name = {name!r}: also the name of sources"
                    f"[{names.index(name)}]; give one of them another name."
                )


@dataclasses.dataclass(kw_only=True, slots=True)
class Prepared(Datasets):
    """Text that is ready to be read: one packed dataset per source and split."""

    config: Data
    train: list[Windows | Rows]
    eval: list[Windows | Rows]
    seq_len: int  # L, inputs per sequence
    tokenizer: Tokenizer  # the runtime tokenizer


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
    root = cache_root(config.cache_dir)
    named = [(f"{where}.sources[{i}]", s) for i, s in enumerate(config.sources)]
    if not scoring:
        check_shared(named, log)
    scans = [cache.scan(source, here, log) for here, source in named]
    all_files = digest([s["sha256"] for s in scans])
    total = sum(s["bytes"] for s in scans)
    if total == 0:
        first = config.sources[0]
        find_files(getattr(first, "paths", ()), f"{where}.sources[0].paths")
    corpus = (lambda limit: _sample(named, total, limit), all_files)
    tokenizer = config.tokenizer.make(f"{where}.tokenizer", corpus, root, log)
    pairs: list[tuple[Windows | Rows, Windows | Rows]] = []
    manifest = {}
    for i, ((here, source), scan) in enumerate(zip(named, scans, strict=True)):
        folder, manifest[source.label()] = cache.prepared(
            source, scan, tokenizer, seq_len, root, here, log
        )
        streams = [Stream(folder / s, tokenizer.token_bytes) for s in SPLITS]
        if source.content() in cache.WHOLE:
            pair: list[Windows | Rows] = [Rows(s, seq_len, domain=i) for s in streams]
        else:
            scored = Windows(
                streams[1], seq_len, overlap=overlap, domain=i, partial=True
            )
            pair = [Windows(streams[0], seq_len, domain=i), scored]
        pairs.append((pair[0], pair[1]))
    has_text = [any(p.stream.counts["documents"] for p in pair) for pair in pairs]
    for (here, source), both, some in zip(named, pairs, has_text, strict=True):
        if not some and any(has_text):
            log(f"data: warning: {source.label()!r} has no text and is left out")
            continue
        _check_sizes(*both, source, here, log, scoring)
        _check_targets(*both, source, here, log, scoring)
    weights = tuple(
        s.weight if s.holdout < 1 and some else 0.0
        for s, some in zip(config.sources, has_text, strict=True)
    )
    if not scoring and not any(weights):
        raise ConfigError(f"{where}.sources: no source to train on has any text.")
    return dataclasses.replace(
        unread(config, seq_len, tokenizer),
        train=[train for train, _ in pairs],
        eval=[held_out for _, held_out in pairs],
        weights=weights,
        domains=tuple(s.label() for s in config.sources),
        manifest=manifest,
    )


def unread(config: Data, seq_len: int, tokenizer: Tokenizer) -> Prepared:
    """Make data of which nothing was read, for a run that is only written."""
    nothing: dict[str, Any] = {"train": [], "eval": [], "weights": (), "domains": ()}
    return Prepared(
        config=config, seq_len=seq_len, tokenizer=tokenizer, manifest={}, **nothing
    )


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
    """Warn of prompts that leave no room for a response; raise if all do."""
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
    """Draw training texts of about `limit` bytes in all by the hash of their key.

    A large document gives its beginning. The share is raised if files have less text
    than their size suggests, and lowered if they have more, as compressed ones do.
    """
    share, lowered = min(1.0, limit / total), False
    while True:
        with phase("drawing text for the tokenizer"):
            texts = list(_draw(named, share, limit))
        size = sum(map(len, texts))
        if size >= 2 * limit and len(texts) > 1:
            share, lowered = share / 4, True
        elif share == 1 or size >= limit // 2 or lowered:
            return texts
        else:
            share = min(1.0, 4 * share)


def _draw(named, share: float, limit: int) -> Iterator[str]:
    taken = 0
    for where, source in named:
        if source.content() == "tokens":
            continue
        for key, value, _ in source.documents("train", where):
            for text in texts_of(value):
                if len(text) > limit // 8:
                    text = text[: int(share * len(text))]
                elif unit_hash(key, "moex.sample") >= share:
                    continue
                if text:
                    taken += len(text)
                    yield text
                if taken >= 2 * limit:
                    return
