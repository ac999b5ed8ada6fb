"""Depth: `Segment(pattern, repeat)`. The only file that knows scan and remat.

A pattern is a tuple of feed-forward configs; `repeat` copies of it are built by vmap
over keys and run by one `lax.scan`, so that the program does not grow with depth. With
`scan_layers=False` they run one after the other. Write `repeat=1` segments where
nothing repeats.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.dense import computes_in_c
from kernels_pallas.device import on_a_mesh
from kernels_pallas.names import GROUPED_MATMUL, PRE_ACTIVATIONS
from moex.config.base import Config, require, require_choice
from moex.nn.block import RESIDUALS, Block
from moex.nn.context import fold_key
from moex.nn.contract import AttentionConfig, FeedForwardConfig, StackReader
from moex.nn.lowered import as_read
from moex.sharding import constrain


@dataclasses.dataclass(kw_only=True, slots=True)
class Segment(Config):
    """`repeat` copies of the blocks that `pattern` describes, in order."""

    pattern: tuple[
        FeedForwardConfig, ...
    ]  # one feed-forward config per block, at least one
    repeat: int = 1  # copies, >= 1
    residual: str = "prenorm"  # or "released", "both", "none": see `nn/block.py`
    attention: tuple[AttentionConfig, ...] | None = (
        None  # one per block, or the model's
    )

    def validate(self, path):
        require(len(self.pattern) >= 1, f"{path}.pattern", self.pattern, "not empty")
        require(self.repeat >= 1, f"{path}.repeat", self.repeat, "at least 1")
        for i, ffn in enumerate(self.pattern):
            ffn.validate_repeat(self.repeat, f"{path}.pattern[{i}]")
        require_choice(f"{path}.residual", self.residual, RESIDUALS)
        own = self.attention
        require(
            own is None or len(own) == len(self.pattern),
            f"{path}.attention",
            own,
            f"one attention for each of the {len(self.pattern)} blocks, or None",
        )

    def attentions(self, default) -> tuple[AttentionConfig, ...]:
        """The attention config of each block; `default` is the model's."""
        return self.attention or (default,) * len(self.pattern)

    def validate_dim(self, dim, path):
        """Check what depends on the model width."""
        for i, attention in enumerate(self.attention or ()):
            attention.validate_dim(dim, f"{path}.attention[{i}]")
        for i, ffn in enumerate(self.pattern):
            ffn.validate_dim(dim, f"{path}.pattern[{i}]")

    def make(self, attention, dim, rngs, *, norm_eps):
        """Make a `SegmentStack`; every parameter gets a leading `repeat` dim."""

        def make_one(key):
            return SegmentStack(self, attention, dim, key, norm_eps=norm_eps)

        return jax.vmap(make_one)(jax.random.split(rngs.params(), self.repeat))

    def init_cache(self, attention, dim, batch, length, dtype):
        """Make a decoding cache per place of the pattern, with leading dim `repeat`."""
        own = self.attentions(attention)
        one = [a.init_cache(dim, batch, length, dtype) for a in own]
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.repeat, *a.shape)), one)


class SegmentStack(nnx.Module):
    """The blocks of one segment, each parameter stacked [repeat, ...]."""

    def __init__(self, cfg, attention, dim, key, *, norm_eps):
        rngs = nnx.Rngs(params=key)
        options = {"norm_eps": norm_eps, "residual": cfg.residual}
        self.blocks = nnx.List(
            Block(ffn, own, dim, rngs, **options)
            for ffn, own in zip(cfg.pattern, cfg.attentions(attention), strict=True)
        )

    def __call__(self, x_BLD, ctx, cache):
        """Returns `(x_BLD, aux, cache)`; aux and cache stacked over [repeat]."""
        # A scan copies a layer's slice of every weight. That would be most of the work
        # for one token and few of many experts: decoding reads their weights in place.
        # A prompt uses most experts, but in C those of other layers cost nothing.
        few = x_BLD.shape[1] == 1 or computes_in_c(x_BLD.dtype, ctx.compute.kernels)
        in_place = ctx.mode == "decode" and few and not on_a_mesh()
        paths = stack_readers(self.blocks, ctx) if in_place else set()
        graphdef, stacked, blocks = nnx.split(  # type: ignore
            self.blocks, lambda path, _: _is_inside(path, paths), ..., graph=False
        )
        outer = dataclasses.replace(ctx, key=None, whole_stack=bool(paths))
        first = 0 if ctx.depth is None else ctx.depth

        def body(x_BLD, layer):
            blocks, block_caches, number, parts = layer
            aux, caches = {}, []
            told = {} if ctx.steer is None else {"peak": peak_of(x_BLD, ctx.valid_BL)}
            for i, block in enumerate(nnx.merge(graphdef, stacked, blocks)):
                block_cache = None if cache is None else block_caches[i]
                own = dataclasses.replace(
                    outer,
                    layer=number,
                    depth=first + number * len(blocks) + i,
                    key=fold_key(ctx.key, number * len(blocks) + i),
                    **parts,
                )
                x_BLD, aux[str(i)], new = block(x_BLD, own.inside(str(i)), block_cache)
                x_BLD = constrain(x_BLD, "batch", "length", None)
                caches.append(new)
            return x_BLD, (told | {"blocks": aux}, None if cache is None else caches)

        repeat = jax.tree.leaves(self.blocks)[0].shape[0]
        numbers = jnp.arange(repeat, dtype=jnp.int32)
        body = checkpointed(body, ctx.compute)
        inside = ctx.inside("blocks")
        parts = {"forced": inside.forced, "steer": inside.steer}
        layers = (blocks, cache, numbers, parts)
        if (
            ctx.compute.scan_layers
            and cache is not None
            and ctx.key_segment_BS is not None
        ):
            return _scanned_in_place(body, x_BLD, cache, layers, ctx.cache_index)
        if ctx.compute.scan_layers:
            x_BLD, (aux, cache) = jax.lax.scan(body, x_BLD, layers)
            return x_BLD, aux, cache
        # The scan's own `unroll` would still stack what the backward pass needs.
        outs = []
        for layer in _unstacked(layers, repeat):
            x_BLD, out = body(x_BLD, layer)
            outs.append(out)
        aux, cache = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        return x_BLD, aux, cache


