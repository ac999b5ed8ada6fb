"""Three clipped steps on eight devices are those on one: a choice of all pairs.

All pairs: `python -m experiments.sharding.run`.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.sharding import matrix
from moex.config import ConfigError
from moex.sharding import MeshConfig
from moex.train import state as states

# Every mesh and way of the rows once, and every kind of layer with a way of its own.
PAIRS = [
    ("top-k sigmoid, groups, scale", "expert 8, all_to_all"),
    ("glu with biases", "1 data, 4 expert, 2 tensor, all_to_all"),
    ("latent, all, one space", "2 fsdp, 2 expert, 2 seq, all_to_all"),
    ("latent, all, many spaces", "2 data, 2 expert, 2 tensor, all_to_all"),
    ("expert choice", "2 data, 2 expert, 2 tensor, gather"),
    ("zero, shared, gated", "2 fsdp, 2 expert, 2 seq, gather"),
    ("chain, shared router, latent", "expert 8, gather"),
    ("top-p, controlled", "fsdp 8"),
    ("top-k with capacity", "data 8"),
]


@functools.cache
def on_one_device(layer):
    return matrix.outcome(layer, MeshConfig(data=1), jax.devices()[:1])


@pytest.mark.parametrize(("layer", "mesh"), PAIRS, ids=map(" on ".join, PAIRS))
def test_sharded_is_unsharded(layer, mesh):
    expected = on_one_device(layer)
    actual = matrix.outcome(layer, matrix.MESHES[mesh], jax.devices())
    assert float(expected.metrics["grad_norm"]) > 2 * matrix.CLIP
    distance = matrix.distance(actual, expected)
    assert distance.pop("replicas_differ") == 0, actual.replicas_differ
    assert max(distance.values()) < 1e-5, distance
    if layer != "expert choice":  # balanced by design
        load = next(v for k, v in expected.metrics.items() if "load_frac" in k)
        assert np.max(load) > 1.2 * np.mean(load)


def test_experts_that_the_axis_does_not_divide_are_refused():
    twelve = dataclasses.replace(matrix.LAYERS["top-k"], num_experts=12)
    spec = states.model_spec(matrix.model(twelve))
    message = r"config.mesh.expert = 8: must divide the 'expert' dim .* is 12 \(num_exp"
    with pytest.raises(ConfigError, match=message):
        states.check_mesh(spec, MeshConfig(data=1, expert=8).make())
