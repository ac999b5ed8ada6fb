"""Input files: finding them, reading text from them, and hashes that are the same
on every machine.

Not here: what a file's documents are (`sources.py`).
"""

import contextlib
import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moex.config import ConfigError, require


class File(NamedTuple):
    """One input file: the name that keys are made of, and where it lies."""

    name: str
    path: Path


def unit_hash(key: str, salt: str) -> float:
    """A number in [0, 1) that depends on `key` and `salt` alone, on every machine."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def find_files(paths: tuple[str, ...], where: str) -> list[File]:
    """The files named by `paths`: files, directories (recursive) or globs, sorted.

    A file's name is relative to the directory that was given, so that keys do not
    depend on where the data lies.
    """
    require(len(paths) > 0, where, paths, "at least one file, directory or glob")
    found = []
    for i, entry in enumerate(paths):
        root = Path(entry).expanduser()
        if root.is_dir():
            inside = [p for p in sorted(root.rglob("*")) if p.is_file()]
            inside = [p for p in inside if not p.name.startswith(".")]
            matches = [File(p.relative_to(root).as_posix(), p) for p in inside]
        elif root.is_file():
            matches = [File(root.name, root)]
        else:
            names = sorted(glob.glob(str(root), recursive=True))
            matches = [File(Path(n).name, Path(n)) for n in names if Path(n).is_file()]
        if not matches:
            raise ConfigError(
                f"{where}[{i}] = {entry!r}: no such file, no file in that directory "
                f"or none matches that pattern (looked from {os.getcwd()})."
            )
        found += matches
    for file in found:
        if file.path.stat().st_size == 0:
            raise ConfigError(f"{where}: the file {file.path} is empty; remove it.")
    return found


def decode_utf8(data: bytes, file: Path | str, where: str, offset: int = 0) -> str:
    """The text of `data`, which starts at byte `offset` of `file`."""
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ConfigError(
            f"{where}: {file} is not UTF-8 text: byte 0x{data[e.start]:02x} at offset "
            f"{offset + e.start}. Convert it to UTF-8 or leave it out."
        ) from None


def content_key(*parts: bytes) -> str:
    """A key made of the content, so that equal documents share a split."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def atomic_write(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Wait for other processes that make the same thing; a killed one lets go."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as f:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(f, fcntl.LOCK_EX)
        yield
