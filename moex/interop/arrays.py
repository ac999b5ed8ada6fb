"""Tensors of a folder as parts of stacked, sharded arrays, and back, a slice at a time.

Nothing here holds more than one device's part of one parameter: a shard asks for the
slices of the tensors that it consists of, and a tensor for the slices of the shards
that it lies in.
"""

import collections
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from moex.interop.names import Piece

Ranges = Sequence[tuple[int, int]]


def load_array(shape, dtype, sharding, pieces: Sequence[Piece], folder) -> jax.Array:
    """Read one of our arrays, each shard on the device where it goes.

    Args:
      shape, dtype: those of the whole array.
      sharding: where its parts go.
      pieces: all pieces that it consists of.
      folder: the `Folder`.
    """

    def part(ranges) -> np.ndarray:
        out = np.empty([stop - start for start, stop in ranges], dtype)
        for piece in pieces:
            window = _window(piece, ranges)
            if window is not None:
                here, inside = window
                values = read_part(piece, inside, folder)
                if piece.factor != 1.0:
                    values = values.astype(np.float32) * piece.factor
                out[here] = values
        return out

    # `make_array_from_callback` would build the parts of all devices before it moves
    # one. Here devices that hold the same part are grouped, so that it is built once.
    places = sharding.addressable_devices_indices_map(shape)
    devices_of = collections.defaultdict(list)
    for device, index in places.items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices_of[ranges].append(device)
    arrays = {}
    for ranges, devices in devices_of.items():
        values = part(ranges)
        for device in devices:
            arrays[device] = jax.device_put(values, device)
        jax.block_until_ready([arrays[device] for device in devices])
        del values
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [arrays[device] for device in places]
    )


def _window(piece: Piece, ranges: Ranges):
    """(index into the shard, ranges of the piece as ours has it), or None if outside.

    Args:
      piece: a piece of the array.
      ranges: (start, stop) of the shard in each dim of the array.
    """
    here: list[int | slice] = []
    inside: list[tuple[int, int]] = []
    for at, (start, stop) in zip(piece.index, ranges, strict=True):
        if isinstance(at, slice):
            here.append(slice(None))
            inside.append((start, stop))
        elif start <= at < stop:
            here.append(at - start)
        else:
            return None
    return tuple(here), inside


def read_part(piece: Piece, ranges: Ranges, folder) -> np.ndarray:
    """Read a part of a tensor, with its dims in our order.

    Args:
      piece: the tensor as a `Piece`.
      ranges: (start, stop) in each dim of the piece as ours has it.
      folder: the `Folder`.
    """
    wanted = [(0, 0)] * len(piece.split)
    for ours, theirs in enumerate(piece.order):
        wanted[theirs] = ranges[ours]
    # Where the folder joins dims to one, reading cuts only the outermost of them.
    index, shape, rest, at = [], [], [], 0
    for sizes in piece.joined:
        lead = next((j for j, size in enumerate(sizes) if size > 1), 0)
        start, stop = wanted[at + lead]
        inner = math.prod(sizes[lead + 1 :])
        index.append(slice(start * inner, stop * inner))
        for j, size in enumerate(sizes):
            shape.append(stop - start if j == lead else size)
            rest.append(slice(None) if j == lead else slice(*wanted[at + j]))
        at += len(sizes)
    values = folder[piece.name].read(tuple(index))
    return values.reshape(shape)[tuple(rest)].transpose(piece.order)


def tensor_of(piece: Piece, array: jax.Array, dtype) -> np.ndarray:
    """Make a tensor of a folder from the shards that hold it.

    Args:
      piece: the tensor as a `Piece`.
      array: ours, all of it on devices of this process.
      dtype: type of the tensor.
    """
    sizes = [piece.split[i] for i in piece.order]
    out = np.empty(sizes, array.dtype)
    done = set()
    for shard in array.addressable_shards:
        ranges = [
            s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)
        ]
        window = _window(piece, ranges)
        if window is None or tuple(ranges) in done:
            continue
        done.add(tuple(ranges))
        here, inside = window
        starts = [at if isinstance(at, int) else 0 for at in here]
        lengths = [
            1 if isinstance(at, int) else stop - start
            for at, (start, stop) in zip(here, ranges, strict=True)
        ]
        part = np.asarray(_take(shard.data, starts, tuple(lengths)))
        own = [stop - start for start, stop in inside]
        out[tuple(slice(*r) for r in inside)] = part.reshape(own)
    values = out.transpose(np.argsort(piece.order)).reshape(piece.shape)
    if piece.factor != 1.0:
        values = values / np.float32(piece.factor)
    return np.ascontiguousarray(values).astype(dtype)


@functools.partial(jax.jit, static_argnums=2)
def _take(array, starts, lengths):
    return jax.lax.dynamic_slice(array, starts, lengths)
