"""The experts contract: the definition against a loop, the fused form against it.

T tokens · N routed rows · D model width · E experts · K slots per token
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import combine, dispatch, make_plan
from moex.config.base import ConfigError, ConfigWarning, check
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent, latent_ratio
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.lowrank_glu import LowRankGlu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.context import Compute
from tests.helpers import XLA, context, split_module
from tests.marks import thorough, thorough_but_for
from tests.moe import oracle
from tests.tolerances import assert_close

# What each one computes is said in float64 by `oracle.EXPERTS`.
EXPERTS = {
    "glu": Glu(hidden=3),
    "glu, gelu, bias": Glu(hidden=3, activation="gelu", bias=True),
    "glu, clamped": Glu(hidden=3, activation="clamped"),
    "latent": Latent(hidden=3, latent=2, group=4),
    "latent, all, pairs": Latent(
        hidden=3, latent=2, group=3, ops=("gate", "up", "down")
    ),
    "latent, all, one group": Latent(
        hidden=3, latent=2, group=4, ops=("gate", "up", "down")
    ),
    "latent, up, own": Latent(hidden=3, latent=3, group=1, ops=("up",)),
    "lowrank": LowRank(rank=2, alpha=3.0),
    "rank one": LowRank(rank=1),
    "residual": LowRankGlu(hidden=3, rank=2),
    "stored rows": LowRankGlu(hidden=3, rank=2, rows=(4, 2)),
}
T, K, D, E = 9, 2, 5, 4

QUICK = ("glu", "latent", "stored rows")
experts = pytest.mark.parametrize("name", thorough_but_for(EXPERTS, *QUICK))
# The default kernels are compiled once; the others are quicker to compile.
KERNELS = dict.fromkeys(EXPERTS, "xla") | {"glu": None}
FUSED = ["glu", "residual"]
FUSED += [name for name, cfg in EXPERTS.items() if isinstance(cfg, Latent)]


@pytest.fixture(scope="module")
def inputs():
    """Tokens, gates and a plan with an idle expert and some slots not kept."""
    rng = np.random.default_rng(0)
    expert_TK = np.array([rng.choice(E - 1, K, replace=False) for _ in range(T)])
    keep_TK = rng.random((T, K)) < 0.8
    return {
        "x_TD": rng.normal(size=(T, D)),
        "gate_TK": np.where(keep_TK, rng.random((T, K)), 0),
        "dy_TD": rng.normal(size=(T, D)),
        "expert_TK": expert_TK,
        "keep_TK": keep_TK,
        "plan": make_plan(jnp.asarray(expert_TK), jnp.asarray(keep_TK), E),
    }


def built(name):
    """(graphdef, params, state), with nothing at 0."""
    graphdef, params, state = split_module(EXPERTS[name].make(D, E, nnx.Rngs(params=0)))
    rng = np.random.default_rng(4)
    for leaf, value in params.items():
        if leaf.startswith(("bias", "residual", "rows")):
            params[leaf] = jnp.asarray(rng.normal(size=value.shape), jnp.float32)
    return graphdef, params, state


def by_definition(module, x_TD, gate_TK, plan, ctx):
    y_ND = module(dispatch(x_TD, plan), plan.group_sizes_E, ctx)
    return combine(y_ND, gate_TK, plan)


def fused(module, x_TD, gate_TK, plan, ctx):
    return module.sums(x_TD, gate_TK, plan, ctx)


@functools.lru_cache
def outputs(name, form, dtype, inputs):
    """(y_TD, gradients of {params, x_TD, gate_TK}, params)."""
    inputs = dict(inputs)
    graphdef, params, state = built(name)
    x_TD = jnp.asarray(inputs["x_TD"], dtype)
    gate_TK = jnp.asarray(inputs["gate_TK"], jnp.float32)
    dy_TD = jnp.asarray(inputs["dy_TD"], jnp.float32)

    def loss(params, x_TD, gate_TK):
        module = nnx.merge(graphdef, params, state)
        ctx = context(1, T, compute=Compute(dtype=dtype, kernels=KERNELS[name]))
        y_TD = form(module, x_TD, gate_TK, inputs["plan"], ctx)
        assert y_TD.dtype == x_TD.dtype
        return jnp.sum(dy_TD * y_TD.astype(jnp.float32)), y_TD

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, y_TD), gradients = run(params, x_TD, gate_TK)
    named = dict(zip(("params", "x_TD", "gate_TK"), gradients, strict=True))
    return y_TD, named.pop("params") | named, params


class ByIdentity(dict):
    """A dict that a cache can hold."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture(scope="module")
