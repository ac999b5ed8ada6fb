"""Writing a Hugging Face checkpoint folder with one shard in memory at a time.

Not here: reading one (`folder.py`), which names a model's tensors have.
"""

import dataclasses
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moex.config import ConfigError
from moex.interop.folder import DTYPES, INDEX, SINGLE


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
    """The folder that a checkpoint is written to.

    Raises:
      ConfigError: if it is a file or is not empty.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; name a new or an empty folder.")
    return target


def write(
    folder: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    *,
    max_shard_bytes: int = 1 << 30,
    files: Mapping[str, str | Path] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint folder; a failure at any point leaves nothing behind.

    Tensors fill shards in the order given, and one shard is in memory at a time. All
    is written to a hidden folder beside `folder`, which gets its name at the end.

    Args:
      folder: where to; must be empty or not exist.
      tensors: what to write; names differ.
      max_shard_bytes: largest shard; a tensor above that has a shard of its own.
      files: what else goes into the folder, by file name: a text, or a file to copy.
      metadata: further entries of the header of each shard.

    Raises:
      ConfigError: if `folder` is a file or is not empty.
      ValueError: for a name given twice, a type that the format does not have, and a
        `read` that returns another shape or type than was said.
    """
    target = check_target(folder)
    shards = _plan(tensors, max_shard_bytes)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    header = {**(metadata or {}), "format": "pt"}  # transformers reads no other
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(temporary / name, shard, header)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                "weight_map": {
                    t.name: name
                    for name, shard in zip(names, shards, strict=True)
                    for t in shard
                },
            }
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for name, content in (files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                (temporary / name).write_text(content, encoding="utf-8")
        temporary.replace(target)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _plan(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    """Tensors by shard, in the order given; one shard, maybe empty, at least."""
    seen: set[str] = set()
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"The tensor {tensor.name!r} is given twice.")
        if np.dtype(tensor.dtype) not in DTYPES.values():
            raise ValueError(
                f"The tensor {tensor.name!r} is of type {tensor.dtype}, which the "
                "safetensors format does not have."
            )
        seen.add(tensor.name)
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(file: Path, shard: list[Tensor], header: dict[str, str]) -> None:
    """Write one shard; its arrays are freed on return."""
    arrays = {}
    for tensor in shard:
        value = np.asarray(tensor.read())
        if value.shape != tuple(tensor.shape) or value.dtype != tensor.dtype:
            raise ValueError(
                f"The tensor {tensor.name!r} was to be {np.dtype(tensor.dtype)} of "
                f"shape {tuple(tensor.shape)}; read() gave {value.dtype} of shape "
                f"{value.shape}."
            )
        # The library writes the bytes at the array's address, whatever its strides.
        arrays[tensor.name] = np.asarray(value, order="C")
    save_file(arrays, file, metadata=header)
    # The library makes files for their owner alone; the folder knows the user's umask.
    file.chmod(file.parent.stat().st_mode & 0o666)
