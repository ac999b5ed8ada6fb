"""Sources of documents: one small config per kind of file.

A source is a config that lists its files, checks them, and yields `Document`s in a
fixed order. Whether a document is held out for evaluation depends on a hash of its own
key only, so adding a document never moves another one between the splits.

Not here: tokenizing (`encoding.py`), packing into sequences (`packing.py`).
"""

import abc
import dataclasses
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moex.config.base import ConfigError, nearest, require, require_choice
from moex.data import parquet
from moex.data.contract import Document, FileSource, Say, Source
from moex.data.files import (
    BOM,
    File,
    content_key,
    decode_utf8,
    find_files,
    num_bytes,
    one_line,
    open_bytes,
    plain_name,
    read_lines,
    read_text,
)
from moex.data.records import read_records, saved_dataset, text_at, visual_at

END = " end"  # ends the keys of held-out parts
PART_BYTES = 1_000_000
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclasses.dataclass(kw_only=True, slots=True)
class PythonStdlib(Source):
    """The source text of Python's standard library: data that every machine has.

    Each file is a document. Tests and third-party packages are left out; files that are
    not UTF-8 are skipped and counted.
    """

    def label(self) -> str:
        """The name of the domain."""
        return self.name or "python_stdlib"

    def files(self, where: str, say: Say | None = None) -> list[File]:
        """List all `.py` files of the standard library, sorted by relative path."""
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        skip |= {"__pycache__", "lib-dynload"}
        found = []
        for base, dirs, names in os.walk(root):
            dirs[:] = [d for d in dirs if d not in skip]
            paths = [Path(base, n) for n in names if n.endswith(".py")]
            found += [File(p.relative_to(root).as_posix(), p) for p in paths]
        if not found:
            raise ConfigError(
                f"{where}: this Python has no library source text in {root}; use "
                "Text(paths=(...,)) with files of your own."
            )
        return sorted(found)

    def read(self, where: str) -> Iterator[Document]:
        """Yield one document per file."""
        for file in self.files(where):
            try:
                yield Document(file.name, file.path.read_bytes().decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield Document(file.name, None)


@dataclasses.dataclass(kw_only=True, slots=True)
class Text(FileSource):
    """UTF-8 text files: one document per file, or several with a `delimiter`."""

    delimiter: str = ""  # text between two documents; "": each file is one document

    # Hold out the last part of each file, a share of `holdout`, instead of documents.
    # Files are then read in parts of about PART_BYTES, each a document.
    holdout_ends: bool = False

    ADDED: ClassVar[tuple[str, ...]] = ("holdout_ends",)

    def validate(self, path: str) -> None:
        """Check the fields."""
        FileSource.validate(self, path)
        ok = not (self.holdout_ends and self.delimiter)
        require(ok, f"{path}.holdout_ends", True, "False with a delimiter")

    def split(self, key: str) -> str:
        """The split of a document; with `holdout_ends` its key says it."""
        if self.holdout_ends:
            return "eval" if key.endswith(END) else "train"
        return FileSource.split(self, key)

    def check_file(self, file: File, where: str) -> None:
        """Check that a compressed file is one."""
        with open_bytes(file, f"{where}.paths") as stream:
            stream.read(1)

    def cut(self, file: File) -> str:
        """The delimiter: without one, the key of a document is the file's name."""
        if self.holdout_ends:
            return "ends"
        return self.delimiter or f"whole {plain_name(file.name)}"

    def read(self, where: str) -> Iterator[Document]:
        """Yield one document per file, or per delimited part."""
        for file in self.files(where):
            if self.holdout_ends:
                yield from self._parts(file, f"{where}.paths")
                continue
            if not self.delimiter:
                text = read_text(file, f"{where}.paths")
                yield Document(plain_name(file.name), text)
                continue
            for part in self._delimited(file, f"{where}.paths"):
                if part:
                    yield Document(content_key(part.encode()), part)

    def _delimited(self, file: File, where: str) -> Iterator[str]:
        """Yield the texts between delimiters; little more than one is in memory."""
        rest, at = "", 0
        with open_bytes(file, where) as stream:
            while raw := read_lines(stream, PART_BYTES):
                begin = len(BOM) if at == 0 and raw.startswith(BOM) else 0
                seen = max(len(rest) - len(self.delimiter), 0)
                rest += decode_utf8(raw[begin:], file.path, where, at + begin)
                at += len(raw)
                if rest.find(self.delimiter, seen) >= 0:
                    *whole, rest = rest.split(self.delimiter)
                    yield from whole
        yield rest

    def _parts(self, file: File, where: str) -> Iterator[Document]:
        """Yield the parts of a file in order, cut after lines; the last is held out."""
        name, at = plain_name(file.name), 0
        cut = round(num_bytes(file, where) * (1 - self.holdout))
        with open_bytes(file, where) as stream:
            while True:
                end = at >= cut
                left = PART_BYTES if end else cut - at
                raw = read_lines(stream, min(PART_BYTES, left))
                if not raw:
                    return
                begin = len(BOM) if at == 0 and raw.startswith(BOM) else 0
                text = decode_utf8(raw[begin:], file.path, where, at + begin)
                yield Document(f"{name} {at}{END if end else ''}", text)
                at += len(raw)


@dataclasses.dataclass(kw_only=True, slots=True)
class Parquet(FileSource):
    """A column of Parquet files: one document per row. It needs the package pyarrow."""

    column: str = "text"  # the column that holds the documents
    kind: str = "text"  # "text", or "tokens" for lists of token ids

    def validate(self, path: str) -> None:
        """Check the fields."""
        FileSource.validate(self, path)
        require_choice(f"{path}.kind", self.kind, ("text", "tokens"))

    def content(self) -> str:
        """The kind of content of the documents: `kind`."""
        return self.kind

    def check_file(self, file: File, where: str) -> None:
        """Check that the file is Parquet and has the column, of the right type."""
        schema = parquet.open_file(file, where).schema_arrow
        count = schema.names.count(self.column)
        if count == 0:
            raise ConfigError(
                f"{where}.column = {self.column!r}: {file.path} has the columns "
                f"{', '.join(schema.names)}.{nearest(self.column, schema.names)}"
            )
        if count > 1:
            raise ConfigError(
                f"{where}.column = {self.column!r}: {file.path} has {count} columns of "
                "that name; give the one to be read a name of its own."
            )
        found = schema.field(schema.names.index(self.column)).type
        if not parquet.holds(found, self.kind):
            raise ConfigError(
                f"{where}.column = {self.column!r}: has type {found} in {file.path}, "
                f"but kind={self.kind!r} needs "
                f"{'lists of integers' if self.kind == 'tokens' else 'strings'}."
            )

    def read(self, where: str) -> Iterator[Document]:
        """Yield one document per row; a null is counted as unreadable."""
        for file in self.files(where):
            for i, row in enumerate(parquet.rows(file, self.column, where)):
                if not row.is_valid:
                    yield Document("null", None)
                elif self.kind == "tokens":
                    if row.values.null_count:
                        raise ConfigError(
                            f"{where}.column = {self.column!r}: row {i} of {file.path} "
                            "has a null among its token ids."
                        )
                    yield _token_document(row.values.to_numpy(zero_copy_only=False))
                else:
                    raw = row.as_buffer().to_pybytes()
                    yield _text_document(raw, f"row {i} of {file.path}", where)


def _text_document(raw: bytes, at: str, where: str) -> Document:
    return Document(content_key(raw), decode_utf8(raw, at, f"{where}.paths"))


def _token_document(ids: np.ndarray) -> Document:
    ids = ids.astype("<i8")
    return Document(content_key(ids.tobytes()), ids)


@dataclasses.dataclass(kw_only=True, slots=True)
class ArrayRecord(FileSource):
    """ArrayRecord files: one document per record."""

    kind: str = "text"  # "text" for UTF-8, "tokens" for little-endian token ids
    token_dtype: str = "uint16"  # with kind="tokens": the type of an id

    def validate(self, path: str) -> None:
        """Check the fields."""
        FileSource.validate(self, path)
        require_choice(f"{path}.kind", self.kind, ("text", "tokens"))
        require_choice(f"{path}.token_dtype", self.token_dtype, TOKEN_DTYPES)

    def content(self) -> str:
        """The kind of content of the documents: `kind`."""
        return self.kind

    def check_file(self, file: File, where: str) -> None:
        """Check that the file opens as ArrayRecord."""
        _open_array_record(file, where)

    def read(self, where: str) -> Iterator[Document]:
        """Yield one document per record."""
        dtype = np.dtype(self.token_dtype).newbyteorder("<")
        for file in self.files(where):
            for i, raw in enumerate(_records(file, where)):
                here = f"record {i} of {file.path}"
                if self.kind == "text":
                    yield _text_document(raw, here, where)
                    continue
                if len(raw) % dtype.itemsize:
                    raise ConfigError(
                        f"{where}.token_dtype = {self.token_dtype!r}: {here} "
                        f"has {len(raw)} bytes, which is not a multiple of "
                        f"{dtype.itemsize}."
                    )
                yield _token_document(np.frombuffer(raw, dtype))


def _open_array_record(file: File, where: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file.path))
    if not reader.ok():
        raise ConfigError(f"{where}.paths: {file.path} is not an ArrayRecord file.")
    return reader


