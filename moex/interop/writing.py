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

from moex.data.files import naming
from moex.interop.folder import DTYPES, INDEX, SINGLE
from moex.progress import phase
from moex.runs.claim import new_folder

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
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    folder: str | os.PathLike[str],
    tensors: Sequence[Tensor],
    *,
    max_shard_bytes: int = 1 << 30,
    single: str = SINGLE,
    files: Mapping[str, str | Path] | None = None,
    index: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; a failure at any point leaves nothing behind.

    Tensors fill shards in the order given, and one is in memory at a time. All is
    written to a hidden folder next to `folder`, which gets its name at the end.

    Args:
      folder: where to; must be empty or not exist.
      tensors: what to write; names differ.
      max_shard_bytes: largest shard; a tensor above that has a shard of its own.
      single: name of the file if there is one only.
      files: what else goes into the folder, by file name: a text, or a file to copy.
      index: another folder's index; its files are used if the tensors are the same.

    Raises:
      ConfigError: see `new_folder`.
      ValueError: for a `read` that returns another shape or type than was said.
    """
    target = new_folder(folder, f"--out={folder}")
    if index is None or index["weight_map"].keys() != {t.name for t in tensors}:
        index = {}
    shards = _plan(tensors, max_shard_bytes, index.get("weight_map"), single)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        total = sum(tensor.nbytes for tensor in tensors)
        with phase("writing tensors", total, "B") as at:
            for name, shard in shards.items():
                _write_shard(temporary / name, shard, at.add)
        files = dict(files or {})
        if list(shards) != [single]:
            files[INDEX] = json.dumps(_index(shards, index), indent=2) + "\n"
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                with naming(temporary / name):
                    (temporary / name).write_text(content, encoding="utf-8")
        temporary.replace(target)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _plan(
    tensors: Sequence[Tensor],
    most: int,
    file_of: Mapping[str, str] | None,
    single: str,
) -> dict[str, list[Tensor]]:
    """Tensors by file: those of `file_of`, or of at most so many bytes."""
    shards: dict[str, list[Tensor]] = {}
    if file_of is not None:
        for tensor in tensors:
            shards.setdefault(file_of[tensor.name], []).append(tensor)
        return shards
    parts: list[list[Tensor]] = [[]]  # one file, maybe empty, at least
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    count = len(parts)
    names = (f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
    return dict(zip(names if count > 1 else (single,), parts, strict=True))


def _index(shards: dict[str, list[Tensor]], before: Mapping[str, Any]) -> dict:
    """The index of shards, with the fields of an earlier index, in its order."""
    file_of = {t.name: file for file, shard in shards.items() for t in shard}
    size = sum(t.nbytes for shard in shards.values() for t in shard)
    return {
        **before,
        "metadata": {**(before.get("metadata") or {}), "total_size": size},
        "weight_map": {n: file_of[n] for n in before.get("weight_map", file_of)},
    }


def _write_shard(file: Path, shard: list[Tensor], count: Callable) -> None:
    """Write one file of the format, tensor by tensor, laid out as its library does.

    The library itself wants all tensors of a file in memory.
    """
    # Wide types come first: every tensor then starts at a multiple of its item size.
    shard = sorted(shard, key=lambda t: (-t.dtype.itemsize, t.name))
    # transformers reads no other format than that of PyTorch.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": FORMAT[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with naming(file), open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            f.write(_value(tensor))
            count(tensor.nbytes)


def _value(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    value = np.asarray(tensor.read())
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(
            f"The tensor {tensor.name!r} was to be {tensor.dtype} of shape "
            f"{tensor.shape}; read() gave {value.dtype} of shape {value.shape}."
        )
    # Reshape first: NumPy refuses a view of a scalar as bytes.
    return np.ravel(value).view(np.uint8).data
