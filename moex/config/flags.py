"""Configs and overrides by flags: `--config=FILE` or NAME, `--config.a.b=value`.

Values are parsed by absl and ml_collections; each error becomes one line that names the
field, the value, what is allowed and the nearest valid name.
"""

import ast
import contextlib
import dataclasses
import inspect
import pathlib
import re
import sys
import types
import typing
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

import ml_collections
from absl import flags
from ml_collections.config_flags import config_path, tuple_parser

import moex
from moex import project
from moex.config import shipped as configs
from moex.config.base import (
    Config,
    ConfigError,
    children,
    closest,
    fits,
    nearest,
    require_path,
    short,
    type_name,
    walk,
)
from moex.config.reopen import CONFIG_MODULE, check_classes

NONE_WORDS = ("None", "none", "null")


def load_config(args: list[str], base=None):
    """Make the run config that `--config...` arguments describe.

    Args:
      args: `--config=FILE[:arg]`, where a config of moex is named without a folder and
        a suffix, and `--config.a.b=value`, as strings.
      base: config to override when no file is given, or None if a file is needed.

    Raises:
      ConfigError: for a missing or broken file, an unknown field, a wrong type.
    """
    files = [a for a in args if a.startswith("--config=")]
    overrides = [_override(a) for a in args if a not in files]
    if len(files) > 1:
        raise ConfigError(f"--config is given {len(files)} times; give it once.")
    if not files and base is None:
        raise ConfigError(
            "--config: missing; give a config file or a config of moex, such as "
            f"--config=quickstart. Configs of moex are {', '.join(configs.shipped())}."
        )
    cfg = _load_file(files[0]) if files else base
    for path, text in overrides:
        if path == "init_from":  # if empty, the run would start from random parameters
            require_path("--config.init_from", text)
        _apply(cfg, path, text)
    return cfg


def _override(arg: str) -> tuple[str, str]:
    path, _, text = arg.removeprefix("--config.").partition("=")
    return bracketed(path), text


def bracketed(path: str) -> str:
    """Write the path of a field with brackets: `layers.0.dim` is `layers[0].dim`.

    Shells such as zsh take brackets for a pattern; numbers with dots need no quotes.
    """
    return re.sub(r"\.(-?\d+)(?=[.\[]|$)", r"[\1]", path)


def fields_meant(cfg, name: str) -> str:
    """Write ` Did you mean ...?` with the fields that a name may mean, or nothing."""
    return _meant(cfg, cfg, "config", name)


def _load_file(arg: str):
    name = arg.removeprefix("--config=")
    path, *argument = name.split(":", 1)
    file = pathlib.Path(path)
    try:
        found = file.is_file()
    except (OSError, ValueError):  # no file can have this name
        found = False
    if found:
        project.use_config_file(file)
    elif path in (shipped := configs.shipped()):
        file = shipped[path]
    else:
        raise ConfigError(f"--config={name}: {_not_found(file, shipped)}")
    loader = SourceFileLoader(CONFIG_MODULE, str(file))  # whatever its suffix is
    spec: Any = spec_from_loader(CONFIG_MODULE, loader)
    sys.modules[CONFIG_MODULE] = module = module_from_spec(spec)
    try:
        loader.exec_module(module)
        if argument and not inspect.signature(module.get_config).parameters:
            raise ConfigError("this config takes no argument.")
        cfg: Any = module.get_config(*argument)
    except Exception as e:
        raise ConfigError(f"--config={name}: {_reason(e)}") from e
    if not isinstance(cfg, ml_collections.ConfigDict):
        raise ConfigError(
            f"--config={name}: get_config must return an ml_collections.ConfigDict, "
            f"not {type(cfg).__name__}."
        )
    cfg.lock()
    check_classes(cfg)
    return cfg


def _not_found(file: pathlib.Path, shipped: Iterable[str]) -> str:
    """The error of a config that is neither a file nor comes with moex."""
    near = nearest(file.name, [p.name for p in file.parent.glob("*.py")])
    near = near or nearest(file.stem, shipped)
    if len(file.parts) > 1 or file.suffix:
        return f"there is no file {file}.{near}"
    return (
        f"there is no file and no config of moex of this name.{near} Configs of moex "
        f"are {', '.join(shipped)}."
    )


