"""Which arrays of a model belong to single experts, and which layers share slots.

A row is what one expert of one layer has: its part of every array of the experts whose
name has an E. Layers whose rows have the same names, shapes and types share a pool of
slots. Experts here are stored ones: sets of weights, if choices share them.

C slots of a pool · E experts of a layer
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moex.adapters.attach import make_model
from moex.config.base import ConfigError
from moex.model.layers import Site, layers
from moex.model.paths import expert_axis, flat_paths
from moex.model.spec import ModelSpec
from moex.nn.contract import StackReader
from moex.nn.lowered import BlockWeight, lower_model

ALIGNED = 64  # bytes; parts of a row begin at multiples of it


class Part(NamedTuple):
    """The part of a row that comes from one array of the experts."""

    name: str  # path of the array in the module of the experts
    item: str  # "params" or "state"
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # byte of the row where it begins

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Layer(NamedTuple):
    """A layer with routed experts."""

    site: Site
    copy: int  # of the site
    number: int  # of the layer in the model, from 0
    routed: int  # number among the layers with routers, from 0
    experts: int  # E
    first: int  # number of the row of its first expert in its pool

    def most_slots(self) -> int:
        """The most experts of a token, in one of its rounds."""
        assert (sparse := self.site.sparse) is not None
        choices = sparse.moe.num_choices()
        return max(min(r.slots(choices), self.experts) for r in sparse.routers)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Layers that share slots, in order, and their rows."""

    parts: tuple[Part, ...]
    layers: tuple[Layer, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of a row, with gaps."""
        last = self.parts[-1]
        return aligned(last.start + last.size)

    @property
    def num_rows(self) -> int:
        """The experts of all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def most_experts(self) -> int:
        """The most experts E of a layer."""
        return max(layer.experts for layer in self.layers)

    def views(self, row: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of a row of bytes, by name; nothing is copied."""
        return {
            p.name: row[p.start : p.start + p.size].view(p.dtype).reshape(p.shape)
            for p in self.parts
        }


def aligned(size: int) -> int:
    """Round up to a multiple of `ALIGNED`."""
    return -(-size // ALIGNED) * ALIGNED


def module_of(layer: Layer) -> str:
    """The path of the experts of a layer, in the model."""
    assert layer.site.sparse is not None
    return f"{layer.site.sparse.path}/experts"


def is_row_part(path: str) -> bool:
    """Tell whether an array of a layer's experts has a part for each of them."""
    *_, owner, name = path.split("/")
    return expert_axis(owner if name in BlockWeight.PARTS else name) is not None


def abstract(model, weights: str | None = None):
    """The module of a `Model` config without arrays.

    Args:
      model: its config.
      weights: as for `model_spec`.
    """

    def make():
        module = make_model(model, nnx.Rngs(params=0))
        if weights is not None:
            lower_model(module, weights)
        return module

    return nnx.eval_shape(make, graph=False)


def pools(model, spec: ModelSpec, module, dtype: str) -> list[Pool]:
    """The pools of a model.

    Args:
      model: `Model` config.
      spec: `ModelSpec` of it.
      module: from `abstract`.
      dtype: of computing, which experts are cast to that read their weights in place.

    Raises:
      ConfigError: if the model has no layer with routed experts.
    """
    shapes = {"params": flat_paths(spec.params), "state": flat_paths(spec.state)}
    found: dict[tuple[Part, ...], list[Layer]] = {}
    routed = 0
    for site, copy in layers(model):
        if site.sparse is None:
            continue
        E, number = site.sparse.moe.num_stored(), site.numbers[copy]
        own = Layer(site, copy, number, routed, E, 0)
        path = module_of(own)
        reads = isinstance(inside(module, path), StackReader)
        parts = _parts(shapes, path, jnp.dtype(dtype) if reads else None)
        same = found.setdefault(parts, [])
        same.append(own._replace(first=sum(layer.experts for layer in same)))
        routed += 1
    if not found:
        raise ConfigError("--offload: the model has no layer with routed experts.")
    return [Pool(parts, tuple(own)) for parts, own in found.items()]


def inside(module, path: str):
    """A module inside of another one, by its path."""
    for name in path.split("/"):
        module = module[int(name)] if name.isdecimal() else getattr(module, name)
    return module


def _parts(shapes, module: str, cast) -> tuple[Part, ...]:
    found, start = [], 0
    for item, arrays in shapes.items():
        for path, array in arrays.items():
            if not path.startswith(f"{module}/") or not is_row_part(path):
                continue
            name, dtype = path.removeprefix(f"{module}/"), np.dtype(array.dtype)
            lowered = name.split("/")[-1] in BlockWeight.PARTS
            if cast is not None and dtype == np.float32 and not lowered:
                dtype = cast
            part = Part(name, item, tuple(array.shape[2:]), dtype, start)
            found.append(part)
            start = aligned(start + part.size)
    return tuple(found)
