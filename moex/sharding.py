"""The placement of arrays: the mesh, and the rules from logical to mesh axes.

The mesh has five axes, all Auto (XLA propagates): `data` (copies of the model), `fsdp`
(parameters split, gathered where used), `expert`, `seq` (the length of sequences) and
`tensor`. A batch is split over the first three. `RULES` says how every array is split;
`moe/parallel.py` moves rows between the devices of experts.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moex.config.base import Config, ConfigError, require, require_choice

AXIS_NAMES = ("data", "fsdp", "expert", "seq", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "seq")
EXCHANGES = ("auto", "all_to_all", "gather")


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one may be -1: it takes the devices that are left.

    The devices themselves say which TPU slice they are in: the `data` axis goes over
    the data-centre network between slices, all others stay inside a slice.
    """

    data: int = -1  # copies of the model, the batch split between them
    fsdp: int = 1  # parameters and optimizer state split over this axis
    expert: int = 1  # experts split over this axis
    seq: int = 1  # the length of sequences split over this axis
    tensor: int = 1  # heads and hidden widths split over this axis
    exchange: str = "auto"  # rows to experts by "all_to_all", or "gather" of all tokens
    # all_to_all in training: rows received over their mean; None: the worst case.
    exchange_buffer: float | None = None

    def validate(self, path):
        for name in AXIS_NAMES:
            size = getattr(self, name)
            require(size >= 1 or size == -1, f"{path}.{name}", size, ">= 1, or -1")
        free = [n for n in AXIS_NAMES if getattr(self, n) == -1]
        require(len(free) <= 1, path, free, "at most one axis of size -1")
        require_choice(f"{path}.exchange", self.exchange, EXCHANGES)
        buffer = self.exchange_buffer
        require(
            buffer is None or buffer >= 1,
            f"{path}.exchange_buffer",
            buffer,
            "at least 1, or None for buffers that hold the worst case",
        )

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The axis sizes on `num_devices` devices.

        Raises:
          ConfigError: if the sizes do not multiply to the number of devices.
        """
        sizes = [getattr(self, name) for name in AXIS_NAMES]
        fixed = math.prod(s for s in sizes if s != -1)
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        if math.prod(sizes) != num_devices or -1 in sizes:
            given = ", ".join(f"{n}={getattr(self, n)}" for n in AXIS_NAMES)
            raise ConfigError(
                f"config.mesh: the axes ({given}) must multiply to the number of "
                f"devices, which is {num_devices}."
            )
        return tuple(sizes)

    def make(self, devices=None) -> Mesh:
        """Make a mesh over `devices` (default: all).

        Raises:
          ConfigError: if the sizes do not fit the devices or their slices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        auto = (AxisType.Auto,) * len(AXIS_NAMES)
        slices = num_slices(devices)
        if slices == 1:
            return Mesh(_device_array(sizes, devices), AXIS_NAMES, axis_types=auto)
        data, *inside = sizes
        require(
            data % slices == 0,
            "config.mesh.data",
            data,
            f"a multiple of the number of TPU slices = {slices}; only copies of the "
            "model talk over the data-centre network",
        )
        between = (slices, *(1 for _ in inside))
        array = mesh_utils.create_hybrid_device_mesh(
            (data // slices, *inside),
            between,
            devices,
            allow_split_physical_axes=True,
        )
        return Mesh(array, AXIS_NAMES, axis_types=auto)


def _device_array(sizes, devices) -> np.ndarray:
    """Put devices in the shape of a mesh; on a torus axes lie along whole dimensions.

    Where that cannot be, such as 8 of a 4x4x4 torus, an axis takes part of a dimension.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )


def num_slices(devices) -> int:
    """The number of TPU slices among `devices`; 1 on any other platform.

    GPUs have such a number too, one per node or NVLink domain; there any axis may go
    over the network, and the order of devices keeps the last axes inside a node.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(d, "slice_index", 0) for d in devices})


# The mesh axis, or axes, that each logical axis is split over; None: it is not split.
RULES: dict[str, Any] = {
    "batch": BATCH_AXES,
    "length": "seq",
    "tokens": TOKEN_AXES,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "latent": None,
}


def partition_spec(axes) -> PartitionSpec:
    """The `PartitionSpec` for the logical axis names (or None) of one array.

    Raises:
      ValueError: if two logical axes land on one mesh axis.
    """
    spec = [None if a is None else RULES[a] for a in axes]
    seen: dict[str, str] = {}
    for logical, mesh_axes in zip(axes, spec, strict=True):
        for mesh_axis in _names(mesh_axes):
            if mesh_axis in seen:
                raise ValueError(
                    f"logical axes {seen[mesh_axis]!r} and {logical!r} of one array "
                    f"both map to mesh axis {mesh_axis!r}: axes {axes}"
                )
            seen[mesh_axis] = logical
    return PartitionSpec(*spec)


def _names(mesh_axes) -> tuple[str, ...]:
    """The names of one mesh axis, of several, or of none."""
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()


