"""Segments that are cut compute the same, to the bit."""

import dataclasses

import jax
import numpy as np
import pytest

from moex.convert.segments import cut, cut_arrays, cut_model
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe

MODEL = tiny_lm(
    Segment(pattern=(tiny_moe(4, shared=None), Dense(hidden=8)), repeat=3),
    Segment(pattern=(tiny_moe(3, shared=None),), repeat=2),
)
# XLA fuses the body of a loop in other ways than that of a layer without a loop.
UNROLLED = dataclasses.replace(XLA, scan_layers=False)
CUT = {0: "a", 4: "b", 6: "a", 7: "a"}


def test_equal_neighbours_stay_in_one_segment():
    model = cut_model(MODEL, cut(MODEL, CUT))
    sizes = [(len(s.pattern), s.repeat) for s in model.layers]
    assert sizes == [(2, 1), (2, 1), (2, 1), (1, 2)]
    even = dict.fromkeys((0, 2, 4), "a")  # all copies alike
    assert [s.repeat for s in cut_model(MODEL, cut(MODEL, even)).layers] == [3, 2]


@pytest.mark.thorough
def test_a_model_that_is_cut_computes_the_same_to_the_bit():
    _, params, state = built(MODEL)
    batch = random_batch(2, 16)

    def logits(cfg, params, state):
        spec = model_spec(cfg)

        @jax.jit
        def run(params, state):
            ctx = TASK.context(batch, mode="eval", compute=UNROLLED)
            return spec.merge(params, state)(ctx)[0]

        return np.asarray(run(params, state))

    found = cut(MODEL, CUT)
    model = cut_model(MODEL, found)
    new = [cut_arrays(tree, found, MODEL) for tree in (params, state)]
    spec = model_spec(model)
    for tree, abstract in zip(new, (spec.params, spec.state), strict=True):
        shapes = {name: a.shape for name, a in flat_paths(tree).items()}
        assert shapes == {name: a.shape for name, a in flat_paths(abstract).items()}
    before = logits(MODEL, params, state)
    np.testing.assert_array_equal(logits(model, *new), before)
