"""Steered routers and layers against loops over tokens in float64.

T tokens · D model width · E experts
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.moe.steering import EPSILON
from moex.nn.mlp import Dense
from tests.helpers import XLA, context
from tests.moe import oracle

T, D, E = 24, 6, 8
V3 = Groups(num=4, keep=2, score="top2")
ROUTERS = {
    "softmax": TopK(k=2, init_std=1.0),
    "before": TopK(k=3, normalize="before", scale=2.5, init_std=1.0),
    "deepseek": TopK(k=2, score="sigmoid", bias_rate=0.1, groups=V3, init_std=1.0),
    "none": TopK(k=2, score="sqrt_softplus", normalize="none", init_std=1.0),
    "top-p": TopP(p=0.6, k_max=4, init_std=1.0),
    "soft": Soft(init_std=1.0),
}


def steer_of(scale=None, force=(), ban=(), experts=E):
    """`Context.steer` as one layer sees it."""
    scale_E = np.ones(experts, np.float32)
    for e, factor in (scale or {}).items():
        scale_E[e] = factor
    numbers = np.arange(experts)
    return {
        "scale_E": jnp.asarray(scale_E),
        "force_E": jnp.asarray(np.isin(numbers, force)),
        "ban_E": jnp.asarray(np.isin(numbers, ban)),
    }


def routed(cfg, steer, experts=E, keep=None):
    """(logits, bias, routing) of a router; with `keep` only these columns of it."""
    module = cfg.make(D, E, nnx.Rngs(params=0))
    rng = np.random.default_rng(1)
    bias_E = np.zeros(E)
    if getattr(module, "bias_E", None) is not None:
        bias_E = rng.normal(size=E).astype(np.float32) / 4
        module.bias_E.set_value(jnp.asarray(bias_E, jnp.float32))
    if keep is not None:
        module.w_DE.set_value(module.w_DE[...][:, np.array(keep)])
    x_TD = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    ctx = context(1, T, mode="eval", steer=steer, compute=XLA)
    return bias_E, module(x_TD, ctx)


def slow(cfg, logit_E, bias_E, force, ban) -> dict:
    """{expert: gate} of one token, as the definitions say."""
    kind = getattr(cfg, "score", "softmax")
    score_E, _ = oracle.scores(logit_E, kind)
    log_E = np.array(logit_E) if kind == "softmax" else np.log(score_E)
    top = max(value for e, value in enumerate(log_E) if e not in ban)
    for e in range(len(log_E)):
        log_E[e] = top + EPSILON if e in force else -np.inf if e in ban else log_E[e]
    prob_E = oracle.softmax(log_E)
    score_E = prob_E if kind == "softmax" else np.exp(log_E)
    if isinstance(cfg, Soft):
        return {e: p for e, p in enumerate(prob_E) if e not in ban}
    left = [e for e in range(len(log_E)) if e not in ban]
    if isinstance(cfg, TopP):
        chosen, mass = [], 0.0
        for e in oracle.best(prob_E, min(cfg.k_max, len(left))):
            if mass <= cfg.p or e in force:
                chosen.append(e)
            mass += prob_E[e]
        return {e: prob_E[e] for e in chosen}
    choice_E = {e: score_E[e] + bias_E[e] for e in left}
    allowed = left
    if cfg.groups is not None:
        size, kept = len(log_E) // cfg.groups.num, []
        for g in range(cfg.groups.num):
            own = sorted(choice_E[e] for e in left if e // size == g)
            kept.append(sum(own[-2:]) if own else -np.inf)
        groups = oracle.best(kept, cfg.groups.keep)
        allowed = [e for e in left if e // size in groups]
    order = sorted(set(allowed) | set(force), key=lambda e: (-choice_E[e], e))
    chosen = [e for e in sorted(force)] + [e for e in order if e not in force]
    gates = oracle.gates_of(score_E, prob_E, chosen[: cfg.k], cfg.normalize)
    return {e: cfg.scale * gate for e, gate in gates.items()}


CASES = {
    "nothing": {},
    "forced": {"force": (5,)},
    "two forced": {"force": (6, 1)},
    "banned": {"ban": (0, 2, 3)},
    "both": {"force": (7,), "ban": (0, 1, 6)},
    "one left": {"ban": (0, 1, 2, 3, 4, 5, 7)},
}


def thorough(*names):
    """Names as parameters whose tests tell little beside the others'."""
    return [pytest.param(name, marks=pytest.mark.thorough) for name in names]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "name", ["deepseek", "top-p", *thorough("softmax", "before", "none", "soft")]
)
def test_forced_and_banned_experts_are_those_of_the_definition(name, case):
    cfg, chosen = ROUTERS[name], {"force": (), "ban": ()} | CASES[case]
    if name == "soft" and chosen["force"]:
        pytest.skip("all experts are used")
    bias_E, routing = routed(cfg, steer_of(**chosen))
    logits_TE = np.float64(routing.logits_TE)
    for t in range(T):
        wanted = slow(cfg, logits_TE[t], bias_E, **chosen)
        row = (routing.expert_TK[t], routing.gate_TK[t], routing.keep_TK[t])
        got = {int(e): float(g) for e, g, keep in zip(*row, strict=True) if keep}
        assert sorted(got) == sorted(wanted), t
        for e, gate in wanted.items():
            np.testing.assert_allclose(got[e], gate, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["softmax", "top-p", *thorough("before", "none", "soft")]
)
@pytest.mark.parametrize("keep", [(0, 3, 4, 7), (5,)])
def test_a_mask_is_a_router_without_the_banned_experts(name, keep):
    """To rounding, where at least k are kept, and with k clipped to those that are."""
    ban = tuple(e for e in range(E) if e not in keep)
    cfg = ROUTERS[name]
    _, masked = routed(cfg, steer_of(ban=ban))
    fewer = {"k": min(cfg.k, len(keep))} if isinstance(cfg, TopK) else {}
    if isinstance(cfg, TopP):
        fewer = {"k_max": min(cfg.k_max, len(keep))}
    small = type(cfg)(**{f: getattr(cfg, f) for f in cfg.__slots__} | fewer)
    _, compact = routed(small, None, keep=keep)
    for t in range(T):
        found = []
        for routing, names in ((masked, range(E)), (compact, keep)):
            row = (routing.expert_TK[t], routing.gate_TK[t], routing.keep_TK[t])
            found.append({names[int(e)]: float(g) for e, g, k in zip(*row) if k})  # noqa: B905
        assert found[0].keys() == found[1].keys(), t
        for e, gate in found[1].items():
            np.testing.assert_allclose(found[0][e], gate, rtol=1e-5)


