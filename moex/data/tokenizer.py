"""Tokenizer configs: raw bytes, a BPE trained on the run's own text, or a file.

All of them make a `Tokenizer`. Not here: `Tokenizer` itself (`encoding.py`), writing
token streams (`stream.py`).
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moex.config.base import ConfigError, nearest, require, require_path
from moex.data.contract import Corpus, TokenizerConfig
from moex.data.encoding import DOC_TOKEN, MOST_TOKENS, Tokenizer, read_model, sha256
from moex.data.files import atomic_write, locked
from moex.json_files import read_object
from moex.progress import phase

# Bytes of text to train on: the first for this many tokens, for more in proportion.
BPE_LEAST_BYTES, BPE_FEW_TOKENS, BPE_MOST_BYTES = 4_000_000, 4096, 256_000_000


@dataclasses.dataclass(kw_only=True, slots=True)
class Bytes(TokenizerConfig):
    """The 256 bytes and one token between documents: a vocabulary of 257."""

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> Tokenizer:
        """Make the byte tokenizer; it needs neither training nor the cache."""
        return Tokenizer(None, doc_id=256, vocab_size=257)


@dataclasses.dataclass(kw_only=True, slots=True)
class Bpe(TokenizerConfig):
    """A byte-level BPE trained on the training split; any text can be encoded."""

    vocab: int = 4096  # number of tokens, > 256 and at most MOST_TOKENS

    def validate(self, path: str) -> None:
        """Check that all bytes and the document token fit."""
        allowed = f"> 256 (all bytes) and at most {MOST_TOKENS:,}"
        require(256 < self.vocab <= MOST_TOKENS, f"{path}.vocab", self.vocab, allowed)

    def known_size(self) -> int:
        """The size of the vocabulary: `vocab`."""
        return self.vocab

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> Tokenizer:
        """Train it, or read one that was trained before on the same text.

        It is trained on `bpe_bytes(vocab)` of text. For 4096 tokens 4 MB are enough:
        held-out files of the standard library have 3.58 bytes per token with all
        10 MB, and 3.57 with 3 MB. For 32,000 they are not: held-out files of installed
        packages have 3.73 bytes per token with 4 MB, and 3.84 with 31 MB.

        Raises:
          ConfigError: if there is no text to train on.
        """
        sample, digest = corpus
        amount = bpe_bytes(self.vocab)
        key = f"bpe-v2 {tokenizers.__version__} {self.vocab} {digest}"
        key += f" {amount}" if amount > BPE_LEAST_BYTES else ""
        key = sha256(key)[:32]
        file = cache / f"bpe-{self.vocab}-{key}.json"
        with locked(file.with_suffix(".lock")):
            text = _kept(file)
            if text is None:
                text = self._train(sample(amount), amount, where, log)
                kept = {"sha256": sha256(text), "tokenizer": text}
                atomic_write(file, json.dumps(kept) + "\n")
        model = tokenizers.Tokenizer.from_str(text)
        return Tokenizer(model, doc_id=0, vocab_size=self.vocab)

    def _train(self, texts: list[str], amount: int, where: str, log) -> str:
        if not texts:
            raise ConfigError(
                f"{where}: Bpe needs text to train on and no source has any in its "
                "training split; for token ids use TokenizerFile(path=...)."
            )
        size = sum(map(len, texts))
        read = f"{size / 1e6:.1f} MB"
        if size < amount // 2:
            read += f", all that there is; {amount / 1e6:.1f} MB would fit its size"
        log(f"tokenizer: training BPE with {self.vocab} tokens on {read}")
        with phase("training the tokenizer"):
            return train_bpe(texts, self.vocab).to_str()


def _kept(file: Path) -> str | None:
    """Read a tokenizer in the cache; None if it is damaged or not there."""
    try:
        kept = read_object(file)
    except ConfigError:
        return None
    text = kept.get("tokenizer")
    return (
        text if isinstance(text, str) and kept.get("sha256") == sha256(text) else None
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerFile(TokenizerConfig):
    """A tokenizer in the JSON format of Hugging Face `tokenizers`."""

    path: str  # the file, usually called tokenizer.json
    doc_token: str = "<|endoftext|>"  # the token that ends a document

    def validate(self, path: str) -> None:
        """Check the fields."""
        require_path(f"{path}.path", self.path)

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> Tokenizer:
        """Read the file.

        Raises:
          ConfigError: if it is missing, cannot be read or lacks `doc_token`.
        """
        file = Path(self.path).expanduser()
        name = f"{where}.path = {self.path!r}"
        if not file.is_file():
            raise ConfigError(f"{name}: no such file.")
        model = read_model(file, name)
        doc_id = model.token_to_id(self.doc_token)
        if doc_id is None:
            raise ConfigError(
                f"{where}.doc_token = {self.doc_token!r}: not in the vocabulary of "
                f"{self.path}.{nearest(self.doc_token, model.get_vocab())}"
            )
        return Tokenizer(model, doc_id=doc_id, name=name)


@dataclasses.dataclass(kw_only=True, slots=True)
class SavedTokenizer(TokenizerConfig):
    """The tokenizer of a run, which `Tokenizer.save` wrote."""

    path: str  # the directory, usually RUN/tokenizer

    def validate(self, path: str) -> None:
        """Check the fields."""
        require_path(f"{path}.path", self.path)

    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> Tokenizer:
        """Read the tokenizer.

        Raises:
          ConfigError: if there is none, or if it was changed after it was saved.
        """
        return Tokenizer.load(self.path)


def bpe_bytes(vocab: int) -> int:
    """The bytes of text that fit a vocabulary of `vocab` tokens."""
    in_proportion = BPE_LEAST_BYTES * max(vocab, BPE_FEW_TOKENS) // BPE_FEW_TOKENS
    return min(in_proportion, BPE_MOST_BYTES)


def train_bpe(texts: Iterable[str], vocab: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE; the document token has id 0."""
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
