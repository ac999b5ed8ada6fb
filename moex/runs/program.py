"""A program: a model on a mesh and how to compute it; no arrays, data or optimizer.

It is what training, evaluation, generation and conversion have in common.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.device import platform
from kernels_pallas.implementations import (
    INTERPRETED,
    Request,
    able,
    split_names,
    why_not,
)
from moex import sharding
from moex.config.base import ConfigError, caution, require
from moex.data.batches import Datasets, eval_batches
from moex.model.precision import compute_dtype
from moex.model.spec import ModelSpec, abstract_arrays
from moex.nn.context import Compute
from moex.progress import counted
from moex.runs.base import has_base, without_base
from moex.runs.keys import check_run


@dataclasses.dataclass(kw_only=True)
class Program:
    """A model on a mesh, and how to compute it."""

    cfg: Any  # the run config, checked; fields that the data decides are filled in
    mesh: Mesh
    spec: ModelSpec

    def compute(self, *, train: bool) -> Compute:
        """How to compute, to train or to score."""
        return compute_of(self.cfg, train=train)

    @property
    def num_domains(self) -> int:
        """The number of domains of the data, by the config."""
        return self.cfg.task.num_domains(self.cfg)

    @property
    def whole(self) -> NamedSharding:
        """The sharding of arrays that every device holds in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    def abstract_state(self) -> dict:
        """The arrays of the model as `ShapeDtypeStruct`s with shardings.

        Returns:
          {"params", "state", "guard"}.
        """
        return abstract_arrays(self.spec, self.mesh)

    def saved(self, state: dict) -> dict:
        """The part of a state that checkpoints of this run hold."""
        if not has_base(self.cfg):
            return state
        return state | {"params": without_base(self.spec, state["params"])}


@dataclasses.dataclass(kw_only=True)
class Evaluated(Program):
    """A program and the held-out data that it is scored on."""

    data: Datasets

    @property
    def num_domains(self) -> int:
        """The number of domains of the data."""
        return len(self.data.domains)

    @property
    def holds_out(self) -> bool:
        """Whether there is held-out data with something to score."""
        return self.data.holds_out

    def eval_batches(self, limit: int | None, doing="scoring held-out data"):
        """The held-out batches of this process; `doing` says what they are read for."""
        size = eval_batch_size(self.cfg)
        rows = sharding.process_rows(self.mesh, size)
        found = eval_batches(self.data, batch_size=size, limit=limit, rows=rows)
        sequences = sum(map(len, self.data.eval))
        total = -(-min(sequences, limit or sequences) // size)
        return counted(found, doing, total, "batches")


def mesh_here(cfg) -> Mesh:
    """Check a config and make its mesh of the devices of this job.

    Raises:
      ConfigError: for a mistake in the config, or where it does not fit the devices.
    """
    check_run(cfg, to_train=False)
    mesh = cfg.mesh.make()
    check_devices(cfg, mesh)
    check_kernels(cfg)
    return mesh


def compute_of(cfg, *, train: bool) -> Compute:
    """How a run config computes, to train or to score."""
    kernels = None if cfg.kernels == "auto" else cfg.kernels
    if not train and not kernels_here(cfg):
        caution(f"config.kernels = {kernels!r} do not run here; 'auto' is used.")
        kernels = None
    return Compute(
        dtype=compute_dtype(cfg),
        kernels=kernels,
        remat=cfg.remat if train else "none",
        scan_layers=cfg.scan_layers,
        exchange=cfg.mesh.exchange,
        # Scores must be exact, and evaluation has the memory: no backward pass.
        exchange_buffer=cfg.mesh.exchange_buffer if train else None,
    )


def kernels_here(cfg) -> bool:
    """Whether at least one of the kernels that a run names works here."""
    return cfg.kernels == "auto" or any(
        why_not(name, _experts_of(cfg), platform()) is None
        for name in split_names(cfg.kernels)
    )


def _experts_of(cfg) -> Request:
    """A request for the kernel of experts, with sizes that no kernel refuses."""
    return Request("grouped_glu", compute_dtype(cfg), 1024, 1024, 8, "silu")


def eval_batch_size(cfg) -> int:
    """The number of sequences per evaluation step, over the whole job."""
    return cfg.eval.batch_size or cfg.batch_size // cfg.grad_accum


def check_devices(cfg, mesh: Mesh) -> None:
    """Check that batches and sequences divide over the devices of a mesh.

    Raises:
      ConfigError: naming the field and the number it must be a multiple of.
    """
    shards = sharding.batch_shards(mesh)
    micro, accum = cfg.batch_size // cfg.grad_accum, cfg.grad_accum
    of = f"a multiple of grad_accum * batch shards of the mesh = {accum} * {shards}"
    require(micro % shards == 0, "config.batch_size", cfg.batch_size, of)
    check_eval_devices(cfg, mesh)


def check_eval_devices(cfg, mesh: Mesh) -> None:
    """Check that an evaluation divides over the devices; see `check_devices`."""
    parts, of = (
        mesh.shape["seq"],
        f"a multiple of config.mesh.seq = {mesh.shape['seq']}",
    )
    require(cfg.seq_len % parts == 0, "config.seq_len", cfg.seq_len, of)
    split = mesh.abstract_mesh.abstract_device.platform in ("cpu", "tpu")
    one = "1 on a GPU, whose attention is not split along the sequence; use fsdp"
    require(parts == 1 or split, "config.mesh.seq", parts, one)
    size, shards = eval_batch_size(cfg), sharding.batch_shards(mesh)
    of = f"a multiple of the batch shards of the mesh = {shards}"
    require(size % shards == 0, "config.eval.batch_size", size, of)


def check_kernels(cfg) -> None:
    """Check that the kernels that a run names can run on the platform of the mesh."""
    if kernels_here(cfg):
        return
    request, where = _experts_of(cfg), platform()
    can = [name for name in able(request, where) if not name.endswith(INTERPRETED)]
    reasons = (f"{n}: {why_not(n, request, where)}" for n in split_names(cfg.kernels))
    raise ConfigError(
        f"config.kernels = {cfg.kernels!r}: must be 'auto' or have one among "
        f"{', '.join(can)} on a {where} in {request.dtype}. {'; '.join(reasons)}."
    )
