"""Context-coherent expert parallelism: a token stays where its expert was.

Ordinary expert parallelism sends a token to the device of its expert and back, in every
layer. Here every device has the keys and values of all sequences, so that the next
layer can be computed wherever a token is: one all-to-all a layer, in which a row leaves
only if the next expert is on another device. After a step the new keys and values of
all layers go to all devices.

This is complete for one expert per token alone: the outputs of several experts on
several devices have to be added up somewhere, which is the way back again.

Source: ExFlow, arXiv:2401.08383; what is gathered, and when, is ours: its code has no
runtime.

B sequences, each with one new token · D model width · V vocabulary · P devices of the
`expert` axis · S sequences that a device has room for · C rows that one device sends to
another at most · E experts · M MoE layers · N new tokens
"""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from moex.config.base import ConfigError, require
from moex.model import decode
from moex.model.layers import sites
from moex.model.spec import merged, shardings
from moex.moe.layer import MoE, MoELayer
from moex.moe.parallel import local_sums
from moex.moe.routers.forced import Forced
from moex.moe.stored import to_stored
from moex.nn.context import Compute, Context
from moex.nn.contract import not_causal
from moex.nn.mlp import Dense


@dataclasses.dataclass(frozen=True)
class Room:
    """The sizes of the buffers of a device; what finds no room is computed again."""

    slots: int  # S
    per_pair: int  # C

    @classmethod
    def of(cls, batch: int, devices: int) -> "Room":
        """Room for twice the mean, which usually is enough."""
        slots = min(batch, 2 * -(-batch // devices))
        return cls(slots, min(slots, 2 * -(-slots // devices)))

    def grown(self, batch: int) -> "Room":
        """Room for twice as many; at last for all sequences, which always is enough."""
        return Room(min(batch, 2 * self.slots), min(batch, 2 * self.per_pair))


@dataclasses.dataclass(frozen=True)
class Decoded:
    """New tokens, and what they cost."""

    tokens: list[list[int]]  # of each sequence, without the one that it stopped at
    steps: int  # of decoding, after the prompt
    rows: int  # tokens that were decoded, in all of them
    # Rows that changed devices on their way into each MoE layer, of all steps; into the
    # first one they come from the last layer of the token before.
    moved: list[int]
    ordinary: list[
        int
    ]  # that leave home in ordinary expert parallelism; as many return
    gathered: int  # numbers that a token leaves on every device: keys, values, output
    reruns: int  # steps that were computed again with more room


def check(model, devices: int) -> None:
    """Check that a model can be decoded like this.

    Raises:
      ConfigError: naming the field, and why not.
    """
    require(model.adapter is None, "config.model.adapter", model.adapter, "None")
    if (where := not_causal(model)) is not None:
        raise ConfigError(f"{where}: reads later tokens; it cannot generate.")
    found = False
    for site in sites(model):
        if isinstance(site.ffn, Dense):
            continue
        kind = type(site.ffn).__name__
        allowed = "MoE or Dense: in others a token has more than one expert at a time"
        require(isinstance(site.ffn, MoE), site.where, kind, allowed)
        moe, where, found = site.ffn, f"{site.where}.router", True
        slots = moe.router.slots(moe.num_choices())
        told = (
            "1: with more, the outputs of a token's experts must be added up on one "
            "device, which is the second all-to-all again"
        )
        require(slots == 1, f"{where}: experts of a token", slots, told)
        by_place = isinstance(moe.router, Forced)
        require(not by_place, where, "Forced", "a router that looks at tokens")
        count = moe.num_stored()
        allowed = f"a divisor of the {count} experts of {site.where}"
        require(count % devices == 0, "config.mesh.expert", devices, allowed)
    if not found:
        raise ConfigError("config.model: has no MoE layer; nothing has to move.")


def generate(
    spec,
    model,
    params,
    state,
    prompts: list[list[int]],
    *,
    mesh,
    max_new_tokens: int,
    room: Room | None = None,
    sampling: tuple[float, int, float] = (0.0, 0, 1.0),
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    compute: Compute = Compute(),
) -> Decoded:
    """The continuation of each prompt: the tokens that `decode.generate` gives.

    Prompts are computed as always; it is the new tokens that stay where their experts
    are.

    Args:
      spec: `ModelSpec` of `model`.
      model: an `LM` config.
      params, state: arrays, placed by `shardings(spec, mesh)`.
      prompts: at least one prompt of at least one token.
      mesh: with devices on the axis `expert` alone.
      max_new_tokens: N.
      room: of the first steps; None: `Room.of`.
      sampling: temperature, top_k and top_p; the default takes the likeliest token.
      seed, stop_tokens, compute: as for `decode.generate`.

    Raises:
      ConfigError: if the model or the mesh cannot do this.
    """
    P, B = mesh.shape["expert"], len(prompts)
    others = {k: n for k, n in mesh.shape.items() if n > 1 and k != "expert"}
    require(
        not others and P > 1, "config.mesh", dict(mesh.shape), "expert alone above 1"
    )
    check(model, P)
    decode.check_request(model, prompts, max_new_tokens, compute.dtype, sampling)
    prompt_BP, num_padding_B = decode.padded_left(prompts)
    slots = prompt_BP.shape[1] + max_new_tokens - 1
    run = _Run(spec, mesh, compute, slots, sampling)
    room = room or Room.of(B, P)
    stop_K = decode.padded_stops(stop_tokens)
    key, home_B = jax.random.key(seed), jnp.arange(B, dtype=jnp.int32) * P // B
    stopped_B, rows, reruns = jnp.zeros(B, bool), 0, 0
    moved = ordinary = np.zeros(1, np.int64)
    columns: list[tuple[np.ndarray, np.ndarray]] = []
    with jax.set_mesh(mesh):
        cache = model.init_cache(B, slots, jnp.dtype(compute.dtype))
        logits_BV, cache = run.prompt(params, state, cache, prompt_BP, num_padding_B)
        for i in range(max_new_tokens):
            own = jax.random.fold_in(key, i)
            stopped_B, token_B1 = run.emitted(logits_BV, own, stopped_B, stop_K)
            columns.append((np.asarray(token_B1), ~np.asarray(stopped_B)))
            alive = int(columns[-1][1].sum())
            if i + 1 == max_new_tokens or not alive:
                break
            batch = (token_B1, prompt_BP.shape[1] + i, num_padding_B, stopped_B, home_B)
            while True:
                out = run.step(params, state, cache, batch, room)
                if not int(out.lost):
                    break
                room, reruns = room.grown(B), reruns + 1
            logits_BV, cache, home_B = out.logits_BV, out.cache, out.home_B
            moved = moved + np.asarray(out.moved_M)
            ordinary = ordinary + np.asarray(out.ordinary_M)
            rows += alive
    new_BN = np.concatenate([token_B1 for token_B1, _ in columns], axis=1)
    num_new_B = np.sum([there_B for _, there_B in columns], axis=0)
    kept = sum(math.prod(a.shape) for a in jax.tree.leaves(cache)) // (B * slots)
    return Decoded(
        tokens=[row[:n].tolist() for row, n in zip(new_BN, num_new_B, strict=True)],
        steps=len(columns) - 1,
        rows=rows,
        moved=moved.tolist(),
        ordinary=ordinary.tolist(),
        gathered=kept + model.dim,
        reruns=reruns,
    )


class Step(NamedTuple):
    """The results of one step."""

    logits_BV: jax.Array
    cache: Any
    home_B: jax.Array  # int32, the device where each sequence is
    moved_M: jax.Array  # int32, rows that changed devices
    ordinary_M: jax.Array  # int32, rows that would leave home and come back
    lost: jax.Array  # int32; above 0 the rest means nothing


class _Run:
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
    seq_S, lost = _first(home_B == me, jnp.arange(B, dtype=jnp.int32), room.slots)
    x_SD = model.embed(_rows(ctx, seq_S))[:, 0]
    there = _Residents(x_SD, seq_S, home_B, room, lost)
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
    placed = _to_sequences(B, there.seq_S)
    home_B = placed(jnp.full(there.seq_S.shape, me, jnp.int32))
    every = (placed(there.x_SD), new, home_B, jnp.stack(there.moved_M))
    # Exactly one device has each row, so that the sum is a gather.
    x_BD, new, home_B, moved_M, ordinary_M, lost = lax.psum(
        (*every, jnp.stack(there.ordinary_M), there.lost), "expert"
    )
    return x_BD, new, home_B, moved_M, ordinary_M, lost


def _first(is_B, value_B, size: int):
    """The pair (int32[size]: the values where `is_B`, then -1; how many do not fit)."""
    order_B = jnp.argsort(~is_B, stable=True)[:size]
    found_S = jnp.where(is_B[order_B], value_B[order_B], -1)
    return found_S, jnp.maximum(jnp.sum(is_B, dtype=jnp.int32) - size, 0)


def _to_sequences(B: int, seq_S):
    """A function that puts rows [S, ...] in the order of sequences; others are 0."""
    at_S = jnp.where(seq_S < 0, B, seq_S)

    def placed(rows):
        zeros = jnp.zeros((B, *rows.shape[1:]), rows.dtype)
        return zeros.at[at_S].set(rows, mode="drop")

    return placed


def _rows(ctx: Context, seq_S) -> Context:
    """The context of the sequences on this device; places without one are padding."""
    at_S = jnp.maximum(seq_S, 0)
    names = ("position_BL", "token_BL", "key_segment_BS", "key_position_BS")
    own = {name: getattr(ctx, name)[at_S] for name in names}
    own["segment_BL"] = jnp.where(seq_S[:, None] < 0, 0, ctx.segment_BL[at_S])
    return dataclasses.replace(ctx, **own)


class _Residents:
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
        own, at_S = _rows(ctx, self.seq_S), jnp.maximum(self.seq_S, 0)
        index = ctx.cache_index
        assert index is not None
        seen = jax.tree.map(lambda a: a[at_S], cache)
        x_S1D = self.x_SD[:, None]
        y_S1D, seen = block.attention(block.norm_attention(x_S1D), own, seen)
        new = jax.tree.map(
            lambda a: _to_sequences(self.batch, self.seq_S)(
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
        layer, own = block.ffn, _rows(ctx, self.seq_S)
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
        here = _rows(ctx, self.seq_S)
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
        row_S, over = _first(
            is_N, jnp.arange(len(all_NW), dtype=jnp.int32), self.room.slots
        )
        kept_SW = jnp.where(row_S[:, None] < 0, 0.0, all_NW[jnp.maximum(row_S, 0)])
        self.lost += over + jnp.sum(leaves_S & (rank_S >= C), dtype=jnp.int32)
        count = len(facts)
        self.seq_S = kept_SW[:, 0].astype(jnp.int32) - 1
        self.gate_S, self.told = kept_SW[:, 1], list(kept_SW[:, 2:count].T)
        self.x_SD = kept_SW[:, count:].astype(self.x_SD.dtype)
