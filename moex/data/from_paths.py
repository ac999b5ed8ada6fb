"""Sources made from file names on a command line: `moex train --data=FILE`.

Not here: reading the files (`sources.py`, `chat.py`).
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moex.config.base import ConfigError, nearest
from moex.data.chat import Chat
from moex.data.contract import FileSource, Source
from moex.data.files import File, find_files, plain_name
from moex.data.records import Record, first_record, saved_dataset
from moex.data.sources import ArrayRecord, Parquet, PromptResponse, Text, TextRecords

TEXT = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".py", ".sh", ".c", ".h", ".cc"),
    *(".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
)
# The first of these whose fields a file's first record has; they have default fields.
OF_RECORDS: dict[type[FileSource], tuple[str, ...]] = {
    Chat: ("messages",),
    PromptResponse: ("prompt", "response"),
    TextRecords: ("text",),
}
# The source for each suffix of a file; None: its first record decides.
KINDS: dict[str, type[FileSource] | None] = {
    **dict.fromkeys(TEXT, Text),
    **dict.fromkeys((".jsonl", ".arrow", ".parquet")),
    **dict.fromkeys((".arrayrecord", ".array_record"), ArrayRecord),
}
FEW = 100  # of fewer text files, hold out the ends: a share of the files is too few

OTHERWISE = "Other data is given by --config.data or --config=FILE (docs/data.md)."


def given_sources(
    paths: Sequence[str],
    *,
    train: bool = False,
    layout: Mapping[str, str] | None = None,
) -> tuple[Source, ...]:
    """Make a source for each of `paths`: files, folders, globs or saved datasets.

    Sources are named by the stem of their file or, where that is not enough, as given.

    Args:
      paths: the paths.
      train: hold out a share of each, as sources do by default, and not all of them.
      layout: fields for sources of chats.

    Raises:
      ConfigError: for files that are missing or not readable without settings, and if
        all are empty.
    """
    find_files(tuple(paths), "--data")
    sources, files = [], [_files(path) for path in paths]
    names = [p if glob.has_magic(p) else Path(plain_name(p)).stem or p for p in paths]
    for path, name, found in zip(paths, names, files, strict=True):
        if list(paths).count(path) > 1:
            raise ConfigError(f"--data = {path!r}: is given twice.")
        fields: dict[str, Any] = {"name": path if names.count(name) > 1 else name}
        if not train:
            fields["holdout"] = 1.0
        try:
            kind = _kind(path, found)
            if kind is Chat:
                fields |= layout or {}
            if kind is Text and train:
                fields["holdout_ends"] = len(found) < FEW
            source = kind(paths=(path,), **fields)
            for file in found:
                source.check_file(file, kind.__name__)
        except ConfigError as e:
            text = str(e).removeprefix("--data: ").removeprefix("--data.paths: ")
            raise ConfigError(f"--data = {path!r}: {text} {OTHERWISE}") from None
        sources.append(source)
    return tuple(sources)


def _files(path: str) -> list[File]:
    paths = saved_dataset(path, "--data") or (path,)
    return find_files(paths, "--data", may_be_empty=True)


def _kind(path: str, files: Sequence[File]) -> type[FileSource]:
    """The kind of source that reads some files, which is the same for all of them."""
    kinds: dict[Any, str] = {}
    for file in files:
        suffix = Path(plain_name(file.path.name)).suffix.lower()
        if suffix not in KINDS:
            raise ConfigError(
                f"{file.path} must end in one of {', '.join(KINDS)}, or one of these "
                f"and .gz or .zst.{nearest(suffix, KINDS)}"
            )
        kinds[KINDS[suffix] or suffix] = suffix
    if len(kinds) > 1:
        raise ConfigError(
            f"files of one kind must be there, not of "
            f"{' and '.join(kinds.values())}; give --data for each kind."
        )
    kind = next(iter(kinds), Text)
    return _kind_of_records(files) if isinstance(kind, str) else kind


def _kind_of_records(files: Sequence[File]) -> type[FileSource]:
    """The kind of the first record that there is."""
    for file in files:
        record = first_record(file, "--data")
        if record is not None:
            return _kind_of_record(record, file)
    return TextRecords


def _kind_of_record(record: Record, file: File) -> type[FileSource]:
    for kind, fields in OF_RECORDS.items():
        if all(name in record for name in fields):
            return Parquet if kind is TextRecords and _is_parquet(file) else kind
    known = [name for fields in OF_RECORDS.values() for name in fields]
    near = next(filter(None, (nearest(name, known) for name in record)), "")
    raise ConfigError(
        f"{file.path}: records must have messages, or prompt and response, or text, "
        f"not {', '.join(record)}.{near}"
    )


def _is_parquet(file: File) -> bool:
    return file.path.suffix.lower() == ".parquet"
