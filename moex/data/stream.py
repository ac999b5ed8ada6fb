"""Token streams on disk, one per split of a source.

A stream is `[doc, t1 .. tn, doc, u1 .. um, doc]`, with the offsets of the document
tokens in another file. It is written once and memory-mapped afterwards.

Not here: cutting streams into sequences (`packing.py`), the cache (`cache.py`).
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moex.config.base import ConfigError
from moex.data.contract import texts_of
from moex.data.files import atomic_write, naming

SPLITS = ("train", "eval")
BATCH_CHARS = 8_000_000


class StreamWriter:
    """Writes one stream into a directory, one document at a time.

    Args:
      directory: an existing directory that nothing else writes to.
      vocab_size: ids are stored as uint16 if that is enough, or else as uint32.
      doc_id: the token put before each document and after the last.
      with_bytes: also store the number of bytes of each token, as no table gives it.
      with_learned: also store which tokens are learned, where `prompts` cannot say it.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        doc_id: int,
        with_bytes: bool,
        with_learned: bool = False,
    ):
        self._dir, self._doc_id = directory, doc_id
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._tokens = open(directory / "tokens.bin", "wb")  # noqa: SIM115
        self._sizes = open(directory / "bytes.bin", "wb") if with_bytes else None  # noqa: SIM115
        self._learned = open(directory / "learned.bin", "wb") if with_learned else None  # noqa: SIM115
        self._visual: Any = None
        self._visual_shape: tuple[int, ...] | None = None
        self._end_learned = False
        self._starts: list[int] = []
        self._prompts: list[int] = []
        self._length = self._bytes = self._empty = self._skipped = 0

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *error) -> None:
        for file in (self._tokens, self._sizes, self._learned, self._visual):
            if file:
                file.close()

    def add(
        self,
        ids: np.ndarray,
        sizes: np.ndarray,
        text_bytes: int,
        prompt: int = 0,
        learned: np.ndarray | None = None,
        *,
        visual: np.ndarray | None = None,
    ) -> None:
        """Append a document; a document without tokens is only counted.

        Args:
          ids: int[n] token ids.
          sizes: int[n] number of bytes of each token.
          text_bytes: the number of bytes of the document.
          prompt: how many of the first tokens are not learned.
          learned: bool[n + 1] which tokens are learned; the last is the document token
            after them. Only for a writer `with_learned`.
          visual: float32 [tokens, width]; the same shape for all documents.
        """
        if len(ids) == 0:
            self._empty += 1
            return
        if visual is not None:
            self._put_visual(visual)
        self._starts.append(self._length)
        self._prompts.append(prompt)
        if learned is not None:
            flags = np.r_[self._end_learned, learned[:-1]]
            self._end_learned = bool(learned[-1])
        else:
            flags = None
        self._put(np.r_[self._doc_id, ids], np.r_[0, sizes], flags)
        self._bytes += text_bytes

    def skip(self) -> None:
        """Count a document that could not be read."""
        self._skipped += 1

    def _put(self, ids: np.ndarray, sizes: np.ndarray, learned=None) -> None:
        with naming(self._dir):
            self._tokens.write(ids.astype(self._dtype).tobytes())
            if self._sizes:
                self._sizes.write(sizes.astype("<i4").tobytes())
            if self._learned:
                self._learned.write(learned.astype("u1").tobytes())
        self._length += len(ids)

    def _put_visual(self, visual: np.ndarray) -> None:
        if self._visual is None:
            self._visual = open(self._dir / "visual.bin", "wb")  # noqa: SIM115
            self._visual_shape = visual.shape
        if visual.shape != self._visual_shape:
            given = list(visual.shape)
            raise ConfigError(
                f"visual tokens must all be of one shape, [tokens, width]; the first "
                f"are {list(self._visual_shape or ())}, others {given}."
            )
        with naming(self._dir):
            self._visual.write(visual.astype("<f4").tobytes())

    def close(self) -> dict[str, Any]:
        """Finish the files; returns the counts of this split."""
        if self._starts:
            end = np.array([self._end_learned])
            self._put(np.array([self._doc_id]), np.array([0]), end)
        with naming(self._dir):
            self.__exit__()
            np.save(self._dir / "starts.npy", np.array(self._starts, np.int64))
            if any(self._prompts):
                np.save(self._dir / "prompts.npy", np.array(self._prompts, np.int32))
        counts = {
            "documents": len(self._starts),
            "bytes": self._bytes,
            "tokens": self._length,
            "empty_documents": self._empty,
            "unreadable_documents": self._skipped,
        }
        meta: dict[str, Any] = counts | {"dtype": self._dtype.str}
        if self._visual_shape:
            meta["visual"] = list(self._visual_shape)
        atomic_write(self._dir / "meta.json", json.dumps(meta, indent=2) + "\n")
        return counts


