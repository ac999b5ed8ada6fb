"""MoE layers in place of dense ones: the config of a model, and its parameters.

The mathematics of one layer is in `upcycle.py`, the cutting of segments in
`segments.py`; reading and writing runs in `apply.py`.
"""

import jax
import numpy as np

from moex.config.base import ConfigError
from moex.convert.kinds.moe import Upcycle
from moex.convert.segments import Piece, chosen_layers, cut, cut_arrays, cut_model
from moex.convert.upcycle import layer_of_dense, moe_of_dense
from moex.model.layers import layers as layers_of
from moex.nn.mlp import Dense
from moex.progress import phase


def pieces(model, layers: str) -> list[Piece]:
    """The segments that a `Model` config has to have where some layers are upcycled.

    Raises:
      ConfigError: if no layer is dense, or `layers` names one that is not.
    """
    dense = [
        n for n, (at, _) in enumerate(layers_of(model)) if isinstance(at.ffn, Dense)
    ]
    if not dense:
        raise ConfigError("config.model: has no dense layer; there is none to upcycle.")
    return cut(model, dict.fromkeys(chosen_layers(layers, dense, "dense"), True))


def moe_model(model, options: Upcycle):
    """A copy of a `Model` config in which the named dense layers are MoE layers.

    Dense layers inside `Narrow` and shared experts stay.

    Raises:
      ConfigError: if there is no such layer, or `split` does not divide its width.
    """

    def change(ffn, upcycled, where):
        return moe_of_dense(ffn, options, where) if upcycled else ffn

    return cut_model(model, pieces(model, options.layers), change)


def upcycle_params(params, state, model, options: Upcycle):
    """`(params, state)` of `moe_model(model, options)`.

    Args:
      params, state: nested dicts of arrays of the old model; not changed.

    Returns:
      New nested dicts; layers that stay dense, and all else, have the old values.
    """
    found = pieces(model, options.layers)
    params, state = (cut_arrays(tree, found, model) for tree in (params, state))
    doing, total = "making experts", len(upcycled_layers(model, options.layers))
    with phase(doing, total, "layers") as at:
        _upcycle(params, found, options, at.add)
    return params, state


def _upcycle(params, found: list[Piece], options: Upcycle, count) -> None:
    """Replace feed-forwards in parameters by new segment; `count` counts layers."""
    for i, piece in enumerate(found):
        blocks = params["segments"][str(i)]["blocks"]
        for block, upcycled in enumerate(piece.labels):
            if upcycled:
                old = jax.device_get(blocks[str(block)]["ffn"])
                layers = []
                for r in range(piece.repeat):
                    weights = {name: value[r] for name, value in old.items()}
                    number = piece.layer(block, r)
                    layers.append(layer_of_dense(weights, options, number))
                    count(1)
                stacked = jax.tree.map(lambda *a: np.stack(a), *layers)
                blocks[str(block)]["ffn"] = stacked


def upcycled_layers(model, layers: str) -> list[int]:
    """Numbers of the layers of a `Model` config that become MoE layers."""
    return sorted(
        piece.layer(block, r)
        for piece in pieces(model, layers)
        for block, upcycled in enumerate(piece.labels)
        if upcycled
        for r in range(piece.repeat)
    )
