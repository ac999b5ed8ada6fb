"""Where the experts of a model wait that have no slot: one row for each of them.

A row is the bytes of one expert (`layout.py`). The rows of a run are in a file of the
cache of moex, which is written once from the checkpoint, piece by piece, and mapped
into memory: so a model larger than the memory can be used. Rows can also be in memory
that the device reads directly, where the platform has such memory and they fit.
"""

import abc
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moex import cache
from moex.config.base import ConfigError, to_dict
from moex.data.files import one_line
from moex.json_files import digest
from moex.nn.lowered import SCALES, VALUES, rounded
from moex.offload.layout import Layer, Part, Pool, module_of
from moex.progress import counted
from moex.runs.directory import RunDir
from moex.runs.rows import Rows

PINNED = "pinned_host"


class Bank(abc.ABC):
    """All rows of a pool."""

    def __init__(self, pool: Pool):
        self.pool = pool

    @abc.abstractmethod
    def row(self, number: int) -> dict[str, Any]:
        """The parts of a row by name: arrays of the host."""


class FileBank(Bank):
    """Rows in a file that is mapped into memory."""

    def __init__(self, pool: Pool, file: pathlib.Path):
        super().__init__(pool)
        self.file = file
        shape = (pool.num_rows, pool.row_bytes)
        try:
            self._rows = np.memmap(file, np.uint8, "r", shape=shape)
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"{file}: cannot be read: {one_line(e)}; remove it, and it is written "
                "again: moex cache --clear=banks"
            ) from None

    def row(self, number):
        return self.pool.views(np.asarray(self._rows[number]))


class PinnedBank(Bank):
    """Rows in memory of the host that the device reads directly."""

    def __init__(self, pool: Pool, source: Bank, device):
        super().__init__(pool)
        kinds = sorted(m.kind for m in device.addressable_memories())
        if PINNED not in kinds:
            raise ConfigError(
                f"--offload-bank=pinned: a {device.device_kind} has no {PINNED} "
                f"memory, but {', '.join(kinds)}; use disk."
            )
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED)
        self._rows = [
            jax.device_put(source.row(number), place) for number in range(pool.num_rows)
        ]

    def row(self, number):
        return self._rows[number]


Read = Callable[[str, str, tuple], np.ndarray]
Piece = Callable[[str, str], tuple[int, ...]]


def bank_files(folder: RunDir, rows: Rows, pools: Sequence[Pool]) -> list[pathlib.Path]:
    """The files of the banks of a run, which are written if they are not there.

    Args:
      folder: of the run.
      rows: the checkpoint.
      pools: of its model.

    Raises:
      ConfigError: if there is no room for them.
      CheckpointError: if the checkpoint is damaged.
    """
    key = digest(
        {
            "model": to_dict(folder.config().model),
            "checksums": rows.meta["checksums"],
            "parts": [[str(part) for part in pool.parts] for pool in pools],
        }
    )
    home = cache.banks()
    target = home / key
    files = [target / f"{i}.rows" for i in range(len(pools))]
    if target.is_dir():
        os.utime(target)
        return files
    needed = sum(pool.num_rows * pool.row_bytes for pool in pools)
    try:
        home.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(home).free
        if needed > room:
            raise ConfigError(
                f"{home}: the experts of {folder} need {needed / 2**30:,.1f} GiB here, "
                f"and {room / 2**30:,.1f} GiB are free; set MOEX_CACHE to a folder on "
                "another disk."
            )
        made = pathlib.Path(tempfile.mkdtemp(prefix="new-", dir=home))
        try:
            for i, pool in enumerate(pools):
                write_bank(made / files[i].name, pool, rows.read, rows.piece)
            made.rename(target)
        except BaseException as e:
            shutil.rmtree(made, ignore_errors=True)
            if not (isinstance(e, OSError) and target.is_dir()):  # another was quicker
                raise
    except OSError as e:
        raise ConfigError(f"{home}: cannot be written: {one_line(e)}") from None
    return files


def write_bank(file: pathlib.Path, pool: Pool, read: Read, piece: Piece) -> None:
    """Write all rows of a pool; no more than a piece of an array is in memory.

    Args:
      file: new file.
      pool: says what is in a row.
      read: gives a part of an array, as `Rows.read`.
      piece: tells the shape of the pieces of an array, as `Rows.piece`.
    """
    sites = {module_of(layer): layer.site for layer in pool.layers}
    places = {(module_of(a), a.copy): a for a in pool.layers}
    arrays = [(path, part) for path in sites for part in pool.parts]
    with open(file, "wb") as stream:
        stream.truncate(pool.num_rows * pool.row_bytes)
        doing = "writing experts to the cache"
        for path, part in counted(arrays, doing, len(arrays), "arrays"):
            own = {r: a for (at, r), a in places.items() if at == path}
            _write_part(stream, pool, own, path, part, read, piece)


def _write_part(
    stream, pool: Pool, own: dict[int, Layer], path, part: Part, read, piece
):
    """Write a part of all experts of a site; `own` has its layers by their copy."""
    state = "state/" if part.item == "state" else ""
    whole = part.name.removesuffix(VALUES).removesuffix(SCALES)
    where = (part.item, f"{state}{path}/{whole}")
    step_r, step_e, *_ = piece(*where)
    num_experts = next(iter(own.values())).experts
    for r in range(0, len(own), step_r):
        for e in range(0, num_experts, step_e):
            several = (slice(r, r + step_r), slice(e, e + step_e))
            block = read(*where, several)
            if whole == part.name:
                block = _cast(block, part.dtype)
            else:
                block = _rounded(block, whole, part, pool, where[1])
            for i, copy in enumerate(block):
                for j, array in enumerate(copy):
                    row = own[r + i].first + e + j
                    stream.seek(row * pool.row_bytes + part.start)
                    stream.write(np.ascontiguousarray(array).tobytes())


def _rounded(block: np.ndarray, whole: str, part: Part, pool: Pool, where: str):
    """A part of weights that are kept in fewer bytes."""
    if not np.all(np.isfinite(block)):
        raise ConfigError(
            f"--weights: {where} has a number that is not finite; it can only be read "
            "as it is."
        )
    parts = {own.name: own for own in pool.parts}
    values, scales = (
        jax.ShapeDtypeStruct((*block.shape[:2], *own.shape), own.dtype)
        for own in (parts[whole + VALUES], parts[whole + SCALES])
    )
    found = rounded(jnp.asarray(block), values, scales)
    return np.asarray(found[part.name.endswith(SCALES)])


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in another type, rounded as the device rounds."""
    return array if array.dtype == dtype else np.asarray(jnp.asarray(array, dtype))
