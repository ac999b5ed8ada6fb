"""Read checkpoints that were published quantised, as if they were not.

Two methods, named by `quantization_config.quant_method` of config.json:

- `fp8` (DeepSeek-V3): a float8_e4m3fn tensor `X` [out, in] and `X_scale_inv`
  [ceil(out/bm), ceil(in/bn)]; the value is the weight times its block's scale.
- `mxfp4` (GPT-OSS): `X_blocks` uint8 [E, out, groups, 16] and `X_scales` uint8
  [E, out, groups]. A byte holds two numbers of 4 bits (E2M1), the low half first; 32
  numbers share a scale, 2 to the power of its byte less 127. `X` is [E, in, out] with
  in = 32 groups: transposed, as transformers returns it.

Values are computed in float32 and rounded to bfloat16, the type that transformers
dequantises these models to. That loses nothing of mxfp4, whose numbers have two
significant bits.

Nothing is quantised here, and weights that other methods quantised are refused.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from moex.config.base import ConfigError
from moex.interop.folder import Folder, Stored

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # a power of two in a byte; 255 is NaN
SCALE_DTYPES = (np.dtype(np.float32), BFLOAT16, E8M0)

# The sixteen numbers of E2M1: a sign, two bits of exponent and one of mantissa.
_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array(_HALF + [-v for v in _HALF], np.float32)
GROUP = 32  # numbers of mxfp4 that share a scale
CHUNK = 256  # rows that are in float32 at a time

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised tensor; `read` takes slices of step 1, and gives plain numbers."""

    # weight, scale: its two parts in the folder.
    weight: Stored
    scale: Stored
    shape: tuple[int, ...]  # its shape when read
    dtype: ClassVar[np.dtype] = BFLOAT16

    @property
    def file(self) -> Path:
        """The file that the weight lies in."""
        return self.weight.file


@dataclasses.dataclass(frozen=True)
class Fp8(Quantised):
    """A float8 matrix; blocks of `block` rows and columns share a scale."""

    block: tuple[int, int]

    def read(self, index: Slices = ()) -> np.ndarray:
        """The part in some rows and columns; only the blocks it lies in are read."""
        row, col = _padded(index, 2)
        rows, row_blocks = _blocks(row, self.shape[0], self.block[0])
        cols, col_blocks = _blocks(col, self.shape[1], self.block[1])
        weight = self.weight.read((row, col))
        scale = self.scale.read((row_blocks, col_blocks)).astype(np.float32)
        rows, cols = rows // self.block[0], cols // self.block[1]
        out = np.empty(weight.shape, self.dtype)
        for i in range(0, len(rows), CHUNK):
            part = slice(i, i + CHUNK)
            out[part] = weight[part].astype(np.float32) * scale[rows[part]][:, cols]
        return out


class Mxfp4(Quantised):
    """Matrices of packed 4-bit numbers, transposed; `GROUP` of a row share a scale."""

    def read(self, index: Slices = ()) -> np.ndarray:
        """The part in some experts, columns and rows of the packed numbers."""
        expert, col, row = _padded(index, 3)
        experts = range(*expert.indices(self.shape[0]))
        cols, groups = _blocks(col, self.shape[1], GROUP)
        rows = len(range(*row.indices(self.shape[2])))
        out = np.empty((len(experts), len(cols), rows), self.dtype)
        for i, e in enumerate(experts):
            packed = self.weight.read((e, row, groups))
            scale = self.scale.read((e, row, groups)).view(E8M0).astype(np.float32)
            for j in range(0, rows, CHUNK):
                part = slice(j, j + CHUNK)
                halves = np.stack([packed[part] & 15, packed[part] >> 4], axis=-1)
                values = E2M1[halves].reshape(*scale[part].shape, GROUP)
                values *= scale[part][..., None]
                values = values.reshape(len(values), -1)
                out[i, :, part] = values[:, cols].T
        return out


def _padded(index: Slices, axes: int) -> Slices:
    """Slices for all axes: one that is missing is taken whole."""
    return index + (slice(None),) * (axes - len(index))


