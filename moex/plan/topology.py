"""Devices and the networks between them, as vendors publish them.

`parse("v5p:4x4x4")` is a `Topology`: how many devices, the memory of each, and how long
a mesh axis takes to carry bytes. Nothing here asks for a device.

Peak FLOP/s are in `accounting.PEAK_TFLOPS`.
"""

import dataclasses
import itertools
import math
import re

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moex.config.base import ConfigError, nearest, require
from moex.model.accounting import device_peak_flops
from moex.sharding import AXIS_NAMES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device; bytes, and bytes per second one way."""

    platform: str
    device_kind: str  # JAX's name for it
    memory: float | None = None  # bytes that a program may use; None: not known
    memory_rate: float | None = None  # rate of the device's memory; None: not known
    # Rate of one link of the torus (TPU), or of one device into NVLink (GPU).
    link: float | None = None
    # Rate of one device into the network between slices or nodes.
    network: float | None = None
    dims: int = 0  # dimensions of the torus of a TPU slice; 0: there is none
    # A whole dimension is closed to a ring if its chips are a multiple of this.
    ring: int = 0


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: HBM bandwidth; "bidirectional
# ICI bandwidth per chip" halved and divided by the links of a chip, 4 in a 2D torus and
# 6 in a 3D one; v5p: "DCN bandwidth per chip"; v5e: that of a pod over its chips; v6e:
# 4 x 200 Gbit/s of a host over its 8 chips. Memory of v5e, v5p and v6e is what an error
# of libtpu 0.0.42.1 names as the limit where a program does not fit.
# Checked there: v6e 32 GB, 800 GB/s a chip over 4 ports, and its network; v5p 1200 GB/s
# a chip, 2765 GB/s of HBM, 50 Gbit/s; v4 32 GiB and 1200 GB/s of HBM. Not checked, to
# be looked up before they are relied on: links of v4, and all figures of GPUs (data
# sheets of H100, H200 and A100 80 GB SXM; NVLink of 900 and 600 GB/s both ways; one 400
# or 200 Gbit/s port a GPU).
CHIPS = {
    "v4": Chip("tpu", "TPU v4", 32 * GIB, 1200e9, 50e9, None, 3, 4),
    "v5e": Chip("tpu", "TPU v5 lite", 15.75 * GIB, 819e9, 50e9, 25e9 / 8, 2, 16),
    "v5p": Chip("tpu", "TPU v5", 95.74 * GIB, 2765e9, 100e9, 50e9 / 8, 3, 4),
    "v6e": Chip("tpu", "TPU v6 lite", 31.25 * GIB, 1638e9, 100e9, 100e9 / 8, 2, 16),
    "a100": Chip("gpu", "NVIDIA A100-SXM4-80GB", 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip("gpu", "NVIDIA H100 80GB HBM3", 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip("gpu", "NVIDIA H200", 141e9, 4800e9, 450e9, 50e9),
    "cpu": Chip("cpu", "cpu"),
}
FORMS = {"tpu": "v5e:16x16 or v5p:4x4x4", "gpu": "h100:8x4", "cpu": "cpu:8"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are connected."""

    name: str  # as the user wrote it
    kind: str  # a key of `CHIPS`
    shape: tuple[int, ...]  # shape of one slice; GPUs: (devices of a node, nodes)
    slices: int = 1  # number of TPU slices; the data-centre network connects them

    @property
    def chip(self) -> Chip:
        """The kind of device."""
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """One of "cpu", "gpu", "tpu"."""
        return self.chip.platform

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 FLOP/s of one device, or None where it is not known."""
        return device_peak_flops(self.chip)

    def mesh(self, cfg) -> AbstractMesh:
        """The mesh of a `MeshConfig` over these devices.

        Raises:
          ConfigError: if its sizes do not fit.
        """
        sizes = cfg.sizes(self.num_devices)
        require(
            sizes[0] % self.slices == 0,
            "config.mesh.data",
            sizes[0],
            f"a multiple of the number of TPU slices = {self.slices}; only copies of "
            "the model talk over the data-centre network",
        )
        return abstract_mesh(self, sizes)

    def near(self, axis: str, sizes: dict[str, int]) -> int:
        """Devices of one group along a mesh axis that are in one slice or node."""
        if self.platform == "tpu":
            return sizes[axis] // self.slices if axis == "data" else sizes[axis]
        if self.platform == "cpu":
            return sizes[axis]
        after = AXIS_NAMES[AXIS_NAMES.index(axis) + 1 :]
        stride = math.prod(sizes[name] for name in after)
        return min(sizes[axis], max(1, self.shape[0] // stride))

    def seconds(
        self, axis: str, sizes: dict[str, int], received: float, exchange: bool
    ) -> float | None:
        """Seconds that a mesh axis takes to bring bytes to every device.

        Args:
          exchange: each device's bytes are its own (all-to-all); else all receive the
            same (all-gather, reduce-scatter), and a slice or node fetches them once.

        Returns:
          The time of the slower of the two networks; None where one is not published.
        """
        if received == 0:
            return 0.0
        size, near = sizes[axis], self.near(axis, sizes)
        far = received * (size - near) / (size - 1)
        inside = received - far if exchange else received
        if not exchange:
            far /= near
        near_s = self._inside(axis, sizes, inside, exchange) if near > 1 else 0.0
        network = self.chip.network
        far_s = 0.0 if far == 0 else far / network if network else None
        return None if near_s is None or far_s is None else max(near_s, far_s)

    def _inside(self, axis, sizes, received, exchange) -> float | None:
        link = self.chip.link
        if link is None:
            return None
        if self.platform == "gpu":
            return received / link
        # A part of a dimension is a line.
        dims = torus_dims(self, sizes)[axis] or ((sizes[axis], False),)
        if not exchange:
            return received / (link * sum(2 if ring else 1 for _, ring in dims))
        size = math.prod(length for length, _ in dims)
        return max(
            received * hops(length, ring) * size / (size - 1) / link
            for length, ring in dims
        )


def hops(length: int, ring: bool) -> float:
    """Load of the busiest link of a dimension when all chips exchange evenly.

    The unit is what one chip sends. In a ring a chip's bytes go length / 4 hops on
    average, over two links. In a line half of the chips send half of their bytes over
    its middle.
    """
    return length / 8 if ring and length > 2 else length / 4


def torus_dims(
    topology: Topology, sizes
) -> dict[str, tuple[tuple[int, bool], ...] | None]:
    """The dimensions of the torus that each mesh axis runs along: (chips, is a ring).

    Axes choose from the last to the first, as JAX lays them out: the dimensions whose
    product is the size of the axis; None where there are none.
    """
    chip, left = topology.chip, list(topology.shape)
    found: dict[str, tuple[tuple[int, bool], ...] | None] = {}
    for axis in reversed(AXIS_NAMES):
        size = topology.near(axis, sizes)
        counts = range(len(left), 0, -1)
        choices = (c for n in counts for c in itertools.combinations(left, n))
        chosen = next((c for c in choices if math.prod(c) == size), None)
        if size == 1:
            found[axis] = ((1, False),)
        elif chosen is None:
            found[axis] = None
            left = _take(left, size)
        else:
            found[axis] = tuple((d, d % chip.ring == 0) for d in chosen if d > 1)
            for d in chosen:
                left.remove(d)
    return found


def _take(left: list[int], size: int) -> list[int]:
    """The dimensions that are left after an axis of `size` chips took its part."""
    rest = []
    for d in left:
        part = math.gcd(d, size)
        size //= part
        rest.append(d // part)
    return rest


def abstract_mesh(topology: Topology, sizes) -> AbstractMesh:
    """A mesh without devices; programs traced under it are for the topology's chip."""
    chip, auto = topology.chip, (AxisType.Auto,) * len(AXIS_NAMES)
    device = AbstractDevice(chip.device_kind, None, chip.platform)
    return AbstractMesh(
        tuple(sizes), AXIS_NAMES, axis_types=auto, abstract_device=device
    )


