"""Bytes that training keeps from the forward pass to the backward pass.

They are the residuals of JAX's own differentiation of the code that trains, taken
abstractly: no array is made. XLA may keep less, where it fuses or drops, and needs more
for a while inside each layer. What is kept depends on the platform, whose kernels and
attention are those that would run here.

B batch · L length · D model width
"""

import dataclasses
import functools

import jax
from flax import nnx

from kernels_pallas.device import platform
from moex.model.accounting import num_bytes
from moex.model.layers import Site
from moex.model.losses import moe_layers
from moex.model.paths import of_trained
from moex.model.spec import ModelSpec
from moex.nn.context import Context
from moex.nn.extra_keys import with_extra_keys
from moex.runs.program import compute_of

# Copies of an abstract segment: a large prime, so that no other dim is equal to it.
COPIES = 1_000_003
# The parameters after the layers begin so.
HEAD = ("norm/", "w_logits", "w_out", "adapters/w_logits", "adapters/w_out")


def block_activation_bytes(cfg, spec: ModelSpec, site: Site) -> float:
    """Bytes per token that one layer keeps from its forward to its backward pass.

    Args:
      cfg: run config, for the sequence length and how to compute.
      spec: that of its model.
      site: where the layer is; the layer before it in the pattern matters under
        recomputation, which keeps the input of a pattern and not those of the blocks
        inside it.
    """
    one = (site.place,)
    before = tuple(range(max(site.place - 1, 0), site.place))
    if cfg.remat == "none" or not before:
        return _pattern_bytes(cfg, spec, site.segment, one)
    with_one = _pattern_bytes(cfg, spec, site.segment, before + one)
    return with_one - _pattern_bytes(cfg, spec, site.segment, before)


def _pattern_bytes(cfg, spec: ModelSpec, segment: int, places) -> float:
    """Bytes per token that one copy of a part of a segment's pattern keeps.

    Only arrays that scan stacks are counted: all copies share the others (masks, rotary
    angles). Batch sizes 1 and 2 tell activations from weights.

    Args:
      cfg, spec: as for `block_activation_bytes`.
      segment: number of the segment in the model.
      places: the numbers of the blocks in its pattern, in order.
    """
    params, state = (_copies(tree, segment) for tree in (spec.params, spec.state))

    def residuals(params, state, x_BLD, ctx):
        def run(params, x_BLD):
            model = spec.merge(params, state)
            stack = model.segments[segment]
            stack.blocks = nnx.List(stack.blocks[i] for i in places)
            own = with_extra_keys(model.adapters, ctx)
            y_BLD, aux, _ = stack(x_BLD, own, None)
            return y_BLD, [layer["losses"] for _, layer in moe_layers(aux)]

        own, trained = of_trained(run, params, spec.trained())
        if needs_gradient(spec, segment):
            return jax.vjp(own, trained, x_BLD)[1]
        return jax.vjp(lambda trained: own(trained, x_BLD), trained)[1]

    def kept(batch_size: int) -> int:
        make_context = functools.partial(_context, cfg)
        ctx = jax.eval_shape(make_context, *_batch_and_key(cfg, batch_size))
        shape = (batch_size, cfg.seq_len, cfg.model.dim)
        x_BLD = jax.ShapeDtypeStruct(shape, ctx.compute.dtype)
        found = jax.eval_shape(residuals, params, state, x_BLD, ctx)
        stacked = [a for a in jax.tree.leaves(found) if a.shape[:1] == (COPIES,)]
        return num_bytes(stacked)

    return (kept(2) - kept(1)) / COPIES / cfg.seq_len


def needs_gradient(spec: ModelSpec, segment: int) -> bool:
    """Whether anything is trained in a segment or before it."""
    for name, is_trained in spec.trained().items():
        before = not name.startswith(HEAD)
        if name.startswith("segments/"):
            before = int(name.split("/")[1]) <= segment
        if is_trained and before:
            return True
    return False


def _copies(tree: dict, segment: int) -> dict:
    """The abstract arrays of a model, where a segment has `COPIES` copies."""
    of_segments = tree.get("segments", {})
    more = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((COPIES, *a.shape[1:]), a.dtype),
        of_segments.get(str(segment), {}),
    )
    return tree | {"segments": of_segments | {str(segment): more}}


def model_activation_bytes(cfg, spec: ModelSpec, sequences: int = 1) -> float:
    """Bytes per token that the whole training loss keeps for its backward pass.

    Args:
      sequences: rows of one batch; it is compared with a batch of twice as many.
    """
    loss = traced_loss(cfg, spec)

    def kept(batch_size):
        def residuals(params, *rest):
            own, trained = of_trained(loss, params, spec.trained())
            return jax.vjp(lambda trained: own(trained, *rest)[0], trained)[1]

        return num_bytes(jax.eval_shape(residuals, *loss_args(cfg, spec, batch_size)))

    grown = kept(2 * sequences) - kept(sequences)
    return grown / sequences / cfg.seq_len


def traced_loss(cfg, spec: ModelSpec):
    """Make `(params, state, batch, key) -> (loss, sums)` of training, to be traced."""

    def loss(params, state, batch, key):
        ctx = _context(cfg, batch, key)
        model = spec.merge(params, state)
        return cfg.task.loss(model, ctx, batch, cfg.loss, num_domains=1)

    return loss


def loss_args(cfg, spec: ModelSpec, batch_size: int) -> tuple:
    """The abstract arguments of `traced_loss`."""
    return spec.params, spec.state, *_batch_and_key(cfg, batch_size)


def _batch_and_key(cfg, batch_size: int) -> tuple:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return cfg.task.batch_shapes(cfg, batch_size), key


def _context(cfg, batch, key) -> Context:
    """The context of training, also for devices that are not there.

    JAX traces cuDNN's attention only where cuDNN is. Attention in blocks is traced in
    its place: it keeps the same arrays, no scores.
    """
    compute = compute_of(cfg, train=True)
    if platform() == "gpu" and jax.default_backend() == "cpu":
        compute = dataclasses.replace(compute, attention="blocks")
    return cfg.task.context(batch, key=key, compute=compute)
