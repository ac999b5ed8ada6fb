"""Input files: finding them, reading text from them, and hashes that are the same
on every machine.

Not here: the documents of a file (`sources.py`).
"""

import collections
import contextlib
import fcntl
import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from os.path import islink
from pathlib import Path
from typing import BinaryIO, NamedTuple

from moex.config.base import ConfigError, require, require_path
from moex.progress import phase

LONG_LINE = 10_000  # bytes of a line; the rest of a longer one may be cut off
BOM = b"\xef\xbb\xbf"  # some editors put this before UTF-8 text; it is not text


class File(NamedTuple):
    """One input file: the name for the keys of its documents, and its path."""

    name: str
    path: Path


class Candidate(NamedTuple):
    """A file that a path leads to, its real path, and whether links were followed."""

    file: File
    real: str
    linked: bool


def unit_hash(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on `key` and `salt` alone, on every machine."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def find_files(
    paths: tuple[str, ...],
    where: str,
    say: Callable[[str], None] | None = None,
    *,
    may_be_empty: bool = False,
) -> list[File]:
    """Find the files of `paths`, sorted: files, directories (recursive) or globs.

    A file's name is relative to the given directory, so that keys do not depend on
    where the data is stored. Hidden files and folders are left out unless a path names
    them, and so are empty files. Links to folders are followed. A file that several
    paths or links lead to is taken once.

    Args:
      paths: the paths of the config.
      where: the field, for error messages.
      say: called with one line for each kind of file that was left out.
      may_be_empty: return no file if all are empty.

    Raises:
      ConfigError: for a path that leads to no file, and if all files are empty.
    """
    require(len(paths) > 0, where, paths, "at least one file, directory or glob")
    found: list[Candidate] = []
    nowhere: list[Path] = []
    for i, entry in enumerate(paths):
        require_path(f"{where}[{i}]", entry)
        matches = _matches(os.path.expanduser(entry), nowhere)
        if not matches:
            raise ConfigError(
                f"{where}[{i}] = {entry!r}: no such file, no file in that directory "
                f"or none matches that pattern (looked from {os.getcwd()})."
            )
        found += matches
    chosen: dict[str, Candidate] = {}
    for candidate in sorted(found, key=lambda c: c.linked):  # the file itself first
        chosen.setdefault(candidate.real, candidate)
    once = [c.file for c in found if chosen[c.real] is c]
    files = [file for file in once if file.path.stat().st_size > 0]
    left_out = {
        "empty and left out": [f.path for f in once if f.path.stat().st_size == 0],
        "named twice and read once": [
            c.file.path for c in found if chosen[c.real] is not c
        ],
        "no file to read": nowhere,
    }
    if not files and not may_be_empty:
        first, *others = left_out["empty and left out"]
        if others:
            raise ConfigError(
                f"{where}: all {len(others) + 1} files are empty ({first}, ...); "
                "remove them."
            )
        raise ConfigError(f"{where}: the file {first} is empty; remove it.")
    for reason, names in left_out.items():
        if names and say is not None:
            say(f"data: {where}: {and_more(names)}: {reason}")
    return files