@pytest.mark.thorough
def test_banned_experts_choose_no_tokens():
    with pytest.warns(match="ExpertChoice"):
        cfg = ExpertChoice(k=2.0, init_std=1.0)
        cfg.validate("router")
    _, routing = routed(cfg, steer_of(scale={1: 3.0}, ban=(0, 4)))
    assert np.flatnonzero(~routing.keep_EC.any(axis=1)).tolist() == [0, 4]
    probs_TE = jax.nn.softmax(jnp.delete(routing.logits_TE, jnp.array([0, 4]), axis=1))
    np.testing.assert_allclose(
        routing.gate_EC[1], probs_TE[routing.token_EC[1], 0], rtol=1e-5
    )


def layer_of(cfg):
    module = cfg.make(D, nnx.Rngs(params=0))
    return module, nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize("name", ["deepseek", *thorough("softmax", "top-p")])
def test_gates_of_a_layer_are_scaled_after_normalisation(name):
    """And the shared expert is not; a factor of 0 leaves an expert out."""
    cfg = MoE(
        num_experts=E,
        router=ROUTERS[name],
        experts=Glu(hidden=5),
        shared=Dense(hidden=4),
    )
    module, params = layer_of(cfg)
    scale = {0: 0.0, 2: 4.0, 5: 0.5}
    x_BLD = jax.random.normal(jax.random.key(3), (2, 12, D))
    ctx = context(2, 12, mode="eval", compute=XLA, steer=steer_of(scale), num_padding=2)
    y_BLD, _ = module(x_BLD, ctx)
    x_TD, valid_T = (
        np.float64(x_BLD.reshape(T, D)),
        np.asarray(ctx.valid_BL).reshape(-1),
    )
    gates, *_ = oracle.route(
        cfg.router, x_TD, params["router"] | {"num_experts": E}, valid_T=valid_T
    )
    y_TD = oracle.shared(cfg, x_TD, params)
    weights = oracle.as_float64(params["experts"])
    for t, chosen in enumerate(gates):
        for e, gate in chosen.items():
            own = oracle.glu_expert(cfg.experts, x_TD[t], weights, e)
            y_TD[t] += scale.get(e, 1.0) * gate * own
    np.testing.assert_allclose(y_BLD.reshape(T, D), y_TD, rtol=1e-4, atol=1e-5)


def test_steering_that_was_not_passed_on_is_one_line():
    """By a module of a user, that holds a layer and does not know of steering."""
    module, _ = layer_of(MoE(num_experts=E, router=TopK(k=2), experts=Glu(hidden=5)))
    ctx = context(1, T, compute=XLA, steer={"inner": steer_of()})
    with pytest.raises(ConfigError, match=r"ctx\.inside\(NAME\)"):
        jax.eval_shape(lambda: module(jnp.zeros((1, T, D)), ctx))


@pytest.mark.thorough
def test_every_round_of_a_chain_is_scaled():
    moe = MoE(num_experts=E, router=ROUTERS["softmax"], experts=Glu(hidden=5))
    module, params = layer_of(Chain(moe=moe, iterations=2))
    scale = {e: float(e) for e in range(E)}
    x_BLD = jax.random.normal(jax.random.key(3), (1, T, D))
    ctx = context(1, T, mode="eval", compute=XLA, steer=steer_of(scale))
    y_BLD, _ = module(x_BLD, ctx)
    z_TD = start_TD = np.float64(x_BLD[0])
    weights = oracle.as_float64(params["experts"])
    for t in range(2):
        own = params["routers"][t] | {"num_experts": E}
        gates, *_ = oracle.route(moe.router, z_TD, own)
        z_TD = z_TD + [
            sum(
                scale[e] * gate * oracle.glu_expert(moe.experts, z_D, weights, e)
                for e, gate in chosen.items()
            )
            for z_D, chosen in zip(z_TD, gates, strict=True)
        ]
    np.testing.assert_allclose(y_BLD[0], z_TD - start_TD, rtol=1e-3, atol=1e-4)
