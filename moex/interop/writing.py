"""Writing a Hugging Face checkpoint folder with one tensor in memory at a time.

`folder.py` reads such folders; `names.py` has the names of a model's tensors.
"""

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moex.config.base import ConfigError
from moex.data.files import naming
from moex.interop.folder import DTYPES, INDEX, SINGLE

FORMAT = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written: known before it is made, made by `read` when due."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def check_target(folder: str | os.PathLike[str]) -> Path:
    """The folder that is written to, without symbolic links.

    Raises:
      ConfigError: if it is a file, is not empty or is the current folder.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"--out={folder}: exists already; must be new or an empty folder."
        )
    if target == Path.cwd():  # the new folder replaces it
        raise ConfigError(f"--out={folder}: is the folder you are in; name another.")
    return target


def write(
    folder: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    *,
    max_shard_bytes: int = 1 << 30,
    files: Mapping[str, str | Path] | None = None,
    metadata: Mapping[str, str] | None = None,
    index: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; a failure at any point leaves nothing behind.

    Tensors fill shards in the order given, and one is in memory at a time. All is
    written to a hidden folder next to `folder`, which gets its name at the end.

    Args:
      folder: where to; must be empty or not exist.
      tensors: what to write; names differ.
      max_shard_bytes: largest shard; a tensor above that has a shard of its own.
      files: what else goes into the folder, by file name: a text, or a file to copy.
      metadata: further entries of the header of each shard.
      index: another folder's index; its files are used if the tensors are the same.

    Raises:
      ConfigError: see `check_target`.
      ValueError: for a name given twice, a type that the format does not have, and a
        `read` that returns another shape or type than was said.
    """
    target = check_target(folder)
    _check(tensors)
    if index is not None and index["weight_map"].keys() == {t.name for t in tensors}:
        shards = _as_before(tensors, index["weight_map"])
    else:
        index, shards = None, _plan(tensors, max_shard_bytes)
    header = {**(metadata or {}), "format": "pt"}  # transformers reads no other
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, shard in shards.items():
            _write_shard(temporary / name, shard, header)
        if list(shards) != [SINGLE]:
            text = json.dumps(_index(shards, index or {}), indent=2)
            with naming(temporary / INDEX):
                (temporary / INDEX).write_text(text + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                with naming(temporary / name):
                    (temporary / name).write_text(content, encoding="utf-8")
        temporary.replace(target)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check(tensors: Sequence[Tensor]) -> None:
    """Check that names differ and that the format has the types."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"The tensor {tensor.name!r} is given twice.")
        if np.dtype(tensor.dtype) not in FORMAT:
            raise ValueError(
                f"The tensor {tensor.name!r} is of type {tensor.dtype}, which the "
                "safetensors format does not have."
            )
        seen.add(tensor.name)


def _plan(tensors: Sequence[Tensor], max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """Tensors by file, in the order given; one file, maybe empty, at least."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    count = len(shards)
    if count == 1:
        return {SINGLE: shards[0]}
    names = (f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
    return dict(zip(names, shards, strict=True))


def _as_before(
    tensors: Sequence[Tensor], files: Mapping[str, str]
) -> dict[str, list[Tensor]]:
    """Group tensors by the file that an index places them in."""
    shards: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        shards.setdefault(files[tensor.name], []).append(tensor)
    return shards


def _index(shards: dict[str, list[Tensor]], before: Mapping[str, Any]) -> dict:
    """The index of shards, with the fields of an earlier index, in its order."""
    file_of = {t.name: file for file, shard in shards.items() for t in shard}
    size = sum(t.nbytes for shard in shards.values() for t in shard)
    return {
        **before,
        "metadata": {**(before.get("metadata") or {}), "total_size": size},
        "weight_map": {n: file_of[n] for n in before.get("weight_map", file_of)},
    }


def _write_shard(file: Path, shard: list[Tensor], metadata: dict[str, str]) -> None:
    """Write one file of the format, tensor by tensor, laid out as its library does.

    The library itself wants all tensors of a file in memory.
    """
    # Wide types come first: every tensor then starts at a multiple of its item size.
    shard = sorted(shard, key=lambda t: (-np.dtype(t.dtype).itemsize, t.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": FORMAT[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with naming(file), open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            f.write(_value(tensor))


def _value(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    value = np.asarray(tensor.read())
    if value.shape != tuple(tensor.shape) or value.dtype != tensor.dtype:
        raise ValueError(
            f"The tensor {tensor.name!r} was to be {np.dtype(tensor.dtype)} of "
            f"shape {tuple(tensor.shape)}; read() gave {value.dtype} of shape "
            f"{value.shape}."
        )
    # Reshape first: NumPy refuses a view of a scalar as bytes.
    return np.ravel(value).view(np.uint8).data