def param_sharding(shape, axes, mesh: Mesh) -> NamedSharding:
    """The sharding of one parameter; leading dims beyond `axes` are stacked layers."""
    full = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return NamedSharding(mesh, partition_spec(full))


def check_divides(leaves, sizes: dict[str, int]) -> None:
    """Check that every mesh axis divides the dims that it splits.

    Args:
      leaves: (name, shape, logical axes) of each parameter; the last dims have axes.
      sizes: sizes of the mesh axes by name.

    Raises:
      ConfigError: with the mesh axis, the parameter, its dim and both sizes.
    """
    for name, shape, axes in leaves:
        own = tuple(shape[len(shape) - len(axes) :])
        for size, logical in zip(own, axes, strict=True):
            mesh_axis = None if logical is None else RULES[logical]
            parts = 1 if mesh_axis is None else sizes[mesh_axis]
            if size % parts:
                raise ConfigError(
                    f"config.mesh.{mesh_axis} = {parts}: must divide the {logical!r} "
                    f"dim of every parameter; that of {name} is {size} "
                    f"({WHAT_AXES_ARE.get(logical, logical)}; its shape is {own}, "
                    f"axes {tuple(axes)})."
                )


WHAT_AXES_ARE = {
    "expert": "num_experts, or stored_experts",
    "embed": "model width, or the width of a head or a latent space",
    "heads": "key/value heads",
    "mlp": "hidden width",
    "vocab": "vocabulary; config.model.vocab may be larger than the tokenizer's",
}


def _extent(mesh, axis) -> int:
    return math.prod(mesh.shape[n] for n in _names(axis))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return _extent(mesh, BATCH_AXES)


def constrain(x: jax.Array, *axes):
    """Ask XLA to lay `x` out by logical `axes`; without a mesh in use, do nothing.

    Dims that the mesh does not divide are left to XLA. Inside of a shard_map nothing is
    left to lay out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1 or mesh.manual_axes:
        return x
    spec = partition_spec(axes)
    fitted = [
        axis if size % _extent(mesh, axis) == 0 else None
        for size, axis in zip(x.shape, spec, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitted))


def by_rows(function, x_TC):
    """Compute `function` of the rows of an array where the rows are.

    XLA does not split every operation by rows that it could: it brings all rows to all
    devices for a top_k.

    Args:
      function: [t, C] -> arrays whose first dim is t, each row of its own.
      x_TC: rows of tokens, split over `TOKEN_AXES` if these divide T.
    """
    if not _splits_rows(x_TC.shape[0]):
        return function(x_TC)
    rows = PartitionSpec(TOKEN_AXES)
    run = jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)
    return run(x_TC)


def sum_over_rows(function, *arrays):
    """Compute `function` of the rows of arrays where they are, and add the results up.

    Args:
      function: arrays whose first dim is t -> one array.
      *arrays: arrays whose first dim is that of the tokens, as in `by_rows`.
    """
    if not _splits_rows(arrays[0].shape[0]):
        return function(*arrays)
    run = jax.shard_map(
        lambda *own: jax.lax.psum(function(*own), TOKEN_AXES),
        in_specs=PartitionSpec(TOKEN_AXES),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return run(*arrays)


def _splits_rows(num_tokens: int) -> bool:
    """Whether the mesh in use splits this many tokens into parts of one size."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(axis, 1) for axis in TOKEN_AXES)
    # Inside of a shard_map the rows of a device are all on it.
    return parts > 1 and num_tokens % parts == 0 and not mesh.manual_axes


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of one array of a batch: [B], or [B, L]."""
    return NamedSharding(mesh, partition_spec(("batch", "length")[:ndim]))


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, rising.

    Processes whose devices hold the same rows (split over `seq` or `tensor` only) read
    the same data.
    """
    shards = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,))
    rows = range(batch_size)
    return sorted({row for i in shards.values() if i for row in rows[i[0]]})


def told_by_each(value: int, mesh: Mesh) -> jax.Array:
    """Share one int per process: int32[devices], `value` on this process's devices.

    Each process may have another value, and the step can reduce them. A batch cannot
    carry it: its parts may have copies in several processes.
    """
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    one = np.full((1,), value, np.int32)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: one)


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """Make global arrays, split over batch and length, from the host's own arrays.

    Args:
      batch: [b, L] and [b] arrays with the rows `process_rows`, each of full length.
      mesh: mesh of the job.
    """
    parts = batch_shards(mesh)
    held = len(process_rows(mesh, parts))  # the parts of a batch that this process has

    def place(local):
        local = np.asarray(local)
        step = len(local) // held
        rows = process_rows(mesh, step * parts)

        def piece(index):
            first = np.searchsorted(rows, index[0].start or 0)
            return local[(slice(first, first + step), *index[1:])]

        shape = (step * parts, *local.shape[1:])
        sharding = batch_sharding(mesh, local.ndim)
        return jax.make_array_from_callback(shape, sharding, piece)

    return {k: place(v) for k, v in batch.items()}
