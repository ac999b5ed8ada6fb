"""Bytes that the axes of a mesh carry in one optimizer step.

Bytes are those that one device receives. Which collectives there are follows from the
shardings: a parameter split over `fsdp` is gathered where it is used; a gradient is
summed over every axis that splits tokens and not the parameter; `moe/parallel.py` is
what moves tokens to experts.

In an axis of n devices an all-gather or a reduce-scatter of b bytes brings (n - 1) / n
of b to each, an all-reduce twice that.
"""

import dataclasses
import math

import jax.numpy as jnp

from moex.model.accounting import local_bytes
from moex.model.layers import sites
from moex.model.paths import flat_paths
from moex.model.precision import compute_dtype
from moex.moe.all_to_all import moves_all_to_all
from moex.plan.memory import local_shape
from moex.sharding import TOKEN_AXES, batch_shards
from moex.train.job import Training

# The id and gate of one slot, 4 bytes each, which travel with a row.
SLOT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one kind that one axis carries in one optimizer step."""

    axis: str
    what: str  # a description for people
    received: float  # bytes that one device receives
    exchange: bool = False  # each device's bytes are its own (all-to-all)
    seconds: float | None = None  # on the network of the axis; None: not known


def traffic(program: Training) -> list[Traffic]:
    """All traffic that is not 0 bytes. Call it under the topology's mesh."""
    rows = [*_weights(program), *_gradients(program), *_activations(program)]
    merged: dict[tuple, Traffic] = {}
    for row in [*rows, *_tokens_to_experts(program)]:
        key = (row.axis, row.what, row.exchange)
        before = merged[key].received if key in merged else 0.0
        merged[key] = dataclasses.replace(row, received=row.received + before)
    return [row for row in merged.values() if row.received > 0]


def _share(n: int) -> float:
    """The share that other devices send in a gather over an axis of n devices."""
    return (n - 1) / n


def _itemsize(program: Training) -> int:
    return jnp.dtype(compute_dtype(program.cfg)).itemsize


def local_tokens(program: Training) -> float:
    """Tokens of one device in one microbatch."""
    cfg, mesh = program.cfg, program.mesh
    sequences = cfg.batch_size // cfg.grad_accum / batch_shards(mesh)
    return sequences * cfg.seq_len / mesh.shape["seq"]


def _passes(program: Training) -> int:
    """How often a layer's weights are gathered, or its tokens sent, there and back."""
    return 3 if program.cfg.remat == "full" else 2


def _leaves(program: Training):
    """(whether it is trained, abstract array with its sharding, axes that split it)."""
    params, trained = program.abstract_state()["params"], program.spec.trained()
    for path, leaf in flat_paths(params).items():
        yield trained[path], leaf, {a for a in leaf.sharding.spec if a is not None}


def _weights(program: Training) -> list[Traffic]:
    """All-gathers of parameters in the compute dtype, reduce-scatters of gradients.

    Weights are gathered in the forward pass and in the backward pass, whose
    recomputation shares the gather.
    """
    n, times = program.mesh.shape["fsdp"], program.cfg.grad_accum
    gathered = scattered = 0.0
    for is_trained, leaf, axes in _leaves(program):
        if "fsdp" in axes:
            size = math.prod(local_shape(leaf)) * n * _itemsize(program)
            gathered += 2 * size
            scattered += size * is_trained
    return [
        Traffic("fsdp", "weights gathered", times * gathered * _share(n)),
        Traffic("fsdp", "gradients scattered", times * scattered * _share(n)),
    ]


def _gradients(program: Training) -> list[Traffic]:
    """All-reduces of gradients over the axes that split tokens and not the parameter.

    The nearest axes come first: what is scattered there travels less on the others.
    """
    shape, rows = program.mesh.shape, []
    for is_trained, leaf, axes in _leaves(program):
        size = local_bytes(leaf) * is_trained
        for axis in reversed(TOKEN_AXES):
            if axis in axes:
                continue
            n = shape[axis]
            received = 2 * program.cfg.grad_accum * size * _share(n)
            rows.append(Traffic(axis, "gradients summed", received))
            size /= n
    return rows


