"""The base class of all moex configs, and the functions on whole config trees.

A config is a plain dataclass whose *type* is the choice: `TopK(k=2)` is a top-k
router. It is unfrozen, because ml_collections applies `--config.a.b=value` by
assignment, and it copies nested configs when it is built, so that one `moe` used in
two places is two configs. Checks that need only the config live in `validate`, which
runs after overrides (an override does not run `__post_init__` again).

Not here: reading flags (`flags.py`), the run-level keys (`runs/keys.py`).
"""

import copy
import dataclasses
import difflib
import importlib
import inspect
import math
import pathlib
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections

from moex import project
from moex.project import TYPE_KEY, ProjectError

# Config classes that moved: their names in old runs, and their names today.
MOVED = {
    "moex.optim.AdamW": "moex.model.optim.AdamW",
    "moex.optim.Muon": "moex.model.optim.Muon",
    "moex.optim.Optim": "moex.model.optim.Optim",
    "moex.run.Checkpoint": "moex.runs.keys.Checkpoint",
    "moex.run.Eval": "moex.runs.keys.Eval",
    "moex.run.Log": "moex.runs.keys.Log",
    "moex.run.Loss": "moex.runs.keys.Loss",
    "moex.schedule.Schedule": "moex.config.schedule.Schedule",
}
# Metadata of a field: its value in configs that were saved before the field existed.
ABSENT = "absent"


class ConfigError(ValueError):
    """A user's mistake in a config or on the command line: one line, no traceback."""


class RunError(RuntimeError):
    """A run cannot go on: one line and exit code 1, no traceback."""


class ConfigWarning(UserWarning):
    """A setting in a config that works but is probably not what was meant."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
    """The base of all configs. It copies nested configs; `check` calls `validate`."""

    def __init_subclass__(cls):
        """Let `super()` work: `slots=True` makes the class again, as another one."""
        for value in vars(cls).values():
            function = inspect.unwrap(getattr(value, "fget", None) or value)
            names = getattr(getattr(function, "__code__", None), "co_freevars", ())
            if "__class__" in names:  # until Python 3.14 it stays the first class
                cell = function.__closure__[names.index("__class__")]
                if tag_of(cell.cell_contents) == tag_of(cls):
                    cell.cell_contents = cls

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Config):
                setattr(self, field.name, copy.deepcopy(value))
            elif isinstance(value, (tuple, list)) and any(
                isinstance(v, Config) for v in value
            ):
                # A deep copy of the whole tuple would keep `(moe, moe)` one config.
                copies = type(value)(copy.deepcopy(v) for v in value)
                setattr(self, field.name, copies)

    def validate(self, path: str) -> None:
        """Raise `ConfigError` if fields are out of range; `path` names this config."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Write ` Did you mean 'x'?` for the `closest` of `allowed`; or ""."""
    found = closest(str(name), allowed)
    return "" if found is None else f" Did you mean {found!r}?"


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant by `name`; None if that is unclear.

    Names with other digits mean other things (`qwen2` and `qwen3`, layers 0 and 1).
    """
    cutoff = 0.75 if len(name) > 3 else 0.6  # allows one slip in a short name
    by_lower = {a.lower(): a for a in allowed if _digits(a) == _digits(name)}
    match = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    # difflib finds no match for a short name such as `k`, which may mean `k_max`.
    match = match or [a for a in by_lower if name and a.startswith(f"{name.lower()}_")]
    return by_lower[match[0]] if match else None


def _digits(name: str) -> list[list[str]]:
    """The digits of each number in a name, sorted, so that swapped digits are equal."""
    return [sorted(number) for number in re.findall(r"[0-9]+", name)]


def require(ok: bool, path: str, value: Any, allowed: str) -> None:
    """Raise a `ConfigError` that names the field, its value and what is allowed."""
    if not ok:
        raise ConfigError(f"{path} = {short(value)}: must be {allowed}.")


def short(value: Any, most: int = 200) -> str:
    """The repr of a value in one line of at most `most` characters, for a message."""
    try:
        is_dict = isinstance(value, ml_collections.ConfigDict)
        text = " ".join(repr(value.to_dict() if is_dict else value).split())
    except (RecursionError, ValueError):  # it is nested too deep, or has 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def require_path(path: str, value: Any) -> None:
    """Raise a `ConfigError` if a path is empty: it would mean the current folder."""
    if str(value).strip() == "" or "\0" in str(value):
        raise ConfigError(
            f"{path} = {str(value)!r}: must name a file or folder; the one you are in "
            "is '.'."
        )


def caution(text: str) -> None:
    """Warn of a setting that is probably not meant; `text` begins with the field."""
    warnings.warn(text, ConfigWarning, stacklevel=3)


def require_choice(path: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise a `ConfigError` unless the value is one of `allowed`; see `require`."""
    allowed = tuple(allowed)
    if value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ConfigError(
            f"{path} = {short(value)}: must be one of {names}.{nearest(value, allowed)}"
        )


