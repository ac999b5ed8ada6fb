"""The contract between routers and everything after them.

T tokens · E experts · K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts each token goes to, and with what weight. Always float32.

    Attributes:
      expert_TK: int32 in [0, E); the kept slots of a token name different experts.
      gate_TK: float32 weight of each slot; 0 where not kept.
      keep_TK: bool, the slot is really used. K is static, so a router that chooses
        fewer experts for some tokens clears `keep`.
      logits_TE: float32 router logits, before normalisation.
      probs_TE: float32 normalised scores; each row sums to 1. The load-balance loss
        averages these.
    """

    expert_TK: jax.Array
    gate_TK: jax.Array
    keep_TK: jax.Array
    logits_TE: jax.Array
    probs_TE: jax.Array

    def keep_only(self, keep_TK) -> "Routing":
        """The same routing with only the slots that `keep_TK` also allows."""
        keep_TK = self.keep_TK & keep_TK
        gate_TK = jnp.where(keep_TK, self.gate_TK, 0.0)
        return dataclasses.replace(self, keep_TK=keep_TK, gate_TK=gate_TK)


def router_logits(x_TD, w_DE) -> jax.Array:
    """float32[T, E] whatever the dtype of x: routing decisions are discontinuous.

    Highest precision, because a TPU otherwise multiplies float32 in bfloat16.
    """
    return jnp.dot(
        x_TD.astype(jnp.float32),
        w_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def normalize_gates(gate_TK, keep_TK) -> jax.Array:
    """Gates scaled to sum to 1 over the kept slots of each token; none kept gives 0."""
    gate_TK = jnp.where(keep_TK, gate_TK, 0.0)
    total_T1 = jnp.sum(gate_TK, axis=-1, keepdims=True)
    # All gates can underflow to 0; the floor keeps the quotient finite then.
    return gate_TK / jnp.maximum(total_T1, 1e-20)
