"""The training state: plain nested dicts of arrays, and how they are made.

Modules exist only inside a trace: `nnx.split` at construction gives a graph definition
and dicts, `merged` inside the step gives the module back. Optimizer, checkpoints and
tests see dicts whose paths are the module paths.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moex import sharding
from moex.adapters.attach import make_model
from moex.model.paths import flat_paths, path_name
from moex.nn.lowered import lower_model
from moex.nn.model import Model
from moex.nn.param import split_params


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """The facts about one parameter or state variable, besides its shape."""

    # Logical axis names of its own dims (stacked layers come before).
    axes: tuple[str | None, ...]
    matrix: tuple | None = None  # (input dims, output dims) among `axes`, or None
    # Function that moves a state: `(value, stats, step) -> value`, or None.
    rule: Any = None
    frozen: bool = False  # it belongs to the base of adapters, and is not trained
    trained_by: str | None = None  # kind of batches that train it; None: all batches


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its arrays: made once per run by `model_spec`."""

    graphdef: Any  # for `merged`
    # params, state: nested dicts of `ShapeDtypeStruct`: learned by gradient, or not.
    params: dict
    state: dict
    info: dict[str, ParamInfo]  # `{path: ParamInfo}` for both

    def merge(self, params, state):
        """The module; use inside a trace."""
        return merged(self.graphdef, params, state)

    def trained(self) -> dict[str, bool]:
        """The answer for each path whether the model lets its parameter be trained."""
        return {path: not self.info[path].frozen for path in flat_paths(self.params)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of `params` and `state` by its path."""
        arrays = flat_paths(self.params) | flat_paths(self.state)
        return {path: array.shape for path, array in arrays.items()}


def model_spec(
    cfg: Model, mesh: Mesh | None = None, weights: str | None = None
) -> ModelSpec:
    """The abstract model of a config; allocates nothing.

    Args:
      cfg: model config.
      mesh: the mesh that it has to fit; None: none.
      weights: keep matrices so, for a model that is not trained: see
        `nn.lowered.lower_model`; None: as they are trained.

    Raises:
      ConfigError: if `mesh` does not divide a parameter that it splits.
    """

    def make():
        model = make_model(cfg, nnx.Rngs(params=0))
        if weights is not None:
            lower_model(model, weights)
        return model

    abstract = nnx.eval_shape(make, graph=False)
    graphdef, params, state = split_params(abstract)
    info = {}
    for tree in (params, state):
        for path, variable in nnx.to_flat_state(tree):
            metadata = variable.get_metadata()
            info["/".join(map(str, path))] = ParamInfo(
                axes=metadata["axes"],
                matrix=metadata.get("matrix"),
                rule=metadata.get("rule"),
                frozen=metadata.get("frozen", False),
                trained_by=metadata.get("trained_by"),
            )
    spec = ModelSpec(graphdef, _pure(params), _pure(state), info)
    if mesh is not None:
        check_mesh(spec, mesh)
    return spec


def _pure(state) -> dict:
    """Make nested dicts with string keys (list positions too), as in checkpoints."""
    return _string_keys(nnx.to_pure_dict(state))


def _string_keys(tree):
    if isinstance(tree, dict):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def merged(graphdef, params, state):
    """The module of a `ModelSpec.graphdef` and nested dicts; use inside a trace."""
    return nnx.merge(graphdef, _positions(params), _positions(state))


def _positions(tree):
    """Undo `_string_keys`: nnx sorts keys, and the text "10" comes before "2"."""
    if isinstance(tree, dict):
        return {
            int(k) if str(k).isdecimal() else k: _positions(v) for k, v in tree.items()
        }
    return tree


def init_params(cfg: Model, key) -> tuple[dict, dict]:
    """Make fresh (params, state) of a config; jit it with `out_shardings`."""
    _, params, state = split_params(make_model(cfg, nnx.Rngs(params=key)))
    return _pure(params), _pure(state)


def shardings(spec: ModelSpec, mesh: Mesh) -> tuple[dict, dict]:
    """The `NamedSharding` of every leaf of (params, state), by logical axes."""

    def place(path, leaf):
        axes = spec.info[path_name(path)].axes
        return sharding.param_sharding(leaf.shape, axes, mesh)

    return (
        jax.tree_util.tree_map_with_path(place, spec.params),
        jax.tree_util.tree_map_with_path(place, spec.state),
    )


def check_mesh(spec: ModelSpec, mesh: Mesh) -> None:
    """Check that a mesh divides every parameter it splits: see `check_divides`."""
    sharding.check_divides(
        [(name, shape, spec.info[name].axes) for name, shape in spec.shapes().items()],
        dict(mesh.shape),
    )


def opt_shardings(tx, spec: ModelSpec, param_shardings, mesh: Mesh):
    """The shardings of `tx.init(params)`: moments like their parameter, others whole.

    A leaf of the optimizer state belongs to the parameter whose path ends its own path
    and whose shape it has.
    """
    by_path = {
        path_name(path): (leaf.shape, sharding_)
        for (path, leaf), sharding_ in zip(
            jax.tree_util.tree_flatten_with_path(spec.params)[0],
            jax.tree.leaves(param_shardings),
            strict=True,
        )
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        keys = [str(getattr(k, "key", "")) for k in path]
        for start in range(len(keys)):
            shape, found = by_path.get("/".join(keys[start:]), (None, None))
            if shape == leaf.shape:
                return found
        return whole

    abstract = jax.eval_shape(tx.init, spec.params)
    return jax.tree_util.tree_map_with_path(place, abstract)


def init_guard() -> dict:
    """Make the state of the update guard: see `step.guard_update`."""
    return {
        "accepted": jnp.zeros((), jnp.int32),
        "grad_norm_mean": jnp.zeros((), jnp.float32),
        "skipped": jnp.zeros((), jnp.int32),
        "skipped_in_row": jnp.zeros((), jnp.int32),
    }


def abstract_arrays(spec: ModelSpec, mesh: Mesh) -> dict:
    """The arrays of a model as `ShapeDtypeStruct`s with shardings.

    Returns:
      {"params", "state", "guard"}.
    """
    params, state = shardings(spec, mesh)
    whole, guard = NamedSharding(mesh, PartitionSpec()), jax.eval_shape(init_guard)
    return {
        "params": _placed(spec.params, params),
        "state": _placed(spec.state, state),
        "guard": _placed(guard, jax.tree.map(lambda _: whole, guard)),
    }


def abstract_opt(tx, spec: ModelSpec, mesh: Mesh):
    """The state of an optimizer as `ShapeDtypeStruct`s with shardings."""
    placed = opt_shardings(tx, spec, shardings(spec, mesh)[0], mesh)
    return _placed(jax.eval_shape(tx.init, spec.params), placed)


def _placed(tree, shards):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shards
    )
