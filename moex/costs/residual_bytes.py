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
from moex.adapters.attach import attach
from moex.model.accounting import num_bytes
from moex.model.losses import moe_layers
from moex.model.paths import apart, together
from moex.model.spec import ModelSpec
from moex.nn.context import Context
from moex.nn.model import Model
from moex.nn.param import split_params
from moex.nn.stack import Segment
from moex.runs.program import compute_of

# Copies of an abstract segment: a large prime, so that no other dim is equal to it.
COPIES = 1_000_003


def block_activation_bytes(cfg, segment: Segment, place: int) -> float:
    """Bytes per token that one layer keeps from its forward to its backward pass.

    Args:
      cfg: run config, for the sequence length and how to compute.
      segment: where the layer is.
      place: which of its pattern it is; the others matter under recomputation, which
        keeps the input of a pattern and not those of the blocks inside it.
    """
    one = segment.pattern[place : place + 1]
    before = segment.pattern[max(place - 1, 0) : place]
    if cfg.remat == "none" or not before:
        return _pattern_bytes(cfg, segment, one)
    with_one = _pattern_bytes(cfg, segment, before + one)
    return with_one - _pattern_bytes(cfg, segment, before)


def _pattern_bytes(cfg, segment: Segment, pattern) -> float:
    """Bytes per token that one copy of a pattern keeps.

    Only arrays that scan stacks are counted: all copies share the others (masks, rotary
    angles). Batch sizes 1 and 2 tell activations from weights.
    """
    number = cfg.model.layers.index(segment)
    segment = dataclasses.replace(segment, pattern=tuple(pattern), repeat=1)
    make = functools.partial(_stack, cfg.model, segment, f"segments/{number}/")
    graphdef, params, state = split_params(nnx.eval_shape(make, graph=False))
    params, state = _copies(params), _copies(state)
    trained, frozen = nnx.split_state(params, _is_trained, ...)

    def residuals(trained, frozen, state, x_BLD, ctx):
        def run(trained, x_BLD):
            stack = nnx.merge(graphdef, trained, frozen, state)
            y_BLD, aux, _ = stack(x_BLD, ctx, None)
            return y_BLD, [layer["losses"] for _, layer in moe_layers(aux)]

        return jax.vjp(run, trained, x_BLD)[1]

    def kept(batch_size: int) -> int:
        make_context = functools.partial(_context, cfg)
        ctx = jax.eval_shape(make_context, *_batch_and_key(cfg, batch_size))
        shape = (batch_size, cfg.seq_len, cfg.model.dim)
        x_BLD = jax.ShapeDtypeStruct(shape, ctx.compute.dtype)
        found = jax.eval_shape(residuals, trained, frozen, state, x_BLD, ctx)
        stacked = [a for a in jax.tree.leaves(found) if a.shape[:1] == (COPIES,)]
        return num_bytes(stacked)

    return (kept(2) - kept(1)) / COPIES / cfg.seq_len


def _stack(model: Model, segment: Segment, path: str):
    """The module of one segment, with the adapters that the model has there."""
    rngs = nnx.Rngs(params=0)
    stack = segment.make(model.attention, model.dim, rngs, norm_eps=model.norm_eps)
    if model.adapter is not None:
        attach(stack, model.adapter, rngs, part=path)
    return stack


def _is_trained(_, variable) -> bool:
    return not variable.get_metadata().get("frozen", False)


def _copies(tree):
    """The abstract parameters of a segment with `COPIES` copies, from those of one."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((COPIES, *a.shape[1:]), a.dtype), tree
    )


def model_activation_bytes(cfg, spec: ModelSpec, sequences: int = 1) -> float:
    """Bytes per token that the whole training loss keeps for its backward pass.

    Args:
      sequences: rows of one batch; it is compared with a batch of twice as many.
    """
    loss = traced_loss(cfg, spec)

    def kept(batch_size):
        def residuals(params, *rest):
            trained, frozen = apart(params, spec.trained())

            def of_trained(trained):
                return loss(together(trained, frozen), *rest)[0]

            return jax.vjp(of_trained, trained)[1]

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