def _scanned_in_place(body, x_BLD, cache, layers, index):
    """Scan over layers, and write the new keys alone into the stack of their caches.

    A cache that went through the scan as its input and its output would be copied as a
    whole, several times, for each token.

    Args:
      body: `(x_BLD, layer) -> (x_BLD, (aux, cache of the layer))`.
      x_BLD: tokens.
      cache: arrays [repeat, B, S, ...].
      layers: (blocks, cache, numbers, parts), what `body` takes, stacked.
      index: the slot that the keys of the first token are written to.

    Returns:
      (x_BLD, aux, cache).
    """
    blocks, _, numbers, parts = layers
    length = x_BLD.shape[1]

    def step(carry, layer):
        x_BLD, cache = carry
        blocks, number, parts = layer
        own = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), cache
        )
        x_BLD, (aux, own) = body(x_BLD, (blocks, own, number, parts))

        def write(whole, new):
            # Other parts of a cache, such as extra keys, have not changed.
            part = jax.lax.dynamic_slice_in_dim(new, index, length, axis=1)[None]
            start = (number, 0, index, *[0] * (whole.ndim - 3))
            return jax.lax.dynamic_update_slice(whole, part, start)

        return (x_BLD, jax.tree.map(write, cache, own)), aux

    (x_BLD, cache), aux = jax.lax.scan(step, (x_BLD, cache), (blocks, numbers, parts))
    return x_BLD, aux, cache


def peak_of(x_BLD, valid_BL):
    """The greatest absolute number of the valid tokens, float32; NaN if one is NaN.

    The barrier keeps it out of the computation of the model, whose bits stay the same.
    """
    x_BLD = jax.lax.optimization_barrier(x_BLD)
    size_BLD = jnp.abs(x_BLD.astype(jnp.float32))
    return jnp.max(jnp.where(valid_BL[..., None], size_BLD, 0.0))


def _unstacked(layers, repeat) -> list:
    """Split stacked arrays into those of each layer; the gradient concatenates once.

    The gradient of an index is padding of the whole size, once for each layer.
    """
    leaves, treedef = jax.tree.flatten(layers)
    parts = [
        [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, (1,) * repeat)]
        for leaf in leaves
    ]
    return [jax.tree.unflatten(treedef, own) for own in zip(*parts, strict=True)]


def _is_inside(path: tuple, parts: set[tuple]) -> bool:
    """Tell whether a variable is one of the parts, or belongs to one."""
    return any(path[:n] in parts for n in range(len(path) + 1))


def stack_readers(blocks, ctx) -> set[tuple]:
    """The paths of what can be read out of the whole stack: experts, what C reads."""
    modules = list(nnx.iter_modules(blocks, graph=False))
    found = {path for path, module in modules if isinstance(module, StackReader)}
    for path, module in modules:
        for name in getattr(module, "PROJECTED", ()):
            kept = name in getattr(module, "READ_WHOLE", ())
            weight = getattr(module, name)
            if weight is not None and not kept and as_read(weight, ctx) is not None:
                found.add((*path, name))
    return found


REMAT = ("none", "dots", "full")


def checkpointed(body, compute):
    """Put `body` under `jax.checkpoint` as `compute.remat` says: one of `REMAT`.

    Outside of a scan, barriers must keep XLA from sharing what is computed again.
    """
    if compute.remat == "none":
        return body
    policies = jax.checkpoint_policies
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(GROUPED_MATMUL, PRE_ACTIVATIONS),
    )
    return jax.checkpoint(
        body,
        prevent_cse=not compute.scan_layers,
        policy=dots if compute.remat == "dots" else None,
    )
