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

The compiled step is in `coherent_step.py`, its part of one device in `residents.py`.

B sequences, each with one new token · V vocabulary · P devices of the `expert` axis, or
padded length of prompts · M MoE layers · N new tokens · K stop tokens
"""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from moex.config.base import ConfigError, require
from moex.model import decode
from moex.model.layers import sites
from moex.moe.layer import MoE
from moex.moe.routers.forced import Forced
from moex.nn.context import Compute
from moex.nn.contract import not_causal
from moex.nn.mlp import Dense
from moex.placement.coherent_step import Programs
from moex.placement.residents import Room


@dataclasses.dataclass(frozen=True)
class Decoded:
    """New tokens, and what they cost."""

    tokens: list[list[int]]  # of each sequence, without the one that it stopped at
    steps: int  # of decoding, after the prompt
    rows: int  # tokens that were decoded, in all of them
    # Rows that changed devices on their way into each MoE layer, of all steps; into the
    # first one they come from the last layer of the token before.
    moved: list[int]
    # Rows that leave home in ordinary expert parallelism; as many return.
    ordinary: list[int]
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
    B, N = len(prompts), max_new_tokens
    _check_mesh(mesh)
    check(model, mesh.shape["expert"])
    decode.check_request(model, prompts, N, compute.dtype, sampling)
    prompt_BP, num_padding_B = decode.padded_left(prompts)
    slots = prompt_BP.shape[1] + N - 1
    programs = Programs(spec, mesh, compute, slots, sampling)
    stop_K, key = decode.padded_stops(stop_tokens), jax.random.key(seed)
    stopped_B, columns = jnp.zeros(B, bool), []
    with jax.set_mesh(mesh):
        empty = model.init_cache(B, slots, jnp.dtype(compute.dtype))
        logits_BV, cache = programs.prompt(
            params, state, empty, prompt_BP, num_padding_B
        )
        writing = _Writing(programs, (params, state), cache, room, num_padding_B)
        for i in range(N):
            own = jax.random.fold_in(key, i)
            stopped_B, token_B1 = programs.emitted(logits_BV, own, stopped_B, stop_K)
            columns.append((np.asarray(token_B1), ~np.asarray(stopped_B)))
            if i + 1 == N or not columns[-1][1].any():
                break
            slot = prompt_BP.shape[1] + i
            logits_BV = writing.step(token_B1, slot, stopped_B)
    new_BN = np.concatenate([token_B1 for token_B1, _ in columns], axis=1)
    num_new_B = np.sum([there_B for _, there_B in columns], axis=0)
    kept = sum(math.prod(a.shape) for a in jax.tree.leaves(cache)) // (B * slots)
    return Decoded(
        tokens=[row[:n].tolist() for row, n in zip(new_BN, num_new_B, strict=True)],
        steps=len(columns) - 1,
        rows=writing.rows,
        moved=writing.moved_M.tolist(),
        ordinary=writing.ordinary_M.tolist(),
        gathered=kept + model.dim,
        reruns=writing.reruns,
    )


def _check_mesh(mesh) -> None:
    others = [n for axis, n in mesh.shape.items() if axis != "expert" and n > 1]
    alone = not others and mesh.shape["expert"] > 1
    require(alone, "config.mesh", dict(mesh.shape), "expert alone above 1")


class _Writing:
    """Sequences that are being written, and the rows that moved so far."""

    def __init__(self, programs: Programs, arrays, cache, room, num_padding_B):
        B, P = len(num_padding_B), programs.mesh.shape["expert"]
        self._programs, self._arrays, self._cache = programs, arrays, cache
        self._room, self._num_padding_B = room or Room.of(B, P), num_padding_B
        self._home_B = jnp.arange(B, dtype=jnp.int32) * P // B
        self.moved_M = self.ordinary_M = np.zeros(1, np.int64)
        self.rows = self.reruns = 0

    def step(self, token_B1, slot: int, stopped_B) -> jax.Array:
        """The logits [B, V] after the tokens that go to a slot of the cache."""
        batch = (token_B1, slot, self._num_padding_B, stopped_B, self._home_B)
        while True:
            out = self._programs.step(*self._arrays, self._cache, batch, self._room)
            if not int(out.lost):
                break
            self._room = self._room.grown(len(token_B1))
            self.reruns += 1
        self._cache, self._home_B = out.cache, out.home_B
        self.moved_M = self.moved_M + np.asarray(out.moved_M)
        self.ordinary_M = self.ordinary_M + np.asarray(out.ordinary_M)
        self.rows += int(np.sum(~np.asarray(stopped_B)))
        return out.logits_BV