def and_more(names: Sequence[Path]) -> str:
    """Write the first of some names, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])


def _matches(path: str, nowhere: list[Path]) -> list[Candidate]:
    """Find the files that one path leads to; add broken links to `nowhere`."""
    if os.path.isdir(path):
        return sorted(_files_in(Path(path), nowhere), key=lambda c: c.file.path)
    names = [path] if os.path.isfile(path) else sorted(set(_glob(Path(path))))
    return [
        Candidate(File(os.path.basename(n), Path(n)), os.path.realpath(n), islink(n))
        for n in names
        if os.path.isfile(n)
    ]


def _files_in(root: Path, nowhere: list[Path]) -> Iterator[Candidate]:
    """Yield all files under a folder, in no fixed order."""
    for folder, real, entries, linked in _folders(root):
        for entry in entries:
            path, by_link = folder / entry.name, entry.is_symlink()
            if os.path.isfile(path) if by_link else entry.is_file():
                name = path.relative_to(root).as_posix()
                at = os.path.realpath(path) if by_link else f"{real}/{entry.name}"
                yield Candidate(File(name, path), at, linked or by_link)
            elif not os.path.isdir(path):
                nowhere.append(path)


def _folders(root: Path) -> Iterator[tuple[Path, str, list[os.DirEntry], bool]]:
    """Yield `(folder, real path, entries, whether by a link)`, each folder once.

    Real folders come before links to folders, so that a link hides none. So that this
    ends, links to a visited folder or to a parent folder of `root` are not followed.
    """
    seen = set(map(str, Path(os.path.realpath(root)).parents))
    links = collections.deque([(root, False)])
    while links:
        first, linked = links.popleft()
        folders = [first]
        while folders:
            folder = folders.pop()
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            with os.scandir(folder) as found:
                shown = [entry for entry in found if not entry.name.startswith(".")]
            entries = sorted(shown, key=lambda entry: entry.name)
            yield folder, real, entries, linked
            for entry in entries:
                at = folder / entry.name
                if entry.is_symlink():
                    if os.path.isdir(at):
                        links.append((at, True))
                elif entry.is_dir():
                    folders.append(at)


def _glob(pattern: Path) -> Iterator[str]:
    """Yield names that match; `**` stands for all folders that `_folders` visits."""
    if "**" not in pattern.parts:
        yield from glob.glob(str(pattern))
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :] or ("*",)
    for head in sorted(glob.glob(str(Path(*pattern.parts[:at])))):
        if os.path.isdir(head):
            for folder, *_ in _folders(Path(head)):
                yield from _glob(Path(glob.escape(str(folder)), *rest))


def read_text(file: File, where: str) -> str:
    """Read the text of a file, without a byte-order mark.

    Raises:
      ConfigError: if it is not UTF-8.
    """
    with open_bytes(file, where) as stream:
        data = stream.read()
    begin = len(BOM) if data.startswith(BOM) else 0
    return decode_utf8(data[begin:], file.path, where, begin)


def plain_name(name: str) -> str:
    """A name without the suffix of its compression: `a.txt` for `a.txt.gz`."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSED else name


@contextlib.contextmanager
def open_bytes(file: File, where: str) -> Iterator[BinaryIO]:
    """Open a file for reading; `.gz` and `.zst` are decompressed while they are read.

    Raises:
      ConfigError: while a compressed file is read, if it is damaged.
    """
    suffix = file.path.suffix.lower()
    if suffix not in COMPRESSED:
        with open(file.path, "rb") as stream:
            yield stream
        return
    try:
        with COMPRESSED[suffix](file.path) as stream:
            yield stream
    except (EOFError, OSError, zlib.error) as e:
        if getattr(e, "errno", None) is not None:
            raise  # an error of the file system
        raise ConfigError(f"{where}: {file.path} is damaged ({one_line(e)}).") from None


def num_bytes(file: File, where: str) -> int:
    """The bytes of a file once it is decompressed."""
    if file.path.suffix.lower() not in COMPRESSED:
        return file.path.stat().st_size
    with open_bytes(file, where) as stream:
        return sum(map(len, iter(lambda: stream.read(1 << 20), b"")))


def read_lines(stream: BinaryIO, size: int) -> bytes:
    """Read `size` bytes and the rest of the line; of a long line, whole characters."""
    data = stream.read(size)
    data += stream.readline(LONG_LINE)
    for back in (1, 2, 3):  # a character has four bytes at most
        first = data[-back:][:1]
        if first >= b"\xc0":  # a character begins here
            size = 2 + (first >= b"\xe0") + (first >= b"\xf0")
            return data + stream.read(max(size - back, 0))
        if first < b"\x80":
            break
    return data


def _open_gz(path: Path) -> BinaryIO:
    return gzip.GzipFile(path, "rb")  # type: ignore[return-value]


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow  # late: it is large

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSED: dict[str, Callable] = {
    ".gz": _open_gz,
    ".zst": _open_zst,
}


def decode_utf8(data: bytes, file: Path | str, where: str, offset: int = 0) -> str:
    """Decode `data`, which starts at byte `offset` of `file`."""
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{where}: {file} is not UTF-8 text: byte 0x{data[e.start]:02x} at offset "
            f"{offset + e.start}. Convert it to UTF-8 or leave it out."
        ) from None


def one_line(error: BaseException) -> str:
    """The text of a library's error on one line, shortened to 200 characters."""
    return " ".join(str(error).split())[:200].rstrip(".")


def content_key(content: bytes) -> str:
    """Make a key from the content, so that equal documents are in the same split."""
    return hashlib.sha256(content).hexdigest()[:32]


def size_and_hash(file: Path) -> tuple[int, str]:
    """The bytes of a file, and their sha256 in hexadecimal."""
    with open(file, "rb") as f:
        sha = hashlib.file_digest(f, "sha256").hexdigest()
        return f.tell(), sha


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add the file name to an `OSError` that has none, such as for a full disk."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(file)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a small file; after a kill there is either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except KeyboardInterrupt:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock on a file, for one maker at a time; a killed process loses it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as f:
        waits = phase(f"waiting for the process that makes {file.with_suffix('')}")
        with waits, contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