def _records(file: File, where: str) -> Iterator[bytes]:
    reader = _open_array_record(file, where)
    count = reader.num_records()
    for start in range(0, count, 1024):
        try:
            records = reader.read(start, min(start + 1024, count))
        except RuntimeError as e:
            raise ConfigError(
                f"{where}.paths: {file.path} is damaged ({one_line(e)})."
            ) from None
        yield from records
    reader.close()


@dataclasses.dataclass(kw_only=True, slots=True)
class Records(FileSource):
    """The base of sources of records: lines of JSON, or rows of Arrow and Parquet.

    Paths may also be folders that Hugging Face `datasets.save_to_disk` wrote.
    """

    @abc.abstractmethod
    def fields(self) -> dict[str, str]:
        """The fields that are read: {field of this config: name in the records}."""

    @abc.abstractmethod
    def document(self, record: dict[str, Any], at: str, where: str) -> Document:
        """Make a document of a record; `at` is its place, for error messages."""

    def files(self, where: str, say: Say | None = None) -> list[File]:
        """List the files that the paths name; of a saved dataset, those of its rows."""
        found = (saved_dataset(p, f"{where}.paths") or (p,) for p in self.paths)
        paths = tuple(itertools.chain.from_iterable(found))
        return find_files(paths, f"{where}.paths", say, may_be_empty=True)

    def check_file(self, file: File, where: str) -> None:
        """Check that the first record can be read and has the fields."""
        next(self._documents(file, where), None)

    def read(self, where: str) -> Iterator[Document]:
        """Yield one document per record."""
        for file in self.files(where):
            yield from self._documents(file, where)

    def _documents(self, file: File, where: str) -> Iterator[Document]:
        for at, record in read_records(file, self.fields(), where):
            yield self.document(record, at, where)


