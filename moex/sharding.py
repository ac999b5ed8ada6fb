"""Where arrays live: the mesh, the rules from logical to mesh axes, placement.

The mesh has four axes, all Auto (XLA propagates): `data` (copies of the model),
`fsdp` (parameters split, gathered where used), `expert` and `tensor`. A batch is split
over the first three. Every figure of sharding comes from `AxisRules`.
"""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moex.config import Config, ConfigError, require

AXIS_NAMES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one may be -1: whatever devices are left."""

    data: int = -1  # copies of the model, the batch split between them
    fsdp: int = 1  # parameters and optimizer state split over this axis
    expert: int = 1  # experts split over this axis
    tensor: int = 1  # heads and hidden widths split over this axis

    def validate(self, path):
        for name in AXIS_NAMES:
            size = getattr(self, name)
            require(size >= 1 or size == -1, f"{path}.{name}", size, ">= 1, or -1")
        free = [n for n in AXIS_NAMES if getattr(self, n) == -1]
        require(len(free) <= 1, path, free, "at most one axis of size -1")

    def sizes(self, num_devices: int, path: str = "config.mesh") -> tuple[int, ...]:
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
                f"{path}: the axes ({given}) must multiply to the number of "
                f"devices, which is {num_devices}."
            )
        return tuple(sizes)

    def make(self, devices=None) -> Mesh:
        """A mesh over `devices` (default: all)."""
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        auto = (AxisType.Auto,) * len(AXIS_NAMES)
        return jax.make_mesh(sizes, AXIS_NAMES, axis_types=auto, devices=devices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis -> mesh axis (or several, or None: not split)."""

    batch: tuple[str, ...] = BATCH_AXES
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    head_dim: str | None = None
    mlp: str | None = "tensor"
    expert: str | None = "expert"
    latent: str | None = None


RULES = AxisRules()


def partition_spec(axes, rules: AxisRules = RULES) -> PartitionSpec:
    """Logical axis names (or None) of one array -> `PartitionSpec`.

    Raises:
      ValueError: if two logical axes land on one mesh axis.
    """
    spec = [None if a is None else getattr(rules, a) for a in axes]
    seen: dict[str, str] = {}
    for logical, mesh_axes in zip(axes, spec, strict=True):
        for mesh_axis in (
            (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        ):
            if mesh_axis in seen:
                raise ValueError(
                    f"logical axes {seen[mesh_axis]!r} and {logical!r} of one array "
                    f"both map to mesh axis {mesh_axis!r}: axes {axes}"
                )
            seen[mesh_axis] = logical
    return PartitionSpec(*spec)


def param_sharding(shape, axes, mesh: Mesh, rules: AxisRules = RULES) -> NamedSharding:
    """Sharding of one parameter; leading dims beyond `axes` are stacked layers.

    A dim that the mesh axis does not divide is left whole: a layer with 3 experts on
    an expert axis of 2 still runs, replicated.
    """
    full = (None,) * (len(shape) - len(axes)) + tuple(axes)
    spec = partition_spec(full, rules)
    fitted = [
        axis if axis is not None and size % _extent(mesh, axis) == 0 else None
        for size, axis in zip(shape, spec, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*fitted))


def _extent(mesh, axis) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[n] for n in names)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return _extent(mesh, BATCH_AXES)


def constrain(x: jax.Array, *axes):
    """Ask XLA to lay `x` out by logical `axes`, inside `jax.set_mesh`; else nothing.

    Dims that the mesh does not divide are left to XLA.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    spec = partition_spec(axes)
    fitted = [
        axis if axis is not None and size % _extent(mesh, axis) == 0 else None
        for size, axis in zip(x.shape, spec, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitted))


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """Host arrays of this process -> global arrays split over the batch axes."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }
