"""Experts in another order: block p of the expert axis holds the experts of device p.

Routers choose the same experts under new numbers, so the model computes the same, up to
the order in which sums are rounded; ties of router scores, which go to the lowest
number, may go to another expert.

E experts of a layer · R copies of a layer
"""

import dataclasses

import jax
import numpy as np

from moex.config.base import ConfigError, require
from moex.convert.plans import Place, Plan
from moex.model.layers import Site, layers, site_at, sites
from moex.model.paths import expert_axis, flat_paths, nested
from moex.model.spec import model_spec


def whole_blocks(sparse) -> tuple[int, ...]:
    """Sizes of the groups of neighbouring experts that must stay together in a layer.

    They are the groups of its routers, and the experts that share a projection.

    Raises:
      ConfigError: if the experts of the layer cannot change places.
    """
    moe, where = sparse.moe, sparse.where
    for part in (*sparse.routers, moe.experts):
        if not part.reorders:
            raise ConfigError(
                f"{where}: {type(part).__name__} depends on the numbers of experts; "
                "they cannot change places."
            )
    count, sizes = moe.num_stored(), set()
    if moe.stored_experts is None:
        for router in sparse.routers:
            if router.groups_kept() is not None:
                sizes.add(moe.num_choices() // router.groups_kept()[0])
        if moe.zero is not None and sizes:
            raise ConfigError(
                f"{where}: its router chooses groups in which there are zero-"
                "computation experts; experts cannot change places."
            )
    size = moe.experts.kept_evenly(count)
    if count % size:
        raise ConfigError(
            f"{where}: {count} experts share projections in groups of {size}, and the "
            "last group is smaller; they cannot change places."
        )
    return tuple(sorted((sizes | {size}) - {1, count}))


def devices_of(plan: Plan) -> int:
    """The number of devices of a plan.

    Raises:
      ConfigError: if layers have different ones, or there is one device.
    """
    found = {len(own.devices) for own in plan.by_layer().values()}
    one = len(found) == 1
    require(one, f"{plan.where}: devices", sorted(found), "as many in every layer")
    count = found.pop()
    require(count > 1, f"{plan.where}: devices", count, "2 or more in every layer")
    return count


def check(plan: Plan, model) -> None:
    """Check that the layers of a plan can take their places.

    Raises:
      ConfigError: naming the plan and the layer.
    """
    plan.check(model)
    devices_of(plan)
    own = plan.by_layer()
    _check_names(model)
    for number, (site, _) in enumerate(layers(model)):
        if number not in own:
            continue
        for size in whole_blocks(site.sparse):
            order = own[number].order()
            for first in range(0, len(order), size):
                block = order[first : first + size]
                if len({e // size for e in block}) > 1:
                    raise ConfigError(
                        f"{plan.where}, layer {number}: devices: groups of {size} "
                        f"experts must stay together, such as those of "
                        f"{block[0]} and {block[1]}; `moex place --run` heeds them."
                    )


def _check_names(model) -> None:
    """Check that the name of every array of experts says which of its dims is E."""
    for path, info in model_spec(model).info.items():
        name, axes = path.split("/")[-1], info.axes
        if "experts" not in path.split("/") or "expert" not in axes:
            continue
        if expert_axis(name) != axes.index("expert") - len(axes):
            raise ConfigError(
                f"{path}: its name must end in a letter for each dim, E for experts, "
                "such as w_EDF; then experts can change places."
            )


@dataclasses.dataclass(frozen=True)
class _Order:
    """The order of the experts of one layer."""

    stored: bool  # whether experts share the sets of weights that are placed
    choices: int  # choices of a router, zero-computation experts too
    plan: Place

    def of(self, name: str, part: str, array: np.ndarray) -> np.ndarray:
        """The array of a layer in the new order.

        Args:
          name: of the array, with a letter for each dim.
          part: "experts", "router", or the layer itself: "".
          array: of one copy.
        """
        order = self.plan.order()
        if part == "" and name == "stored_E":
            return np.argsort(order).astype(array.dtype)[array]
        axis = expert_axis(name)
        if part == "router" and axis is not None and not self.stored:
            rest = range(len(order), self.choices)
            return np.take(array, [*order, *rest], axis)
        if part != "experts":
            return array
        if axis is not None:
            return np.take(array, order, axis)
        letters = name.rpartition("_")[2]
        if "G" in letters:  # projections of groups that stayed together
            axis = letters.index("G") - len(letters)
            size = len(order) // array.shape[axis]
            return np.take(array, [e // size for e in order[::size]], axis)
        return array


def placed_arrays(tree, model, plan: Plan) -> dict:
    """Parameters or state of a model in the order of a plan that `check` took.

    Args:
      tree: nested dict of arrays; not changed.
      model: its `Model` config.
    """
    found, by_layer, every = {}, plan.by_layer(), sites(model)
    for path, array in flat_paths(tree).items():
        site, part = _part(every, path)
        plans = [] if site is None else [by_layer.get(n) for n in site.numbers]
        if site is None or site.sparse is None or not any(plans):
            found[path] = array
            continue
        moe, name = site.sparse.moe, path.split("/")[-1]
        stored = moe.stored_experts is not None
        copies = np.array(jax.device_get(array))
        for r, own in enumerate(plans):
            if own is not None:
                order = _Order(stored, moe.num_choices(), own)
                copies[r] = order.of(name, part, copies[r])
        found[path] = copies
    return nested(found)


def _part(every: list[Site], path: str) -> tuple[Site | None, str]:
    """The pair (layers of an array of an MoE or None, its part as for `_Order.of`)."""
    if not path.startswith("segments/"):
        return None, ""
    site = site_at(every, path)
    if site.sparse is None or not path.startswith(f"{site.sparse.path}/"):
        return None, ""
    first, *rest = path.removeprefix(f"{site.sparse.path}/").split("/")
    parts = {"experts": "experts", "router": "router", "routers": "router"}
    return (site if first in parts or not rest else None), parts.get(first, "")