def _activations(program: Training) -> list[Traffic]:
    """Sums of tensor parallelism, and the keys and values that `seq` gathers.

    Tensor parallelism sums the outputs of attention and feed-forward, and in the
    backward pass the gradients of their inputs; recomputation sums the output of
    attention again. It also sums the look-up of tokens and the gradient of the logits'
    input.
    """
    cfg, mesh = program.cfg, program.mesh
    model, itemsize = cfg.model, _itemsize(program)
    tokens, times = local_tokens(program), cfg.grad_accum
    layers = model.num_layers()
    full = cfg.remat == "full"
    sums = (5 if full else 4) * layers + 2
    n = mesh.shape["tensor"]
    stream = tokens * model.dim * itemsize
    rows = [
        Traffic("tensor", "activations summed", times * sums * 2 * stream * _share(n))
    ]
    width = sum(
        site.repeat * site.attention.key_width(model.dim) for site in sites(model)
    )
    parts = mesh.shape["seq"]
    keys = tokens * parts * width / n * itemsize * _share(parts)
    rows.append(Traffic("seq", "keys and values", times * _passes(program) * keys))
    return rows


def _tokens_to_experts(program: Training) -> list[Traffic]:
    """Traffic of tokens to their experts and back, in every pass of every MoE layer."""
    rows = []
    for site in sites(program.cfg.model):
        if site.sparse is not None:
            passes = len(site.sparse.routers) * site.repeat * _passes(program)
            rows += _one_exchange(program, site.sparse.moe, site.sparse.width, passes)
    return rows


def _one_exchange(program: Training, moe, width, passes) -> list[Traffic]:
    mesh_cfg, n = program.cfg.mesh, program.mesh.shape["expert"]
    tokens, K = local_tokens(program), math.ceil(expected_slots(moe))
    buffer, itemsize = mesh_cfg.exchange_buffer, _itemsize(program)
    chosen = mesh_cfg.exchange
    if chosen == "auto":
        all_to_all = moves_all_to_all(n, int(tokens), K, buffer)
        chosen = "all_to_all" if all_to_all else "gather"
    passes *= program.cfg.grad_accum
    ids = SLOT_BYTES * K
    if chosen == "all_to_all":
        rows = tokens * mean_devices(moe, n) * _share(n)
        there, back = moe.experts.travel_widths(moe.num_stored(), width, K, n)
        received = rows * ((there + back) * itemsize + ids)
        return [Traffic("expert", "tokens to experts", passes * received, True)]
    received = tokens * (n - 1) * (2 * width * itemsize + ids)
    return [Traffic("expert", "tokens gathered", passes * received)]


def expected_slots(moe) -> float:
    """The expected slots of one token before training."""
    return moe.router.expected_slots(moe.num_choices())


def mean_devices(moe, n: int) -> float:
    """The mean number of devices that hold an expert of a token, if routing is even.

    A device holds none of a token's K distinct experts with the probability that all K
    are on other devices; with group-limited routing only experts of the groups kept
    count. Where experts share weights, slots are counted as drawn one by one.
    """
    E, K = moe.num_experts, expected_slots(moe)
    groups = moe.router.groups_kept()
    if int(K) != K or K > E or moe.stored_experts is not None:
        return n * (1 - (1 - 1 / n) ** K)
    if groups is None:
        return n * (1 - _none(E, E // n, int(K)))
    num, keep = groups
    size = E // num
    if n >= num:  # all experts of a device are in one group
        missed = _none(keep * size, E // n, int(K))
        return n * keep / num * (1 - missed)
    own = num // n  # groups of a device; j of them are kept
    missed = sum(
        math.comb(own, j)
        * math.comb(num - own, keep - j)
        / math.comb(num, keep)
        * _none(keep * size, j * size, int(K))
        for j in range(min(own, keep) + 1)
    )
    return n * (1 - missed)


def _none(total: int, own: int, drawn: int) -> float:
    """Probability that none of `drawn` of `total` is among `own`."""
    return math.comb(total - own, drawn) / math.comb(total, drawn)