def run(inputs):
    held = ByIdentity(inputs)
    return lambda name, form, dtype="float32": outputs(name, form, dtype, held)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form) if name in QUICK else thorough(name, form)
        for form, names in ((by_definition, EXPERTS), (fused, FUSED))
        for name in names
    ],
)
def test_values_and_gradients_are_those_of_the_loop(name, form, inputs, run):
    y_TD, gradients, params = run(name, form)
    cfg = EXPERTS[name]
    one = oracle.EXPERTS[type(cfg).__name__]

    def true_y(arguments):
        y_TD = np.zeros((T, D))
        weights = {k: np.asarray(arguments[k], np.float64) for k in params}
        for t, j in np.argwhere(inputs["keep_TK"]):
            e = inputs["expert_TK"][t, j]
            row_D = one(cfg, np.asarray(arguments["x_TD"])[t], weights, e)
            y_TD[t] += np.asarray(arguments["gate_TK"])[t, j] * row_D
        return y_TD

    arguments = params | {k: inputs[k] for k in ("x_TD", "gate_TK")}
    assert_close(y_TD, true_y(arguments), "float32")

    def true_loss(arguments):
        return np.sum(inputs["dy_TD"] * true_y(arguments))

    rng = np.random.default_rng(1)
    for leaf, gradient in gradients.items():
        for _ in range(2):
            direction = rng.normal(size=gradient.shape)
            slope = oracle.slope(
                lambda a: np.sum(inputs["dy_TD"] * true_y(a)),
                arguments,
                leaf,
                direction,
            )
            assert_close(np.sum(gradient * direction), slope, "difference", leaf)
    for leaf in params:
        if not leaf.startswith("b_"):  # those belong to groups
            assert jnp.all(gradients[leaf][E - 1] == 0), "an idle expert has a gradient"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [(name, "float32", "float32") for name in FUSED]
    + [("glu", "bfloat16", "bfloat16")],
)
def test_fused_is_the_definition(name, dtype, kind, run):
    y_TD, gradients, _ = run(name, by_definition, dtype)
    fused_y_TD, fused_gradients, _ = run(name, fused, dtype)
    assert_close(fused_y_TD, y_TD, kind)
    for leaf, gradient in gradients.items():
        assert fused_gradients[leaf].dtype == gradient.dtype
        assert_close(fused_gradients[leaf], gradient, kind, leaf)


@pytest.mark.thorough
@experts
def test_bfloat16_is_near_float32(name, inputs, run):
    form = fused if name in FUSED else by_definition
    graphdef, params, state = built(name)
    y_TD = jax.jit(form)(
        nnx.merge(graphdef, params, state),
        jnp.asarray(inputs["x_TD"], jnp.bfloat16),
        jnp.asarray(inputs["gate_TK"], jnp.float32),
        inputs["plan"],
        context(1, T, compute=Compute(dtype="bfloat16", kernels=KERNELS[name])),
    )
    assert y_TD.dtype == jnp.bfloat16
    assert_close(y_TD, run(name, form)[0], "bfloat16")


@experts
def test_rows_past_the_groups_are_zero(name):
    graphdef, params, state = built(name)
    module = nnx.merge(graphdef, params, state)
    sizes_E = jnp.array([1, 0, 2, 0], jnp.int32)
    x_ND = jnp.full((5, D), 1.0).at[3:].set(jnp.nan)
    ctx = context(1, 5, compute=Compute(kernels=KERNELS[name]))
    y_ND = jax.jit(lambda x_ND: module(x_ND, sizes_E, ctx))(x_ND)
    assert jnp.all(y_ND[3:] == 0)
    assert jnp.all(jnp.isfinite(y_ND))
    np.testing.assert_array_equal(y_ND[1], y_ND[2])


@experts
def test_permuting_experts_changes_nothing(name, inputs, run):
    """Weights and assignment move together; sums over a token's slots stay in order."""
    if EXPERTS[name] is EXPERTS["latent, all, pairs"]:
        pytest.skip("experts of different groups are not alike")
    graphdef, params, state = built(name)
    order_E = np.array([2, 0, 3, 1])
    renamed_TK = jnp.asarray(np.argsort(order_E)[inputs["expert_TK"]])
    moved = {k: v[order_E] if len(v) == E else v for k, v in params.items()}
    form = fused if name in FUSED else by_definition
    y_TD = form(
        nnx.merge(graphdef, moved, state),
        jnp.asarray(inputs["x_TD"], jnp.float32),
        jnp.asarray(inputs["gate_TK"], jnp.float32),
        make_plan(renamed_TK, jnp.asarray(inputs["keep_TK"]), E),
        context(1, T, compute=Compute(kernels=KERNELS[name])),
    )
    assert_close(y_TD, run(name, form)[0], "order")