class Stream:
    """A memory-mapped stream that `StreamWriter` wrote.

    Attributes:
      tokens: uint16 or uint32[T], documents with a document token around each.
      starts: int64[documents] offsets of the document tokens before each document.
      prompts: int32[documents] numbers of leading tokens not learned, or None.
      learned: uint8[T] 1 for tokens that are learned, or None: `prompts` says it.
      visual: float32[documents, tokens, width] the visual tokens of each, or None.
    """

    def __init__(self, directory: Path, token_bytes: np.ndarray):
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.directory = directory
        self.counts = {k: v for k, v in meta.items() if k not in ("dtype", "visual")}
        self.tokens = _mapped(directory / "tokens.bin", meta["dtype"], meta["tokens"])
        self.starts = np.load(directory / "starts.npy")
        file = directory / "prompts.npy"
        self.prompts = np.load(file) if file.exists() else None
        file = directory / "bytes.bin"
        self._sizes = None
        if file.exists():
            self._sizes = _mapped(file, "<i4", meta["tokens"])
        self._table = token_bytes
        file = directory / "learned.bin"
        self.learned = _mapped(file, "u1", meta["tokens"]) if file.exists() else None

        shape = (len(self.starts), *meta.get("visual", (0, 0)))
        file = directory / "visual.bin"
        self.visual = None
        if file.exists():
            numbers = _mapped(file, "<f4", math.prod(shape))
            self.visual = numbers.reshape(shape)

    def num_bytes(self, start: int, stop: int) -> np.ndarray:
        """The bytes of each token in a range of the stream, int32[stop - start]."""
        if self._sizes is not None:
            return self._sizes[start:stop]
        return self._table[self.tokens[start:stop]]


def _mapped(file: Path, dtype: str, length: int) -> np.ndarray:
    if file.stat().st_size != length * np.dtype(dtype).itemsize:
        raise OSError(f"{file} does not have {length} items of {dtype}")
    if length == 0:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, "r").view(np.ndarray)


def write_source(
    source, tokenizer, out: Path, where: str, count=lambda number: None
) -> dict[str, Any]:
    """Encode a source in one pass into `out/train` and `out/eval`.

    Args:
      count: called with the bytes of each document that is written.

    Returns:
      The counts of each split, and a hash of the keys of the held-out documents.
    """
    with_bytes = not tokenizer.exact
    held_out = hashlib.sha256()
    kinds = {"text": _texts, "tokens": _tokens, "pairs": _pairs, "chats": _chats}
    encode, chats = kinds[source.content()], source.content() == "chats"
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            (out / split).mkdir(parents=True)
            writer = StreamWriter(
                out / split, tokenizer.vocab_size, tokenizer.doc_id, with_bytes, chats
            )
            writers[split] = stack.enter_context(writer)
        for batch in _batches(source.read(where)):
            for key, value, _ in batch:
                if value is None:
                    writers[source.split(key)].skip()
            batch = [d for d in batch if d.value is not None]
            added = encode([d.value for d in batch], tokenizer, where)
            for (key, _, visual), document in zip(batch, added, strict=True):
                split = source.split(key)
                try:
                    writers[split].add(*document, visual=visual)
                except ConfigError as e:
                    raise ConfigError(f"{where}: {e}") from None
                count(document[2])
                if split == "eval":
                    held_out.update(key.encode(errors="surrogateescape") + b"\n")
        counts = {split: writer.close() for split, writer in writers.items()}
    return {"splits": counts, "held_out_sha256": held_out.hexdigest()}


