"""Whether a run can be opened again: its config is read back as it was written."""

import dataclasses
import json
from typing import Any

import ml_collections

from moex import project
from moex.config.base import (
    Config,
    ConfigError,
    check,
    config_class,
    flat,
    from_dict,
    require,
    short,
    tag_of,
    to_dict,
    walk,
)

CONFIG_MODULE = "config_config"  # the name of a config file as a module
# Modules that no other process can import again, and what they are to the user.
NO_FILES = {CONFIG_MODULE: "the config file", "__main__": "the program that runs"}


def check_reopens(cfg: Any) -> None:
    """Check, before a run starts, that its config.json will give the same config.

    Raises:
      ConfigError: for a class that is not found again, and for a value that JSON cannot
        hold or that comes back as another one.
    """
    check_classes(cfg)
    for where, node in walk(cfg, "config"):
        _check_value(where, node)
    try:
        again = from_dict(json.loads(json.dumps(to_dict(cfg))))
        check(again)
    except ConfigError as e:
        raise ConfigError(f"{e} So it would be read from config.json.") from None
    new = flat(to_dict(again))
    for path, value in flat(to_dict(cfg)).items():
        read = new.get(path)
        allowed = f"kept: the value would be {short(read)} when the run is opened"
        require(read == value, f"config.{path}", value, allowed)


def check_classes(cfg: Any) -> None:
    """Check that every class of a config can be found again when its run is opened."""
    for where, node in walk(cfg, "config"):
        cls = type(node)
        if not isinstance(node, Config) or cls.__module__.startswith("moex."):
            continue
        if cls.__module__ in NO_FILES:
            raise ConfigError(
                f"{where}: {cls.__name__} is defined in {NO_FILES[cls.__module__]}; "
                "put it into a file of its own beside it, so that the run can be "
                "opened again."
            )
        if cls.__qualname__ != cls.__name__:
            raise ConfigError(
                f"{where}: {cls.__qualname__} is defined inside of something else; "
                "put it at the top of its file, so that the run can be opened again."
            )
        if config_class(tag_of(cls), where) is not cls:
            raise ConfigError(
                f"{where}: {tag_of(cls)} is another class in {project.folder()} than "
                "the one that is imported; rename its file."
            )


def _check_value(where: str, node: Any) -> None:
    """Check that JSON can hold one node of a config."""
    if isinstance(node, (dict, ml_collections.ConfigDict)):
        for key in node:
            require(isinstance(key, str), f"{where}, a key", key, "text")
    elif isinstance(node, Config):
        for field in dataclasses.fields(node):
            path = f"{where}.{field.name}"
            allowed = "a field that `__init__` takes, so that the run can be opened"
            require(field.init, path, getattr(node, field.name), allowed)
    elif not isinstance(node, (bool, float, int, list, str, tuple, type(None))):
        allowed = (
            "a number, text, True, False, None, a config, or a tuple or mapping of "
            "these: config.json holds no others"
        )
        require(False, where, node, allowed)
