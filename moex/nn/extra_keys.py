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


def add_extra_keys(y_BLHA, q_BLHA, keys_and_values, scale, ctx, cache):
    """Add what the heads of a layer find among extra keys to what they have found.

    Args:
      y_BLHA: output of the heads.
      q_BLHA: queries, as for the keys of the tokens.
      keys_and_values: `(x_BPD, ctx) -> (k_BPGA, v_BPGA)` of the layer, not rotated.
      scale: factor on the scores.
      ctx: `Context`.
      cache: that of the layer in decoding; None: there is none.

    Returns:
      (y_BLHA, cache). The first call of a generation puts the keys and values of the
      extra keys into the cache, and later ones take them from there.
    """
    for number, extra in enumerate(ctx.extra_keys or ()):
        at, name = ctx.depth - extra.first, f"extra_{number}"
        here = True if extra.everywhere else (at >= 0) & (at < len(extra.gate_YBH))

        def make(extra=extra, at=at):
            x_BPD = _of_layer(extra.x_YBPD, at).astype(q_BLHA.dtype)
            return keys_and_values(x_BPD, ctx)

        if cache is not None and name not in cache:
            cache = cache | {name: _where(here, make)}
        made = make if cache is None else functools.partial(cache.get, name)
        gate_BH = functools.partial(_of_layer, extra.gate_YBH, at)
        found = functools.partial(_found, q_BLHA, made, gate_BH, scale, y_BLHA.dtype)
        y_BLHA += _where(here, found)
    return y_BLHA, cache


def _where(here, function):
    """The result of a function, or zeros; it is computed only where it is needed."""
    if here is True:
        return function()
    shapes = jax.eval_shape(function)
    nothing = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype))
    return jax.lax.cond(here, function, lambda: nothing(shapes))


def _found(q_BLHA, made, gate_BH, scale, dtype):
    k_BPGA, v_BPGA = made()
    found_BLHA = _attend(q_BLHA, k_BPGA, v_BPGA, scale).astype(jnp.float32)
    return (gate_BH()[:, None, :, None] * found_BLHA).astype(dtype)


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
