"""Three clipped steps on eight devices are those on one: a choice of all pairs.

All pairs: `python -m experiments.sharding.run`.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from experiments.sharding import matrix
from moex.config.base import ConfigError
from moex.model import spec as states
from moex.model.paths import flat_paths
from moex.moe.experts.glu import Glu
from moex.nn.context import Compute
from moex.sharding import MeshConfig

# Together every mesh once and a choice of routers and experts: not every kind is here,
# and those that are stand on one mesh each. All are among all pairs.
TRAVELLING = [("latent", "2 fsdp, 2 expert, 2 seq, all_to_all")]
SLOW = [
    ("glu with biases", "1 data, 4 expert, 2 tensor, all_to_all"),
    ("top-p, controlled", "fsdp 8"),
    ("top-k sigmoid, groups, scale", "expert 8, all_to_all"),
    ("expert choice", "2 data, 2 expert, 2 tensor, gather"),
    ("zero, shared, gated", "2 fsdp, 2 expert, 2 seq, gather"),
    ("low rank", "expert 8, gather"),
    ("shared weights", "expert 8, all_to_all"),
    ("expert choice, shared weights", "2 data, 2 expert, 2 tensor, gather"),
    ("top-k with capacity", "data 8"),
    ("chain", "2 data, 2 expert, 2 tensor, all_to_all"),
    ("top-k, LoRA", "2 data, 2 expert, 2 tensor, all_to_all"),
    ("top-k, LoRA", "2 fsdp, 2 expert, 2 seq, gather"),
]
# These compile for a minute each.
SLOWEST = [
    ("zero, shared, gated", "2 fsdp, 2 expert, 2 seq, gather"),
    ("latent, all, many spaces", "2 fsdp, 2 expert, 2 seq, all_to_all"),
    ("chain, shared router, latent", "2 data, 2 expert, 2 tensor, all_to_all"),
]


# What else a step may do. Without a scan every layer is compiled by itself.
OPTIONS = {
    "glu with biases": {"grad_accum": 2, "compute": Compute(remat="dots")},
    "latent": {"losses": {"balance_scope": "sequence"}},
    "chain": {"losses": {"balance_scope": "step"}, "grad_accum": 2},
}
UNROLLED = {"compute": Compute(remat="full", scan_layers=False)}
SLOW_OPTIONS = {"zero, shared, gated": UNROLLED}


def on_one_device(layer, **options):
    return matrix.outcome(layer, MeshConfig(data=1), jax.devices()[:1], **options)


@pytest.mark.parametrize(
    ("layer", "mesh", "options"),
    [
        *(
            pytest.param(
                *pair, options.get(pair[0], {}), id=" on ".join(pair), marks=mark
            )
            for pairs, options, mark in (
                (TRAVELLING, OPTIONS, pytest.mark.slow),
                (SLOW, OPTIONS, pytest.mark.slow),
                (SLOWEST, SLOW_OPTIONS, pytest.mark.slow),
            )
            for pair in pairs
        ),
    ],
)
def test_sharded_is_unsharded(layer, mesh, options):
    expected = on_one_device(layer, **options)
    actual = matrix.outcome(layer, matrix.MESHES[mesh], jax.devices(), **options)
    assert float(expected.metrics["grad_norm"]) > 2 * matrix.CLIP
    distance = matrix.distance(actual, expected)
    assert distance.pop("replicas_differ") == 0, actual.replicas_differ
    assert max(distance.values()) < 1e-5, distance
    if not layer.startswith("expert choice"):  # balanced by design
        load = next(v for k, v in expected.metrics.items() if "load_frac" in k)
        assert np.max(load) > 1.2 * np.mean(load)


@pytest.mark.thorough
def test_gathered_weights_of_experts_are_not_kept():
    """With fsdp no array of the program holds the whole weights of all layers."""
    layer = dataclasses.replace(matrix.LAYERS["top-k"], experts=Glu(hidden=40))
    cfg = matrix.model(layer)
    text = matrix.compiled(cfg, matrix.MESHES["fsdp 8"], jax.devices()).as_text()
    assert re.search(r"f32\[8,16,2,40\]", text), "no layer's weights are gathered"
    assert not re.search(r"f32\[2,8,16,2,40\]", text)


@pytest.mark.slow
def test_an_update_that_lost_rows_is_skipped():
    mesh = MeshConfig(data=1, expert=8, exchange="all_to_all", exchange_buffer=1.0)
    outcome = matrix.outcome("forced, all to two", mesh, jax.devices())
    _, params, _ = matrix.initial("forced, all to two")
    assert outcome.metrics["lost_rows"] > 0
    assert outcome.metrics["skipped"] == 1
    for path, value in flat_paths(params).items():
        np.testing.assert_array_equal(outcome.params[path], value, err_msg=path)
    assert max(np.max(v) for k, v in outcome.metrics.items() if "lost_frac" in k) > 0


def test_experts_that_the_axis_does_not_divide_are_refused():
    twelve = dataclasses.replace(matrix.LAYERS["top-k"], num_experts=12)
    spec = states.model_spec(matrix.model(twelve))
    message = r"config.mesh.expert = 8: must divide the 'expert' dim .* is 12 \(num_exp"
    with pytest.raises(ConfigError, match=message):
        states.check_mesh(spec, MeshConfig(data=1, expert=8).make())
