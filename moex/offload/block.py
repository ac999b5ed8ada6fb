"""Blocks of a model whose experts are in slots, and the programs that run them.

There is one program for each kind of block, whatever is resident: it gets the arrays of
a layer, and the slots of all layers with such experts.

B batch · L length · D model width · T tokens · E experts · R rounds
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moex.model.layers import Site
from moex.model.paths import flat_paths, nested
from moex.model.spec import merged
from moex.nn.stack import peak_of
from moex.offload.layout import Layer
from moex.offload.slots import TRACED, Slots

ROWS, MISSING, SCORE = range(3)  # lines of what a layer tells of its experts


@functools.partial(
    jax.jit, static_argnames=("graphdef", "module"), donate_argnames="cache"
)
def run_block(
    arrays, slots, x_BLD, ctx, place_2, steer, cache, offload, *, graphdef, module
):
    """Run one block with the experts that are resident.

    Args:
      arrays: (params, state) of the block, without rows of experts.
      slots: arrays of `Slots` by the item of their part; {} for a dense block.
      x_BLD: residual stream.
      ctx: `Context` of the batch.
      place_2: int32, which copy of its segment the block is, and its number.
      steer: the block's part of `Context.steer`, or None.
      cache: of the attention; None outside of decoding.
      offload: `Context.offload`; None for a dense block.
      graphdef: of the block.
      module: path of the experts in the block; "" in a dense one.

    Returns:
      (x_BLD, aux, cache, told): told has, for each round, "flags_R3E" (`ROWS`,
      `MISSING`, `SCORE`), "next", which goes on in `Context.offload`, and "slots",
      which says what experts elsewhere would compute; None in a dense block.
    """
    TRACED["block"] += 1
    block = _with_slots(graphdef, arrays, slots, module)
    ctx = _own_context(ctx, place_2, steer, offload)
    peak = None if steer is None else peak_of(x_BLD, ctx.valid_BL)
    x_BLD, aux, cache = block(x_BLD, ctx, cache)
    if not module:
        return x_BLD, (aux, peak), cache, None
    rounds = _rounds(aux, module)
    parts = ("x_TD", "expert_TK", "gate_TK", "keep_TK")
    told = {
        "flags_R3E": _flags(rounds),
        "next": {
            "done_RE": jnp.stack([r["done_E"] for r in rounds]),
            "sum_RTD": jnp.stack([r["sum_TD"] for r in rounds]),
        },
        "slots": [{name: r[name] for name in parts} for r in rounds],
    }
    return x_BLD, (aux, peak), cache, told


@functools.partial(jax.jit, static_argnames=("graphdef", "module"))
def run_forecast(
    arrays, slots, x_BLD, ctx, place_2, steer, offload, *, graphdef, module
):
    """Ask the router of a later block about the present residual stream.

    Source: the prefetch of HybriMoE, arXiv:2504.05897.

    Args:
      offload: `Context.offload` without any resident; the others are as in `run_block`.

    Returns:
      Flags float32[3, E] of the first round.
    """
    TRACED["forecast"] += 1
    block = _with_slots(graphdef, arrays, slots, module)
    ctx = _own_context(ctx, place_2, steer, offload).inside("ffn")
    _, aux = block.ffn(block.norm_ffn(x_BLD), ctx)
    return _flags(_rounds({"ffn": aux}, module))[0]


def _with_slots(graphdef, arrays, slots, module: str):
    """The module of a block, with slots in the place of its experts."""
    trees = []
    for item, tree in zip(("params", "state"), arrays, strict=True):
        own = {f"{module}/{name}": a for name, a in slots.get(item, {}).items()}
        trees.append(nested(flat_paths(tree) | own))
    return merged(graphdef, *trees)


def _own_context(ctx, place_2, steer, offload):
    return dataclasses.replace(
        ctx, layer=place_2[0], depth=place_2[1], steer=steer, offload=offload
    )


def _rounds(aux: dict, module: str) -> list[dict]:
    """Take out of an aux what each round of the experts told."""
    own = aux
    for name in module.split("/")[:-1]:
        own = own[name]
    told = own.pop("offload")
    return [told[str(t)] for t in range(len(told))] if "0" in told else [told]


def _flags(rounds: list[dict]):
    told = [[r["rows_E"], r["missing_E"], r["score_E"]] for r in rounds]
    return jnp.array(told, jnp.float32)


class Routed(NamedTuple):
    """The experts of a block."""

    module: str  # their path in the block
    layer: Layer
    place: int  # number of the layer in its pool
    slots: Slots

    def sizes(self, x_BLD) -> tuple[int, int, int]:
        """The rounds, the tokens and their width."""
        sparse = self.layer.site.sparse
        assert sparse is not None
        tokens = x_BLD.shape[0] * x_BLD.shape[1]
        return len(sparse.routers), tokens, sparse.width


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One block of the model as the executor runs it."""

    site: Site
    copy: int
    graphdef: Any
    arrays: tuple[dict, ...]  # params and state, without rows of experts
    place_2: jax.Array
    routed: Routed | None  # None: it is dense

    def steer(self, tree: dict | None) -> dict | None:
        """The block's part of `Context.steer`."""
        for name in self.site.path.split("/"):
            tree = None if tree is None else tree.get(name)
        return jax.tree.map(lambda a: a[self.copy], tree)
