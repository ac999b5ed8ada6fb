"""Paths of parameters: `segments/0/blocks/1/ffn/...`, as in nested dicts of arrays."""

from typing import Any

import jax


def flat_paths(tree) -> dict[str, Any]:
    """Flatten nested dicts to `{"a/b/c": leaf}`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path) -> str:
    """Write a key path of nested dicts as `a/b/c`."""
    return "/".join(str(k.key) for k in path)
