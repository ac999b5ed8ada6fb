"""The router contract; the list is the registration.

T tokens · D model width · E experts · K slots per token
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config import ConfigError, check
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.moe.routing import Routing, normalize_gates
from tests.helpers import context, split_module
from tests.moe import oracle
from tests.tolerances import assert_close

# Each config with the function that says in float64 what it should do:
# (x_TD, w_DE, bias_E=..., **fields) -> (expert_TK, gate_TK, logits_TE, probs_TE).
ROUTERS = {
    "topk": (TopK(k=2, init_std=0.5), oracle.route),
    "topk, k = 1, raw": (TopK(k=1, normalize=False, init_std=0.5), oracle.route),
    "topk, k = E": (TopK(k=6, init_std=0.5), oracle.route),
    "topk, sigmoid, bias": (
        TopK(k=3, score="sigmoid", scale=2.5, bias_rate=0.1, init_std=0.5),
        oracle.route,
    ),
}
T, D, E = 11, 5, 6

routers = pytest.mark.parametrize("name", ROUTERS)


def make(name, seed=0):
    """(config, oracle, function (params, state, x_TD) -> Routing, params, state)."""
    cfg, truth = ROUTERS[name]
    graphdef, params, state = split_module(cfg.make(D, E, nnx.Rngs(params=seed)))

    @jax.jit
    def run(params, state, x_TD) -> Routing:
        return nnx.merge(graphdef, params, state)(x_TD, context(1, x_TD.shape[0]))

    return cfg, truth, run, params, state


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (T, D))


@routers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_ranges_and_no_repeats(name, dtype):
    cfg, _, run, params, state = make(name)
    routing = run(params, state, tokens().astype(dtype))
    K = cfg.slots(E)
    for field, shape, kind in [
        ("expert_TK", (T, K), "int32"),
        ("gate_TK", (T, K), "float32"),
        ("keep_TK", (T, K), "bool"),
        ("logits_TE", (T, E), "float32"),
        ("probs_TE", (T, E), "float32"),
    ]:
        array = getattr(routing, field)
        assert (array.shape, array.dtype.name) == (shape, kind), field
    assert jnp.all((routing.expert_TK >= 0) & (routing.expert_TK < E))
    for expert_K, keep_K in zip(routing.expert_TK, routing.keep_TK, strict=True):
        kept = np.asarray(expert_K)[np.asarray(keep_K)]
        assert len(set(kept.tolist())) == len(kept)
    assert jnp.all(jnp.where(routing.keep_TK, 0.0, routing.gate_TK) == 0)
    assert jnp.all(routing.gate_TK >= 0)
    assert_close(jnp.sum(routing.probs_TE, axis=1), np.ones(T), "float32")


@routers
def test_values_are_those_of_the_oracle(name):
    cfg, truth, run, params, state = make(name)
    if state:
        state = {"bias_E": jnp.linspace(-0.3, 0.3, E)}
    routing = run(params, state, tokens())
    expected = truth(tokens(), params["w_DE"], **state, **dataclasses.asdict(cfg))
    np.testing.assert_array_equal(routing.expert_TK, expected[0])
    assert_close(routing.gate_TK, expected[1], "float32")
    assert_close(routing.logits_TE, expected[2], "float32")
    assert_close(routing.probs_TE, expected[3], "float32")


@routers
def test_gates_are_normalised_if_asked(name):
    cfg, _, run, params, state = make(name)
    routing = run(params, state, tokens())
    total_T = jnp.sum(routing.gate_TK, axis=1)
    if cfg.normalize:
        assert_close(total_T, np.full(T, cfg.scale), "float32")
    else:
        assert jnp.all(total_T < cfg.scale)


@routers
def test_gradients_are_those_of_the_oracle(name):
    cfg, truth, run, params, state = make(name)
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=(T, n)) for n in (cfg.slots(E), E, E)]

    def loss(params, x_TD):
        routing = run(params, state, x_TD)
        outputs = (routing.gate_TK, routing.logits_TE, routing.probs_TE)
        pairs = zip(weights, outputs, strict=True)
        return sum(jnp.sum(jnp.asarray(w, jnp.float32) * y) for w, y in pairs)

    def true_loss(arguments):
        outputs = truth(**arguments, **state, **dataclasses.asdict(cfg))[1:]
        return sum(np.sum(w * y) for w, y in zip(weights, outputs, strict=True))

    dparams, dx_TD = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, tokens())
    arguments = {"x_TD": tokens(), "w_DE": params["w_DE"]}
    for leaf, gradient in {"x_TD": dx_TD, "w_DE": dparams["w_DE"]}.items():
        for _ in range(3):
            direction = rng.normal(size=gradient.shape)
            slope = oracle.slope(true_loss, arguments, leaf, direction)
            assert_close(np.sum(gradient * direction), slope, "difference", leaf)


@routers
def test_permuting_tokens_permutes_the_routing(name):
    _, _, run, params, state = make(name)
    order_T = np.random.default_rng(0).permutation(T)
    routing, permuted = (run(params, state, x) for x in (tokens(), tokens()[order_T]))
    np.testing.assert_array_equal(permuted.expert_TK, routing.expert_TK[order_T])
    assert_close(permuted.gate_TK, routing.gate_TK[order_T], "order")


@routers
def test_permuting_experts_renames_them(name):
    _, _, run, params, state = make(name)
    order_E = np.random.default_rng(0).permutation(E)
    if state:
        state = {"bias_E": jnp.linspace(-0.3, 0.3, E)}
    routing = run(params, state, tokens())
    renamed = run(
        {"w_DE": params["w_DE"][:, order_E]},
        {k: v[order_E] for k, v in state.items()},
        tokens(),
    )
    np.testing.assert_array_equal(order_E[renamed.expert_TK], routing.expert_TK)
    assert_close(renamed.gate_TK, routing.gate_TK, "order")


@routers
def test_ties_go_to_the_lowest_experts(name):
    cfg, _, run, params, state = make(name)
    routing = run({"w_DE": jnp.zeros((D, E))}, state, tokens())
    lowest_K = np.arange(cfg.slots(E))
    np.testing.assert_array_equal(routing.expert_TK, np.tile(lowest_K, (T, 1)))


@pytest.mark.parametrize("name", [n for n, (c, _) in ROUTERS.items() if c.bias_rate])
def test_the_bias_selects_and_does_nothing_else(name):
    cfg, _, run, params, _ = make(name)
    state = {"bias_E": jnp.zeros(E).at[4].set(9.0)}
    routing = run(params, state, tokens())
    assert jnp.all(routing.expert_TK[:, 0] == 4)
    score_TE = jax.nn.sigmoid(routing.logits_TE)
    gate_TK = jnp.take_along_axis(score_TE, routing.expert_TK, axis=1)
    gate_TK = cfg.scale * normalize_gates(gate_TK, routing.keep_TK)
    assert_close(routing.gate_TK, gate_TK, "order")

    def loss(state):
        routing = run(params, state, tokens())
        return jnp.sum(routing.gate_TK**2) + jnp.sum(routing.probs_TE**2)

    assert jnp.all(jax.grad(loss)(state)["bias_E"] == 0)


def test_gates_that_underflow_stay_finite():
    gate_TK = normalize_gates(jnp.zeros((1, 2)), jnp.ones((1, 2), bool))
    assert gate_TK.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"router.k = 0: must be at least 1"),
        ({"k": 9}, r"router.k = 9: must be at most num_experts = 4"),
        ({"score": "softmx"}, r"must be one of .* Did you mean 'softmax'"),
        ({"scale": 0.0}, r"router.scale = 0.0: must be above 0"),
        ({"bias_rate": -1.0}, r"router.bias_rate = -1.0: must be >= 0"),
    ],
)
def test_refusals(change, message):
    router = TopK(**{"k": 2} | change)
    with pytest.raises(ConfigError, match=message):
        check(MoE(num_experts=4, router=router, experts=Glu(hidden=2)), "config.ffn")
