"""The grid of a sweep: its axes as text, its points, and the check of all configs."""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from moex.config.base import ConfigError, require, to_dict
from moex.config.flags import bracketed
from moex.config.reopen import check_reopens
from moex.runs.directory import given_config
from moex.runs.keys import check_run

MOST_POINTS = 10_000
LONGEST = 200  # the most bytes of a folder name; file systems allow 255
BRACKETS = {"(": ")", "[": "]", "{": "}"}
CONFIG = "config"  # the axis whose values are those of --config
ARGUMENT = "config:"  # begins axes of keys in the argument of --config=FILE:KEY=VALUE


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # the name of its folder
    config_args: tuple[str, ...]  # its `--config=...` and `--config.a.b=value`
    steps: int  # how many steps it trains


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    # The config without the swept values, as plain data; of an axis of configs, all of
    # them by value.
    base: Any
    grid: dict[str, tuple[str, ...]]  # the values as text, by field
    # The points in order; the last field of the grid changes fastest.
    points: tuple[Point, ...]


def make_sweep(
    texts: Sequence[str], config_args: list[str], load=given_config
) -> Sweep:
    """Read the arguments of a sweep and check the config of every point.

    Args:
      texts: FIELD=V1,V2 each.
      config_args: `--config...` arguments that all points share.
      load: makes a config of such arguments.

    Raises:
      ConfigError: for a mistake in the grid, or in the config of any point.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        field, values = parse_axis(text)
        if field in grid:
            raise ConfigError(f"--sweep {field}: is given twice; give all values once.")
        grid[field] = values
    count = math.prod(map(len, grid.values()))
    require(count <= MOST_POINTS, "--sweep", count, f"at most {MOST_POINTS:,} runs")
    bases = {v: point_args(config_args, {CONFIG: v}) for v in grid.get(CONFIG, ())}
    base = {value: to_dict(load(args)) for value, args in bases.items()}
    base = base or to_dict(load(config_args))
    points, seen = [], dict[str, str]()
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        args = point_args(config_args, chosen)
        name = point_name(chosen)
        try:
            cfg = load(args)
            check_run(cfg)
            check_reopens(cfg)
        except ConfigError as e:
            raise ConfigError(f"--sweep, {name}: {e}") from None
        for same in (name, json.dumps(to_dict(cfg), sort_keys=True)):
            if same in seen:
                raise ConfigError(f"--sweep: {seen[same]} and {name} would be one run.")
            seen[same] = name
        points.append(Point(name, tuple(args), cfg.steps))
    return Sweep(base, grid, tuple(points))


def point_args(config_args: list[str], chosen: dict[str, str]) -> list[str]:
    """The `--config...` arguments of a point: those of the sweep, and its own.

    Raises:
      ConfigError: if the sweep and the point have both a `--config=`.
    """
    given = [arg for arg in config_args if arg.startswith("--config=")]
    others = [arg for arg in config_args if arg not in given]
    if CONFIG in chosen:
        if given:
            raise ConfigError(
                f"--sweep {CONFIG}: gives the configs; leave out {given[0]}, or sweep "
                f"a key of its argument, as in {ARGUMENT}router=topk,topp."
            )
        given = [f"--config={chosen[CONFIG]}"]
    keys = [
        f"{field.removeprefix(ARGUMENT)}={value}"
        for field, value in chosen.items()
        if field.startswith(ARGUMENT)
    ]
    if keys and given:
        joint = "," if ":" in given[0] else ":"
        given = [f"{given[0]}{joint}{','.join(keys)}"]
    fields = [
        f"--config.{field}={value}"
        for field, value in chosen.items()
        if field != CONFIG and not field.startswith(ARGUMENT)
    ]
    return [*given, *others, *fields]


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
    """Read `(field, values)` from `FIELD=V1,V2` or `FIELD=V1|V2`.

    Raises:
      ConfigError: if there is no field or no value, or one is empty or comes twice.
    """
    field, equals, rest = text.partition("=")
    field = bracketed(field.strip().removeprefix("config."))
    if not field or not equals:
        raise ConfigError(f"--sweep {text}: must be FIELD=V1,V2, as in seed=0,1.")
    parts = split_top(rest, "|") if "|" in rest else []
    parts = parts if len(parts) > 1 else split_top(rest)
    values = tuple(value.strip() for value in parts)
    if "" in values:
        raise ConfigError(f"--sweep {text}: a value is missing.")
    value, times = collections.Counter(values).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"--sweep {text}: {value} is given twice.")
    return field, values


def split_top(text: str, separator: str = ",") -> list[str]:
    """Split `text` at each separator outside of brackets and quotes.

    Raises:
      ConfigError: if a bracket or a quote is not closed.
    """
    parts, start, closing, quote = [], 0, list[str](), ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == separator and not closing:
            parts.append(text[start:i])
            start = i + 1
    if quote or closing:
        raise ConfigError(f"--sweep ...={text}: {quote or closing[-1]} is missing.")
    return [*parts, text[start:]]


def point_name(chosen: dict[str, str]) -> str:
    """The folder name of a point, such as `optim.lr=0.01,router=topp,seed=1`."""
    named = {field.removeprefix(ARGUMENT): value for field, value in chosen.items()}
    if CONFIG in named:  # `configs/quickstart.py:chain=2` is `quickstart_chain=2`
        file, colon, argument = named[CONFIG].partition(":")
        file = file.removeprefix("configs/").removesuffix(".py")
        named[CONFIG] = f"{file}{colon}{argument}"
    parts = (f"{field}={value}" for field, value in sorted(named.items()))
    text = re.sub(r"\[(\d+)\]", r".\1", ",".join(parts))
    text = re.sub(r"[\s'\"()\[\]{}]+", "", text)
    name = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
