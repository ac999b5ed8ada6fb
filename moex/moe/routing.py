"""The contract between routers and everything after them.

T tokens · E experts (zero-computation ones included) · K slots per token · C slots per
expert · B batch · L length, T = B * L
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from moex.sharding import by_rows

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
NORMALIZE = ("after", "before", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision(abc.ABC):
    """The decision of a router: the base of its two layouts.

    Attributes:
      experts_choose: whether it is an `ExpertRouting`.
      logits_TE: float32 router logits, before normalisation and without noise.
      probs_TE: float32 normalised scores; each row sums to 1. The load-balance loss
        averages these.
      sums: arrays that the router's own state update needs besides the load, float32 or
        int32; they may be added over microbatches.
      losses: float32[T] by name, the router's own losses, differentiable: their means
        over the tokens of a step, times `RouterConfig.losses`, are part of the total
        loss. A loss of the whole batch is the same number for every token.
    """

    experts_choose: ClassVar[bool]

    logits_TE: jax.Array
    probs_TE: jax.Array
    sums: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @abc.abstractmethod
    def without_padding(self, valid_T) -> Self:
        """The same decision without slots of padding, where `valid_T` is False."""

    @abc.abstractmethod
    def loads(self, shape_BL, num_experts) -> tuple[jax.Array, jax.Array]:
        """The pair `(load_BE, real_T)`: slots per sequence and expert, and per token.

        Args:
          shape_BL: batch and length of the tokens.
          num_experts: experts that compute; only their slots count in `real_T`.
        """

    @abc.abstractmethod
    def most_slots(self) -> int:
        """The most slots that a token may have."""

    @abc.abstractmethod
    def trace(self) -> dict:
        """The arrays that a replay of this decision needs, and the gates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing(Decision):
    """The experts that each token goes to, with their weights. Always float32.

    Attributes:
      expert_TK: int32 in [0, E); the kept slots of a token name different experts.
      gate_TK: float32 weight of each slot; 0 where not kept.
      keep_TK: bool, whether the slot is used. K is static, so a router that chooses
        fewer experts for some tokens clears `keep`.
    """

    experts_choose = False

    expert_TK: jax.Array
    gate_TK: jax.Array
    keep_TK: jax.Array

    def keep_only(self, keep_TK) -> "Routing":
        """The same routing with only the slots that `keep_TK` also allows."""
        keep_TK = self.keep_TK & keep_TK
        gate_TK = jnp.where(keep_TK, self.gate_TK, 0.0)
        return dataclasses.replace(self, keep_TK=keep_TK, gate_TK=gate_TK)

    def without_padding(self, valid_T):
        return self.keep_only(valid_T[:, None])

    def loads(self, shape_BL, num_experts):
        B, E = shape_BL[0], self.probs_TE.shape[-1]
        # Comparing and summing fuses, needs no scatter, and stays on the device.
        expert_BSE = self.expert_TK.reshape(B, -1, 1) == jnp.arange(E)[None, None]
        kept_BSE = expert_BSE & self.keep_TK.reshape(B, -1, 1)
        real_TK = self.keep_TK & (self.expert_TK < num_experts)
        return (
            jnp.sum(kept_BSE, axis=1, dtype=jnp.float32),
            jnp.sum(real_TK, axis=-1, dtype=jnp.float32),
        )

    def most_slots(self):
        return self.expert_TK.shape[1]

    def trace(self):
        return {"expert": self.expert_TK, "gate": self.gate_TK, "keep": self.keep_TK}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRouting(Decision):
    """The tokens that each expert takes: the layout of routers in which experts choose.

    Attributes:
      token_EC: int32 in [0, T); the kept slots of an expert name different tokens.
      gate_EC, keep_EC: as in `Routing`. The router keeps no slot of padding.
    """

    experts_choose = True

    token_EC: jax.Array
    gate_EC: jax.Array
    keep_EC: jax.Array

    def without_padding(self, valid_T):
        return self

    def loads(self, shape_BL, num_experts):
        B, L = shape_BL
        T, E = self.probs_TE.shape
        keep_EC = self.keep_EC.astype(jnp.float32)
        expert_E1 = jnp.arange(E)[:, None]
        load_BE = jnp.zeros((B, E)).at[self.token_EC // L, expert_E1].add(keep_EC)
        real_EC = jnp.where(expert_E1 < num_experts, keep_EC, 0.0)
        return load_BE, jnp.zeros(T).at[self.token_EC].add(real_EC)

    def most_slots(self):
        return self.probs_TE.shape[1]

    def by_row(self) -> tuple[jax.Array, Routing]:
        """Return `(token_N, routing)`: every slot as its own token with one expert."""
        E, C = self.token_EC.shape
        expert_EC = jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[:, None], (E, C))
        rows = Routing(
            expert_TK=expert_EC.reshape(-1, 1),
            gate_TK=self.gate_EC.reshape(-1, 1),
            keep_TK=self.keep_EC.reshape(-1, 1),
            logits_TE=self.logits_TE,
            probs_TE=self.probs_TE,
        )
        return self.token_EC.reshape(-1), rows

    def by_token(self) -> Routing:
        """The same choices as slots of tokens: slot e of a token is for expert e."""
        T, E = self.logits_TE.shape
        at = (self.token_EC, jnp.arange(E)[:, None])
        gate_EC = jnp.where(self.keep_EC, self.gate_EC, 0.0)
        return Routing(
            expert_TK=jnp.broadcast_to(jnp.arange(E, dtype=jnp.int32)[None], (T, E)),
            gate_TK=jnp.zeros((T, E)).at[at].add(gate_EC),
            keep_TK=jnp.zeros((T, E), bool).at[at].max(self.keep_EC),
            logits_TE=self.logits_TE,
            probs_TE=self.probs_TE,
        )

    def trace(self):
        return {"token": self.token_EC, "gate": self.gate_EC, "keep": self.keep_EC}


