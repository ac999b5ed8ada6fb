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
import jax.numpy as jnp
from flax import nnx

from moex.accounting import num_bytes
from moex.nn.context import Context
from moex.nn.lm import LM
from moex.nn.stack import Segment
from moex.train.job import static_options
from moex.train.losses import lm_loss, make_context, moe_layers
from moex.train.state import ModelSpec


def block_activation_bytes(cfg, segment: Segment, place: int) -> float:
    """Bytes per token that one layer keeps from its forward to its backward pass.

    The layer is scanned once and twice, at batch sizes 1 and 2: the second difference
    leaves out weights, and what all layers share (masks, rotary angles).
    """
    one = dataclasses.replace(segment, pattern=(segment.pattern[place],))

    def kept(repeat, batch):
        stack = dataclasses.replace(one, repeat=repeat)
        return _segment_bytes(cfg, stack, batch)

    growth = kept(2, 2) - kept(2, 1) - kept(1, 2) + kept(1, 1)
    # A checkpointed pattern keeps its input, not those of the blocks inside it.
    inner = place > 0 and cfg.remat != "none"
    options = static_options(cfg, train=True)
    own_input = cfg.model.dim * jnp.dtype(options["dtype"]).itemsize if inner else 0
    return growth / cfg.seq_len - own_input


def _segment_bytes(cfg, segment: Segment, batch: int) -> int:
    model: LM = cfg.model

    def residuals(x_BLD, key, ctx):
        stack = segment.make(
            model.attention, model.dim, nnx.Rngs(params=key), norm_eps=model.norm_eps
        )
        graphdef, params, state = nnx.split(stack, nnx.Param, ...)  # type: ignore

        def run(params, x_BLD):
            y_BLD, aux, _ = nnx.merge(graphdef, params, state)(x_BLD, ctx, None)
            return y_BLD, [layer["losses"] for _, layer in moe_layers(aux)]

        return jax.vjp(run, params, x_BLD)[1]

    ctx = _abstract_context(cfg, _abstract_batch(batch, cfg.seq_len))
    x_BLD = jax.ShapeDtypeStruct((batch, cfg.seq_len, model.dim), ctx.compute_dtype)
    return num_bytes(jax.eval_shape(residuals, x_BLD, _abstract_key(), ctx))


def model_activation_bytes(cfg, spec: ModelSpec) -> float:
    """Bytes per token that the whole training loss keeps for its backward pass."""

    def kept(batch_size):
        def residuals(params, state, batch, key):
            ctx = make_context(batch, key=key, **static_options(cfg, train=True))

            def loss(params):
                return lm_loss(
                    spec.merge(params, state),
                    ctx,
                    batch,
                    cfg.loss,
                    num_tokens=jnp.float32(1),
                    num_microbatches=1,
                    num_domains=1,
                )[0]

            return jax.vjp(loss, params)[1]

        batch = _abstract_batch(batch_size, cfg.seq_len)
        args = (spec.params, spec.state, batch, _abstract_key())
        return num_bytes(jax.eval_shape(residuals, *args))

    return (kept(2) - kept(1)) / cfg.seq_len


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _abstract_context(cfg, batch) -> Context:
    options = static_options(cfg, train=True)
    make = functools.partial(make_context, **options)
    return jax.eval_shape(make, batch, key=_abstract_key())


def _abstract_batch(batch_size: int, seq_len: int) -> dict:
    """The shapes of a batch of the data pipeline."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    names = ("tokens", "targets", "segment", "position", "num_bytes")
    batch = {name: array(jnp.int32, seq_len) for name in names}
    return batch | {
        "loss_mask": array(jnp.float32, seq_len),
        "domain": array(jnp.int32),
        "example_id": array(jnp.int32),
    }
