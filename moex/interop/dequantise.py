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
significant bits; for fp8 times a float32 scale `dtype` may ask for float32.

Nothing is quantised here, and weights that other methods quantised are refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moex.config.base import ConfigError
from moex.interop.folder import Folder

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # a power of two in a byte; 255 is NaN
SCALE_DTYPES = (np.dtype(np.float32), BFLOAT16, E8M0)

# The sixteen numbers of E2M1: a sign, two bits of exponent and one of mantissa.
_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = np.array(_HALF + [-v for v in _HALF], np.float32)
GROUP = 32  # numbers of mxfp4 that share a scale
CHUNK = 256  # rows that are in float32 at a time


class Quantised(NamedTuple):
    """One quantised tensor: its two parts in the folder, and its shape when read."""

    weight: str
    scale: str
    shape: tuple[int, ...]


class Dequantised:
    """A quantised folder with the interface of `Folder`; make one with `reader`.

    `names` has no scales; `config` has no `quantization_config`, as that of a model
    that never was quantised (the file config.json still has it).
    """

    def __init__(self, folder: Folder, dtype: Any = BFLOAT16):
        """Pair weights and scales; see `reader` for what is raised."""
        self.folder, self.path, self.listing = folder, folder.path, folder.listing
        self.out_dtype = np.dtype(dtype)
        self.config = dict(folder.config)
        settings = self.config.pop("quantization_config")
        self.method: str = settings["quant_method"]
        self.block = (1, 1)
        if self.method == "fp8":
            self.block = _block_size(folder, settings)
            self.quantised = _pair_fp8(folder, self.block)
        else:
            self.quantised = _pair_mxfp4(folder)
        parts = {p for q in self.quantised.values() for p in (q.weight, q.scale)}
        self.names: set[str] = (folder.names - parts) | set(self.quantised)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, as it is when read."""
        found = self.quantised.get(name)
        return found.shape if found else self.folder.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor, as it is when read."""
        return self.out_dtype if name in self.quantised else self.folder.dtype(name)

    def file_of(self, name: str) -> Path:
        """The file that a tensor lies in."""
        found = self.quantised.get(name)
        return self.folder.file_of(found.weight if found else name)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that a slice for each of its first axes cuts.

        Only the blocks that the part lies in are read.
        """
        found = self.quantised.get(name)
        if found is None:
            return self.folder.read(name, index)
        slices = index + (slice(None),) * (len(found.shape) - len(index))
        read = self._read_fp8 if self.method == "fp8" else self._read_mxfp4
        return read(found, slices)

    def _read_fp8(self, found: Quantised, slices: tuple[slice, ...]) -> np.ndarray:
        rows, row_blocks = _blocks(slices[0], found.shape[0], self.block[0])
        cols, col_blocks = _blocks(slices[1], found.shape[1], self.block[1])
        weight = self.folder.read(found.weight, slices)
        scale = self.folder.read(found.scale, (row_blocks, col_blocks))
        scale = scale.astype(np.float32)
        rows, cols = rows // self.block[0], cols // self.block[1]
        out = np.empty(weight.shape, self.out_dtype)
        for i in range(0, len(rows), CHUNK):
            part = slice(i, i + CHUNK)
            out[part] = weight[part].astype(np.float32) * scale[rows[part]][:, cols]
        return out

    def _read_mxfp4(self, found: Quantised, slices: tuple[slice, ...]) -> np.ndarray:
        experts = range(*slices[0].indices(found.shape[0]))
        cols, groups = _blocks(slices[1], found.shape[1], GROUP)
        rows = len(range(*slices[2].indices(found.shape[2])))
        out = np.empty((len(experts), len(cols), rows), self.out_dtype)
        for i, e in enumerate(experts):
            packed = self.folder.read(found.weight, (e, slices[2], groups))
            scale = self.folder.read(found.scale, (e, slices[2], groups))
            scale = scale.view(E8M0).astype(np.float32)
            for j in range(0, rows, CHUNK):
                part = slice(j, j + CHUNK)
                halves = np.stack([packed[part] & 15, packed[part] >> 4], axis=-1)
                values = E2M1[halves].reshape(*scale[part].shape, GROUP)
                values *= scale[part][..., None]
                values = values.reshape(len(values), -1)
                out[i, :, part] = values[:, cols].T
        return out


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
    found = {}
    for name in sorted(folder.names):
        if folder.dtype(name) == FP8:
            shape, scale = folder.shape(name), f"{name}_scale_inv"
            _require(len(shape) == 2, folder, name, f"has shape {shape}; must be 2-D")
            grid = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
            _check_scale(folder, name, scale, grid, SCALE_DTYPES)
            found[name] = Quantised(name, scale, shape)
    for name in sorted(folder.names - {q.scale for q in found.values()}):
        alone = name.endswith("_scale_inv")
        _require(not alone, folder, name, f"scales no tensor of type {FP8}")
    return found


def _pair_mxfp4(folder: Folder) -> dict[str, Quantised]:
    """Each tensor of packed 4-bit numbers with its scales, by its unpacked name."""
    found = {}
    for weight in sorted(n for n in folder.names if n.endswith("_blocks")):
        name = weight.removesuffix("_blocks")
        shape, dtype = folder.shape(weight), folder.dtype(weight)
        ok = len(shape) == 4 and shape[-1] == GROUP // 2 and dtype == np.uint8
        text = f"is {dtype} {shape}; must be uint8 [experts, rows, groups, 16]"
        _require(ok, folder, weight, text)
        _require(name not in folder.names, folder, name, f"is there as {weight!r} too")
        scale = f"{name}_scales"
        _check_scale(folder, weight, scale, shape[:-1], (np.dtype(np.uint8),))
        unpacked = (shape[0], shape[2] * GROUP, shape[1])
        found[name] = Quantised(weight, scale, unpacked)
    for name in sorted(folder.names - {q.scale for q in found.values()}):
        _require(not name.endswith("_scales"), folder, name, "scales no tensor _blocks")
    return found


def _check_scale(folder: Folder, name: str, scale: str, shape: Any, dtypes: Any):
    """Raise `ConfigError` unless `scale` has the `shape`, and one of the `dtypes`."""
    _require(scale in folder.names, folder, name, f"has no scale {scale!r}")
    got, dtype = folder.shape(scale), folder.dtype(scale)
    _require(got == shape, folder, scale, f"has shape {got}; {name!r} needs {shape}")
    allowed = " or ".join(map(str, dtypes))
    _require(dtype in dtypes, folder, scale, f"is {dtype}; must be {allowed}")


def _require(ok: bool, folder: Folder, name: str, text: str) -> None:
    if not ok:
        raise ConfigError(f"{folder.path}: the tensor {name!r} {text}.")


def reader(folder: Folder, dtype: Any = BFLOAT16) -> Folder | Dequantised:
    """A reader of a folder's tensors as plain numbers: the folder if not quantised.

    Raises:
      ConfigError: for a method other than fp8 by blocks and mxfp4, and for a scale
        that is missing, of another shape or type, or without a tensor.
    """
    settings = folder.config.get("quantization_config")
    if not settings:
        return folder
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in ("fp8", "mxfp4"):
        raise ConfigError(
            f"{folder.path}: the checkpoint is quantised by the method {method!r}; "
            "read are fp8 scaled by blocks, mxfp4, and checkpoints not quantised."
        )
    return Dequantised(folder, dtype)