def test_full_rank_latent_experts_are_glu_experts(inputs, run):
    """Latent width D and orthogonal projections Q: A = Q^T W gives Q A = W."""
    rng = np.random.default_rng(0)
    params = run("glu", fused)[2]
    cfg = Latent(hidden=3, latent=D, group=2, ops=("gate", "up", "down"))
    graphdef, latent, state = split_module(cfg.make(D, E, nnx.Rngs(params=0)))
    q_GDD = np.linalg.qr(rng.normal(size=(2, D, D)))[0]
    q_EDD = q_GDD[np.arange(E) // 2]
    w_in, w_out = (np.asarray(params[k]) for k in ("w_in_ED2F", "w_out_EFD"))
    turned_ED2F = np.einsum("edz,edgf->ezgf", q_EDD, w_in)
    values = {
        "b_gate_GDZ": q_GDD,
        "b_up_GDZ": q_GDD,
        "a_gate_EZF": turned_ED2F[:, :, 0],
        "a_up_EZF": turned_ED2F[:, :, 1],
        "a_down_EFZ": np.einsum("efd,edz->efz", w_out, q_EDD),
        "b_down_GZD": np.swapaxes(q_GDD, 1, 2),
    }
    assert values.keys() == latent.keys()
    values = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    y_TD = fused(
        nnx.merge(graphdef, values, state),
        jnp.asarray(inputs["x_TD"], jnp.float32),
        jnp.asarray(inputs["gate_TK"], jnp.float32),
        inputs["plan"],
        context(1, T, compute=XLA),
    )
    assert_close(y_TD, run("glu", fused)[0], "float32")


def test_a_rank_of_zero_start_adds_nothing():
    module = LowRank(rank=2, zero_init=True).make(D, E, nnx.Rngs(params=0))
    sizes_E = jnp.array([1, 0, 2, 0], jnp.int32)
    ctx = context(1, 3, compute=XLA)
    assert jnp.all(module(jnp.ones((3, D)), sizes_E, ctx) == 0)


# Ratios of core.md 3a: (experts, width, model width), group -> {ops: ratio}.
RATIOS = [
    ((60, 1408, 2048), 4, 0.958, 0.938),
    ((60, 1408, 2048), 60, 0.803, 0.704),
    ((64, 1408, 2048), 1, 1.458, 1.688),
    ((256, 2048, 7168), 4, 0.690, 0.536),
    ((256, 2048, 7168), 256, 0.526, 0.290),
]


@pytest.mark.parametrize(("sizes", "group", "two", "three"), RATIOS, ids=str)
def test_published_ratios_of_latent_experts(sizes, group, two, three):
    E, F, D = sizes
    for ops, ratio in ((("gate", "up"), two), (("gate", "up", "down"), three)):
        cfg = Latent(hidden=F, latent=F, group=group, ops=ops)
        assert round(latent_ratio(E, D, cfg), 3) == ratio


def test_the_ratio_is_that_of_the_parameters():
    """With a short last group: 5 experts in groups of 2 are 3 groups."""
    cfg = Latent(hidden=3, latent=2, group=2)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(split_module(made)[1]))
        for made in (c.make(D, 5, nnx.Rngs(params=0)) for c in (cfg, Glu(hidden=3)))
    ]
    assert latent_ratio(5, D, cfg) == pytest.approx(sizes[0] / sizes[1])


def layer_of(experts):
    return MoE(num_experts=E, router=TopK(k=2), experts=experts)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Glu(hidden=0), r"experts.hidden = 0: must be at least 1"),
        (Glu(hidden=1, activation="glu"), r"Did you mean '[gs][ei]lu'"),
        (Latent(hidden=3, latent=0, group=2), r"experts.latent = 0: must be at least"),
        (Latent(hidden=3, latent=2, group=0), r"experts.group = 0: must be at least 1"),
        (Latent(hidden=3, latent=2, group=2, ops=()), r"experts.ops = \(\): must be"),
        (Latent(hidden=3, latent=2, group=2, ops=("gat",)), r"Did you mean 'gate'"),
        (
            Latent(hidden=3, latent=2, group=2, ops=("up", "up")),
            r"must be without repeats",
        ),
        (LowRank(rank=0), r"experts.rank = 0: must be at least 1"),
        (LowRank(rank=1, alpha=0.0), r"experts.alpha = 0.0: must be above 0"),
    ],
    ids=str,
)
def test_refusals(cfg, message):
    with pytest.raises(ConfigError, match=message):
        check(layer_of(cfg), "config.ffn")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            Latent(hidden=3, latent=6, group=2),
            r"experts.latent = 6: must be at most the model width, 5",
        ),
        (
            Latent(hidden=3, latent=2, group=5),
            r"experts.group = 5: must be at most num_experts = 4",
        ),
        (LowRank(rank=6), r"experts.rank = 6: must be at most the model width, 5"),
    ],
    ids=str,
)
def test_refusals_that_need_the_width(cfg, message):
    with pytest.raises(ConfigError, match=message):
        layer_of(cfg).validate_dim(D, "config.ffn")


def test_a_caution_where_latent_experts_save_nothing():
    """The rule of core.md 3a: with latent = hidden, group > D / (D - F)."""
    with pytest.warns(ConfigWarning, match=r"1\.\d+ times .* group > 5 / \(5 - 3\)"):
        layer_of(Latent(hidden=3, latent=3, group=2)).validate_dim(D, "config.ffn")
    layer_of(Latent(hidden=3, latent=3, group=4)).validate_dim(D, "config.ffn")
