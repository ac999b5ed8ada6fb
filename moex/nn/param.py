"""Parameters: one line gives shape, logical axes and initial values.

`axes` is moex's own metadata key, not `out_sharding`: a model can be built without a
mesh, and `sharding.py` reads the axes later. A stack of layers adds leading dims that
the axes do not name; the rule is "extra leading dims are `layers`".
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Logical axes. `None` marks an axis that is never sharded.
AXES = ("vocab", "embed", "heads", "head_dim", "mlp", "expert", "latent")


class RouterState(nnx.Variable):
    """State of a router that no gradient moves, such as its selection bias.

    Its metadata are `axes`, as for parameters, and `rule`: a hashable callable
    `(value, stats, step) -> value` that the train step applies (`moe/balance.py`), or
    None for state that does not move.
    """


def split_params(module) -> tuple[Any, Any, Any]:
    """Split into (graph definition, parameters, other state) for `nnx.merge`.

    moex says `graph=False` wherever nnx asks, so it does not depend on the mode that
    nnx is in: a module that is reachable by two paths is an error.
    """
    return nnx.split(module, nnx.Param, ..., graph=False)  # type: ignore


def param(
    rngs, shape, axes, *, std=None, fan_in=None, value=None, matrix=None
) -> nnx.Param:
    """Make a float32 parameter.

    Args:
      rngs: `nnx.Rngs` with a `params` stream.
      shape: tuple of ints.
      axes: one logical axis name or None per dim of `shape`.
      std: standard deviation of a normal initial value.
      fan_in: int; instead of `std`, use a normal cut at two deviations with
        variance 1 / fan_in (LeCun).
      value: constant initial value, instead of `std` and `fan_in`.
      matrix: (input dims, output dims) if the parameter is a matrix, or a stack of
        matrices over its other dims: Muon orthogonalises each. Embeddings, routers
        and scales have none.
    """
    if len(shape) != len(axes) or not {None, *AXES}.issuperset(axes):
        names = ", ".join(AXES)
        raise ValueError(
            f"axes {axes} of shape {shape}: must be one for each dim, None or {names}."
        )
    if value is not None:
        array = jnp.full(shape, value, jnp.float32)
    elif fan_in is not None:
        # 0.8796 is the standard deviation of a unit normal cut at +-2.
        array = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape)
        array = array * (fan_in**-0.5 / 0.87962566)
    else:
        array = std * jax.random.normal(rngs.params(), shape)
    return nnx.Param(array, axes=tuple(axes), matrix=matrix)
