"""The cache of prepared data: folders named by their content, written atomically.

A prepared source is a directory `<name>-<key>` with `train/`, `eval/` and
`manifest.json`. The key covers the content of all files, the source's settings and the
tokenizer, so nothing stale is ever read. A directory appears complete or not at all.

Not here: the meaning of the files in a split (`stream.py`).
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moex.config.base import TYPE_KEY, ConfigError, to_dict
from moex.data.files import File, locked, size_and_hash
from moex.data.packing import pack_rows
from moex.data.stream import SPLITS, write_source
from moex.json_files import digest, read_object
from moex.progress import counted, phase

STALE_S = 24 * 3600
WHOLE = ("pairs", "chats")  # kinds of documents that are packed whole
FORMAT = 2  # increase this when the meaning of cached files changes


def scan(source, where: str, say=None) -> dict[str, Any]:
    """Read the names, sizes and hashes of a source's files, and one hash of it all.

    Args:
      source: config of the source.
      where: its path, for error messages.
      say: called with one line per kind of file that was left out.
    """
    found = source.files(where, say)
    for file in found:
        source.check_file(file, where)
    total = sum(map(_size, found))
    read = counted(found, f"reading {source.label()}", total, "B", _size)
    files = [[file.name, *size_and_hash(file.path)] for file in read]
    settings = to_dict(source)
    for name in ("weight", "name", "paths"):
        settings.pop(name, None)
    for name in source.ADDED:
        if not settings[name]:
            del settings[name]
    return {
        "kind": settings.pop(TYPE_KEY),
        "settings": settings,
        "sha256": digest([settings, files]),
        "bytes": sum(size for _, size, _ in files),
        "files": files,
    }


def _size(file: File) -> int:
    return file.path.stat().st_size


def prepared(
    source, scan, tokenizer, seq_len: int, root: Path, where: str, log
) -> tuple[Path, dict[str, Any]]:
    """Take the folder of a prepared source and its manifest, or make them now."""
    key = [FORMAT, scan["kind"], scan["sha256"], tokenizer.fingerprint]
    if source.content() in WHOLE:
        key.append(seq_len)  # rows are packed on disk; windows are cut when read
    name = "".join(c if c.isalnum() else "_" for c in source.label())[:40]
    final = root / f"{name}-{digest(key)[:32]}"
    # Checking all bytes needs no lock; with one, processes would wait for each other.
    with phase(f"checking {final}"):
        manifest = _read(final)
    if manifest:
        return final, manifest
    with locked(root / f"{final.name}.lock"):
        manifest = _read(final)
        if manifest is None:
            if final.exists():
                log(f"data: {final} is damaged and made again")
            shutil.rmtree(final, ignore_errors=True)
            with _temporary(root, final) as out:
                manifest = _make(source, scan, tokenizer, seq_len, out, where, log)
    return final, manifest


def _read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory whose files are all as written, or else None."""
    try:
        manifest = read_object(directory / "manifest.json")
        sealed = manifest.pop("sha256_of_manifest", None) == digest(manifest)
        whole = sealed and _hashes(directory) == manifest["cache_files"]
    except (ConfigError, OSError):
        return None
    return manifest if whole else None


def _hashes(directory: Path) -> dict[str, list]:
    """Compute {name: [size, sha256]} of the files of the splits."""
    files = [p for s in SPLITS for p in sorted((directory / s).glob("*"))]
    return {p.relative_to(directory).as_posix(): list(size_and_hash(p)) for p in files}


def _make(source, scan, tokenizer, seq_len, out, where, log) -> dict[str, Any]:
    """Write both splits and the manifest into `out`."""
    began = time.perf_counter()
    log(f"data: encoding {source.label()} ({scan['bytes'] / 1e6:.1f} MB)")
    with phase(f"encoding {source.label()}", scan["bytes"], "B") as at:
        made = write_source(source, tokenizer, out, where, at.add)
    if source.content() in WHOLE:
        for split in SPLITS:
            pack_rows(out / split, seq_len, source.truncate, where)
    manifest = scan | made
    manifest["tokenizer"] = tokenizer.fingerprint
    manifest["seconds"] = round(time.perf_counter() - began, 2)
    manifest["cache_files"] = _hashes(out)
    sealed = manifest | {"sha256_of_manifest": digest(manifest)}
    text = json.dumps(sealed, indent=1) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8")
    tokens = sum(c["tokens"] for c in made["splits"].values())
    log(f"data: {source.label()}: {tokens:,} tokens in {manifest['seconds']} s")
    return manifest


@contextlib.contextmanager
def _temporary(root: Path, final: Path) -> Iterator[Path]:
    """Yield a new directory; rename it to `final` if the block succeeds."""
    for old in root.glob("tmp-*"):  # killed processes left these
        if time.time() - old.stat().st_mtime > STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    out = Path(tempfile.mkdtemp(prefix="tmp-", dir=root))
    try:
        yield out
        try:
            os.replace(out, final)
        except OSError:  # where locks do not work, another process may have made it
            if _read(final) is None:
                raise
    finally:
        shutil.rmtree(out, ignore_errors=True)
