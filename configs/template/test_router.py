"""The router against a plain loop over tokens; run it with `python -m pytest`."""

import jax
import jax.numpy as jnp
import moex
import numpy as np
import pytest
from flax import nnx

from router import Cosine

T, D, E, K = 7, 5, 6, 2


def route(cfg, x_TD, seed=0):
    """The vectors of the experts, and the decision for tokens."""
    moex.check(cfg)
    router = cfg.make(D, E, nnx.Rngs(seed))
    return np.asarray(router.w_DE[...]), router(x_TD, moex.Context.of(x_TD[None]))


def test_it_chooses_by_cosine_as_a_loop_over_tokens_does():
    x_TD = jax.random.normal(jax.random.key(1), (T, D))
    w_DE, routing = route(Cosine(k=K, temperature=0.5), x_TD)
    for t, x_D in enumerate(np.asarray(x_TD, np.float64)):
        cosine_E = x_D @ w_DE / np.linalg.norm(x_D) / np.linalg.norm(w_DE, axis=0)
        best_K = np.argsort(-cosine_E)[:K]
        assert routing.expert_TK[t].tolist() == best_K.tolist()
        gate_K = np.exp(cosine_E[best_K] / 0.5)
        gate_K /= gate_K.sum()
        np.testing.assert_allclose(routing.gate_TK[t], gate_K, rtol=1e-3)


def test_the_gates_move_the_vectors_of_the_experts():
    graph, params = nnx.split(Cosine(k=K).make(D, E, nnx.Rngs(0)))
    x_TD = jax.random.normal(jax.random.key(1), (T, D))

    def weighted(params):
        routing = nnx.merge(graph, params)(x_TD, moex.Context.of(x_TD[None]))
        return jnp.sum(routing.gate_TK[:, 0])

    gradient_DE = jax.grad(weighted)(params)["w_DE"][...]
    assert np.all(np.isfinite(gradient_DE)) and np.any(gradient_DE != 0)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(moex.ConfigError, match="router.temperature = 0"):
        moex.check(Cosine(k=1, temperature=0.0), "router")
