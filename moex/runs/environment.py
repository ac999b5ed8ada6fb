"""The environment of each start of a run: versions, machine, command."""

import datetime
import importlib.metadata
import json
import platform
import sys

import jax

import moex
from moex.cluster import distributed
from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.json_files import expect_object, field, json_kind, read_json
from moex.runs.directory import RunDir

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("ml_collections", "tokenizers", "libtpu", "jax-cuda12-plugin"),
    "jax-cuda13-plugin",
)


def environment(step: int) -> dict:
    """Describe the environment of this process, which goes on from `step`."""
    device = jax.devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "moex": moex.__version__,
        "code": distributed.code_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "processes": jax.process_count(),
        "packages": {name: v for name in PACKAGES if (v := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_environment(run: RunDir) -> list[dict]:
    """The starts in a run's environment.json, oldest first; none if there is no file.

    Raises:
      ConfigError: naming the file and the entry, if moex cannot have written it.
    """
    file = run.environment
    if not file.is_file():
        return []
    starts = read_json(file)
    if not isinstance(starts, list):
        raise ConfigError(f"{file}: must be a list, not {json_kind(starts)}.")
    for i, start in enumerate(starts):
        where = f"{file}, entry {i}"
        field(expect_object(start, where), "packages", dict[str, str], where, {})
        field(start, "command", list[str], where, [])
        field(start, "step", int, where, 0)
    return starts


def save_environment(run: RunDir, step: int) -> None:
    """Add this start to the environment.json of a run.

    A damaged file is kept as environment.json.damaged, and a new one is begun.
    """
    file = run.environment
    try:
        starts = read_environment(run)
    except ConfigError:
        file.replace(file.with_name(f"{file.name}.damaged"))
        starts = []
    text = json.dumps([*starts, environment(step)], indent=1)
    atomic_write(file, text + "\n")
