"""A run with fewer experts, of which only those are read from the disk."""

import dataclasses

import numpy as np

from moex.config import base as configs
from moex.convert.plans import Plan
from moex.convert.to_pruned import Part, Pruned
from moex.model.paths import flat_paths, nested
from moex.model.spec import abstract_arrays, model_spec
from moex.progress import counted
from moex.runs.base import check_no_adapters
from moex.runs.directory import Place, RunDir
from moex.runs.open import LoadedRun, saved_with
from moex.runs.rows import Rows, bytes_read, placed
from moex.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Kept:
    """A pruned run, and how much was read for it."""

    run: LoadedRun
    bytes_read: int  # from files
    clipped: list[str]  # as in `Pruned`


def load_kept(place: Place, plan: Plan) -> Kept:
    """Read the experts of a plan, and all that is no expert, of the newest checkpoint.

    Raises:
      ConfigError: if the plan does not fit the run.
      CheckpointError: if the checkpoint is damaged.
    """
    folder = RunDir.of(place)
    check_no_adapters(folder, plan.where)
    cfg = folder.config()
    plan.check(cfg.model)
    pruned = Pruned.of(cfg.model, plan)
    rows = Rows(folder)
    saved_with(cfg, cfg.task.saved_identity(folder))(rows.step, rows.meta)
    before = bytes_read()
    run = read_parts(folder, rows, pruned)
    return Kept(run, bytes_read() - before, pruned.clipped)


def read_parts(
    folder: RunDir, rows: Rows, pruned: Pruned, skip=lambda path: False
) -> LoadedRun:
    """Read the arrays of a pruned model.

    Args:
      skip: whether an array of the old model is not read: it is zeros.
    """
    cfg = configs.from_dict(configs.to_dict(folder.config()))
    cfg.model, cfg.mesh = pruned.model, MeshConfig()
    mesh = cfg.mesh.make()
    spec = model_spec(cfg.model, mesh)
    abstract = abstract_arrays(spec, mesh)
    found = {}
    for item in ("params", "state"):
        places = flat_paths(abstract[item])
        doing = "reading what is kept" if item == "params" else "reading states"
        arrays = {}
        for path in counted(places, doing, len(places), "arrays"):
            part, place = pruned.part(path), places[path]
            if skip(part.path):
                array = np.zeros(place.shape, place.dtype)
            else:
                array = _read(rows, item, part)
            arrays[path] = placed(array, place)
        found[item] = nested(arrays)
    return LoadedRun(
        cfg=cfg, mesh=mesh, spec=spec, folder=folder, step=rows.step, **found
    )


def _read(rows: Rows, item: str, part: Part) -> np.ndarray:
    """Read a part of an array; only the experts that stay."""
    path = f"state/{part.path}" if item == "state" else part.path
    if part.copies is None:
        return rows.read(item, path)
    if part.experts is None or rows.piece(item, path)[0] != 1:
        whole = dataclasses.replace(part, copies=slice(None))
        return whole.of(rows.read(item, path, (part.copies,)))
    first, step = part.copies.start, part.copies.step or 1
    after = (slice(None),) * (-part.axis - 1)
    return np.stack(
        [
            rows.read(item, path, (first + r * step, ..., np.array(own), *after))
            for r, own in enumerate(part.experts)
        ]
    )
