"""Sources made from file names on a command line: `moex trace RUN --data=FILE`.

Not here: reading the files (`sources.py`).
"""

import glob
from collections.abc import Sequence
from pathlib import Path

from moex.config.base import ConfigError, nearest
from moex.data.contract import Source
from moex.data.files import find_files
from moex.data.sources import ArrayRecord, Parquet, PromptResponse, Text

TEXT = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".py", ".sh", ".c", ".h", ".cc"),
    *(".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
)

# The source for each suffix of a file; it is used with its default fields.
KINDS: dict[str, type[Source]] = {
    **dict.fromkeys(TEXT, Text),
    ".jsonl": PromptResponse,
    ".parquet": Parquet,
    ".arrayrecord": ArrayRecord,
    ".array_record": ArrayRecord,
}

OTHERWISE = "Other data is given by --config.data or --config=FILE (docs/data.md)."


def given_sources(paths: Sequence[str]) -> tuple[Source, ...]:
    """Make a source for each of `paths` (files, folders or globs), all held out.

    Sources are named by the stem of their file or, where that is not enough, as given.

    Raises:
      ConfigError: for files that are missing, empty, or not readable without settings.
    """
    find_files(tuple(paths), "--data")
    names = [p if glob.has_magic(p) else Path(p).stem or p for p in paths]
    sources = []
    for path, name in zip(paths, names, strict=True):
        if list(paths).count(path) > 1:
            raise ConfigError(f"--data = {path!r}: is given twice.")
        name = path if names.count(name) > 1 else name
        sources.append(_source(path, name))
    return tuple(sources)


def _source(path: str, name: str) -> Source:
    files = find_files((path,), "--data")
    kinds = {}
    for file in files:
        suffix = file.path.suffix.lower()
        if suffix not in KINDS:
            raise ConfigError(
                f"--data = {path!r}: {file.path} must end in one of "
                f"{', '.join(KINDS)}.{nearest(suffix, KINDS)} {OTHERWISE}"
            )
        kinds[KINDS[suffix]] = suffix
    if len(kinds) > 1:
        raise ConfigError(
            f"--data = {path!r}: files of one kind must be there, not of "
            f"{' and '.join(kinds.values())}; give --data for each kind."
        )
    (kind,) = kinds
    source = kind(paths=(path,), name=name, holdout=1.0)  # type: ignore[call-arg]
    try:
        for file in files:
            source.check_file(file, kind.__name__)
    except ConfigError as e:
        raise ConfigError(f"--data = {path!r}: {e} {OTHERWISE}") from None
    return source
