"""Experts that share weights in folders of other programs, which have no such layers.

Each choice of the router gets a copy of the weights that it leads to, so the folder is
as large as one of a model without sharing, and computes the same.

E experts · G stored ones · R copies of a layer
"""

import copy
import dataclasses

import jax
import numpy as np

from moex.interop.names import Piece
from moex.model.layers import sites


def written_out(model):
    """A copy of a model config in which each expert has weights of its own."""
    model = copy.deepcopy(model)
    for site in sites(model):
        if site.sparse is not None:
            site.sparse.moe.stored_experts = None
    return model


class Copies:
    """Finds the array of a tensor of a model that is written out.

    Args:
      model: config of the model as it is.
      arrays: its parameters and state by path.
    """

    def __init__(self, model, arrays: dict[str, jax.Array]):
        self._arrays = arrays
        self._stored = {
            f"{site.sparse.path}/experts/": jax.device_get(
                arrays[f"{site.sparse.path}/stored_E"]
            )
            for site in sites(model)
            if site.sparse is not None and site.sparse.moe.stored_experts is not None
        }

    def __bool__(self):
        """Whether any experts share weights."""
        return bool(self._stored)

    def of(self, piece: Piece) -> tuple[Piece, jax.Array]:
        """The piece to take, and the array to take it from.

        Args:
          piece: of the model that is written out.
        """
        array = self._arrays[piece.path]
        stored_RE = self._stored.get(piece.path.rpartition("/")[0] + "/")
        if stored_RE is None:
            return piece, array
        r, e, *rest = piece.index
        if isinstance(e, slice):  # all experts are one tensor
            own = array[r][np.asarray(stored_RE[r])][None]
            return dataclasses.replace(piece, index=(0, e, *rest)), own
        index = (r, int(stored_RE[r, e]), *rest)
        return dataclasses.replace(piece, index=index), array
