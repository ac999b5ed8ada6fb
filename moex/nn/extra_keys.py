"""Extra keys: states that attentions see besides the tokens, by a softmax of their own.

An adapter of a whole model makes them from its parameters, such as prompts, or from the
batch, such as the tokens of a vision encoder. They reach the layers in the `Context`,
and layers find theirs by depth, so a scan over layers stays one program.

B batch · L queries · P extra keys · Y layers that see them · D model width · H query
heads · G key/value heads · R = H / G · A head width
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraKeys:
    """States that some layers see, and how much each head takes from them.

    Attributes:
      x_YBPD: states; Y is 1 if all layers see the same, B is 1 if all sequences do.
      gate_YBH: float32 factor on what a head finds; B is 1 if all sequences have one.
      first: depth of the first of the Y layers, from 0.
      everywhere: all layers of the model see them.
    """

    x_YBPD: jax.Array
    gate_YBH: jax.Array
    first: int = dataclasses.field(metadata={"static": True})
    everywhere: bool = dataclasses.field(metadata={"static": True})


class KeysAdapter(nnx.Module):
    """An adapter of a whole model that gives its attentions extra keys."""

    @abc.abstractmethod
    def keys(self, ctx) -> ExtraKeys | None:
        """The extra keys of a batch, or None where it has none."""


def with_extra_keys(adapters, ctx):
    """The context of the layers, with the extra keys of the model's adapters."""
    makers = [a for a in adapters.values() if isinstance(a, KeysAdapter)]
    made = tuple(keys for keys in (a.keys(ctx) for a in makers) if keys is not None)
    return dataclasses.replace(ctx, extra_keys=made) if made else ctx


def add_extra_keys(y_BLHA, q_BLHA, keys_and_values, scale, ctx):
    """Add what the heads of a layer find among extra keys to what they have found.

    Args:
      y_BLHA: output of the heads.
      q_BLHA: queries, as for the keys of the tokens.
      keys_and_values: `(x_BPD, ctx) -> (k_BPGA, v_BPGA)` of the layer, not rotated.
      scale: factor on the scores.
      ctx: `Context`.
    """
    for extra in ctx.extra_keys or ():
        found = functools.partial(_found, extra, q_BLHA, keys_and_values, scale, ctx)
        if extra.everywhere:
            y_BLHA += found(y_BLHA)
            continue
        at = ctx.depth - extra.first
        here = (at >= 0) & (at < len(extra.gate_YBH))
        y_BLHA += jax.lax.cond(here, found, jnp.zeros_like, y_BLHA)
    return y_BLHA


def _found(extra, q_BLHA, keys_and_values, scale, ctx, like_BLHA):
    at = ctx.depth - extra.first
    x_BPD, gate_BH = (_of_layer(a, at) for a in (extra.x_YBPD, extra.gate_YBH))
    k, v = keys_and_values(x_BPD.astype(q_BLHA.dtype), ctx)
    found_BLHA = _attend(q_BLHA, k, v, scale).astype(jnp.float32)
    return (gate_BH[:, None, :, None] * found_BLHA).astype(like_BLHA.dtype)


def _of_layer(array, at):
    at = 0 if array.shape[0] == 1 else at
    return jax.lax.dynamic_index_in_dim(array, at, 0, keepdims=False)


def _attend(q_BLHA, k_BPGA, v_BPGA, scale):
    """softmax(q k^T scale) v, all keys seen; the softmax is computed in float32."""
    B, L, H, A = q_BLHA.shape
    G = k_BPGA.shape[2]
    q = (q_BLHA * scale).reshape(B, L, G, H // G, A)
    b = "b"
    if k_BPGA.shape[0] == 1:  # one product for all sequences
        b, k_BPGA, v_BPGA = "", k_BPGA[0], v_BPGA[0]
    f32 = jnp.float32
    score = jnp.einsum(f"blgra,{b}pga->bgrlp", q, k_BPGA, preferred_element_type=f32)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BPGA.dtype)
    y = jnp.einsum(f"bgrlp,{b}pga->blgra", weight, v_BPGA)
    return y.reshape(B, L, H, -1)