def _batches(documents) -> Iterator[list]:
    """Yield lists of documents of about `BATCH_CHARS` characters, for all cores."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        value = document.value
        texts = texts_of(value)
        size += len(value) if isinstance(value, np.ndarray) else sum(map(len, texts))
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _texts(texts: list[str], tokenizer, where: str) -> Iterator[tuple]:
    """Yield the arguments of `StreamWriter.add` for each text."""
    coded = tokenizer.encode_with_bytes(texts)
    for text, (ids, sizes) in zip(texts, coded, strict=True):
        yield ids, sizes, len(text.encode())


def _pairs(pairs: list, tokenizer, where: str) -> Iterator[tuple]:
    """Yield the arguments of `StreamWriter.add` for each (prompt, response)."""
    prompts = tokenizer.encode_with_bytes([prompt for prompt, _ in pairs])
    # A response continues its prompt; if the prompt is empty, it begins the text.
    answers = tokenizer.encode_with_bytes([text for _, text in pairs], inside=True)
    alone = tokenizer.encode_with_bytes([text for prompt, text in pairs if not prompt])
    begins = iter(alone)
    for pair, first, second in zip(pairs, prompts, answers, strict=True):
        second = second if pair[0] else next(begins)
        ids, sizes = (np.r_[a, b] for a, b in zip(first, second, strict=True))
        yield ids, sizes, sum(len(text.encode()) for text in pair), len(first[0])


def _chats(chats: list, tokenizer, where: str) -> Iterator[tuple]:
    """Yield the arguments of `StreamWriter.add` for each list of parts."""
    said = [text for parts in chats for text in texts_of(parts)]
    coded = iter(tokenizer.encode_with_bytes(said, inside=True))
    markup: dict[str, tuple] = {}
    for parts in chats:
        own, flags = [], []
        for part in parts:
            if part.markup and part.text not in markup:
                ids = tokenizer.encode_markup(part.text)
                markup[part.text] = ids, tokenizer.bytes_of(ids)
            own.append(markup[part.text] if part.markup else next(coded))
            flags.append(np.full(len(own[-1][0]), part.learned))
        ids, sizes = (np.concatenate(arrays) for arrays in zip(*own, strict=True))
        learned = np.concatenate([*flags, [parts[-1].learned]])
        if len(ids) and ids[-1] == tokenizer.doc_id:  # the writer adds one
            ids, sizes, learned = ids[:-1], sizes[:-1], learned[:-1]
        prompt = int(np.argmax(learned)) if learned.any() else len(ids) + 1
        yield ids, sizes, int(sizes.sum()), prompt, learned


def _tokens(documents: list, tokenizer, where: str) -> Iterator[tuple]:
    """Yield the arguments of `StreamWriter.add` for each list of ids."""
    for ids in documents:
        if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ConfigError(
                f"{where}: token id {bad} is outside the tokenizer's vocabulary of "
                f"{tokenizer.vocab_size}; the ids were made with another tokenizer."
            )
        ids = _strip(ids, tokenizer.doc_id)
        sizes = tokenizer.bytes_of(ids)
        yield ids, sizes, int(sizes.sum())


def _strip(ids: np.ndarray, doc_id: int) -> np.ndarray:
    """Remove document tokens at both ends: the writer adds its own."""
    text = np.flatnonzero(ids != doc_id)
    return ids[text[0] : text[-1] + 1] if len(text) else ids[:0]
