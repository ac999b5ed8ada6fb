"""The tokens on one device, on their way through layers: context-coherent parallelism.

A token moves to the device of its expert, and stays there; see `coherent.py`. All of
this runs on every device, inside of `jax.shard_map`.

B sequences, each with one new token · D model width · P devices of the `expert` axis ·
S sequences that a device has room for · C rows that one device sends to another at most
· E experts · G stored sets of weights · W numbers of a row that moves · N rows
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moex.config.base import require
from moex.moe.layer import MoELayer
from moex.moe.parallel import local_sums
from moex.moe.stored import to_stored
from moex.nn.context import Context


@dataclasses.dataclass(frozen=True)
class Room:
    """The sizes of the buffers of a device; what finds no room is computed again."""

    slots: int  # S
    per_pair: int  # C

    def __post_init__(self):
        for name in ("slots", "per_pair"):
            value = getattr(self, name)
            require(value >= 1, f"room.{name}", value, "1 or more")

    @classmethod
    def of(cls, batch: int, devices: int) -> "Room":
        """Room for twice the mean, which usually is enough."""
        slots = min(batch, 2 * -(-batch // devices))
        return cls(slots, min(slots, 2 * -(-slots // devices)))

    def grown(self, batch: int) -> "Room":
        """Room for twice as many; at last for all sequences, which always is enough."""
        return Room(min(batch, 2 * self.slots), min(batch, 2 * self.per_pair))


def first(is_B, value_B, size: int):
    """The pair (int32[size]: the values where `is_B`, then -1; how many do not fit)."""
    order_B = jnp.argsort(~is_B, stable=True)[:size]
    found_S = jnp.where(is_B[order_B], value_B[order_B], -1)
    return found_S, jnp.maximum(jnp.sum(is_B, dtype=jnp.int32) - size, 0)


def to_sequences(B: int, seq_S):
    """A function that puts rows [S, ...] in the order of sequences; others are 0."""
    at_S = jnp.where(seq_S < 0, B, seq_S)

    def placed(rows):
        zeros = jnp.zeros((B, *rows.shape[1:]), rows.dtype)
        return zeros.at[at_S].set(rows, mode="drop")

    return placed


def own_rows(ctx: Context, seq_S) -> Context:
    """The context of the sequences on this device; places without one are padding."""
    at_S = jnp.maximum(seq_S, 0)
    names = ("position_BL", "token_BL", "key_segment_BS", "key_position_BS")
    own = {name: getattr(ctx, name)[at_S] for name in names}
    own["segment_BL"] = jnp.where(seq_S[:, None] < 0, 0, ctx.segment_BL[at_S])
    return dataclasses.replace(ctx, **own)


class Residents:
    """The tokens on this device, on their way through the layers."""

    def __init__(self, x_SD, seq_S, home_B, room: Room, lost):
        self.x_SD, self.seq_S, self.room, self.lost = x_SD, seq_S, room, lost
        B, P = len(home_B), lax.axis_size("expert")
        self.batch = B
        self.home_B = jnp.arange(B, dtype=jnp.int32) * P // B  # if they never moved
        self.moved_M: list = []
        self.ordinary_M: list = []

    def through(self, block, ctx: Context, cache: dict) -> dict:
        """Go through a block; the new rows of its cache, [B, 1, ...]."""
        own, at_S = own_rows(ctx, self.seq_S), jnp.maximum(self.seq_S, 0)
        index = ctx.cache_index
        assert index is not None
        seen = jax.tree.map(lambda a: a[at_S], cache)
        x_S1D = self.x_SD[:, None]
        y_S1D, seen = block.attention(block.norm_attention(x_S1D), own, seen)
        new = jax.tree.map(
            lambda a: to_sequences(self.batch, self.seq_S)(
                lax.dynamic_slice_in_dim(a, index, 1, axis=1)
            ),
            seen,
        )
        self.x_SD = (x_S1D + y_S1D)[:, 0]
        if isinstance(block.ffn, MoELayer):
            self._through_experts(block, ctx)
        else:
            h_S1D = self.x_SD[:, None]
            z_S1D = block.norm_ffn(h_S1D)
            y_S1D, _ = block.ffn(z_S1D, own)
            self.x_SD = block.added(h_S1D, z_S1D, y_S1D)[:, 0]
        return new

    def _through_experts(self, block, ctx: Context) -> None:
        layer, own = block.ffn, own_rows(ctx, self.seq_S)
        E, G = layer.num_experts, layer.num_stored
        per_device = G // lax.axis_size("expert")
        routing = layer.router(block.norm_ffn(self.x_SD[:, None])[:, 0], own)
        routing = routing.without_padding(own.valid_BL.reshape(-1))
        stored = routing
        if layer.stored_E is not None:
            stored = to_stored(routing, layer.stored_E[...], G)
        expert_S, gate_S = routing.expert_TK[:, 0], routing.gate_TK[:, 0]
        keep_S, set_S = routing.keep_TK[:, 0], stored.expert_TK[:, 0]
        real_S = keep_S & (expert_S < E)
        me = lax.axis_index("expert")
        told = (expert_S + 1, set_S, keep_S, real_S)
        self._travel(jnp.where(real_S, set_S // per_device, me), told, gate_S)
        expert_S, set_S, keep_S, real_S = (a.astype(jnp.int32) for a in self.told)
        keep_S1, gate_S1 = (keep_S > 0)[:, None], self.gate_S[:, None]
        z_SD = block.norm_ffn(self.x_SD[:, None])[:, 0]
        here = own_rows(ctx, self.seq_S)
        alone = Context.of(
            z_SD[:, None],
            mode="decode",
            compute=ctx.compute,
            first_expert=me * per_device,
        )
        slots = (set_S[:, None] - me * per_device, gate_S1, (real_S > 0)[:, None])
        y_SD = local_sums(layer.experts.sums, z_SD, slots, per_device, alone)
        if layer.zero is not None:
            gate_S1 = jnp.where(keep_S1, gate_S1, 0.0)
            y_SD += layer.zero(z_SD, expert_S[:, None] - 1, gate_S1, E)
        if layer.shared is not None:
            y_SD += layer.shared_output(z_SD[:, None], here)[:, 0]
        self.x_SD = block.added(self.x_SD, z_SD, y_SD)

    def _travel(self, to_S, told, gate_S) -> None:
        """Move to other devices: the one all-to-all of a layer."""
        P, C, me = lax.axis_size("expert"), self.room.per_pair, lax.axis_index("expert")
        there_S = self.seq_S >= 0
        leaves_S = there_S & (to_S != me)
        home_S = self.home_B[jnp.maximum(self.seq_S, 0)]
        self.moved_M.append(jnp.sum(leaves_S, dtype=jnp.int32))
        self.ordinary_M.append(jnp.sum(there_S & (to_S != home_S), dtype=jnp.int32))
        # Whole numbers below 2**24 are exact in float32; 0 in the first is no row.
        facts = [self.seq_S + 1, gate_S, *told]
        rows_SW = jnp.concatenate(
            [
                jnp.stack([f.astype(jnp.float32) for f in facts], axis=1),
                self.x_SD.astype(jnp.float32),
            ],
            axis=1,
        )
        goes_SP = leaves_S[:, None] & (to_S[:, None] == jnp.arange(P)[None])
        rank_S = jnp.sum(jnp.where(goes_SP, jnp.cumsum(goes_SP, axis=0) - 1, 0), axis=1)
        at_S = jnp.where(leaves_S & (rank_S < C), to_S * C + rank_S, P * C)
        sent = jnp.zeros((P * C, rows_SW.shape[1])).at[at_S].set(rows_SW, mode="drop")
        came = lax.all_to_all(sent.reshape(P, C, -1), "expert", 0, 0)
        stay_SW = jnp.where((there_S & ~leaves_S)[:, None], rows_SW, 0.0)
        all_NW = jnp.concatenate([stay_SW, came.reshape(P * C, -1)])
        is_N = all_NW[:, 0] > 0
        row_S, over = first(
            is_N, jnp.arange(len(all_NW), dtype=jnp.int32), self.room.slots
        )
        kept_SW = jnp.where(row_S[:, None] < 0, 0.0, all_NW[jnp.maximum(row_S, 0)])
        self.lost += over + jnp.sum(leaves_S & (rank_S >= C), dtype=jnp.int32)
        count = len(facts)
        self.seq_S = kept_SW[:, 0].astype(jnp.int32) - 1
        self.gate_S, self.told = kept_SW[:, 1], list(kept_SW[:, 2:count].T)
        self.x_SD = kept_SW[:, count:].astype(self.x_SD.dtype)
