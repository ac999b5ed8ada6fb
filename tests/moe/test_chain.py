"""Chains and narrow layers against a loop over rounds and tokens.

B batch · L length · T = B * L tokens · D model width · C rounds
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.zero import Zero
from moex.moe.layer import MoE
from moex.moe.narrow import Narrow
from moex.moe.replay import recorded
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.block import RESIDUALS, Block
from moex.nn.mlp import Dense
from tests.helpers import XLA, context, split_module
from tests.marks import thorough_but_for
from tests.moe import oracle
from tests.moe.test_layer import flat, nested
from tests.tolerances import assert_close

D, SHAPE, PADDING = 5, (2, 5), 1
LOSSES = ("load_balance", "sequence_balance", "router_z", "entropy", "importance")


def moe(router, shared=True, **fields):
    defaults = {"num_experts": 4, "experts": Glu(hidden=3)}
    shared = Dense(hidden=3) if shared else None
    return MoE(router=router, shared=shared, **defaults | fields)


# The released models route without renormalised gates: core.md 1a.
RAW = TopK(k=2, normalize="none", init_std=0.7)
CHAINS = {
    "C = 1": Chain(moe=moe(RAW), iterations=1),
    "C = 2": Chain(moe=moe(RAW), iterations=2),
    "C = 3, no shared expert": Chain(moe=moe(RAW, shared=False), iterations=3),
    "C = 2, shared router": Chain(moe=moe(RAW), iterations=2, routers="shared"),
    "C = 2, no inner residual": Chain(moe=moe(RAW), iterations=2, inner_residual=False),
    "C = 2, shared expert once": Chain(moe=moe(RAW), iterations=2, shared_once=True),
    "C = 2, own k and kind per round": Chain(
        moe=moe(RAW, zero=Zero(copy=1, constant=1), shared_gate=True),
        iterations=2,
        routers=(
            TopK(k=1, init_std=0.7),
            TopP(p=0.6, k_max=3, init_std=0.7),
        ),
    ),
    "C = 2, latent, expert choice": Chain(
        moe=moe(
            ExpertChoice(k=1.5, init_std=0.7),
            experts=Latent(hidden=3, latent=2, group=4),
        ),
        iterations=2,
    ),
}
chains = pytest.mark.parametrize(
    "name",
    thorough_but_for(
        CHAINS,
        *("C = 2", "C = 2, own k and kind per round"),
        later=("C = 1", "C = 3, no shared expert", "C = 2, no inner residual"),
    ),
)


def inputs():
    """(x_BLD, dy_BLD, ctx)"""
    x_BLD, dy_BLD = jax.random.normal(jax.random.key(1), (2, *SHAPE, D))
    return x_BLD, dy_BLD, context(*SHAPE, num_padding=PADDING, compute=XLA)


def string_keys(tree):
    if not isinstance(tree, dict):
        return tree
    return {str(k): string_keys(v) for k, v in tree.items()}


def built(cfg, seed=0):
    """(graphdef, params, state) with every key a string."""
    graphdef, params, state = split_module(cfg.make(D, nnx.Rngs(params=seed)))
    return graphdef, string_keys(params), state


def outputs(cfg, params=None):
    """((loss, (y_BLD, aux)), gradients of params and x), the params."""
    graphdef, own, state = built(cfg)
    params = own if params is None else params
    x_BLD, dy_BLD, ctx = inputs()

    def loss(params, x_BLD):
        y_BLD, aux = nnx.merge(graphdef, params, state)(x_BLD, ctx)
        total = jnp.sum(y_BLD * dy_BLD)
        return total + sum(jnp.sum(aux["losses"][n]) for n in LOSSES), (y_BLD, aux)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return run(params, x_BLD), params


def truth(cfg, x_TD, params):
    routers = {int(k): v for k, v in params.get("routers", {}).items()}
    T = SHAPE[0] * SHAPE[1]
    return oracle.chain(
        cfg,
        x_TD,
        params | {"routers": routers},
        shape=SHAPE,
        valid_T=np.arange(T) % SHAPE[1] < SHAPE[1] - PADDING,
    )


@chains
def test_values_gradients_and_counts_are_those_of_the_loop(name):
    cfg = CHAINS[name]
    ((_, (y_BLD, aux)), (dparams, dx_BLD)), params = outputs(cfg)
    x_BLD, dy_BLD, _ = inputs()
    y_TD, rounds = truth(cfg, x_BLD.reshape(-1, D), params)
    assert_close(y_BLD.reshape(-1, D), y_TD, "float32")
    for t, found in enumerate(rounds):
        np.testing.assert_array_equal(aux["load"][t], found["load_E"])
        assert float(aux["stats"]["num_kept"][t]) == found["num_kept"]
        for loss in LOSSES:
            assert_close(aux["losses"][loss][t], found[loss], "float32", loss)

    def true_loss(arguments):
        own = nested({k: v for k, v in arguments.items() if k != "x"})
        y_TD, rounds = truth(cfg, arguments["x"], own)
        total = np.sum(y_TD * np.asarray(dy_BLD, np.float64).reshape(-1, D))
        return total + sum(found[loss] for found in rounds for loss in LOSSES)

    arguments = flat(params) | {"x": x_BLD.reshape(-1, D)}
    gradients = flat(dparams) | {"x": dx_BLD.reshape(-1, D)}
    rng = np.random.default_rng(2)
    for leaf, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        slope = oracle.slope(true_loss, arguments, leaf, direction)
        assert_close(np.sum(gradient * direction), slope, "difference", str(leaf))


def test_one_round_is_the_plain_layer_bit_for_bit():
    chain = CHAINS["C = 1"]
    ((loss, (y_BLD, aux)), _), params = outputs(chain)
    plain = params | {"router": params["routers"]["0"]}
    del plain["routers"]
    ((plain_loss, (plain_BLD, plain_aux)), _), _ = outputs(chain.moe, plain)
    np.testing.assert_array_equal(y_BLD, plain_BLD)
    assert loss == plain_loss
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), aux, plain_aux)


def test_experts_are_held_once():
    one, three = (
        sum(a.size for a in jax.tree.leaves(built(CHAINS[name])[1]))
        for name in ("C = 1", "C = 2")
    )
    assert three - one == 4 * D  # one more router


@pytest.mark.thorough
def test_block_forms():
    """core.md 1a: what is added to the output of the chain, with C = 2."""
    cfg = Chain(moe=moe(RAW), iterations=2)
    attention = Attention(heads=1, head_dim=4)
    block = Block(cfg, attention, D, nnx.Rngs(params=0), norm_eps=1e-6)
    x_BLD, _, ctx = inputs()

    @jax.jit
    def run(block, x_BLD):
        h_BLD = x_BLD + block.attention(block.norm_attention(x_BLD), ctx, None)[0]
        z_BLD = block.norm_ffn(h_BLD)
        found = {}
        for block.residual in RESIDUALS:
            found[block.residual], aux, _ = block(x_BLD, ctx, None)
        return h_BLD, z_BLD, block.ffn(z_BLD, ctx)[0], found, aux

    h_BLD, z_BLD, delta_BLD, found, aux = run(block, x_BLD)
    expected = {
        "prenorm": h_BLD + delta_BLD,
        "released": z_BLD + delta_BLD,  # z_C itself: the raw residual h is gone
        "both": h_BLD + z_BLD + delta_BLD,
        "none": delta_BLD,
    }
    assert found.keys() == set(RESIDUALS)
    for residual, y_BLD in found.items():
        assert_close(y_BLD, expected[residual], "order", residual)
    assert aux["ffn"]["load"].shape == (2, 4)  # [C, E]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["C = 2, shared router", "C = 2, own k and kind per round"]
)
def test_a_replayed_chain_repeats_every_round(name):
    graphdef, params, state = built(CHAINS[name])
    x_BLD, _, ctx = inputs()
    collect = dataclasses.replace(ctx, collect=True)

    @jax.jit
    def run(params, x_BLD, forced=None):
        return nnx.merge(graphdef, params, state)(
            x_BLD, dataclasses.replace(collect, forced=forced)
        )

    _, aux = run(params, x_BLD)
    forced = recorded(aux)
    _, again = run(params, -x_BLD, forced)
    np.testing.assert_array_equal(again["load"], aux["load"])
    _, free = run(params, -x_BLD)
    assert jnp.any(free["load"] != aux["load"])


def test_nothing_to_replay():
    with pytest.raises(ValueError, match="record with Context"):
        recorded({"segments": {}})


# Narrow.


def test_narrow_is_inner_between_two_projections():
    inner = moe(RAW)
    cfg = Narrow(latent=3, inner=inner)
    graphdef, params, state = built(cfg)
    x_BLD, _, ctx = inputs()
    y_BLD, aux = jax.jit(nnx.merge(graphdef, params, state))(x_BLD, ctx)
    x_TD = np.asarray(x_BLD, np.float64).reshape(-1, D)
    T = len(x_TD)
    found = oracle.moe(
        inner,
        x_TD @ np.asarray(params["w_down_DZ"], np.float64),
        params["inner"],
        shape=SHAPE,
        valid_T=np.arange(T) % SHAPE[1] < SHAPE[1] - PADDING,
    )
    expected_TD = found["y_TD"] @ np.asarray(params["w_up_ZD"], np.float64)
    assert_close(y_BLD.reshape(-1, D), expected_TD, "float32")
    np.testing.assert_array_equal(aux["inner"]["load"], found["load_E"])


def test_narrow_of_a_dense_layer_has_no_aux():
    cfg = Narrow(latent=3, inner=Dense(hidden=4))
    _, aux = cfg.make(D, nnx.Rngs(params=0))(*(inputs()[i] for i in (0, 2)))
    assert aux == {}


@pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")
@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Chain(moe=moe(RAW), iterations=0), r"f.iterations = 0: must be at least 1"),
        (
            Chain(moe=moe(RAW), iterations=2, routers="indep"),
            r"f.routers = 'indep': must be 'independent', 'shared'",
        ),
        (
            Chain(moe=moe(RAW), iterations=2, routers=(RAW,)),
            r"f.routers = '1 routers': must be one router per round, iterations = 2",
        ),
        (
            Chain(moe=moe(RAW), iterations=1, routers=(TopK(k=9),)),
            r"f.routers\[0\].k = 9: must be at most num_experts = 4",
        ),
        (
            Chain(
                moe=moe(RAW, capacity_factor=1.0),
                iterations=1,
                routers=(ExpertChoice(k=1.0),),
            ),
            r"f.moe.capacity_factor = 1.0: must be None: ExpertChoice fills",
        ),
        (Chain(moe=moe(TopK(k=0)), iterations=1), r"f.moe.router.k = 0: must be at l"),
        (Narrow(latent=0, inner=Dense(hidden=1)), r"f.latent = 0: must be at least 1"),
        (Narrow(latent=1, inner=RAW), r"f.inner = 'TopK': must be a feed-forward"),
    ],
    ids=str,
)
def test_refusals(cfg, message):
    with pytest.raises(ConfigError, match=message):
        check(cfg, "f")
        cfg.validate_dim(D, "f")


def test_narrow_checks_its_width_and_the_inner_layer():
    with pytest.raises(ConfigError, match=r"f.latent = 6: must be at most .* 5"):
        Narrow(latent=6, inner=Dense(hidden=1)).validate_dim(D, "f")
    latent = moe(RAW, experts=Latent(hidden=3, latent=4, group=4))
    with pytest.raises(ConfigError, match=r"f.inner.moe.experts.latent = 4: .*, 3"):
        Narrow(latent=3, inner=Chain(moe=latent, iterations=1)).validate_dim(D, "f")
