"""Expert choice: every expert takes its best tokens of the batch.

T tokens · D model width · E experts · C slots per expert
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moex.config.base import caution, require
from moex.moe import steering
from moex.moe.contract import Router, RouterConfig
from moex.moe.routing import ExpertRouting, replayed
from moex.nn.param import param
from moex.numbers import exact


@dataclasses.dataclass(kw_only=True, slots=True)
class ExpertChoice(RouterConfig):
    """Each expert takes the tokens that want it most: perfect balance by design.

    Which tokens an expert takes depends on the whole batch, later tokens included: a
    causal model cannot be decoded like that, and its training loss is not a causal
    one.
    """

    k: float  # mean experts per token, above 0 and at most num_experts
    init_std: float = 0.02  # standard deviation of the initial router weights

    causal = False
    experts_choose = True
    takes_bans = reorders = True

    def validate(self, path):
        require(self.k > 0, f"{path}.k", self.k, "above 0")
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")
        caution(
            f"{path}: ExpertChoice reads later tokens of the batch; the loss of a "
            "causal model trained with it is too good, and it cannot generate."
        )

    def validate_experts(self, num_experts, path):
        require(
            self.k <= num_experts,
            f"{path}.k",
            self.k,
            f"at most num_experts = {num_experts}",
        )

    def expected_slots(self, num_experts) -> float:
        return self.k

    def split(self, parts):
        return dataclasses.replace(self, k=self.k * parts)

    def keep_experts(self, keep, num_experts):
        return dataclasses.replace(self, k=min(self.k, len(keep)))

    def make(self, dim, num_experts, rngs):
        return ExpertChoiceRouter(self, dim, num_experts, rngs)


class ExpertChoiceRouter(Router):
    """probs = softmax(x W) over experts; expert e takes its C most probable tokens.

    C = ceil(k T / E), at most T, where T counts tokens without padding. Gates are the
    probabilities, not normalised. Ties go to the first token.

    Parameters: w_DE [D, E].

    Source: Zhou et al. 2022, arXiv:2202.09368, section 3.2, with k for their capacity
    factor c.
    """

    PROJECTED = ("w_DE",)

    def __init__(self, cfg, dim, num_experts, rngs):
        self.k = cfg.k
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)

    def __call__(self, x_TD, ctx) -> ExpertRouting:
        if ctx.mode == "decode":
            raise ValueError(
                "ExpertChoice cannot decode: which tokens an expert takes depends on "
                "tokens that are not there yet."
            )
        logits_TE = self.logits(x_TD, ctx)
        probs_TE = jax.nn.softmax(logits_TE, axis=-1)
        live_TE = jax.nn.softmax(steering.allowed(logits_TE, ctx.steer), axis=-1)
        T, E = logits_TE.shape
        k = exact(self.k)
        C = min(math.ceil(k * T / E), T)
        valid_T = ctx.valid_BL.reshape(-1)
        wanted_TE = jnp.where(valid_T[:, None], jax.lax.stop_gradient(live_TE), -1.0)
        _, token_EC = jax.lax.top_k(wanted_TE.T, C)
        token_EC = token_EC.astype(jnp.int32)
        # Padding takes no share: an expert keeps ceil(k n / E) of its C slots.
        # Slot c is below k n / E if n, the number of real tokens, is above c E / k.
        most_C = [c * E * k.denominator // k.numerator for c in range(C)]
        in_share_C = jnp.sum(valid_T) > jnp.array(most_C, jnp.int32)
        keep_EC = valid_T[token_EC] & in_share_C[None]
        if steering.chooses(ctx.steer):
            keep_EC &= ~ctx.steer["ban_E"][:, None]
        token_EC, keep_EC = replayed(ctx, "token", token_EC, keep_EC)
        gate_EC = jnp.take_along_axis(live_TE.T, token_EC, axis=1)
        return ExpertRouting(
            token_EC=token_EC,
            gate_EC=jnp.where(keep_EC, gate_EC, 0.0),
            keep_EC=keep_EC,
            logits_TE=logits_TE,
            probs_TE=probs_TE,
        )
