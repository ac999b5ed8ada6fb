"""The runtime tokenizer: text to token ids and back, and the bytes of each token.

It knows how many bytes of UTF-8 each token stands for, so that losses can be given in
bits per byte. Not here: the configs that make it (`tokenizer.py`), the texts and bytes
of single tokens (`token_text.py`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moex.config.base import ConfigError, require, require_choice
from moex.data import token_text
from moex.data.fast_bpe import encode_ascii
from moex.data.files import atomic_write, decode_utf8
from moex.data.library import one_line_errors
from moex.json_files import digest, field, read_object

DOC_TOKEN = "<|doc|>"
PIECE_CHARS = 1_000_000
FEW_CORES = 4  # with more cores, the library itself is faster than `fast_bpe.py`
META, MODEL = "moex_tokenizer.json", "tokenizer.json"
MOST_TOKENS = 2**24  # limit of a vocabulary; the largest published ones have 2**18


def sha256(text: str) -> str:
    """The sha256 of a text as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_model(file: Path, name: str) -> tokenizers.Tokenizer:
    """Read the tokenizer in a file from any program; `name` begins errors."""
    text = decode_utf8(file.read_bytes(), file, name)
    with one_line_errors(f"{name}: not a tokenizers JSON file"):
        model = tokenizers.Tokenizer.from_str(text)
    vocab = model.get_vocab(with_added_tokens=True)
    require(len(vocab) > 0, name, 0, "a tokenizer of one token at least")
    highest = max(vocab.values())
    allowed = f"below {MOST_TOKENS:,}"
    require(highest < MOST_TOKENS, f"{name}: a token id", highest, allowed)
    token_of: dict[int, str] = {}
    for token, i in vocab.items():
        if token_of.setdefault(i, token) != token:
            raise ConfigError(
                f"{name}: {token!r} and {token_of[i]!r} must have ids of their own, "
                f"not both {i}."
            )
    return model


