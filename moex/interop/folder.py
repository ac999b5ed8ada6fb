"""A Hugging Face checkpoint folder, read as a stream of tensors.

A folder is config.json and weights in the safetensors format: model.safetensors, or
shards and model.safetensors.index.json. `Folder.open` checks the whole folder from
the headers alone, so that a broken download fails before any tensor is read.

The safetensors library checks every file. The bytes are then read through a memory
map of one tensor, because the library gives NumPy no float8, and refuses slices that
NumPy allows (empty ones, and ones that reach over the end).

`dequantise.py` reads quantised tensors, `writing.py` writes folders, and `names.py`
knows what the name of a tensor means.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from moex.config.base import ConfigError, nearest, short
from moex.json_files import field, parse_json, read_object

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
PICKLES = (".bin", ".pt", ".pth")
LONGEST_NAME = 255  # bytes, the limit of file systems

# Files that travel with a model, besides its weights.
EXTRA_FILES = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)

# The format's names of the types that NumPy and ml_dtypes have. Packed types of less
# than a byte (F4, F6) are left out: an array cannot view them.
DTYPES: dict[str, np.dtype] = {
    **{"F64": np.dtype(np.float64), "F32": np.dtype(np.float32)},
    **{"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)},
    **{"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)},
    **{"I16": np.dtype(np.int16), "I8": np.dtype(np.int8)},
    **{"U64": np.dtype(np.uint64), "U32": np.dtype(np.uint32)},
    **{"U16": np.dtype(np.uint16), "U8": np.dtype(np.uint8)},
    **{"BOOL": np.dtype(np.bool_), "C64": np.dtype(np.complex64)},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)},
    **{"F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
    **{"F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu)},
}

Index = tuple[slice | int, ...]


class Stored(NamedTuple):
    """A tensor in a file: its type, its shape, and its first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self, index: Index = ()) -> np.ndarray:
        """A new array in memory of it, or of its part `index`, which is as NumPy's.

        Only the pages that hold the part are read.
        """
        if 0 in self.shape:  # an empty tensor has no bytes to map
            return np.empty(self.shape, self.dtype)[index]
        # Every read maps the file anew, so that pages do not pile up in memory.
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A checkpoint folder that was found whole; make one with `Folder.open`."""

    path: Path  # the folder
    config: dict[str, Any]  # the fields of its config.json
    # Each tensor by its name: `Stored`, or one of `dequantise.py`.
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Check a folder and list its tensors; reads headers only.

        Files may be symbolic links, because a snapshot in the hub's cache is made of
        them; names in the index may not lead out of the folder.

        Raises:
          ConfigError: for a folder or file that is missing or broken, for weights
            that are only there as pickles, and for an index and shards that disagree.
        """
        path = Path(path).expanduser()
        if not path.is_dir():
            what = "is a file, not a folder" if path.exists() else "does not exist"
            raise ConfigError(f"The checkpoint folder {path} {what}.")
        config = read_json(path / CONFIG)
        weight_map = _weight_map(path)
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        tensors: dict[str, Stored] = {}
        for file in files:
            for name, tensor in stored_tensors(path / file).items():
                if name in tensors:
                    raise ConfigError(
                        f"{path}: the tensor {name!r} is in two shards, "
                        f"{tensors[name].file.name} and {file}."
                    )
                tensors[name] = tensor
        if weight_map is not None:
            _check_index(path, weight_map, tensors)
        return cls(path, config, tensors)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self.tensors)

    @property
    def listing(self) -> Path:
        """The file that lists all tensors."""
        index = self.path / INDEX
        return index if index.is_file() else self.path / SINGLE

    def __getitem__(self, name: str) -> Any:
        """A tensor by its name: it has `file`, `dtype`, `shape` and `read`."""
        if name not in self.tensors:
            raise ConfigError(
                f"{self.path} has no tensor {name!r}.{nearest(name, self.tensors)}"
            )
        return self.tensors[name]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder."""
    if not file.is_file():
        raise ConfigError(f"{file.parent}: has no {file.name}.")
    return read_object(file)


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index's file name by tensor; None for a folder with a single file."""
    single, index = (path / SINGLE).is_file(), path / INDEX
    if single and index.is_file():
        # One of the two files is out of date, and nothing tells which one.
        raise ConfigError(f"{path}: has both {SINGLE} and {INDEX}; remove one.")
    if single:
        return None
    if not index.is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles and not any(path.glob("*.safetensors")):
            raise ConfigError(
                f"{path}: has its weights as a pickle only ({pickles[0]}), which is "
                "not read: unpickling runs code that the file contains. Convert it "
                "with save_pretrained(safe_serialization=True) of transformers."
            )
        raise ConfigError(f"{path}: has neither {SINGLE} nor {INDEX}.")
    weight_map = read_index(index)["weight_map"]
    for name, file in weight_map.items():
        if not (path / file).is_file():
            raise ConfigError(
                f"{index}: the shard {file} of tensor {name!r} is missing."
            )
    return weight_map


