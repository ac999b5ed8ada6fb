"""The files that moex keeps between commands: data, programs, kernels, experts.

They lie in one folder and can be removed at any time: what is missing is made again.
Programs are those of JAX's persistent compilation cache, which is on by default.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moex.cluster.connections import say

KINDS = {
    "data": "prepared data and trained tokenizers",
    "programs": "compiled programs, of which those used last are kept",
    "kernels": "the C library of the CPU kernels",
    "banks": "experts of runs that were used with --offload",
}
# The settings of JAX's cache that differ from its defaults, unless the user made them.
DEFAULTS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2 * 2**30),  # bytes
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
# What the names of prepared data and of tokenizers end in: a hash of their content.
OURS = re.compile(r"-[0-9a-f]{32}(\.json|\.lock)?")


class Entry(NamedTuple):
    """A kept file or folder."""

    kind: str  # one of KINDS
    path: Path
    bytes: int
    used: float  # seconds since 1970


def root(directory: str | None = None) -> Path:
    """The folder of the cache.

    It is the given one, or $MOEX_CACHE, or moex in $XDG_CACHE_HOME, or ~/.cache/moex.
    """
    given = directory or os.environ.get("MOEX_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "moex").absolute()


def banks() -> Path:
    """The folder with the experts of runs, a folder for each checkpoint."""
    return root() / "banks"


def keep_programs() -> Path | None:
    """Let JAX keep compiled programs in a folder, and load them at the next start.

    Call it before JAX is imported; the command `moex` does so. A program is one of a
    version of JAX, of a kind of device and of settings. JAX removes those used longest
    ago when all are larger than `JAX_COMPILATION_CACHE_MAX_SIZE`.

    Returns:
      The folder; None if nothing was set: the user has set JAX_COMPILATION_CACHE_DIR
      ("" turns the cache off), JAX is imported already, or the folder is not private or
      cannot be written.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or "jax" in sys.modules:
        return None
    try:
        folder = root() / "programs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # a read-only folder, or no home
        return None
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
        # A program from there could be anybody's code.
        say(
            f"{folder}: others can write here; compiled programs are not kept",
            "warning",
        )
        return None
    if not os.access(folder, os.W_OK):
        return None
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    return folder


def entries() -> Iterator[Entry]:
    """List what is kept."""
    from kernels_pallas.native.library import cache_path

    for path in _files(root()):
        if OURS.search(path.name):
            yield _entry("data", path)
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    for path in _files(Path(programs) if programs else root() / "programs"):
        if path.name.endswith("-cache"):
            read = path.with_name(path.name.removesuffix("cache") + "atime")
            yield _entry("programs", path, read)
    for path in _files(cache_path()):
        if path.name.startswith("experts-"):
            yield _entry("kernels", path)
    for path in _files(banks()):
        yield _entry("banks", path)


def clear(kinds, days: float = 0) -> list[Entry]:
    """Remove the entries of some kinds that were not used for this many days.

    Returns:
      The removed entries.

    Raises:
      OSError: if a file cannot be removed.
    """
    removed = []
    for entry in entries():
        if entry.kind not in kinds or time.time() - entry.used < days * 24 * 3600:
            continue
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
            if entry.kind == "programs":
                name = entry.path.name.removesuffix("cache") + "atime"
                entry.path.with_name(name).unlink(missing_ok=True)
        removed.append(entry)
    return removed


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _entry(kind: str, path: Path, stamp: Path | None = None) -> Entry:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    used = max((max(s.st_mtime, s.st_atime) for s in stats), default=0.0)
    if stamp and stamp.is_file():
        used = max(used, stamp.stat().st_mtime)
    return Entry(kind, path, sum(s.st_size for s in stats), used)
