"""Reading JSON that a person or another program may have changed.

Every mistake is a `ConfigError` of one line that names the file, its line and the
field. Python's own parser accepts `NaN`, repeated keys and numbers that overflow to
infinity; it fails with a traceback on deep nesting, very long numbers and text that is
not UTF-8.

Not here: JSON that moex itself wrote a moment ago, in the same process.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moex.config.base import ConfigError, fits, nearest, short, type_name

MOST_BYTES = 1 << 30  # the largest file or line; no JSON of moex is larger


def parse_json(text: str | bytes, where: str, *, nan: bool = False) -> Any:
    """Read JSON text as Python data.

    Args:
      text: JSON; bytes are UTF-8, with or without a byte-order mark.
      where: begins the error message, such as "runs/a/config.json".
      nan: whether the words NaN, Infinity and -Infinity, which are not JSON, are
        accepted, as floats. Logs of moex before version 0.2 have them.

    Raises:
      ConfigError: if it is not JSON, repeats a key in an object, or has a number that
        no float can hold; with line and column where they are known.
    """
    options: dict[str, Any] = {"object_pairs_hook": _object}
    if not nan:
        options |= {"parse_constant": _not_json, "parse_float": _finite}
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, **options)
    except UnicodeDecodeError as e:
        reason = f"byte {e.start} is not UTF-8"
    except json.JSONDecodeError as e:
        reason = f"{e.msg}, line {e.lineno}, column {e.colno}"
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as e:  # from the hooks below, and for numbers of 4,300 digits
        reason = str(e).split(";")[0]
    raise ConfigError(f"{where}: is not JSON: {reason}.")


def parse_object(text: str | bytes, where: str, *, nan: bool = False) -> dict[str, Any]:
    """Read the text of a JSON object; `parse_json` takes any JSON."""
    return expect_object(parse_json(text, where, nan=nan), where)


def read_json(file: str | os.PathLike) -> Any:
    """Read the JSON in a file as Python data; see `parse_json`.

    Raises:
      ConfigError: if the file cannot be read, is larger than `MOST_BYTES` or is not
        JSON.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{file}: has {size:,} bytes; too large for JSON.")
        data = file.read_bytes()
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read ({e.strerror}).") from None
    return parse_json(data, str(file))


def read_object(file: str | os.PathLike) -> dict[str, Any]:
    """Read the JSON object in a file; `read_json` takes any JSON."""
    return expect_object(read_json(file), str(file))


def read_json_lines(
    file: str | os.PathLike, *, nan: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number from 1, object)` of a file with one JSON object a line.

    A last line without a newline is still being written and is left out. Empty lines
    are skipped.

    Raises:
      ConfigError: naming the file and the line, if one is not a JSON object.
    """
    file = Path(file)
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, 1):
                if not raw.endswith(b"\n"):
                    return
                if raw.strip():
                    yield number, parse_object(raw, f"{file}, line {number}", nan=nan)
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read ({e.strerror}).") from None


def expect_object(data: Any, where: str) -> dict[str, Any]:
    """Return `data` if it is a JSON object.

    Raises:
      ConfigError: if it is anything else.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: must be a JSON object, not {json_kind(data)}.")
    return data


_MISSING = object()


def field(
    data: dict[str, Any], name: str, kind: Any, where: str, default: Any = _MISSING
) -> Any:
    """Return a field of a JSON object if it has the right type.

    Args:
      data: the object.
      name: the name of the field.
      kind: a type as in the annotations of configs: `int`, `float | None`,
        `list[str]`, `dict[str, int]`, `tuple[int, ...]` for a list. An `int` fits
        `float`; a `bool` is not a number.
      where: begins the error message, such as "runs/a/config.json".
      default: the value of a missing field; without it a missing field is an error.

    Raises:
      ConfigError: if the field is missing or of another type.
    """
    if name not in data:
        if default is not _MISSING:
            return default
        raise ConfigError(f"{where}: has no field {name!r}.{nearest(name, data)}")
    value = data[name]
    if not fits(value, kind):
        raise ConfigError(
            f"{where}: {name} = {short(value, 60)}: must be {type_name(kind)}, "
            f"not {json_kind(value)}."
        )
    return value


def check_names(data: dict[str, Any], known: Iterable[str], where: str) -> None:
    """Check that all fields of a JSON object are some of `known`.

    Raises:
      ConfigError: naming another one; begins with `where`.
    """
    known = tuple(known)
    for name in data:
        if name not in known:
            raise ConfigError(
                f"{where}: no such field: {short(name, 60)}.{nearest(name, known)} "
                f"Fields are {', '.join(known)}."
            )


def dump_json(data: Any, **options: Any) -> str:
    """Write plain data as JSON text; a float that is not finite becomes null.

    JSON has no NaN; other programs refuse a file that has one.
    """
    return json.dumps(_finite_only(data), allow_nan=False, **options)


def digest(data: Any) -> str:
    """The sha256 of JSON data; it is the same before writing and after reading."""
    plain = json.loads(json.dumps(data))  # tuples become lists, keys strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def json_kind(value: Any) -> str:
    """The kind of a value in the words of JSON: "an object", "a string", "null"."""
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "null" if value is None else "a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {short(twice, 60)} stands twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"no float holds the number {text[:20]}")
    return value


def _not_json(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite_only(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {key: _finite_only(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite_only(value) for value in data]
    return data