def read_index(file: Path) -> dict[str, Any]:
    """Read an index of shards and check its form."""
    index = read_json(file)
    field(index, "metadata", dict | None, str(file), None)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{file}: has no weight_map of tensor names to files.")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and not set(shard) & set("/\\:\0")
        plain = plain and len(os.fsencode(shard)) <= LONGEST_NAME
        if not plain or not shard.endswith(".safetensors"):
            raise ConfigError(
                f"{file}: the file of tensor {name!r} is {short(shard)}; must be the "
                "plain name of a .safetensors file in the same folder."
            )
    return index


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises:
      ConfigError: if it is not one, or is broken.
    """
    try:
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > MOST_HEADER:
                raise ValueError(f"its header would have {size:,} bytes")
            header = parse_json(f.read(size), "its header")
        _check_length(file, 8 + size, header)
        # The library checks the rest of a file, such as that no tensors overlap.
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as e:
        text = str(e)
        if text.startswith(str(file)):
            raise
        raise ConfigError(
            f"{file} is truncated or is not a safetensors file: {text}"
        ) from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, item in header.items():
        dtype = DTYPES.get(item["dtype"])
        if dtype is None:
            raise ConfigError(
                f"{file}: the tensor {name!r} is of type {item['dtype']}; must be one "
                f"of {', '.join(DTYPES)}."
            )
        offset = 8 + size + item["data_offsets"][0]
        tensors[name] = Stored(file, dtype, tuple(item["shape"]), offset)
    return tensors


def _check_length(file: Path, start: int, header: dict[str, Any]) -> None:
    """Raise `ConfigError` naming the first tensor that a file is too short for.

    Args:
      file: a safetensors file.
      start: first byte of the data.
      header: the file's header; it may be anything that JSON can be.
    """
    there = file.stat().st_size
    ends = {}
    for name, item in header.items() if isinstance(header, dict) else ():
        offsets = item.get("data_offsets") if isinstance(item, dict) else None
        match offsets:
            case [int(), int(end)] if start + end > there:
                ends[name] = start + end
    if ends:
        name = min(ends, key=lambda n: ends[n])
        raise ConfigError(
            f"{file} is truncated: the tensor {name!r} ends at byte {ends[name]:,}, "
            f"the file at {there:,}; copy it again."
        )


def _check_index(
    path: Path, weight_map: dict[str, str], tensors: dict[str, Stored]
) -> None:
    """Raise `ConfigError` if the index and the shards differ."""
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ConfigError(
                f"{path / file}: has no tensor {name!r}, but {INDEX} says so."
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise ConfigError(f"{tensor.file}: the tensor {name!r} is not in {INDEX}.")


def extra_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files that travel with a model (tokenizer, config) and are in `folder`."""
    return [p for p in (Path(folder, n) for n in EXTRA_FILES) if p.is_file()]
