"""A check of files that two sources read: none may both train on and hold out text."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moex.config.base import ConfigError, to_dict
from moex.data.contract import Source
from moex.data.files import File, and_more

# These fields do not decide which text of a file is read.
ASIDE = ("weight", "name", "paths", "holdout", "delimiter", "truncate", "holdout_ends")


def check_shared(
    named: Sequence[tuple[str, Source]], say: Callable[[str], None]
) -> None:
    """Refuse text that one source holds out and another trains on.

    Args:
      named: (path of the config, source) for each source.
      say: called with one line for two sources that share files; that is allowed if
        both hold out the same documents.

    Raises:
      ConfigError: naming the file and both sources.
    """
    if len(named) == 1:
        return  # so that a folder of a million files is not listed again
    known: dict[str, tuple[str, str]] = {}  # {file and settings: (source, split)}
    shared: dict[tuple[str, str], list[Path]] = {}
    for where, source in named:
        settings = {k: v for k, v in to_dict(source).items() if k not in ASIDE}
        for file in source.files(where):
            key = f"{os.path.realpath(file.path)} {settings}"
            other, split = known.setdefault(key, (where, _split(source, file)))
            if other == where:
                continue
            if split != _split(source, file):
                raise ConfigError(
                    f"{where}: {file.path} is also in {other}, which holds out other "
                    "documents of it: what one is scored on, the other trains on. "
                    "Take it out of one of them."
                )
            shared.setdefault((other, where), []).append(file.path)
    for (other, where), files in shared.items():
        say(f"data: {and_more(files)}: read by both {other} and {where}")


def _split(source: Source, file: File) -> str:
    """A text for comparing sources: if equal, they hold out the same documents."""
    if source.holdout in (0, 1):
        return f"{source.holdout:g}"
    return f"{source.holdout!r} {source.cut(file)!r}"