def router_logits(x_TD, w_DE) -> jax.Array:
    """The logits, always float32[T, E]: routing decisions are discontinuous.

    The precision is the highest: a TPU otherwise multiplies float32 in bfloat16.
    """
    return jnp.dot(
        x_TD.astype(jnp.float32),
        w_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def top_k(value_TE, k) -> tuple[jax.Array, jax.Array]:
    """The k largest values of every row and their int32 places; ties to the first."""
    return by_rows(lambda rows: tuple(jax.lax.top_k(rows, k)), value_TE)


class Scores(NamedTuple):
    """Router scores of one kind, float32.

    Attributes:
      log_TE: their logarithms, up to a constant per token.
      score_TE: the scores; they select, and are the raw gates.
      probs_TE: scores that sum to 1 over the experts.
    """

    log_TE: jax.Array
    score_TE: jax.Array
    probs_TE: jax.Array

    @classmethod
    def of(cls, log_TE, score) -> "Scores":
        """The scores of one kind of `SCORES` with these logarithms."""
        probs_TE = jax.nn.softmax(log_TE, axis=-1)
        if score == "softmax":
            return cls(log_TE, probs_TE, probs_TE)
        return cls(log_TE, jnp.exp(log_TE), probs_TE)


def router_scores(logits_TE, score) -> Scores:
    """The `Scores` of one kind of `SCORES`.

    Normalised in log space: a quotient of scores needs a floor, and a router can push
    all of its sigmoids below any floor, where the balance loss vanishes
    (NVIDIA/Megatron-LM#1545) and the root of a softplus has no finite gradient.
    """
    if score == "softmax":
        log_TE = logits_TE
    elif score == "sigmoid":
        log_TE = jax.nn.log_sigmoid(logits_TE)
    else:
        low_TE = logits_TE < -20.0  # there softplus(x) = exp(x) in float32
        softplus_TE = jax.nn.softplus(jnp.where(low_TE, 0.0, logits_TE))
        log_TE = 0.5 * jnp.where(low_TE, logits_TE, jnp.log(softplus_TE))
    return Scores.of(log_TE, score)


def slot_gates(scores: Scores, expert_TK, keep_TK, normalize) -> jax.Array:
    """The gates of the chosen experts, float32[T, K]; 0 where not kept.

    Args:
      normalize: "after" selection (the gates of a token sum to 1), "before" it (the
        chosen entries of `probs_TE`), or "none" (the chosen entries of `score_TE`).
    """
    values_TE = {
        "after": scores.log_TE,
        "before": scores.probs_TE,
        "none": scores.score_TE,
    }[normalize]
    value_TK = jnp.take_along_axis(values_TE, expert_TK, axis=-1)
    if normalize == "after":
        return kept_softmax(value_TK, keep_TK)
    return jnp.where(keep_TK, value_TK, 0.0)


def kept_softmax(log_TK, keep_TK) -> jax.Array:
    """The softmax over the kept slots of each token; 0 for slots that are not kept."""
    kept_TK = jnp.where(keep_TK, log_TK, -jnp.inf)
    top_T1 = jax.lax.stop_gradient(jnp.max(kept_TK, axis=-1, keepdims=True))
    top_T1 = jnp.where(jnp.isfinite(top_T1), top_T1, 0.0)
    # Mask before the exponential too: where it overflows, no gradient is finite.
    exp_TK = jnp.exp(jnp.where(keep_TK, log_TK - top_T1, 0.0))
    exp_TK = jnp.where(keep_TK, exp_TK, 0.0)
    return exp_TK / jnp.maximum(jnp.sum(exp_TK, axis=-1, keepdims=True), 1e-20)


def replayed(ctx, name, ids, keep):
    """Replace `(ids, keep)` by the recorded ones of `ctx.forced`, if there are any.

    Gates are then made from live scores, so gradients reach the router.

    Args:
      ctx: `Context`.
      name: name of the ids in `trace()`, "expert" or "token".
      ids, keep: the choice that the router would make.

    Raises:
      ValueError: if it was recorded with another layout or other sizes.
    """
    if ctx.forced is None:
        return ids, keep
    shape = ctx.forced[name].shape if name in ctx.forced else None
    if shape != ids.shape:
        raise ValueError(
            f"a replayed assignment needs the {name} ids of this router, of shape "
            f"{ids.shape}; it was recorded with {shape}."
        )
    return ctx.forced[name], ctx.forced["keep"]
