"""Routes of a trace: the same experts as in its rows, in the order of decoding."""

import dataclasses

import numpy as np
import pytest

from moex.analysis.trace import Trace
from moex.config.base import ConfigError
from moex.offload.routes import in_step, read_routes
from tests.analysis.oracle import INFOS, random_chunk, write
from tests.offload.routes import random_routes, routes_of


@pytest.fixture
def chunk():
    return random_chunk(np.random.default_rng(3), 40, logits=True)


def test_routes_are_those_of_the_trace(tmp_path, chunk):
    tokens, layers = chunk
    with Trace.open(write(tmp_path / "t", [chunk], logits=True)) as trace:
        routes = read_routes(trace, logits=True)
    assert routes.layer_R == (0, 1, 1, 2)  # rounds of a chain share their layer
    assert routes.experts_R == (5, 5, 5, 2)
    assert routes.num_layers == 3
    assert routes.num_examples == 6
    counted = np.zeros((3, 5), int)
    for n in range(40):
        assert routes.example_N[n] == n // 7
        assert routes.index_N[n] == n % 7
        assert routes.token_N[n] == tokens.token_N[n]
        for r, info in enumerate(INFOS):
            own = layers[info.label]
            want = {
                int(e): float(p)
                for e, keep, p in zip(
                    own.expert_NK[n], own.keep_NK[n], own.prob_NK[n], strict=True
                )
                if keep and e < info.num_experts  # others compute nothing
            }
            found = {
                int(e): float(p)
                for e, p in zip(
                    routes.expert_NRK[n, r], routes.prob_NRK[n, r], strict=True
                )
                if e >= 0
            }
            assert found == want
            assert routes.patterns([n])[0, routes.layer_R[r], list(want)].all()
            for e in want:
                counted[routes.layer_R[r], e] += 1
            logits_E = own.logits_NE[n, : info.num_experts]
            np.testing.assert_array_equal(
                routes.logits_NRE[n, r, : info.num_experts], logits_E
            )
            exp_E = np.exp(logits_E.astype(float))
            np.testing.assert_allclose(
                routes.scores_of([n], r)[: info.num_experts], exp_E / exp_E.sum()
            )
            assert (routes.scores_of([n], r)[info.num_experts :] == 0).all()
    np.testing.assert_array_equal(routes.counts(), counted)


def test_experts_and_scores_of_several_tokens():
    routes = routes_of([[[0, 2]], [[2, 3]], [[2, -1]]])
    experts, rows = routes.experts_of([0, 1, 2], 0)
    assert experts.tolist() == [0, 2, 3]
    assert rows.tolist() == [1, 3, 1]
    np.testing.assert_allclose(
        routes.scores_of([0, 1, 2], 0), np.array([0.5, 0, 1.5, 0.5]) / 3
    )


def test_a_limit_of_tokens_leaves_whole_examples(tmp_path, chunk):
    with Trace.open(write(tmp_path / "t", [chunk], logits=True)) as trace:
        for tokens, examples in ((40, 6), (39, 5), (14, 2), (13, 1), (1, 1)):
            assert read_routes(trace, tokens=tokens).num_examples == examples
        with pytest.raises(ConfigError, match="tokens = 0: must be 1 or more"):
            read_routes(trace, tokens=0)


def test_parts_are_whole_examples():
    routes = random_routes(examples=5, length=3)
    first, second = routes.halves()
    assert (len(first), len(second)) == (6, 9)
    assert second.example_N.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    np.testing.assert_array_equal(second.expert_NRK, routes.expert_NRK[6:])


def test_examples_in_step_go_on_together_and_end_alone():
    routes = routes_of([[[0]]] * 9, example=[0, 0, 0, 1, 2, 2, 3, 3, 3])
    rows = [s.tolist() for s in in_step(routes, 2)]
    assert rows == [[0, 3], [1], [2], [4, 6], [5, 7], [8]]
    assert [s.tolist() for s in in_step(routes)] == [[n] for n in range(9)]
    assert [s.tolist() for s in in_step(routes, 9)][0] == [0, 3, 4, 6]
    with pytest.raises(ConfigError, match="batch = 0: must be 1 or more"):
        in_step(routes, 0)


def test_traces_that_cannot_be_replayed_are_refused(tmp_path, chunk):
    def refused(name, chunks, told, **fields):
        file = write(tmp_path / name, chunks, **{"logits": True, **fields})
        with Trace.open(file) as trace, pytest.raises(ConfigError, match=told):
            read_routes(trace, logits=True)

    infos = (dataclasses.replace(INFOS[0], causal=False), *INFOS[1:])
    refused("a", [chunk], "layer 001 .TopP. chooses by later", layers=infos)
    refused("b", [], "b: has no token")
    chunk[1]["003.1"].logits_NE[5, 1] = np.nan
    refused("c", [chunk], "c: logits of a router are NaN")