@dataclasses.dataclass(kw_only=True, slots=True)
class TextRecords(Records):
    """Records with a text; a null in its place is counted as unreadable."""

    field: str = "text"  # name of the field that holds the text

    def fields(self) -> dict[str, str]:
        """The field of the text."""
        return {"field": self.field}

    def document(self, record, at, where) -> Document:
        """Make a document of a text."""
        if record[self.field] is None:
            return Document("null", None)
        text = text_at(record[self.field], at, f"{where}.field = {self.field!r}")
        return Document(content_key(text.encode()), text)


@dataclasses.dataclass(kw_only=True, slots=True)
class PromptResponse(Records):
    """Records with a prompt and a response; only the response is learned.

    Prompt and response are joined as they are: put separators into the texts. The
    prompt is encoded as in generation, and the response as a text that continues it.
    Examples are packed whole; the token that ends a response is learned too. Those with
    visual tokens have a sequence each.
    """

    prompt: str = "prompt"  # name of the field that is only read
    response: str = "response"  # name of the field that is learned
    truncate: bool = False  # cut examples that are longer than a sequence
    visual: str = ""  # name of the field with the visual tokens; "": there are none

    ADDED: ClassVar[tuple[str, ...]] = ("visual",)

    def content(self) -> str:
        """The kind of content of the documents: `pairs` (prompt, response)."""
        return "pairs"

    def fields(self) -> dict[str, str]:
        """The fields of prompt and response, and that of visual tokens."""
        return {"prompt": self.prompt, "response": self.response} | self._visual()

    def _visual(self) -> dict[str, str]:
        return {"visual": self.visual} if self.visual else {}

    def document(self, record, at, where) -> Document:
        """Make a (prompt, response); the prompt alone decides the split."""
        named = {f: f"{where}.{f} = {name!r}" for f, name in self.fields().items()}
        prompt = text_at(record[self.prompt], at, named["prompt"])
        response = text_at(record[self.response], at, named["response"])
        told, visual = prompt.encode(), None
        if self.visual:
            visual = visual_at(record[self.visual], at, named["visual"])
            told += visual.tobytes()  # images with one prompt are other documents
        return Document(content_key(told), (prompt, response), visual)