def _reason(error: Exception) -> str:
    """The error of a config file; for an unknown field, the fields that there are."""
    unknown = UNKNOWN_ARGUMENT.match(str(error))
    if isinstance(error, TypeError) and unknown:
        owner, name = unknown.groups()
        for kind in _subclasses(Config):
            if kind.__name__ == owner:
                names = [field.name for field in dataclasses.fields(kind)]
                return (
                    f"{owner} has no field {name!r}.{nearest(name, names)} "
                    f"It has {', '.join(names)}."
                )
    text = " ".join(str(error).split())
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, ModuleNotFoundError) and error.name == "configs":
        text += " (the configs that come with moex are in moex.configs)"
    text = f"{type(error).__name__}: {text}"
    missing = MISSING_ARGUMENTS.match(str(error))
    if isinstance(error, TypeError) and missing:
        owner, needed = missing.groups()
        text = f"{owner} needs a value for {needed.replace(', and', ' and')}"
    at = project.where_in_own_code(error)
    return text + (f" ({at})" if at else "")


MISSING_ARGUMENTS = re.compile(r"(\w+)\.__init__\(\) missing \d+ required .*: (.+)")
UNKNOWN_ARGUMENT = re.compile(
    r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'"
)


def _subclasses(kind) -> list:
    return [
        found for sub in kind.__subclasses__() for found in (sub, *_subclasses(sub))
    ]


# Parsers of one value, by the type of the field.
PARSERS: dict[Any, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
    tuple: tuple_parser.TupleParser(),
}


def _apply(cfg, path: str, text: str) -> None:
    """Set one field of `cfg` from text, in place."""
    holder, name = _find(cfg, path)
    value = config_path.get_value(path, cfg)
    is_branch = _is_branch(value)
    if isinstance(holder, (tuple, list)) and not is_branch:
        whole = path.rpartition("[")[0]
        raise ConfigError(
            f"config.{path}: one value of a tuple cannot be set alone; set all of it, "
            f"such as --config.{whole}='{tuple(holder)!r}'."
        )
    annotation: Any = type(value)
    if isinstance(holder, Config):
        annotation = next(f.type for f in dataclasses.fields(holder) if f.name == name)
    is_union = isinstance(annotation, types.UnionType)
    kinds = set(typing.get_args(annotation) if is_union else [annotation])
    optional, kinds = type(None) in kinds, kinds - {type(None)}
    is_config = any(isinstance(k, type) and issubclass(k, Config) for k in kinds)
    if (is_branch or is_config) and (made := _config_of(path, text)) is not None:
        _put(cfg, path, made)
        return
    if len(kinds) > 1 and not is_branch:
        new = _literal(path, text, annotation)
    elif optional and text in NONE_WORDS:
        new = None
    else:
        kind = kinds.pop()
        try:
            new = PARSERS[typing.get_origin(kind) or kind].parse(text)
        except (KeyError, TypeError, ValueError) as e:
            if is_branch:
                raise ConfigError(
                    f"config.{path} = {text!r}: is a whole config; set one of its "
                    "fields, or write it as in a config file, such as "
                    f"'{type(value).__name__}(...)'."
                ) from None
            raise ConfigError(
                f"config.{path} = {text!r}: must be {type_name(annotation)}."
            ) from e
    config_path.set_value(path, cfg, new)


def _put(cfg, path: str, value) -> None:
    """Set a field, or an entry of a tuple: then the tuple is made anew."""
    holder, name = _find(cfg, path)
    if isinstance(holder, (tuple, list)):
        entries = [*holder]
        entries[int(name)] = value
        _put(cfg, path.rpartition("[")[0], type(holder)(entries))
    else:
        config_path.set_value(path, cfg, value)


def _config_of(path: str, text: str):
    """The config that text such as `TopP(p=0.4)` makes; None if it is no such text.

    The name is that of a class of moex or of the user's project that was imported.

    Raises:
      ConfigError: if there is no such class, or an argument does not fit.
    """
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    return _called(path, call) if is_call or isinstance(call, ast.Tuple) else None


