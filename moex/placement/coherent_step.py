"""One decoding step in which tokens stay with their experts, as one program.

See `coherent.py`; `residents.py` is its part of one device.

B sequences, each with one new token · D model width · V vocabulary · L tokens of a row
· P padded length of prompts · S sequences that a device has room for · M MoE layers
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moex.model import decode
from moex.model.spec import merged, shardings
from moex.nn.context import Context
from moex.placement.residents import Residents, Room, first, own_rows, to_sequences


class Step(NamedTuple):
    """The results of one step."""

    logits_BV: jax.Array
    cache: Any
    home_B: jax.Array  # int32, the device where each sequence is
    moved_M: jax.Array  # int32, rows that changed devices
    ordinary_M: jax.Array  # int32, rows that would leave home and come back
    lost: jax.Array  # int32; above 0 the rest means nothing


class Programs:
    """The compiled programs of one call."""

    def __init__(self, spec, mesh, compute, slots, sampling):
        self.spec, self.mesh, self.slots = spec, mesh, slots
        self.compute = dataclasses.replace(compute, scan_layers=True)
        whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
        self.prompt = jax.jit(self._prompt, out_shardings=whole)
        self.emitted = jax.jit(
            lambda logits_BV, key, stopped_B, stop_K: decode.emitted(
                logits_BV, key, stopped_B, stop_K, sampling
            ),
            out_shardings=whole,
        )
        self.step = jax.jit(self._step, static_argnums=4, out_shardings=whole)

    def _context(self, token_BL, first_slot, num_padding_B, stopped_B) -> Context:
        how = (self.slots, num_padding_B, stopped_B, self.compute)
        return decode.context(token_BL, first_slot, *how)

    def _prompt(self, params, state, cache, prompt_BP, num_padding_B):
        stopped_B = jnp.zeros(len(prompt_BP), bool)
        ctx = self._context(prompt_BP, jnp.int32(0), num_padding_B, stopped_B)
        logits_BV, _, cache = self.spec.merge(params, state).decode(ctx, cache)
        return logits_BV, cache

    def _step(self, params, state, cache, batch, room: Room) -> Step:
        token_B1, slot, num_padding_B, stopped_B, home_B = batch
        ctx = self._context(token_B1, slot, num_padding_B, stopped_B)
        placed, whole = shardings(self.spec, self.mesh)[0], PartitionSpec()
        specs = jax.tree.map(lambda own: own.spec, placed)
        body = functools.partial(_body, self.spec.graphdef, room)
        x_BD, new, home_B, moved_M, ordinary_M, lost = jax.shard_map(
            body,
            in_specs=(specs, whole, whole, whole, whole),
            out_specs=whole,
            check_vma=False,
        )(params, state, cache, ctx, home_B)
        cache = jax.tree.map(
            lambda old, rows: lax.dynamic_update_slice_in_dim(
                old, rows.astype(old.dtype), slot, axis=2
            ),
            cache,
            new,
        )
        model = self.spec.merge(params, state)
        logits_BLV = model.outputs(model.norm(x_BD[:, None]), ctx)
        return Step(logits_BLV[:, 0], cache, home_B, moved_M, ordinary_M, lost)


def _body(graphdef, room: Room, params, state, cache, ctx, home_B):
    """One step on one device, from the embedding to the last layer.

    Returns:
      (x_BD, new rows of the cache, home_B, moved_M, ordinary_M, lost), all of them the
      same on every device.
    """
    B, me = len(home_B), lax.axis_index("expert")
    model = merged(graphdef, params, state)
    seq_S, lost = first(home_B == me, jnp.arange(B, dtype=jnp.int32), room.slots)
    x_SD = model.embed(own_rows(ctx, seq_S))[:, 0]
    there = Residents(x_SD, seq_S, home_B, room, lost)
    new: list = []
    for i, (segment, caches) in enumerate(zip(model.segments, cache, strict=True)):
        blocks = list(segment.blocks)
        found: list = [[] for _ in blocks]
        for r in range(jax.tree.leaves(caches)[0].shape[0]):
            for j, stacked in enumerate(blocks):
                block = jax.tree.map(lambda a, r=r: a[r], stacked)
                depth = model.first_blocks[i] + r * len(blocks) + j
                own = dataclasses.replace(ctx, layer=jnp.int32(r), depth=depth)
                rows = jax.tree.map(lambda a, r=r: a[r], caches[j])
                found[j].append(there.through(block, own, rows))
        new.append([jax.tree.map(lambda *a: jnp.stack(a), *own) for own in found])
    placed = to_sequences(B, there.seq_S)
    home_B = placed(jnp.full(there.seq_S.shape, me, jnp.int32))
    every = (placed(there.x_SD), new, home_B, jnp.stack(there.moved_M))
    # Exactly one device has each row, so that the sum is a gather.
    x_BD, new, home_B, moved_M, ordinary_M, lost = lax.psum(
        (*every, jnp.stack(there.ordinary_M), there.lost), "expert"
    )
    return x_BD, new, home_B, moved_M, ordinary_M, lost
