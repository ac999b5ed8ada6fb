"""Hash routing: a token's experts follow from its id, and nothing is learned.

T tokens · E experts · K slots per token
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moex.config.base import ABSENT, ConfigError, require
from moex.moe.contract import FixedK, Router
from moex.moe.routing import Routing, replayed, top_k


@dataclasses.dataclass(kw_only=True, slots=True)
class Hash(FixedK):
    """Each token id has k fixed experts, with equal gates."""

    needs_token_ids: ClassVar[bool] = True

    seed: int = 0  # seed of the hash
    # False: layers of one seed hash alike, as in runs from before this field existed.
    by_layer: bool = dataclasses.field(default=True, metadata={ABSENT: False})

    def validate(self, path):
        FixedK.validate(self, path)
        require(0 <= self.seed < 2**31, f"{path}.seed", self.seed, "in [0, 2**31)")

    def make(self, dim, num_experts, rngs):
        return HashRouter(self, num_experts)


class HashRouter(Router):
    """The k experts with the largest hash of (token id, expert); gates are 1/k.

    Every block of the model and every round of a chain hashes with a seed of its own,
    which follows from `seed`, the number of the block and that of the round. No
    parameters. Logits are 0, and probs are 1/k at the chosen experts, so that load and
    entropy mean the same as for other routers; the router z-loss is a constant.

    Source: Roller et al. 2021, arXiv:2106.04426 (random hash; theirs has k = 1).
    """

    def __init__(self, cfg, num_experts):
        self.k, self.seed, self.by_layer = cfg.k, cfg.seed, cfg.by_layer
        self.num_experts = num_experts

    def __call__(self, x_TD, ctx) -> Routing:
        T, E, k = x_TD.shape[0], self.num_experts, self.k
        if ctx.token_BL is None:
            raise ConfigError(
                "Hash: chooses by token id, and the batch has none (Context.token_BL)."
            )
        token_T = ctx.token_BL.reshape(-1)
        if self.by_layer:
            depth = 0 if ctx.depth is None else ctx.depth
            seed = own_seed(self.seed, depth, ctx.chain_round)
        else:
            seed = self.seed + ctx.chain_round
        expert_TK = hashed_experts(token_T, E, k, seed)
        expert_TK, keep_TK = replayed(ctx, "expert", expert_TK, jnp.ones((T, k), bool))
        here_TKE = expert_TK[:, :, None] == jnp.arange(E)[None, None]
        chosen_TKE = here_TKE & keep_TK[:, :, None]
        return Routing(
            expert_TK=expert_TK,
            gate_TK=jnp.where(keep_TK, 1.0 / k, 0.0),
            keep_TK=keep_TK,
            logits_TE=jnp.zeros((T, E), jnp.float32),
            probs_TE=jnp.sum(chosen_TKE, axis=1, dtype=jnp.float32) / k,
        )


def hashed_experts(token_T, num_experts, k, seed=0) -> jax.Array:
    """Hash each token id to k different experts, int32[T, k], uniformly."""
    expert_1E = jnp.arange(num_experts, dtype=jnp.uint32)[None]
    salt = mixed(jnp.uint32(seed))
    token_T1 = mixed(token_T.astype(jnp.uint32)[:, None] ^ salt)
    # 24 bits are exact in float32, which top_k handles well on every platform.
    value_TE = mixed(token_T1 + expert_1E * jnp.uint32(0x9E3779B9)) >> 8
    return top_k(value_TE.astype(jnp.float32), k)[1].astype(jnp.int32)


def own_seed(seed, depth, chain_round) -> jax.Array:
    """The uint32 seed of one round of one block."""
    own = mixed(jnp.uint32(seed) ^ jnp.uint32(0x9E3779B9))
    own = mixed(own + jnp.asarray(depth).astype(jnp.uint32))
    return mixed(own + jnp.uint32(chain_round))


def mixed(h):
    """Map uint32 one to one, so that every input bit moves every output bit.

    Source: the finalizer of MurmurHash3 (Appleby, public domain).
    """
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