def _called(path: str, node: ast.expr):
    """The value of an expression of literals and calls of config classes."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_called(path, item) for item in node.elts)
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            told = f"config.{path} = {short(ast.unparse(node))}"
            raise ConfigError(f"{told}: must be a literal or a config.") from None
    name, written = (
        ast.unparse(node.func),
        f"config.{path} = {short(ast.unparse(node))}",
    )
    if (kind := _config_class(name)) is None:
        names = {*moex.MODULES, *(k.__name__ for k in _subclasses(Config))}
        near = nearest(name, names)
        raise ConfigError(f"{written}: there is no config {name!r}.{near}")
    if node.args:
        first = dataclasses.fields(kind)[0].name
        told = f"give each field its name, such as {name}({first}=...)"
        raise ConfigError(f"{written}: {told}.")
    given = {str(k.arg): _called(path, k.value) for k in node.keywords}
    try:
        return kind(**given)
    except TypeError as e:
        raise ConfigError(f"config.{path}: {_reason(e)}") from None


def _config_class(name: str) -> Any:
    """The config class of a name: a public one, or one that was imported; or None."""
    kind = getattr(moex, name) if name in moex.MODULES else None
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        found = [k for k in _subclasses(Config) if k.__name__ == name]
        kind = found[0] if found else None
    return kind


def _literal(path: str, text: str, annotation):
    """Read `text` as a Python literal, or take it as it is, whichever fits."""
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        value = tuple(value) if isinstance(value, list) else value
        if fits(value, annotation):
            # An int for a float field becomes a float, as everywhere else.
            is_int = type(value) is int and int not in typing.get_args(annotation)
            return float(value) if is_int else value  # type: ignore
    if fits(text, annotation):
        return text
    raise ConfigError(f"config.{path} = {text!r}: must be {type_name(annotation)}.")


def _is_branch(value) -> bool:
    if isinstance(value, (Config, ml_collections.ConfigDict)):
        return True
    return isinstance(value, (tuple, list)) and any(map(_is_branch, value))


def _find(cfg, path: str):
    """Find the object that holds the last part of `path`; return it and that part.

    Raises:
      ConfigError: if a part does not exist; names what does.
    """
    try:
        parts = config_path.split(path)
        if not all(isinstance(part, (int, str)) for part in parts):
            raise ValueError  # for example "layers[x]"
    except ValueError:
        raise ConfigError(
            f"config.{path}: not a field path; write a.b or a.b[0].c."
        ) from None
    node, seen = cfg, "config"
    for i, part in enumerate(parts):
        names = [n for n, _ in children(node)]
        if isinstance(part, int):
            ok = isinstance(node, (tuple, list)) and -len(node) <= part < len(node)
            if not ok:
                size = len(names) if isinstance(node, (tuple, list)) else 0
                raise ConfigError(f"{seen}[{part}]: no such entry; {seen} has {size}.")
        elif part not in names:
            have = ", ".join(names) if names else f"no fields, it is {node!r}"
            meant = _meant(cfg, node, seen, part) if names else ""
            kind = f" ({type(node).__name__})" if isinstance(node, Config) else ""
            raise ConfigError(
                f"{seen}.{part}: no such field.{meant} {seen}{kind} has {have}."
            )
        if i == len(parts) - 1:
            return node, part
        node = node[part] if isinstance(part, int) else getattr(node, part)
        seen += f"[{part}]" if isinstance(part, int) else f".{part}"
    raise AssertionError("a path has at least one part")


def _meant(cfg, node, seen, name) -> str:
    """Write ` Did you mean ...?` for a field that `node`, at path `seen`, lacks.

    The name may be mistyped, belong further below, or elsewhere, in this order. The
    whole paths of the first three fields of that name are given.
    """
    below, everywhere = _paths(node, seen), _paths(cfg, "config")
    if name not in below and (near := nearest(name, [n for n, _ in children(node)])):
        return near
    for paths in (below, everywhere):
        for meant in (name, closest(name, paths)):
            if meant in paths:
                found = [repr(path) for path in paths[meant]]
                rest = [f"one of {len(found) - 3} more"] if len(found) > 3 else []
                return f" Did you mean {' or '.join(found[:3] + rest)}?"
    return ""


def _paths(node, path) -> dict[str, list[str]]:
    """Collect `{name: paths}` of all fields below a node."""
    found: dict[str, list[str]] = {}
    for where, _ in walk(node, path):
        if where != path and not where.endswith("]"):
            found.setdefault(where.rpartition(".")[2], []).append(where)
    return found
