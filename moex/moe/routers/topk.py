"""Top-k routing, plain or limited to the best groups of experts.

T tokens · D model width · E experts · K slots per token · G groups of experts
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moex.config.base import Config, caution, require, require_choice
from moex.config.schedule import Schedule, is_always_zero, require_values
from moex.moe import steering
from moex.moe.balance import BIAS_RULES, bias_rule
from moex.moe.contract import FixedK, Router
from moex.moe.quantile import SPAN, margin_counts
from moex.moe.routing import (
    NORMALIZE,
    SCORES,
    Routing,
    replayed,
    router_scores,
    slot_gates,
    top_k,
)
from moex.nn.param import RouterState, param

GROUP_SCORES = ("max", "top2")


@dataclasses.dataclass(kw_only=True, slots=True)
class Groups(Config):
    """Group-limited selection: experts are chosen from each token's best groups.

    With one group per node a token's rows travel to at most `keep` nodes.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.2.2 (`score="max"`); DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2 (`score="top2"`: the sum of a group's best two).
    """

    num: int  # groups of equal size, neighbours together; divides the experts
    keep: int  # groups that a token may use, 1 <= keep <= num
    score: str = "max"  # score of a group: "max" of its experts, or sum of its "top2"

    def validate(self, path):
        require(self.num >= 1, f"{path}.num", self.num, "at least 1")
        require(
            1 <= self.keep <= self.num,
            f"{path}.keep",
            self.keep,
            f"in [1, num = {self.num}]",
        )
        require_choice(f"{path}.score", self.score, GROUP_SCORES)

    def validate_experts(self, num_experts, k, path):
        """Check what depends on the number of experts and of slots."""
        require(
            num_experts % self.num == 0,
            f"{path}.num",
            self.num,
            f"a divisor of num_experts = {num_experts}; groups have equal size",
        )
        size = num_experts // self.num
        require(
            k <= self.keep * size,
            f"{path}.keep",
            self.keep,
            f"enough groups for k = {k}: a group has {size} experts",
        )
        require(
            self.score != "top2" or size >= 2,
            f"{path}.score",
            self.score,
            "'max' for groups of one expert",
        )


@dataclasses.dataclass(kw_only=True, slots=True)
class TopK(FixedK):
    """Each token goes to its k best experts."""

    takes_bans = takes_forces = reorders = True

    score: str = "softmax"  # "softmax", "sigmoid" or "sqrt_softplus" of the logits
    normalize: str = "after"  # gates sum to 1 "after" or "before" selection, or "none"
    scale: float = 1.0  # factor on the gates, after normalisation, > 0
    groups: Groups | None = None  # choose from each token's best groups only
    bias_rate: float | Schedule = 0.0  # rate of the loss-free bias; 0: no bias
    bias_rule: str = "sign"  # "sign": rate is the step; "quantile": published with 1
    jitter: float = 0.0  # training: inputs times a uniform of [1 - jitter, 1 + jitter]
    noise: float = 0.0  # training: standard deviation of noise on the logits
    init_std: float = 0.02  # standard deviation of the initial router weights
    logit_bias: bool = False  # a learned bias of the logits (GPT-OSS)

    def validate(self, path):
        FixedK.validate(self, path)
        require_choice(f"{path}.score", self.score, SCORES)
        require_choice(f"{path}.normalize", self.normalize, NORMALIZE)
        if self.k == 1 and self.normalize == "after":
            caution(
                f"{path}.normalize = 'after': with k = 1 every gate is 1, and the loss "
                "of the task has no gradient to the router; use 'none'."
            )
        require(self.scale > 0, f"{path}.scale", self.scale, "above 0")
        rate_path = f"{path}.bias_rate"
        require_values(lambda v: v >= 0, rate_path, self.bias_rate, ">= 0")
        require_choice(f"{path}.bias_rule", self.bias_rule, BIAS_RULES)
        if self.bias_rule == "quantile":
            self._validate_quantile(path)
        require(0 <= self.jitter < 1, f"{path}.jitter", self.jitter, "in [0, 1)")
        require(self.noise >= 0, f"{path}.noise", self.noise, ">= 0")
        require(self.init_std >= 0, f"{path}.init_std", self.init_std, ">= 0")

    def _validate_quantile(self, path):
        rate_path = f"{path}.bias_rate"
        allowed = "at most 1, with which the quantile rule goes all of the way"
        require_values(lambda v: v <= 1, rate_path, self.bias_rate, allowed)
        if is_always_zero(self.bias_rate):
            caution(
                f"{rate_path} = 0: there is no bias, whatever the bias_rule; set 1.0 "
                "for quantile balancing."
            )

    def validate_experts(self, num_experts, path):
        FixedK.validate_experts(self, num_experts, path)
        if self.groups is not None:
            self.groups.validate_experts(num_experts, self.k, f"{path}.groups")

    def keep_experts(self, keep, num_experts):
        k = min(self.k, len(keep))
        if self.groups is not None:
            num = self.groups.num
            counts = np.bincount(np.array(keep) * num // num_experts, minlength=num)
            if len(set(counts)) > 1 or (self.groups.score == "top2" and counts[0] < 2):
                least = 2 if self.groups.score == "top2" else 1
                raise ValueError(
                    f"its {num} groups keep {counts.tolist()} experts: each must keep "
                    f"as many, at least {least}."
                )
            k = min(k, self.groups.keep * int(counts[0]))
        return dataclasses.replace(self, k=k)

    def groups_kept(self):
        return self.groups and (self.groups.num, self.groups.keep)

    def make(self, dim, num_experts, rngs):
        return TopKRouter(self, dim, num_experts, rngs)


class TopKRouter(Router):
    """scores = f(x W); the k highest (scores + bias) are chosen.

    The bias, if there is one, only selects: gates are the scores without it, and no
    gradient reaches it. Ties go to the lowest expert. Noise moves selection and gates
    of training steps; the reported logits are without it. Quantile balancing takes no
    account of groups (nor does the published rule): it balances less well with them.

    Parameters: w_DE [D, E]; with `logit_bias` bias_logits_E [E]; bias_E float32 [E],
    state that the train step moves.

    Source: Shazeer et al. 2017, arXiv:1701.06538 (top-k gating; theirs normalises
    "after" selection and has learned noise); jitter: Fedus et al. 2021,
    arXiv:2101.03961; bias: Wang et al. 2024, arXiv:2408.15664.
    """

    PROJECTED = ("w_DE",)

    def __init__(self, cfg, dim, num_experts, rngs):
        self.k = cfg.k
        self.score = cfg.score
        self.normalize = cfg.normalize
        self.scale = cfg.scale
        self.jitter, self.noise = cfg.jitter, cfg.noise
        groups = cfg.groups
        self.groups = groups and (groups.num, groups.keep, groups.score)
        # With k = E there is nothing to balance, and no (k+1)-th best.
        by_quantile = cfg.bias_rule == "quantile" and cfg.k < num_experts
        self.span = SPAN[cfg.score] if by_quantile else None
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=cfg.init_std)
        self.bias_logits_E: nnx.Param | None = (
            param(rngs, (num_experts,), (None,), value=0.0) if cfg.logit_bias else None
        )
        # Assign once: nnx fixes at the first time whether an attribute holds arrays.
        self.bias_E: RouterState | None = (
            None
            if is_always_zero(cfg.bias_rate)
            else RouterState(
                jnp.zeros(num_experts, jnp.float32),
                axes=(None,),
                rule=bias_rule(cfg.bias_rule, cfg.bias_rate, cfg.k, cfg.score),
            )
        )

    def __call__(self, x_TD, ctx) -> Routing:
        logits_TE = self._logits(x_TD, ctx)
        scores = live = router_scores(logits_TE, self.score)
        noisy = self._noisy(x_TD, logits_TE, ctx)
        if noisy is not None:
            live = router_scores(noisy, self.score)
        live = steering.steered_scores(live, self.score, ctx.steer)
        choice_TE = jax.lax.stop_gradient(live.score_TE)
        if self.bias_E is not None:
            choice_TE = choice_TE + self.bias_E[...][None]
        allowed_TE = steering.allowed(choice_TE, ctx.steer)
        if self.groups is not None:
            allowed_TE = limit_to_groups(allowed_TE, *self.groups)
        _, expert_TK = top_k(steering.forced_first(allowed_TE, ctx.steer), self.k)
        keep_TK = steering.kept(jnp.ones(expert_TK.shape, bool), expert_TK, ctx.steer)
        expert_TK, keep_TK = replayed(
            ctx, "expert", expert_TK.astype(jnp.int32), keep_TK
        )
        gate_TK = slot_gates(live, expert_TK, keep_TK, self.normalize)
        return Routing(
            expert_TK=expert_TK,
            gate_TK=gate_TK * self.scale,
            keep_TK=keep_TK,
            logits_TE=logits_TE,
            probs_TE=scores.probs_TE,
            sums=self._margins(choice_TE, live.score_TE, ctx),
        )

    def _logits(self, x_TD, ctx):
        logits_TE = self.logits(x_TD, ctx)
        if self.bias_logits_E is not None:
            logits_TE += self.bias_logits_E[...][None]
        return logits_TE

    def _noisy(self, x_TD, logits_TE, ctx):
        """The logits with jitter and noise, or None where there is neither."""
        if ctx.key is None or (self.jitter == 0 and self.noise == 0):
            return None
        for_jitter, for_noise = jax.random.split(ctx.key)
        if self.jitter > 0:
            x_TD = x_TD.astype(jnp.float32)
            x_TD *= jax.random.uniform(
                for_jitter, x_TD.shape, minval=1 - self.jitter, maxval=1 + self.jitter
            )
            logits_TE = self._logits(x_TD, ctx)
        if self.noise > 0:
            noise_TE = jax.random.normal(for_noise, logits_TE.shape)
            logits_TE = logits_TE + self.noise * noise_TE
        return logits_TE

    def _margins(self, choice_TE, score_TE, ctx) -> dict:
        """The counts that `QuantileBias` needs; none where nothing is trained."""
        if self.bias_E is None or self.span is None or ctx.mode != "train":
            return {}
        best_TK, _ = top_k(choice_TE, self.k + 1)
        valid_T = ctx.valid_BL.reshape(-1)
        count_EB = margin_counts(
            best_TK[:, -1], score_TE, valid_T, self.bias_E[...], self.span
        )
        return {"margin_EB": count_EB}


def limit_to_groups(choice_TE, num_groups, keep, score):
    """Set `choice_TE` to -inf outside of each token's `keep` best groups."""
    T, E = choice_TE.shape
    by_group_TGE = choice_TE.reshape(T, num_groups, E // num_groups)
    best, _ = top_k(by_group_TGE, 2 if score == "top2" else 1)
    # A group whose experts are all banned comes last, and one with a single expert left
    # is not all banned.
    some = jnp.isfinite(best)
    best = jnp.where(some, best, jnp.where(some[..., :1], 0.0, -jnp.inf))
    _, group_TJ = top_k(jnp.sum(best, axis=-1), keep)
    kept_TG = jnp.any(
        group_TJ[:, :, None] == jnp.arange(num_groups)[None, None], axis=1
    )
    return jnp.where(kept_TG[:, :, None], by_group_TGE, -jnp.inf).reshape(T, E)
