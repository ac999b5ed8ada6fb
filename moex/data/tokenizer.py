"""Tokenizers: raw bytes, a byte-level BPE trained on the run's own text, or a file.

`Tokenizer` is the runtime object that all three configs make. It knows how many bytes
of UTF-8 each token stands for, so that losses can be given in bits per byte.

Not here: writing token streams (`stream.py`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moex.config import Config, ConfigError, nearest, require
from moex.data.files import atomic_write, locked
from moex.data.words import encode_ascii

DOC_TOKEN = "<|doc|>"
BPE_SAMPLE_BYTES = 4_000_000
PIECE_CHARS = 1_000_000
FEW_CORES = 4  # with more, the library itself is faster than `words.py`
META, MODEL = "moex_tokenizer.json", "tokenizer.json"

# Texts of the training split up to about so many bytes in all, and their digest.
Corpus = tuple[Callable[[int], list[str]], str]


@dataclasses.dataclass(kw_only=True, slots=True)
class Bytes(Config):
    """The 256 bytes, and one more token between documents: a vocabulary of 257."""

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> "Tokenizer":
        """The byte tokenizer; nothing is learned and nothing is cached."""
        return Tokenizer(None, doc_id=256, vocab_size=257)


@dataclasses.dataclass(kw_only=True, slots=True)
class Bpe(Config):
    """A byte-level BPE trained on the training split; any text can be encoded."""

    vocab: int = 4096  # number of tokens, > 256

    def validate(self, path: str) -> None:
        """Check that all bytes and the document token fit."""
        require(self.vocab > 256, f"{path}.vocab", self.vocab, "> 256 (all bytes)")

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> "Tokenizer":
        """Train, or read what was trained before on the same text.

        About 4 MB of text are enough: on the standard library at 4096 tokens, training
        on all 10 MB gives 3.58 bytes per token on held-out files, on 3 MB 3.57.

        Raises:
          ConfigError: if there is no text to train on.
        """
        sample, digest = corpus
        key = f"bpe-v1 {tokenizers.__version__} {self.vocab} {digest}"
        key = hashlib.sha256(key.encode()).hexdigest()[:32]
        file = cache / f"bpe-{self.vocab}-{key}.json"
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                self._train(file, sample(BPE_SAMPLE_BYTES), where, log)
        model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        return Tokenizer(model, doc_id=0, vocab_size=self.vocab)

    def _train(self, file: Path, texts: list[str], where: str, log) -> None:
        if not texts:
            raise ConfigError(
                f"{where}: Bpe needs text to train on and no source has any in its "
                "training split; for token ids use TokenizerFile(path=...)."
            )
        size = sum(map(len, texts)) / 1e6
        log(f"tokenizer: training BPE with {self.vocab} tokens on {size:.1f} MB")
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(train_bpe(texts, self.vocab).to_str(), encoding="utf-8")
        os.replace(temporary, file)


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerFile(Config):
    """A tokenizer in the JSON format of Hugging Face `tokenizers`."""

    path: str  # the file, usually called tokenizer.json
    doc_token: str = "<|endoftext|>"  # the token that ends a document

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> "Tokenizer":
        """Read the file.

        Raises:
          ConfigError: if it is missing, cannot be read or lacks `doc_token`.
        """
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise ConfigError(f"{where}.path = {self.path!r}: no such file.")
        try:
            model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as e:  # the library raises plain Exception
            raise ConfigError(
                f"{where}.path = {self.path!r}: not a tokenizers JSON file ({e})."
            ) from None
        doc_id = model.token_to_id(self.doc_token)
        if doc_id is None:
            raise ConfigError(
                f"{where}.doc_token = {self.doc_token!r}: not in the vocabulary of "
                f"{self.path}.{nearest(self.doc_token, model.get_vocab())}"
            )
        return Tokenizer(model, doc_id=doc_id)


@dataclasses.dataclass(kw_only=True, slots=True)
class SavedTokenizer(Config):
    """The tokenizer that a run saved; what `Tokenizer.save` wrote."""

    path: str  # the directory, usually RUN/tokenizer

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> "Tokenizer":
        """Read it.

        Raises:
          ConfigError: if there is none, or if it was changed since.
        """
        return Tokenizer.load(self.path)


def train_bpe(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE; the document token has id 0."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[DOC_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: number of ids, V; ids the model never produces may be among them.
      doc_id: the token before and after every document.
      begin_id: the token before a prompt, None: no token; doc_id unless `begin` was
        called, because that is what moex trains with.
      prefix_id: the token before a text that is scored whole, or is empty.
      stop_ids: the tokens that end a text; doc_id, and those of an imported model.
      token_bytes: int32[V] bytes of UTF-8 that each token stands for; special ones 0.
      exact: whether `token_bytes` sums to the size of any encoded text.
      fingerprint: sha256 of all of the above and the model.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer | None,
        doc_id: int,
        vocab_size: int = 0,
    ):
        self._model: Any = model
        self.doc_id = self.prefix_id = doc_id
        self.begin_id: int | None = doc_id
        self.stop_ids: tuple[int, ...] = (doc_id,)
        if model is None:
            self.vocab_size, spec = 257, {}
            self.token_bytes = np.r_[np.ones(256, np.int32), np.int32(0)]
            self.exact, self._gpt2_words = True, False
        else:
            model.no_truncation()
            model.no_padding()
            model.encode_special_tokens = True  # "<|doc|>" in a text stays text
            self.vocab_size = max(vocab_size, _highest_id(model) + 1)
            spec = json.loads(model.to_str())
            self.exact = _is_byte_level(spec)
            self._gpt2_words = self.exact and _has_gpt2_words(spec)
            self.token_bytes = _token_bytes(model, spec, self.vocab_size, doc_id)
        self._spec = json.dumps(spec, sort_keys=True)
        identity = f"{self._spec} {self.doc_id} {self.vocab_size}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def begin(self, begin_id: int | None, prefix_id: int) -> "Tokenizer":
        """Let texts begin as those that an imported model was trained with."""
        self.begin_id, self.prefix_id = begin_id, prefix_id
        return self

    def stop_at(self, ids: Iterable[int]) -> "Tokenizer":
        """Let texts end at any of these tokens too."""
        self.stop_ids = tuple(sorted({self.doc_id, *ids}))
        return self

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued, at least one."""
        first = [] if self.begin_id is None else [self.begin_id]
        return [*first, *self.encode(text)] or [self.prefix_id]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no document token is added."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, each int32[n]; uses all cores.

        A long text is encoded in pieces (split after a newline where there is one), so
        that one large file neither runs on one core nor needs memory in proportion.
        """
        if self._model is None:
            raw = [np.frombuffer(t.encode(), np.uint8) for t in texts]
            return [r.astype(np.int32) for r in raw]
        pieces = [_pieces(t) if self.exact else [t] for t in texts]
        flat = [p for group in pieces for p in group]
        if self._gpt2_words and (os.cpu_count() or 1) <= FEW_CORES:
            parts = iter(self._ids_by_words(flat))
        else:
            parts = iter(self._model_ids(flat))
        joined = [[next(parts) for _ in group] for group in pieces]
        return [g[0] if len(g) == 1 else np.concatenate(g) for g in joined]

    def _ids_by_words(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same ids as `_model_ids`, in less time on few cores."""
        plain = [t.isascii() for t in texts]
        fast = [t for t, p in zip(texts, plain, strict=True) if p]
        slow = [t for t, p in zip(texts, plain, strict=True) if not p]
        fast_ids = iter(encode_ascii(fast, self._model_ids))
        slow_ids = iter(self._model_ids(slow))
        return [next(fast_ids if p else slow_ids) for p in plain]

    def _model_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        codes = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(c.ids, np.int32) for c in codes]

    def encode_with_bytes(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and the bytes each stands for, both int32[n], exact in sum per text.

        The table is used where it sums to the text's size. Elsewhere (a tokenizer that
        drops or normalises characters) a token gets the bytes from the end of the one
        before it to its own end, and the last one what is left.
        """
        if self.exact:
            return [(i, self.token_bytes[i]) for i in self.encode_batch(texts)]
        codes = self._model.encode_batch(list(texts), add_special_tokens=False)
        pairs = []
        for text, code in zip(texts, codes, strict=True):
            ids = np.array(code.ids, np.int32)
            sizes = self.token_bytes[ids]
            if len(ids) and sizes.sum() != len(text.encode()):
                sizes = _bytes_from_offsets(text, code.offsets)
            pairs.append((ids, sizes))
        return pairs

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; document tokens are left out."""
        ids = [int(i) for i in ids]
        if self._model is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return self._model.decode(ids)

    def pieces(self) -> list[str]:
        """What each id stands for, as text for people; "" for ids that are not used.

        Bytes that are no whole character are written as \\xNN.
        """
        if self._model is None:
            return [*(_text(bytes([i])) for i in range(256)), DOC_TOKEN]
        spec, pieces = json.loads(self._spec), [""] * self.vocab_size
        byte_level = "ByteLevel" in _kinds([spec["pre_tokenizer"], spec["decoder"]])
        for token, i in self._model.get_vocab(with_added_tokens=False).items():
            if byte_level and all(c in BYTE_OF for c in token):
                pieces[i] = _text(bytes(BYTE_OF[c] for c in token))
            elif len(token) == 6 and token.startswith("<0x"):
                pieces[i] = _text(bytes([int(token[3:5], 16)]))
            else:
                pieces[i] = token.replace("\u2581", " ")
        for token in spec["added_tokens"]:
            pieces[token["id"]] = token["content"]
        return pieces

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into a directory, for `load`; survives a kill."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._model is not None:
            atomic_write(directory / MODEL, self._model.to_str())
        meta = {
            "kind": "bytes" if self._model is None else "tokenizers",
            **{"doc_id": self.doc_id, "begin_id": self.begin_id},
            "prefix_id": self.prefix_id,
            "stop_ids": list(self.stop_ids),
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        atomic_write(directory / META, json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote.

        Raises:
          ConfigError: if there is none, or if the file was changed since.
        """
        file = Path(directory) / META
        if not file.is_file():
            raise ConfigError(f"{directory}: holds no tokenizer ({META} is missing).")
        meta = json.loads(file.read_text(encoding="utf-8"))
        model = None
        if meta["kind"] != "bytes":
            text = (file.parent / MODEL).read_text(encoding="utf-8")
            model = tokenizers.Tokenizer.from_str(text)
        made = cls(model, meta["doc_id"], meta["vocab_size"])
        if made.fingerprint != meta["fingerprint"]:
            raise ConfigError(
                f"{directory}: the tokenizer does not match its fingerprint; it was "
                "changed after it was saved."
            )
        made.stop_at(meta.get("stop_ids", ()))
        if "begin_id" in meta:
            return made.begin(meta["begin_id"], meta["prefix_id"])
        # Of before it was kept: the template's, of native runs too.
        first = None if model is None else template_begin(model)
        return made if first is None else made.begin(first, first)


def template_begin(model: tokenizers.Tokenizer) -> int | None:
    """The token that the template of a tokenizer puts before a text."""
    bare = model.encode("a", add_special_tokens=False).ids
    whole = model.encode("a", add_special_tokens=True).ids
    return None if whole[:1] == bare[:1] else whole[0]


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes, in order, for
    those from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    own = {chr(b): b for b in printable}
    return own | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _bytes_of_characters()


def _text(piece: bytes) -> str:
    return piece.decode(errors="backslashreplace")


def _highest_id(model: tokenizers.Tokenizer) -> int:
    return max(model.get_vocab(with_added_tokens=True).values())


def _kinds(part) -> set[str]:
    """The `type` of a part of a tokenizer's JSON, and of all parts inside it."""
    if isinstance(part, list):
        return set().union(*map(_kinds, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_kinds, part.values()))


def _is_byte_level(spec: dict) -> bool:
    """Whether every byte of a text ends up in exactly one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return (
        spec.get("normalizer") is None
        and "ByteLevel" in _kinds(spec.get("pre_tokenizer"))
        and _kinds(spec.get("pre_tokenizer")) <= {"ByteLevel", "Sequence", "Split"}
        and '"add_prefix_space": true' not in json.dumps(spec["pre_tokenizer"])
        and '"Removed"' not in json.dumps(spec["pre_tokenizer"])
        and spec["model"].get("type") == "BPE"
        and set(alphabet) <= spec["model"]["vocab"].keys()
        and not any(t["lstrip"] or t["rstrip"] for t in spec["added_tokens"])
    )


def _has_gpt2_words(spec: dict) -> bool:
    """Whether words are those of `words.py`."""
    how = spec["pre_tokenizer"]
    special = all(t["special"] for t in spec["added_tokens"])
    return special and how["type"] == "ByteLevel" and how.get("use_regex", True)


def _token_bytes(model, spec: dict, vocab_size: int, doc_id: int) -> np.ndarray:
    byte_level = "ByteLevel" in _kinds([spec["pre_tokenizer"], spec["decoder"]])
    table = np.zeros(vocab_size, np.int32)
    for token, i in model.get_vocab(with_added_tokens=False).items():
        if byte_level:
            table[i] = len(token)  # one character of its alphabet is one byte
        elif len(token) == 6 and token.startswith("<0x"):
            table[i] = 1
        else:
            table[i] = len(token.replace("\u2581", " ").encode())
    for token in spec["added_tokens"]:
        size = 0 if token["special"] else len(token["content"].encode())
        table[token["id"]] = size
    table[doc_id] = 0
    return table


def _pieces(text: str) -> list[str]:
    if len(text) <= PIECE_CHARS:
        return [text]
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces


def _bytes_from_offsets(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    size = 1 + (code >= 0x80) + (code >= 0x800).astype(int) + (code >= 0x10000)
    byte_at = np.r_[0, np.cumsum(size)]
    ends = np.maximum.accumulate(np.array([e for _, e in offsets], np.int64))
    ends[-1] = len(text)
    return np.diff(byte_at[ends], prepend=0).astype(np.int32)
