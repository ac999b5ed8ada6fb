"""Paths of parameters: `segments/0/blocks/1/ffn/...`, as in nested dicts of arrays."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any

import jax


def flat_paths(tree) -> dict[str, Any]:
    """Flatten nested dicts to `{"a/b/c": leaf}`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path) -> str:
    """Write a key path of nested dicts as `a/b/c`."""
    return "/".join(str(k.key) for k in path)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The paths that a shell pattern matches; one without `*` may match a part."""
    return fnmatch.filter(names, pattern if "*" in pattern else f"*{pattern}*")


def expert_axis(name: str) -> int | None:
    """The dim of the experts in an array, from the end; None: it has none.

    Args:
      name: ends in a letter (or number) for each dim of one copy: w_in_ED2F.
    """
    found = re.search(r"_([A-Z0-9]+)$", name)
    if found is None or "E" not in found[1]:
        return None
    return found[1].index("E") - len(found[1])


def apart(params, trains: dict[str, bool]) -> tuple[Any, Any]:
    """Split parameters into (trained, frozen); None stands for those of the other."""

    def those(wanted):
        return jax.tree_util.tree_map_with_path(
            lambda path, a: a if trains[path_name(path)] == wanted else None, params
        )

    return those(True), those(False)


def together(trained, frozen):
    """Undo `apart`."""
    return jax.tree.map(
        lambda own, other: other if own is None else own,
        trained,
        frozen,
        is_leaf=lambda a: a is None,
    )


def of_trained(loss, params, trains: dict[str, bool]):
    """A loss as a function of what is trained, to be differentiated; and that part.

    Args:
      loss: `(params, *rest) -> result`.
      params: nested dicts of all parameters.
      trains: the answer for each path whether it is trained.

    Returns:
      (`(trained, *rest) -> result`, trained), trained as `apart` makes it.
    """
    trained, frozen = apart(params, trains)

    def own(trained, *rest):
        return loss(together(trained, frozen), *rest)

    return own, trained


def nested(flat: dict[str, Any]) -> dict:
    """Undo `flat_paths`."""
    tree: dict = {}
    for name, value in flat.items():
        node = tree
        *parts, last = name.split("/")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
