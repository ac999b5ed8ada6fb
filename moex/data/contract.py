"""The contracts of text data: base classes of document sources and tokenizers.

Subclass a config here, define the abstract methods, and override the other methods
where their result differs.
"""

import abc
import dataclasses
import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from moex.config.base import Config, require
from moex.data.encoding import Tokenizer
from moex.data.files import File, find_files, plain_name, unit_hash

Say = Callable[[str], None]  # prints one line for people
# A function that gives training texts of about this many bytes in all, and a digest.
Corpus = tuple[Callable[[int], list[str]], str]


class Part(NamedTuple):
    """A part of a chat: a text, whether it is learned, and whether it is markup.

    Markup comes from the chat's template: special tokens that are named in it, such as
    <|im_end|>, are encoded as such. In all other text they stay text.
    """

    text: str
    learned: bool
    markup: bool


class Document(NamedTuple):
    """A document: a stable key, and its text, token ids, (prompt, response) or parts.

    The value None means that the document could not be read; it is only counted.
    Visual tokens, float32 [tokens, width], are those that belong to the document.
    """

    key: str
    value: str | np.ndarray | tuple[str, str] | tuple[Part, ...] | None
    visual: np.ndarray | None = None


def texts_of(value) -> tuple[str, ...]:
    """The texts of a document's value, without markup; () for token ids and None."""
    if isinstance(value, tuple):
        parts = (p for p in value if not (isinstance(p, Part) and p.markup))
        return tuple(p.text if isinstance(p, Part) else p for p in parts)
    return (value,) if isinstance(value, str) else ()


@dataclasses.dataclass(kw_only=True, slots=True)
class Source(Config, abc.ABC):
    """A source of documents: its share of the mixture, its name, its held-out part."""

    role: ClassVar[str] = "a kind of source, such as Text"
    # Fields that came later. While one is false, data that was cached before is valid.
    ADDED: ClassVar[tuple[str, ...]] = ()

    weight: float = 1.0  # share in the training mixture, in [1e-6, 1e6]
    name: str = ""  # name of the domain; "": the class name, or the stem of the file
    # Fraction of documents kept for evaluation, in [0, 1]; 1: all are only scored.
    holdout: float = 0.05

    def validate(self, path: str) -> None:
        """Check the fields that all sources share."""
        ok = 1e-6 <= self.weight <= 1e6  # Grain turns weights into whole numbers
        require(ok, f"{path}.weight", self.weight, "> 0, in [1e-6, 1e6]")
        require(0 <= self.holdout <= 1, f"{path}.holdout", self.holdout, "in [0, 1]")

    @abc.abstractmethod
    def files(self, where: str, say: Say | None = None) -> list[File]:
        """List all input files in a fixed order.

        Args:
          where: the path of this config, for errors.
          say: called with one line for each kind of file that was left out.

        Raises:
          ConfigError: for a path that matches no file.
        """

    @abc.abstractmethod
    def read(self, where: str) -> Iterator[Document]:
        """Yield every document of both splits, in a fixed order."""

    def label(self) -> str:
        """The name of the domain."""
        return self.name or type(self).__name__.lower()

    def content(self) -> str:
        """The kind of the documents: `text`, `tokens`, `pairs` or `chats`.

        Pairs and chats are packed whole.
        """
        return "text"

    def check_file(self, file: File, where: str) -> None:
        """Raise `ConfigError` for mistakes that show without reading all of a file."""

    def cut(self, file: File) -> str:
        """A text for comparing sources: if equal, they give documents equal keys."""
        return ""

    def split(self, key: str) -> str:
        """The split that the document `key` belongs to: `train` or `eval`."""
        return "eval" if unit_hash(key, "moex.holdout") < self.holdout else "train"

    def documents(self, split: str, where: str = "source") -> Iterator[Document]:
        """Yield the documents of one split, in a fixed order."""
        return (d for d in self.read(where) if self.split(d.key) == split)


@dataclasses.dataclass(kw_only=True, slots=True)
class FileSource(Source):
    """The base of sources that read paths."""

    paths: tuple[str, ...]  # files, directories (recursive) or globs

    def label(self) -> str:
        """The name of the domain: `name`, or the stem of the only file."""
        if not self.name and len(self.paths) == 1 and not glob.has_magic(self.paths[0]):
            return Path(plain_name(self.paths[0])).stem
        return Source.label(self)

    def files(self, where: str, say: Say | None = None) -> list[File]:
        """List the files that the paths name, without those that are empty."""
        return find_files(self.paths, f"{where}.paths", say, may_be_empty=True)


@dataclasses.dataclass(kw_only=True, slots=True)
class TokenizerConfig(Config, abc.ABC):
    """The base of tokenizer configs."""

    role: ClassVar[str] = "a tokenizer config such as Bpe"

    @abc.abstractmethod
    def make(self, where: str, corpus: Corpus, cache: Path, log=print) -> Tokenizer:
        """Make the tokenizer.

        Args:
          where: the path of this config, for errors.
          corpus: training text, for a tokenizer that is trained.
          cache: folder in which a trained tokenizer can be kept.
          log: called with one line for people.

        Raises:
          ConfigError: if the tokenizer cannot be made.
        """

    def known_size(self) -> int | None:
        """The size of the vocabulary if the config alone decides it, or else None."""
        return None
