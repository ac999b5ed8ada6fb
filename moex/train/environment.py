"""What a run was started in: versions, machine, command; for its report."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys

import jax

from moex import distributed
from moex.data.files import atomic_write

FILE = "environment.json"
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("ml_collections", "tokenizers", "libtpu", "jax-cuda12-plugin"),
    "jax-cuda13-plugin",
)


def environment(step: int) -> dict:
    """What this process runs in.

    Args:
      step: that the run goes on from.
    """
    device = jax.devices()[0]
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": sys.argv,
        "moex": _version("moex"),
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


def save_environment(workdir: pathlib.Path, step: int) -> None:
    """Add this start to `workdir/environment.json`."""
    path = workdir / FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):  # a damaged one is begun again
        starts = []
    text = json.dumps([*starts, environment(step)], indent=1)
    atomic_write(path, text + "\n")
