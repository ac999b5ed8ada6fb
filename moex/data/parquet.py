"""Reading columns of Parquet files with the package pyarrow.

Not here: making documents of the values (`sources.py`).
"""

from collections.abc import Iterator
from typing import Any

from moex.config.base import ConfigError
from moex.data.files import File, one_line


def holds(found: Any, kind: str) -> bool:
    """Whether a column of this Arrow type holds texts, or lists of token ids."""
    import pyarrow.types as types

    if kind == "tokens":
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        return any(f(found) for f in lists) and types.is_integer(found.value_type)
    if types.is_dictionary(found):
        found = found.value_type
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    return any(f(found) for f in strings)


def rows(file: File, column: str, where: str) -> Iterator[Any]:
    """Yield the values of a column as Arrow scalars."""
    import pyarrow

    batches = open_file(file, where).iter_batches(columns=[column])
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            values = batch.column(0)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
        except (pyarrow.ArrowException, OSError) as e:
            raise ConfigError(
                f"{where}.paths: {file.path} is damaged ({one_line(e)})."
            ) from None
        yield from values


def open_file(file: File, where: str) -> Any:
    """Open a file as `pyarrow.parquet.ParquetFile`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{where}: Parquet files need the package pyarrow; install it."
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as e:
        raise ConfigError(
            f"{where}.paths: {file.path} is not a Parquet file ({one_line(e)})."
        ) from None