def parse(text: str, path: str = "--topology") -> Topology:
    """A topology from its name, such as `v5p:4x4x4`, `v5e:16x16*2` or `h100:8x4`.

    Raises:
      ConfigError: if there is none of that name.
    """
    kind, _, rest = text.partition(":")
    if kind not in CHIPS:
        forms = ", ".join(FORMS.values())
        raise ConfigError(
            f"{path} = {text!r}: no such device {kind!r}.{nearest(kind, CHIPS)} "
            f"Devices are {', '.join(CHIPS)}, written as {forms}."
        )
    match = re.fullmatch(r"(\d{1,6}(?:x\d{1,6})*)(?:\*(\d{1,6}))?", rest)
    shape = tuple(map(int, match[1].split("x"))) if match else ()
    slices = int(match[2] or 1) if match else 1
    chip = CHIPS[kind]
    lengths = {"tpu": (chip.dims,), "gpu": (1, 2), "cpu": (1,)}[chip.platform]
    if len(shape) not in lengths or 0 in shape or slices < 1:
        raise ConfigError(f"{path} = {text!r}: must be {_form(kind, shape)}.")
    if slices > 1 and (chip.platform != "tpu" or chip.network is None):
        raise ConfigError(
            f"{path} = {text!r}: only v5e, v5p and v6e have several slices here."
        )
    if chip.platform == "gpu":
        shape = (shape[0], shape[1] if len(shape) == 2 else 1)
    return Topology(text, kind, shape, slices)


def _form(kind: str, shape: tuple[int, ...]) -> str:
    """A hint: how to write a shape with the right number of dimensions."""
    chip = CHIPS[kind]
    if chip.platform == "cpu":
        return "cpu:N, N devices, such as cpu:8"
    if chip.platform == "gpu":
        return f"{kind}:GPUSxNODES, such as {kind}:8x4 for 4 nodes of 8"
    count = math.prod(shape) if shape and 0 not in shape else 0
    side = round(count ** (1 / chip.dims)) if count else 4
    near = "x".join([str(max(side, 1))] * chip.dims)
    return f"{kind}: and {chip.dims} sizes, such as {kind}:{near}, and *2 for 2 slices"