def _blocks(part: slice, size: int, block: int) -> tuple[np.ndarray, slice]:
    """The positions of a part of an axis in the blocks that it lies in, and those."""
    start, stop, _ = part.indices(size)
    first = start // block
    return np.arange(start, stop) - first * block, slice(first, -(-stop // block))


def _block_size(folder: Folder, settings: dict[str, Any]) -> tuple[int, int]:
    """The rows and columns that share an fp8 scale."""
    match settings.get("weight_block_size"):
        case [int(rows), int(cols)] if rows > 0 and cols > 0:
            return rows, cols
        case other:
            raise ConfigError(
                f"{folder.path}: quantization_config.weight_block_size = {other!r}; "
                "must be two integers > 0: fp8 is read only if scaled by blocks."
            )


def _pair_fp8(folder: Folder, block: tuple[int, int]) -> dict[str, Quantised]:
    """Each float8 tensor with its scale."""
    found: dict[str, Quantised] = {}
    for name in sorted(folder.names):
        if folder[name].dtype == FP8:
            shape = folder[name].shape
            _require(len(shape) == 2, folder, name, f"has shape {shape}; must be 2-D")
            grid = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
            scale = _scale(folder, name, f"{name}_scale_inv", grid, SCALE_DTYPES)
            found[name] = Fp8(folder.tensors[name], scale, shape, block)
    return found


def _pair_mxfp4(folder: Folder) -> dict[str, Quantised]:
    """Each tensor of packed 4-bit numbers with its scales, by its unpacked name."""
    found: dict[str, Quantised] = {}
    for weight in sorted(n for n in folder.names if n.endswith("_blocks")):
        name = weight.removesuffix("_blocks")
        shape, dtype = folder[weight].shape, folder[weight].dtype
        ok = len(shape) == 4 and shape[-1] == GROUP // 2 and dtype == np.uint8
        text = f"is {dtype} {shape}; must be uint8 [experts, rows, groups, 16]"
        _require(ok, folder, weight, text)
        _require(name not in folder.names, folder, name, f"is there as {weight!r} too")
        kinds = (np.dtype(np.uint8),)
        scale = _scale(folder, weight, f"{name}_scales", shape[:-1], kinds)
        unpacked = (shape[0], shape[2] * GROUP, shape[1])
        found[name] = Mxfp4(folder.tensors[weight], scale, unpacked)
    return found


def _scale(folder: Folder, name: str, scale: str, shape: Any, dtypes: Any) -> Stored:
    """The tensor `scale` of `name`; it must have this shape and one of `dtypes`."""
    _require(scale in folder.names, folder, name, f"has no scale {scale!r}")
    got, dtype = folder[scale].shape, folder[scale].dtype
    _require(got == shape, folder, scale, f"has shape {got}; {name!r} needs {shape}")
    allowed = " or ".join(map(str, dtypes))
    _require(dtype in dtypes, folder, scale, f"is {dtype}; must be {allowed}")
    return folder.tensors[scale]


def _require(ok: bool, folder: Folder, name: str, text: str) -> None:
    if not ok:
        raise ConfigError(f"{folder.path}: the tensor {name!r} {text}.")


def reader(folder: Folder) -> Folder:
    """The folder as if it never was quantised: itself if it was not.

    Raises:
      ConfigError: for a method other than fp8 by blocks and mxfp4, and for a scale
        that is missing, of another shape or type, or without a tensor.
    """
    config = dict(folder.config)
    settings = config.pop("quantization_config", None)
    if not settings:
        return folder
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "fp8":
        found = _pair_fp8(folder, _block_size(folder, settings))
        ending, alone = "_scale_inv", f"scales no tensor of type {FP8}"
    elif method == "mxfp4":
        found = _pair_mxfp4(folder)
        ending, alone = "_scales", "scales no tensor _blocks"
    else:
        raise ConfigError(
            f"{folder.path}: the checkpoint is quantised by the method {method!r}; "
            "read are fp8 scaled by blocks, mxfp4, and checkpoints not quantised."
        )
    parts = {
        part for tensor in found.values() for part in (tensor.weight, tensor.scale)
    }
    plain = {k: v for k, v in folder.tensors.items() if v not in parts}
    for name in sorted(plain):
        _require(not name.endswith(ending), folder, name, alone)
    return dataclasses.replace(folder, config=config, tensors=plain | found)