DEEPEST = 50  # the most levels of nesting; no config of moex has 20


def walk(value: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield `(path, node)` for `value` and everything nested in it, parents first.

    Raises:
      ConfigError: if `value` is nested deeper than `DEEPEST`.
    """
    check_depth(depth, path)
    yield path, value
    for name, child in children(value):
        yield from walk(child, join(path, name), depth + 1)


def join(path: str, name: str) -> str:
    """Join a path and the name of a child: `a.b` or `a[0]`."""
    return path + (name if name.startswith("[") else f".{name}")


def check_depth(depth: int, path: str) -> None:
    """Refuse data nested deeper than `DEEPEST`, before Python's stack overflows."""
    if depth > DEEPEST:
        raise ConfigError(f"{path[:100]}...: nested deeper than {DEEPEST} levels.")


def children(value: Any) -> list[tuple[str, Any]]:
    """The named children of a config, a `ConfigDict`, a dict, a tuple or a list."""
    if isinstance(value, Config):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, (ml_collections.ConfigDict, dict)):
        return [(str(k), value[k]) for k in value]
    if isinstance(value, (tuple, list)):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    return []


def check(config: Any, path: str = "config") -> None:
    """Check types and ranges of a whole config tree.

    Args:
      config: a config, or a `ConfigDict`, dict or tuple of them.
      path: its name in errors.

    Raises:
      ConfigError: with the path of the field, its value and what is allowed.
    """
    nodes = list(walk(config, path))
    for node_path, node in nodes:
        check_plain(node, node_path)
    found = [(p, node) for p, node in nodes if isinstance(node, Config)]
    for node_path, node in found:
        check_types(node, node_path)
    # Check children first, so that a parent can rely on the fields of its children.
    for node_path, node in reversed(found):
        node.validate(node_path)


LARGEST = 2**31 - 1  # the limit of all integers: devices have int32 sizes, steps, ids
# Every float except 0 must lie between these. Float32 ends at 1e-45 and 3e38; results
# of computations need some room.
TINIEST, HUGEST = 1e-30, 1e30
# Limits below `LARGEST`, by name of the field: for counts of things that are made,
# started or kept one by one, and for widths for which tables are made.
MOST = {
    "copy": 2**20,
    "constant": 2**20,
    "dim": 2**20,
    "head_dim": 2**14,
    "iterations": 1000,
    "ns_steps": 100,
    "null": 2**20,
    "num_experts": 2**20,
    "prefetch": 10_000,
    "repeat": 10_000,
    "rope_dim": 2**14,
    "threads": 1000,
}


