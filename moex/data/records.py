"""Records with named fields: lines of JSON, rows of Arrow and Parquet files.

An Arrow file is one of a folder that `datasets.save_to_disk` of Hugging Face wrote, or
any other in Arrow's formats for streams and files. Not here: making documents of
records (`sources.py`, `chat.py`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moex.config.base import ConfigError, is_unicode, nearest
from moex.data import parquet
from moex.data.files import BOM, File, decode_utf8, one_line, open_bytes
from moex.json_files import field, parse_object, read_object

Record = dict[str, Any]
STATE, SPLITS = "state.json", "dataset_dict.json"  # of a dataset, of several


def read_records(file: File, fields: dict[str, str], where: str):
    """Yield (place, record) for each record of a file, in order.

    The place is such as "a.jsonl:3", for error messages. JSON lines may be compressed.

    Args:
      file: lines of JSON, or an Arrow or Parquet file.
      fields: {field of the config: name in the records} of what to read.
      where: the path of the config, for error messages.

    Raises:
      ConfigError: naming file and line, for what cannot be read, and for a record that
        lacks one of the fields.
    """
    suffix = file.path.suffix.lower()
    found = _rows if suffix in (".arrow", ".parquet") else _lines
    for at, record in found(file, fields.values(), where):
        for field_name, name in fields.items():
            if name not in record:
                raise ConfigError(
                    f"{where}.{field_name} = {name!r}: {at} has the fields "
                    f"{', '.join(record)}.{nearest(name, record)}"
                )
        yield at, record


def first_record(file: File, where: str) -> Record | None:
    """The first record of a file with all its fields; None if there is none."""
    return next((record for _, record in read_records(file, {}, where)), None)


def text_at(text: Any, at: str, where: str) -> str:
    """Check that a value in a record is a text.

    Args:
      text: the value.
      at: the place of the record.
      where: the field of the config and its value, such as "s.prompt = 'prompt'".

    Raises:
      ConfigError: if it is anything else, or no valid Unicode.
    """
    if not isinstance(text, str) or not is_unicode(text):
        raise ConfigError(
            f"{where}: {at} must have a string of valid Unicode there, not "
            f"{text!r:.40}."
        )
    return text


def visual_at(numbers: Any, at: str, where: str) -> np.ndarray:
    """Check that a value in a record is the visual tokens of one image.

    Args:
      numbers: a list of numbers for each token, or one list for one token.
      at: the place of the record.
      where: the field of the config and its value, such as "s.visual = 'features'".

    Returns:
      float32 [tokens, width].

    Raises:
      ConfigError: if it is anything else, or a number is not finite.
    """
    try:
        array = np.asarray(numbers, np.float32)
    except (ValueError, TypeError, OverflowError):
        array = np.zeros(0, np.float32)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or array.size == 0 or not np.all(np.isfinite(array)):
        raise ConfigError(
            f"{where}: {at} must have a list of finite numbers there, or one for each "
            f"visual token, all of one length, not {numbers!r:.40}."
        )
    return array


def _lines(file: File, names, where: str) -> Iterator[tuple[str, Record]]:
    offset = 0
    with open_bytes(file, f"{where}.paths") as lines:
        for number, line in enumerate(lines, start=1):
            at = f"{file.path}:{number}"
            begin = len(BOM) if number == 1 and line.startswith(BOM) else 0
            text = decode_utf8(line[begin:], at, f"{where}.paths", offset + begin)
            offset += len(line)
            if text.strip():
                # Other fields are not used, so they may have NaN, which is not JSON.
                yield at, parse_object(text, f"{where}.paths: {at}", nan=True)


def _rows(file: File, names, where: str) -> Iterator[tuple[str, Record]]:
    number = 0
    batches = _batches(file, where)
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            if names and set(names) <= set(batch.schema.names):
                batch = batch.select(list(names))
            records = batch.to_pylist()
        except (ValueError, OSError) as e:  # Arrow's own errors are of both kinds
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(
                f"{where}.paths: {file.path} is damaged ({one_line(e)})."
            ) from None
        for record in records:
            yield f"row {number} of {file.path}", record
            number += 1


def _batches(file: File, where: str) -> Iterator[Any]:
    import pyarrow  # late: it is large

    if file.path.suffix.lower() == ".parquet":
        yield from parquet.open_file(file, where).iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(file.path)) as mapped:
        whole = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if whole:
            reader = pyarrow.ipc.open_file(mapped)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(mapped)


def saved_dataset(path: str, where: str) -> tuple[str, ...] | None:
    """The files of a folder that `datasets.save_to_disk` wrote; None for others.

    Raises:
      ConfigError: for a folder of several splits, naming them, and for a damaged one.
    """
    folder = Path(path).expanduser()
    several, state = folder / SPLITS, folder / STATE
    if several.is_file():
        splits = field(read_object(several), "splits", list[str], str(several))
        if len(splits) != 1:
            names = ", ".join(splits)
            raise ConfigError(
                f"{where}: {path} is a dataset with the splits {names}; give the "
                f"folder of one of them, such as {folder / splits[0]}."
            )
        return saved_dataset(str(folder / splits[0]), where)
    if not state.is_file() or "_data_files" not in (about := read_object(state)):
        return None
    if about.get("_indices_data_files"):
        raise ConfigError(
            f"{where}: {path} was saved by an old version of datasets, with a list of "
            "rows beside them; load and save it with a newer one."
        )
    files = [
        field(item, "filename", str, str(state))
        for item in field(about, "_data_files", list[dict[str, Any]], str(state))
    ]
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConfigError(f"{where}: {state} names {name}, which is not there.")
    return tuple(str(folder / name) for name in files)
