"""`data.json` in a run: the files that it reads, to report changes on resume.

The position in the data is one number in a fixed order of all sequences. If files have
changed, the order is another one: some sequences come twice and some not at all.

Not here: changed settings, which are part of the config (`train/resume.py`).
"""

import collections
import json
from pathlib import Path
from typing import Any

from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.json_files import read_object

MOST_NAMES = 3  # names of changed files in a line


def save_data(file: Path, manifest: dict[str, Any]) -> None:
    """Write which files a run reads, with size and hash.

    Args:
      file: the file to write.
      manifest: the manifest of `Prepared`.
    """
    files = {name: source["files"] for name, source in manifest.items()}
    atomic_write(file, json.dumps(files) + "\n")


def changed_data(file: Path, manifest: dict[str, Any]) -> list[str]:
    """Describe, in a line per source, which files changed since the last start.

    Args:
      file: the file that `save_data` wrote; a run from before version 0.2 has none.
      manifest: the manifest of `Prepared` now.
    """
    if not file.exists():
        return []
    try:
        before = read_object(file)
        compared = [
            (name, _by_name(before[name]), _by_name(manifest[name]["files"]))
            for name in manifest
            if name in before
        ]
    except (ConfigError, ValueError, TypeError) as e:
        reason = str(e) if isinstance(e, ConfigError) else f"{file}: damaged"
        return [f"data: whether files have changed is not known ({reason})"]
    lines = [_line(name, old, new) for name, old, new in compared if old != new]
    return [
        f"resuming with changed data: {line}; from here on the order is another, so "
        "that some sequences come twice and some not at all"
        for line in lines
    ]


def _by_name(files: list) -> dict[str, list]:
    """Group to {name: sizes and hashes}; several folders may have the same name."""
    found = collections.defaultdict(list)
    for name, size, sha in files:
        found[str(name)].append((int(size), str(sha)))
    return {name: sorted(both) for name, both in found.items()}


def _line(source: str, old: dict, new: dict) -> str:
    kinds = {
        "changed": [n for n in new if n in old and old[n] != new[n]],
        "new": [n for n in new if n not in old],
        "gone": [n for n in old if n not in new],
    }
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:MOST_NAMES])}"
        f"{', ...' if len(names) > MOST_NAMES else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return f"files of {source!r}: {', '.join(parts)}"