def check_plain(value: Any, path: str) -> None:
    """Check that a number can be computed with, and that a text can be written."""
    if isinstance(value, int) and not isinstance(value, bool):
        most = MOST.get(path.rpartition(".")[2], LARGEST)
        require(value <= most, path, value, f"at most {most:,}")
        require(value >= -LARGEST, path, value, f"at least {-LARGEST:,}")
    elif isinstance(value, float):
        size = abs(value)
        require(math.isfinite(value), path, value, "finite")
        between = f"0, or between {TINIEST:g} and {HUGEST:g} in magnitude"
        require(value == 0 or TINIEST <= size <= HUGEST, path, value, between)
        other = "1, or a number that float32 can tell from 1"
        require(not 1 - 2**-25 <= size < 1, path, value, other)
    elif isinstance(value, str):
        ok = "\0" not in value and is_unicode(value)
        require(ok, path, value, "text without zero bytes, that UTF-8 can hold")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no half of a surrogate pair alone."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_types(config: Config, path: str) -> None:
    """Check each field of one config against its annotation."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not fits(value, field.type):
            where, value, kind = _misfit(f"{path}.{field.name}", value, field.type)
            name = type(value).__name__
            text, end = short(value), f", not {name}."
            if isinstance(value, Config):
                text, end = repr(name), "."
            raise ConfigError(f"{where} = {text}: must be {type_name(kind)}{end}")


def _misfit(path: str, value: Any, annotation: Any) -> tuple[str, Any, Any]:
    """The (path, value, type) to report: a tuple's entry that does not fit, or all."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    kinds = args if origin in (types.UnionType, typing.Union) else (annotation,)
    for kind in kinds:
        entry = typing.get_args(kind)
        if typing.get_origin(kind) is tuple and entry[1:] == (Ellipsis,):
            for i, v in enumerate(value if isinstance(value, (tuple, list)) else ()):
                if isinstance(v, Config) and not fits(v, entry[0]):
                    return f"{path}[{i}]", v, entry[0]
    return path, value, annotation


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type that a field is annotated with."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, a) for a in args)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(fits(v, args[0]) for v in value)
        return len(args) == len(value) and all(map(fits, value, args))
    if origin is list:
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        if isinstance(value, ml_collections.ConfigDict):
            return True
        return isinstance(value, dict) and all(
            fits(k, args[0]) and fits(v, args[1]) for k, v in value.items()
        )
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def type_name(annotation: Any) -> str:
    """Write an annotation for people: `int`, `int or None`, `tuple of str`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(a) for a in args)
    if origin is tuple:
        inner = [type_name(a) for a in args if a is not Ellipsis]
        return "tuple of " + (inner[0] if len(set(inner)) == 1 else ", ".join(inner))
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    if annotation in (None, type(None)):
        return "None"
    if isinstance(annotation, type):  # contracts have a `role` to be named by
        return vars(annotation).get("role", annotation.__name__)
    return str(annotation)


def to_dict(value: Any) -> Any:
    """Turn a config tree into JSON-ready data; each config has its class as a tag."""
    if isinstance(value, Config):
        fields = {k: to_dict(v) for k, v in children(value)}
        return {TYPE_KEY: tag_of(type(value))} | fields
    if isinstance(value, (ml_collections.ConfigDict, dict)):
        return {k: to_dict(v) for k, v in children(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    return value


def flat(data: Any, path: str = "") -> dict[str, Any]:
    """Flatten a result of `to_dict` to `{path: value}`, with paths as in overrides.

    The path of a config gives the name of its class, that of a tuple of configs their
    number; any other tuple is one value.
    """
    found: dict[str, Any] = {}
    if isinstance(data, dict):
        if TYPE_KEY in data:
            found[path] = data[TYPE_KEY].rpartition(".")[2]
        for name, value in data.items():
            if name != TYPE_KEY:
                found |= flat(value, f"{path}.{name}" if path else name)
    elif isinstance(data, list) and any(isinstance(v, dict) for v in data):
        found[path] = f"{len(data)} entries"
        for i, value in enumerate(data):
            found |= flat(value, f"{path}[{i}]")
    else:
        found[path] = data
    return found


def from_dict(data: Any, path: str = "config", depth: int = 0) -> Any:
    """Invert `to_dict`: tuples come back as tuples, mappings as `ConfigDict`.

    Only subclasses of `Config` in moex and in the project folder (`project.py`) are
    built, so that a foreign config file cannot choose which code runs. Types and ranges
    are left to `check`.

    Raises:
      ConfigError: for an unknown class, an unknown field or a missing field, or if it
        is nested too deep; `path` names where `data` stands.
    """
    check_depth(depth, path)
    if isinstance(data, list):
        return tuple(
            from_dict(v, join(path, f"[{i}]"), depth + 1) for i, v in enumerate(data)
        )
    if not isinstance(data, dict):
        return data
    named = [(k, v) for k, v in data.items() if k != TYPE_KEY]
    values = {k: from_dict(v, join(path, k), depth + 1) for k, v in named}
    if TYPE_KEY not in data:
        try:
            return ml_collections.ConfigDict(values, convert_dict=False)
        except (AttributeError, KeyError, ValueError) as e:  # it reserves that name
            raise ConfigError(f"{path}: {short(str(e))}.") from None
    cls = config_class(data[TYPE_KEY], path)
    fields = dataclasses.fields(cls)
    names = [f.name for f in fields]
    for name in values:
        if name not in names:
            raise ConfigError(
                f"{path}: {cls.__name__} has no field {short(name)}."
                f"{nearest(name, names)}"
            )
    for field in fields:
        if field.name in values:
            continue
        if field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}: {cls.__name__} needs the field {field.name!r}.")
        if ABSENT in field.metadata:
            values[field.name] = field.metadata[ABSENT]
    for field in fields:  # JSON does not tell a list from a tuple
        value = values.get(field.name)
        if isinstance(value, tuple) and not fits(value, field.type):
            as_list = list(value)
            values[field.name] = as_list if fits(as_list, field.type) else value
    return cls(**values)


def tag_of(cls: type[Config]) -> str:
    """The name of a config class in config.json."""
    return f"{cls.__module__}.{cls.__qualname__}"


def config_class(tag: Any, path: str) -> type[Config]:
    """The config class of moex, or else of the project folder, that `tag` names.

    Raises:
      ConfigError: if there is none; `path` names where the tag stands.
    """
    text = MOVED.get(tag, tag) if isinstance(tag, str) else ""
    module, _, name = text.rpartition(".")
    inside = module.split(".")[0] == "moex"
    try:
        if inside:
            cls = getattr(importlib.import_module(module), name, None)
        else:
            cls = project.find_class(module, name) if module else None
    except ProjectError as e:
        raise ConfigError(f"{path}: {short(tag)}: {e}") from e
    except (ImportError, OSError, ValueError):
        cls = None
    if isinstance(cls, type) and issubclass(cls, Config):  # noqa: SIM102
        if not inspect.isabstract(cls):
            return cls
    advice = ""
    if module and not inside:
        advice = (
            f", nor one of the project folder {project.folder()}; if it is your own, "
            f"give the folder with {short(module.split('.')[0])[1:-1]} as "
            "--project=FOLDER"
        )
    raise ConfigError(f"{path}: {short(tag)} is not a config class of moex{advice}.")


def own_files(value: Any) -> list[pathlib.Path]:
    """The files of the config classes in a tree that are not part of moex, in order."""
    nodes = [node for _, node in walk(value, "config") if isinstance(node, Config)]
    names = {type(node).__module__ for node in nodes} - {__name__}
    files = [sys.modules[n].__file__ for n in names if not n.startswith("moex.")]
    return sorted(pathlib.Path(file) for file in files if file)


def describe(value: Any, name: str = "config", indent: int = 0) -> str:
    """Write a config as indented text, one field a line, for people."""
    pad = "  " * indent
    kids = children(value)
    if not kids:
        return f"{pad}{name} = {value!r}"
    if isinstance(value, (tuple, list)) and not any(children(v) for v in value):
        return f"{pad}{name} = {value!r}"
    kind = type(value).__name__ if isinstance(value, Config) else ""
    head = f"{pad}{name}: {kind}".rstrip()
    return "\n".join([head] + [describe(v, k, indent + 1) for k, v in kids])
