"""The way of tokens to the devices of their experts, and back: all-to-all.

One row travels for each pair (token, device) that has a kept slot. The rows of a device
are sorted by the device that they go to; `Travel.there` sends them, and `Travel.back`
brings one row back for each of them, into the same places.

In one device of an expert axis of n: t tokens · K slots per token · N rows that leave ·
R rows that arrive · C rows of one pair of devices at most, padded ones included
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import make_plan
from kernels_pallas.device import platform
from kernels_pallas.permute import take
from kernels_pallas.plan import Layout
from moex.numbers import exact

# all_to_all is chosen if it moves less than this share of the rows that a gather moves:
# a gather needs no sort, no packing and no ids sent with the rows. We did not time it.
MOVES_LESS = 0.75


@dataclasses.dataclass(frozen=True)
class Travel:
    """The way of this device's rows to the devices of their experts, and back."""

    # `Layout` of the rows before they leave; the slot of a pair is the first of the
    # token on that device.
    layout: Layout
    device_N: jax.Array  # int32, where each row goes
    # there, back: rows [N, C] -> rows [R, C] received, and the other way round; each is
    # the other's transpose.
    there: Callable
    back: Callable
    # int32, kept slots of this device whose pair found no room.
    lost: jax.Array | int = 0


def plan_travel(device_tK, keep_tK, n, buffer) -> Travel:
    """The way of every (token, device) that holds a kept slot.

    Args:
      device_tK: int32 device of each slot's expert.
      keep_tK: bool.
      n: devices of the expert axis.
      buffer: `MeshConfig.exchange_buffer`.
    """
    t, K = device_tK.shape
    plan = make_plan(device_tK, device_pairs(device_tK, keep_tK), n)
    place = _ragged if platform() in RAGGED else _padded
    travel = place(plan, device_tK, n, rows_per_pair(n, t, K, buffer))
    if buffer is None:
        return travel
    same_tKK = device_tK[:, :, None] == device_tK[:, None, :]
    sent_tK = jnp.any(same_tKK & travel.layout.kept_TK[:, None, :], axis=2)
    lost = jnp.sum(keep_tK & ~sent_tK, dtype=jnp.int32)
    return dataclasses.replace(travel, lost=lost)


def device_pairs(device_tK, keep_tK):
    """Mark the first kept slot of each token on each device, bool[t, K]."""
    K = device_tK.shape[1]
    same_tKK = device_tK[:, :, None] == device_tK[:, None, :]
    before_KK = jnp.tril(jnp.ones((K, K), bool), -1)[None]
    return keep_tK & ~jnp.any(same_tKK & before_KK & keep_tK[:, None, :], axis=2)


# Platforms that compile `lax.ragged_all_to_all`; others pad the rows to equal parts.
RAGGED = ("gpu", "tpu")


def mean_frac(n: int, K: int) -> Fraction:
    """The share of tokens with a slot on one of n devices, if routing is even."""
    return 1 - Fraction(n - 1, n) ** K


def rows_per_pair(n: int, t: int, K: int, buffer: float | None) -> int:
    """The rows that a device has room for from each other device; at most t."""
    if buffer is None:
        return t
    return min(t, math.ceil(exact(buffer) * t * mean_frac(n, K)))


def moves_all_to_all(n: int, t: int, K: int, buffer: float | None) -> bool:
    """Whether "auto" chooses all-to-all for n devices with t tokens each."""
    if platform() in RAGGED:
        return mean_frac(n, K) < MOVES_LESS
    return rows_per_pair(n, t, K, buffer) < MOVES_LESS * t


def _padded(plan, device_tK, n, C) -> Travel:
    """Plan to send C rows to every device, whether they are used or not."""
    row_N = jnp.arange(n * C, dtype=jnp.int32)
    device_N, place_N = row_N // C, row_N % C
    real_N = place_N < take(plan.group_sizes_E, device_N)
    sorted_N = jnp.where(real_N, take(plan.bounds, device_N) + place_N, 0)
    to_tK = jnp.clip(device_tK, 0, n - 1)
    place_tK = plan.row_TK - take(plan.bounds, to_tK)
    kept_tK = plan.kept_TK & (place_tK < C)
    layout = Layout(
        order_N=take(plan.order_N, sorted_N),
        row_TK=to_tK * C + place_tK,
        kept_TK=kept_tK,
        real_N=real_N,
    )

    def swap(rows):
        parts = rows.reshape(n, C, -1)
        return lax.all_to_all(parts, "expert", 0, 0).reshape(n * C, -1)

    return Travel(layout, device_N, swap, swap)


def _ragged(plan, device_tK, n, C) -> Travel:
    """Plan to send only existing rows, into a buffer of n C rows at each device."""
    me = lax.axis_index("expert")
    N, R = min(plan.order_N.shape[0], n * plan.row_TK.shape[0]), n * C
    size_nn = lax.all_gather(plan.group_sizes_E, "expert")  # [from, to]
    arrive_nn = jnp.minimum(jnp.cumsum(size_nn, axis=0) - size_nn, R)
    leave_nn = jnp.cumsum(size_nn, axis=1) - size_nn
    sent_nn = jnp.minimum(size_nn, R - arrive_nn)
    # For the rows of each pair of devices: where they begin here and there, how many.
    to = (leave_nn[me], arrive_nn[me], sent_nn[me])
    come = (arrive_nn[:, me], leave_nn[:, me], sent_nn[:, me])
    there, back = _transposed_pair(
        lambda rows, to, come: _ragged_swap(rows, R, to, come),
        lambda rows, to, come: _ragged_swap(rows, N, come, to),
    )
    row_N = jnp.arange(N, dtype=jnp.int32)
    device_N = jnp.searchsorted(plan.bounds[1:], row_N, side="right").astype(jnp.int32)
    device_N = jnp.minimum(device_N, n - 1)
    place_N = row_N - take(plan.bounds, device_N)
    to_tK = jnp.clip(device_tK, 0, n - 1)
    place_tK = plan.row_TK - take(plan.bounds, to_tK)
    kept_tK = plan.kept_TK & (place_tK < take(sent_nn[me], to_tK))
    layout = Layout(
        order_N=plan.order_N[:N],
        row_TK=plan.row_TK,
        kept_TK=kept_tK,
        real_N=(row_N < plan.bounds[-1]) & (place_N < take(sent_nn[me], device_N)),
    )
    return Travel(
        layout,
        device_N,
        lambda rows: there(rows, to, come),
        lambda rows: back(rows, to, come),
    )


def _ragged_swap(rows, num_out, mine, theirs):
    """Send `sizes` rows from `begin` here to `begin_there`; unfilled rows are 0."""
    begin, begin_there, sizes = mine
    return lax.ragged_all_to_all(
        rows,
        jnp.zeros((num_out, rows.shape[1]), rows.dtype),
        begin,
        sizes,
        begin_there,
        theirs[2],
        axis_name="expert",
    )


def _transposed_pair(one, other):
    """Two linear functions (x, *indices) of which each is the other's transpose."""

    def made(forward, transpose):
        run = jax.custom_vjp(forward)
        run.defvjp(
            lambda x, *where: (run(x, *where), where),
            lambda where, dy: (transpose(dy, *where), *(None for _ in where)),
        )
        return run

    return made(one, other), made(other, one)