class Tokenizer:
    """Turns text into token ids and back.

    Attributes:
      vocab_size: number of ids, V; ids the model never produces may be among them.
      doc_id: the token before and after every document.
      begin_id: the token before a prompt, None: no token. It is doc_id, with which
        moex trains, unless `begin` was called.
      prefix_id: the token before a text that is scored whole, or that is empty.
      stop_ids: the tokens that end a text: doc_id, and those of an imported model.
      token_bytes: int32[V] bytes of UTF-8 that each token stands for; special ones 0.
      exact: whether `token_bytes` sums to the size of any encoded text.
      fingerprint: sha256 of the model, `doc_id` and `vocab_size`.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer | None,
        doc_id: int,
        vocab_size: int = 0,
        name: str = "the tokenizer",
    ):
        """Wrap a tokenizer of the library; None: of bytes. `name` begins errors."""
        self._model: Any = model
        self._name = name
        self.doc_id = self.prefix_id = doc_id
        self.begin_id: int | None = doc_id
        self.stop_ids: tuple[int, ...] = (doc_id,)
        if model is None:
            self.vocab_size, spec = 257, {}
            self.token_bytes = np.r_[np.ones(256, np.int32), np.int32(0)]
            self.exact, self._gpt2_words = True, False
        else:
            if isinstance(model.model, tokenizers.models.Unigram):
                # Reading rounds scores that were just trained, once: as `load` will.
                self._model = model = tokenizers.Tokenizer.from_str(model.to_str())
            model.no_truncation()
            model.no_padding()
            model.encode_special_tokens = True  # "<|doc|>" in a text stays text
            vocab = model.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocab_size, max(vocab.values()) + 1)
            spec = json.loads(model.to_str())
            self.exact = token_text.is_byte_level(spec)
            self._gpt2_words = self.exact and token_text.has_gpt2_words(spec)
            self.token_bytes = token_text.token_bytes(
                model, spec, self.vocab_size, doc_id
            )
            self._inside = _inside(model, spec)
            self._byte_of = token_text.fallback_bytes(spec, vocab)
            self._hidden = token_text.special_ids(spec)
        self._spec = json.dumps(spec, sort_keys=True)
        identity = f"{self._spec} {self.doc_id} {self.vocab_size}"
        self.fingerprint = sha256(identity)

    @property
    def doc_token(self) -> str:
        """The text of the document token."""
        return self._model.id_to_token(self.doc_id) if self._model else DOC_TOKEN

    def begin(self, begin_id: int | None, prefix_id: int) -> "Tokenizer":
        """Let texts begin as in the training of an imported model."""
        self.begin_id, self.prefix_id = begin_id, prefix_id
        return self

    def stop_at(self, ids: Iterable[int]) -> "Tokenizer":
        """Let texts end at any of these tokens too."""
        self.stop_ids = tuple(sorted({self.doc_id, *ids}))
        return self

    def prompt(self, text: str) -> list[int]:
        """Encode a text that will be continued: at least one id."""
        first = [] if self.begin_id is None else [self.begin_id]
        return [*first, *self.encode(text)] or [self.prefix_id]

    def encode(self, text: str) -> list[int]:
        """Encode a text; no document token is added."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(
        self, texts: Sequence[str], *, inside: bool = False
    ) -> list[np.ndarray]:
        """Encode several texts to int32[n] ids each; this uses all cores.

        A long text is encoded in pieces (split after a newline where there is one), so
        that a large file uses all cores and bounded memory.

        Args:
          texts: texts of valid Unicode.
          inside: whether each text continues another one, so that no space is put
            before its first word.

        Raises:
          ConfigError: if the tokenizer cannot encode one of them.
        """
        if self._model is None:
            with self._errors():
                raw = [np.frombuffer(t.encode(), np.uint8) for t in texts]
            return [r.astype(np.int32) for r in raw]
        pieces = [_pieces(t) if self.exact else [t] for t in texts]
        flat = [p for group in pieces for p in group]
        if self._gpt2_words and (os.cpu_count() or 1) <= FEW_CORES:
            parts = iter(self._ids_by_words(flat))
        else:
            parts = iter(self._model_ids(flat, inside))
        joined = [[next(parts) for _ in group] for group in pieces]
        return [g[0] if len(g) == 1 else np.concatenate(g) for g in joined]

    def encode_markup(self, text: str) -> np.ndarray:
        """Encode text of a chat template to int32[n] ids; it may name special tokens.

        The document token is written as `DOC_TOKEN`, whatever its text is. The text
        continues another one.
        """
        if self._model is None:
            coded = [np.frombuffer(p.encode(), np.uint8) for p in text.split(DOC_TOKEN)]
        else:
            model = tokenizers.Tokenizer.from_str(self._inside.to_str())
            model.encode_special_tokens = False
            with self._errors():
                coded = [
                    np.array(model.encode(part, add_special_tokens=False).ids, int)
                    for part in text.split(DOC_TOKEN)
                ]
        joined = [coded[0]]
        for ids in coded[1:]:
            joined += [np.array([self.doc_id]), ids]
        return np.concatenate(joined).astype(np.int32)

    def _ids_by_words(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode to the same ids as `_model_ids`, in less time on few cores."""
        plain = [t.isascii() for t in texts]
        fast = [t for t, p in zip(texts, plain, strict=True) if p]
        slow = [t for t, p in zip(texts, plain, strict=True) if not p]
        fast_ids = iter(encode_ascii(fast, self._model_ids))
        slow_ids = iter(self._model_ids(slow))
        return [next(fast_ids if p else slow_ids) for p in plain]

    def _model_ids(self, texts: Sequence[str], inside=False) -> list[np.ndarray]:
        model = self._inside if inside else self._model
        with self._errors():
            codes = model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(c.ids, np.int32) for c in codes]

    def _errors(self):
        begins = f"{self._name}: cannot encode a text"
        return one_line_errors(begins, may_panic='"Regex"' in self._spec)

    def encode_with_bytes(
        self, texts: Sequence[str], *, inside: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode to ids and the bytes of each, int32[n]; the sum is exact per text.

        The table `token_bytes` is used if it sums to the text's size. Otherwise (if the
        tokenizer drops or normalises characters) a token gets the bytes from the end of
        the token before to its own end, and the last token gets the rest. A text with
        no token left has no bytes.

        Args:
          texts: texts of valid Unicode.
          inside: as for `encode_batch`.
        """
        if self.exact:
            coded = self.encode_batch(texts, inside=inside)
            return [(ids, self.token_bytes[ids]) for ids in coded]
        model = self._inside if inside else self._model
        with self._errors():
            codes = model.encode_batch(list(texts), add_special_tokens=False)
        pairs = []
        for text, code in zip(texts, codes, strict=True):
            ids = np.array(code.ids, np.int32)
            sizes = self.token_bytes[ids]
            if len(ids) and sizes.sum() != len(text.encode()):
                sizes = token_text.bytes_from_offsets(text, code.offsets)
            pairs.append((ids, sizes))
        return pairs

    def bytes_of(self, ids: np.ndarray) -> np.ndarray:
        """The bytes of each id of a document, int32[n]; the sum is its text's size."""
        sizes = self.token_bytes[ids]
        if self.exact or len(ids) == 0:
            return sizes
        return token_text.bytes_with_sum(sizes, len(self.decode(ids).encode()))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids to text; document tokens are left out.

        Do not join texts that were decoded separately: many tokenizers drop the space
        before the first word. Use `continuation` for ids that follow others.
        """
        ids = [int(i) for i in ids]
        if self._model is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        shown = token_text.broken_runs(ids, self._byte_of)
        if shown == ids:
            return self._model.decode(ids)
        spelled = (
            part if isinstance(part, str) else self._model.id_to_token(part)
            for part in shown
            if part not in self._hidden
        )
        return self._model.decoder.decode([text for text in spelled if text])

    def continuation(self, before: Sequence[int], after: Sequence[int]) -> str:
        """The text that the ids `after` add to that of the ids `before`."""
        known, whole = self.decode(before), self.decode([*before, *after])
        return whole[len(os.path.commonprefix([known, whole])) :]

    def continued(self, prompt: str, new: Sequence[int]) -> str:
        """The text of a prompt with new ids after those of `self.prompt(prompt)`.

        The prompt is kept as it was given, even if the tokenizer changes it.
        """
        before = self.prompt(prompt)
        whole = self.decode([*before, *new])
        if whole.startswith(prompt):
            return whole
        added = self.continuation(before, new)
        if prompt[-1:] == " " != self.decode(before)[-1:]:
            # Decoding dropped the prompt's last space; it is now before the next word.
            added = added.removeprefix(" ")
        return prompt + added

    def pieces(self) -> list[str]:
        """The text of each id, for people; "" for ids that are not used.

        Bytes that are not a whole character are written as \\xNN.
        """
        if self._model is None:
            spell = token_text.spelled
            return [*(spell(bytes([i])) for i in range(256)), DOC_TOKEN]
        vocab = self._model.get_vocab(with_added_tokens=False)
        return token_text.pieces(json.loads(self._spec), vocab, self.vocab_size)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into a directory, for `load`; a kill breaks no file."""
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
        meta["sha256"] = digest(meta)
        atomic_write(directory / META, json.dumps(meta, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a tokenizer that `save` wrote.

        Raises:
          ConfigError: if there is none, or if a file was changed afterwards.
        """
        file = Path(directory) / META
        if not file.is_file():
            raise ConfigError(f"{directory}: holds no tokenizer ({META} is missing).")
        meta, where = read_object(file), str(file)
        kind = field(meta, "kind", str, where)
        size = field(meta, "vocab_size", int, where)
        fingerprint = field(meta, "fingerprint", str, where)
        require_choice(f"{where}: kind", kind, ("bytes", "tokenizers"))
        allowed = f"in [1, {MOST_TOKENS:,}]"
        require(1 <= size <= MOST_TOKENS, f"{where}: vocab_size", size, allowed)
        doc_id = _token_id(meta, "doc_id", int, size, where)
        model_file = file.with_name(MODEL)
        if kind != "bytes" and not model_file.is_file():
            raise ConfigError(f"{directory}: holds no tokenizer ({MODEL} is missing).")
        model = None if kind == "bytes" else read_model(model_file, str(model_file))
        made = cls(model, doc_id, size, str(model_file))
        seal = meta.pop("sha256", None)  # files from before version 0.2 have none
        sealed = seal in (None, digest(meta))
        if made.fingerprint != fingerprint or not sealed:
            raise ConfigError(
                f"{directory}: the tokenizer does not match its fingerprint; it was "
                "changed after it was saved."
            )
        stops = field(meta, "stop_ids", list[int], where, [])
        made.stop_at(_in_vocabulary(i, "stop_ids", size, where) for i in stops)
        if "begin_id" in meta:
            begin = _token_id(meta, "begin_id", int | None, made.vocab_size, where)
            prefix = _token_id(meta, "prefix_id", int, made.vocab_size, where)
            return made.begin(begin, prefix)
        # Files from before version 0.2 have no `begin_id`: in all runs, imported or
        # not, texts then began with the first token of the tokenizer's template.
        first = None if model is None else template_begin(model)
        return made if first is None else made.begin(first, first)


def _token_id(meta: dict, name: str, kind: Any, vocab_size: int, where: str) -> Any:
    """Read a field that is a token id."""
    return _in_vocabulary(field(meta, name, kind, where), name, vocab_size, where)


def _in_vocabulary(value: int | None, name: str, vocab_size: int, where: str) -> Any:
    ok = value is None or 0 <= value < vocab_size
    require(ok, f"{where}: {name}", value, f"in [0, {vocab_size})")
    return value


def _inside(model: tokenizers.Tokenizer, spec: dict) -> tokenizers.Tokenizer:
    """The tokenizer for text that continues another; often it is `model` itself."""
    changed = token_text.inside_a_text(spec)
    if changed == spec:
        return model
    made = tokenizers.Tokenizer.from_str(json.dumps(changed))
    made.encode_special_tokens = True
    return made


def template_begin(model: tokenizers.Tokenizer) -> int | None:
    """The token that the template of a tokenizer puts before a text."""
    with one_line_errors("the tokenizer: cannot encode the text 'a'"):
        bare = model.encode("a", add_special_tokens=False).ids
        whole = model.encode("a", add_special_tokens=True).ids
    return None if whole[:1] == bare[:1] else whole[0]


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
