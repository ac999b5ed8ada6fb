"""Opening a run with its weights in fewer bytes: `--weights` of generate and eval.

The weights are rounded as they are read, one piece of the checkpoint at a time: no more
than a piece is in memory as it was trained.
"""

import contextlib
import functools
import math
import mmap

import jax
import jax.numpy as jnp
import numpy as np

from moex.config.base import ConfigError
from moex.model.accounting import bytes_per_token, num_bytes
from moex.model.paths import flat_paths, nested
from moex.model.spec import ModelSpec, abstract_arrays, model_spec
from moex.nn.lowered import SCALES, VALUES, rounded
from moex.progress import counted, tell
from moex.runs.base import check_no_adapters
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, mesh_here, saved_spec, saved_with
from moex.runs.rows import Rows, placed

FLAG = "--weights"
LARGE = 1 << 20  # bytes of an array that gets memory of its own


def load_lowered(place: Place, weights: str, mesh_cfg=None, *, warn=print) -> LoadedRun:
    """Read the newest checkpoint of a run with its matrices in fewer bytes.

    Args:
      place: the run directory, a path or a `RunDir`.
      weights: "bfloat16", "int8" or "int4"; see `nn.lowered.lower_model`.
      mesh_cfg: as for `load_run`.
      warn: called with a line if the mesh of the run does not fit.

    Raises:
      ConfigError: if it is not a run directory, has no checkpoint or has adapters; or
        for a weight with a number that is not finite.
      CheckpointError: if the checkpoint is damaged.
    """
    folder, where = RunDir.of(place), f"{FLAG}={weights}"
    cfg, whole = folder.config(), saved_spec(folder)
    check_no_adapters(folder, where)
    rows = Rows(folder)
    saved_with(cfg, cfg.task.saved_identity(folder))(rows.step, rows.meta)
    mesh = mesh_here(cfg, whole, warn) if mesh_cfg is None else mesh_cfg.make()
    spec = model_spec(cfg.model, mesh, weights)
    found, abstract = {}, abstract_arrays(spec, mesh)
    for item in ("params", "state"):
        places = flat_paths(abstract[item])
        arrays: dict[str, jax.Array] = {}
        doing = f"reading {item} in {weights}"
        for path in counted(places, doing, len(places), "arrays"):
            if path.endswith(SCALES):
                continue
            name = path.removesuffix(VALUES)
            wanted = [places[p] for p in (path, name + SCALES) if p in places]
            parts = read_as(rows, item, name, wanted, where)
            named = zip((path, name + SCALES), parts, wanted, strict=False)
            arrays |= {p: placed(part, place) for p, part, place in named}
        found[item] = nested(arrays)
    tell(_line(cfg.model, weights, whole, found["params"]))
    if kept := _kept(spec):
        tell(kept)
    return LoadedRun(
        cfg=cfg, mesh=mesh, spec=spec, folder=folder, step=rows.step, **found
    )


def read_as(rows: Rows, item: str, name: str, wanted: list, where: str) -> list:
    """An array of the checkpoint in the dtypes of `wanted`: itself, or its parts.

    Args:
      rows: the checkpoint.
      item: "params" or "state".
      name: of the array, as it was trained.
      wanted: shape and dtype of it; or those of its values and its scales.
      where: begins messages.

    Raises:
      ConfigError: if a number that is rounded is not finite.
    """
    path = f"state/{name}" if item == "state" else name
    parts = [in_large_pages(a.shape, a.dtype) for a in wanted]
    lead = rows.lead(item, path)
    for index in np.ndindex(wanted[0].shape[:lead]):
        piece = rows.read(item, path, (*index, ...))
        if len(wanted) == 1 and wanted[0].dtype != jnp.bfloat16:
            parts[0][index] = piece
            continue
        if not np.all(np.isfinite(piece)):
            raise ConfigError(
                f"{where}: {name} of step {rows.step} has a number that is not finite; "
                "it can only be read as it is."
            )
        if len(wanted) == 1:
            parts[0][index] = piece.astype(wanted[0].dtype)
            continue
        own = [jax.ShapeDtypeStruct(a.shape[lead:], a.dtype) for a in wanted]
        for part, new in zip(parts, _rounded(*own)(piece), strict=True):
            part[index] = np.asarray(new)
    return parts


def in_large_pages(shape, dtype) -> np.ndarray:
    """Make an array, in pages of 2 MB where it is large and Linux has them.

    They are read quicker; and it begins at a page, so JAX on a CPU does not copy it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


@functools.lru_cache(maxsize=64)
def _rounded(values, scales):
    return jax.jit(lambda w: rounded(w, values, scales))


def _kept(spec: ModelSpec) -> str:
    """The line about matrices that stay as trained; empty if there are none."""
    flat = flat_paths(spec.params)
    kept = {
        n: a
        for n, a in flat.items()
        if spec.info[n].matrix is not None and a.dtype == jnp.float32
    }
    names = sorted({n.rpartition("/")[2] for n in kept})
    if not kept:
        return ""
    share = num_bytes(kept) / num_bytes(flat)
    return (
        f"{_gb(num_bytes(kept))} of them ({share:.0%}) are matrices that stay as "
        f"trained: {', '.join(names)}"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB" if size >= 1e8 else f"{size / 1e6:,.3g} MB"


def _line(model, weights: str, whole: ModelSpec, params: dict) -> str:
    """The line about memory and the bytes that a token reads."""
    now, before = num_bytes(params), num_bytes(whole.params)
    flat = flat_paths(params), flat_paths(whole.params)
    read, was = (bytes_per_token(model, own) for own in flat)
    numbers = sum(math.prod(a.shape) for a in flat[1].values())
    return (
        f"weights in {weights}: {_gb(now)} in memory, as trained {_gb(before)} "
        f"({8 * now / numbers:.3g} bits a number); a token reads {_gb(read)}, as "
        f"trained {_gb(was)}"
    )
