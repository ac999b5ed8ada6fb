"""Fewer experts in a model: its config, and the parameters of those that stay.

Which ones stay: `prune.py`.

R copies of a block in a segment
"""

import collections
import copy
import dataclasses
import functools

import jax
import numpy as np

from moex.config.base import ConfigError, walk
from moex.convert.plans import Keep, Plan
from moex.convert.segments import Piece, cut, cut_model
from moex.model.layers import layers as layers_of
from moex.model.paths import expert_axis, flat_paths, nested
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.layer import MoE
from moex.nn.lowered import SCALES, VALUES
from moex.nn.model import Model
from moex.nn.projection import of_adapter


def parts_of(sparse) -> int:
    """Parts of a layer of which equally many experts must stay; 1: any may stay.

    They are the groups of its routers, and the groups of experts that share a
    projection. A finer one is a part of a coarser one.

    Raises:
      ConfigError: if they are not, or do not divide the experts.
    """
    moe, E = sparse.moe, sparse.moe.num_experts
    sizes = {moe.experts.kept_evenly(E)}
    for router in sparse.routers:
        if router.groups_kept() is not None:
            num, _ = router.groups_kept()
            if moe.zero is not None:
                raise ConfigError(
                    f"{sparse.where}: its router chooses groups in which there are "
                    "zero-computation experts; experts cannot go."
                )
            sizes.add(E // num)
    size = min(sizes)
    if any(other % size for other in sizes) or E % size:
        raise ConfigError(
            f"{sparse.where}: {E} experts in parts of {sorted(sizes)}, of which "
            "equally many must stay, do not fit into each other."
        )
    return E // size


def pruned_ffn(ffn, plan: Keep, where: str):
    """The config of a feed-forward that keeps the experts of a plan.

    Raises:
      ConfigError: if its router or its experts cannot do without the others.
    """
    ffn = copy.deepcopy(ffn)
    keep, E = sorted(plan.keep), plan.experts
    for path, node in walk(ffn, where):
        if isinstance(node, MoE):
            if node.stored_experts is not None:
                raise ConfigError(
                    f"{path}: its experts share weights (stored_experts = "
                    f"{node.stored_experts}); prune it before they are merged."
                )
            choices = node.num_choices()
            chosen = [*keep, *range(E, choices)]
            node.router = _told(node.router, chosen, choices, f"{path}.router")
            node.experts = _told(node.experts, keep, E, f"{path}.experts")
            node.num_experts = len(keep)
        elif isinstance(node, Chain) and not isinstance(node.routers, str):
            choices = node.moe.num_choices()
            chosen = [*keep, *range(E, choices)]
            node.routers = tuple(
                _told(router, chosen, choices, f"{path}.routers[{t}]")
                for t, router in enumerate(node.routers)
            )
    return ffn


def _told(part, keep: list[int], num_experts: int, where: str):
    """A router or experts with those alone; a `ConfigError` says why they cannot."""
    if len(keep) == num_experts:
        return part
    try:
        return part.keep_experts(keep, num_experts)
    except ValueError as e:
        raise ConfigError(f"{where}: {e}") from None


@dataclasses.dataclass(frozen=True)
class Pruned:
    """How a model is pruned: its new config, and where arrays of the old one go."""

    plan: Plan
    old: Model  # config before
    model: Model  # and after
    found: list[Piece]
    clipped: list[str]  # lines on layers whose tokens get fewer experts than before

    @classmethod
    def of(cls, model, plan: Plan) -> "Pruned":
        """How a plan prunes a `Model` config.

        Raises:
          ConfigError: naming the layer that cannot be.
        """
        plans = plan.by_layer()
        labels, clipped = {}, []
        for number, (site, _) in enumerate(layers_of(model)):
            own = plans.get(number)
            if own is None or len(own.keep) == own.experts:
                continue
            labels[number] = pruned_ffn(site.ffn, own, f"layer {number}: {site.where}")
            clipped += _clipped(number, site.sparse, labels[number])

        def change(ffn, label, where):
            return ffn if label is None else label

        found = cut(model, labels)
        made = cut_model(model, found, change)
        return cls(plan, model, made, found, clipped)

    def arrays(self, tree) -> dict:
        """Parameters or state of the pruned model.

        Args:
          tree: nested dict of arrays of the old model; not changed.
        """
        old, new = flat_paths(tree), {}
        for path in self.shapes:
            part = self.part(path)
            if part.path in old:
                new[path] = part.of(old[part.path])
        return nested(new)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the pruned model by its path."""
        return model_spec(self.model).shapes()

    @functools.cached_property
    def _old_shapes(self) -> dict[str, tuple[int, ...]]:
        return model_spec(self.old).shapes()

    def check_adapters(self, where: str) -> None:
        """Check that the same matrices of the same layers have adapters as before.

        Raises:
          ConfigError: beginning with `where`; patterns of segments are no longer right.
        """
        new: collections.Counter[str] = collections.Counter()
        for path, shape in self.shapes.items():
            if of_adapter(path):
                new[self._old_path(path)] += shape[0]
        old = {p: shape[0] for p, shape in self._old_shapes.items() if of_adapter(p)}
        for path in sorted(old.keys() | new.keys()):
            if old.get(path, 0) != new[path]:
                raise ConfigError(
                    f"{where}: {path}: the adapter names its targets by segments, and "
                    "these are others where layers keep different experts."
                )

    def part(self, path: str) -> "Part":
        """The part of an array of the old model that is one of the pruned model.

        Raises:
          ConfigError: if its shape would be another: a module of a user may have arrays
            that we do not know.
        """
        names, old = path.split("/"), self._old_path(path)
        if names[0] != "segments":
            return Part(path)
        piece, block = self.found[int(names[1])], int(names[3])
        segment = self.old.layers[piece.segment]
        weight = old.removesuffix(VALUES).removesuffix(SCALES)
        copies, axis = piece.copies(block), expert_axis(weight.split("/")[-1])
        if of_adapter(old):  # the names of its arrays tell no experts
            axis = _changed(self._old_shapes[old], self.shapes[path])
        part = Part(old, None if piece.repeat == segment.repeat else copies)
        routed = {"router", "routers", "experts"} & set(names[5:-1])
        if axis is not None and routed and piece.labels[block] is not None:
            plans = self.plan.by_layer()
            own = [plans[piece.layer(block, r)] for r in range(piece.repeat)]
            count = self._old_shapes[old][axis]  # zero-computation experts too
            rows = [[*sorted(p.keep), *range(p.experts, count)] for p in own]
            part = Part(old, copies, rows, axis)
        shape = part.shape(self._old_shapes[old])
        if shape != self.shapes[path]:
            raise ConfigError(
                f"{old}: has shape {shape} and not {self.shapes[path]} after pruning; "
                "the name of an array must end in a letter for each dim, E for "
                "experts, such as w_DE."
            )
        return part

    def _old_path(self, path: str) -> str:
        """The path in the old model of an array of the pruned one."""
        names = path.split("/")
        if names[0] == "segments":
            n = self.found[int(names[1])].segment
            place = int(names[3]) % len(self.old.layers[n].pattern)
            names[1], names[3] = str(n), str(place)
        return "/".join(names)


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of an array [R, ...] that stays: some copies of it, and some experts."""

    path: str  # of the old array
    copies: slice | None = None  # None: all, and all experts
    experts: list[list[int]] | None = None  # of each of these copies; None: all
    axis: int = 0  # their dim, from the end

    def of(self, array):
        """The part of an array."""
        if self.copies is None:
            return array
        array = np.asarray(jax.device_get(array))[self.copies]
        if self.experts is None:
            return array
        both = zip(array, self.experts, strict=True)
        return np.stack([np.take(one, rows, self.axis) for one, rows in both])

    def shape(self, old: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of an array of shape `old`."""
        if self.copies is None:
            return old
        new = [len(range(old[0])[self.copies]), *old[1:]]
        if self.experts is not None:
            new[self.axis] = len(self.experts[0])
        return tuple(new)


def _changed(old: tuple[int, ...], new: tuple[int, ...]) -> int | None:
    """The first dim, from the end, that differs in arrays of copies; None: no dim."""
    dims = range(1, len(old))
    return next((d - len(old) for d in dims if old[d] != new[d]), None)


def _clipped(number: int, before, ffn) -> list[str]:
    """A line if tokens of a layer get fewer experts, as there are no more."""
    moes = [node for _, node in walk(ffn, "") if isinstance(node, (MoE, Chain))]
    routers = moes[0].rounds() if isinstance(moes[0], Chain) else [moes[0].router]
    moe = next(node for node in moes if isinstance(node, MoE))
    was = max(own.slots(before.moe.num_choices()) for own in before.routers)
    now = max(own.slots(moe.num_choices()) for own in routers)
    if now == was or was == before.moe.num_choices():
        return []
    return [
        f"layer {number}: {moe.num_experts} experts stay, so a token gets {now} of "
        f"them at most, and not {was}"
    ]
