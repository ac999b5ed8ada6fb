"""Quantile balancing in a step: one result on every mesh, for any microbatches."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moex.config.base import check, from_dict, to_dict
from moex.model import spec as states
from moex.model.paths import flat_paths
from moex.moe.chain import Chain
from moex.moe.routers.topk import TopK
from moex.nn.context import Compute
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.sharding import MeshConfig, shard_batch
from moex.train.step import _accumulate, update_state
from tests.helpers import TASK, built, lm_loss, random_batch, tiny_lm, tiny_moe

ROUTER = TopK(k=2, score="sigmoid", bias_rule="quantile", bias_rate=1.0, init_std=0.7)
PLAIN = tiny_moe(router=ROUTER, shared=None)
CHAIN = Chain(moe=PLAIN, iterations=2, routers="shared")
MODEL = tiny_lm(Segment(pattern=(PLAIN, CHAIN), repeat=2))


def biases_after_a_step(mesh_cfg, devices, grad_accum):
    """{path: bits} of the router state that one batch of 8 rows gives."""
    spec, params, state = built(MODEL)
    rng = np.random.default_rng(5)
    state = jax.tree.map(
        lambda a: (0.1 * rng.normal(size=a.shape)).astype(np.float32), state
    )
    mesh = mesh_cfg.make(devices)

    def moved(params, state, batch):
        def micro(args, before):
            _, part = args
            compute = Compute(exchange=mesh_cfg.exchange)
            model = spec.merge(params, state)
            ctx = TASK.context(part, mode="train", compute=compute)
            options = {"num_microbatches": grad_accum, "num_domains": 2}
            return lm_loss(model, ctx, part, Loss(), **options)[1]

        sums = _accumulate(micro, batch, grad_accum)
        return update_state(spec, state, sums["layers"], 0)

    params, state = jax.device_put((params, state), states.shardings(spec, mesh))
    with jax.set_mesh(mesh):
        new = jax.jit(moved)(params, state, shard_batch(random_batch(8, 16), mesh))
    return {
        jax.tree_util.keystr(path): np.asarray(value).tobytes()
        for path, value in jax.tree_util.tree_leaves_with_path(new)
    }


@pytest.fixture(scope="module")
def on_one_device():
    return biases_after_a_step(MeshConfig(data=1), jax.devices()[:1], 1)


# (sizes of the mesh, microbatches): the first two always.
MESHES = [
    ({"fsdp": 2, "expert": 2, "seq": 2}, 2),
    ({}, 4),
    ({"data": 2, "fsdp": 2, "expert": 2}, 1),
    ({"data": 8}, 1),
    ({"fsdp": 8}, 1),
    ({"expert": 8}, 1),
    ({"seq": 4}, 1),
    ({"seq": 4}, 4),
    ({"expert": 4, "tensor": 2}, 2),
]


@pytest.mark.parametrize(
    ("sizes", "grad_accum"),
    [
        pytest.param(*MESHES[1], marks=pytest.mark.thorough),
        *(pytest.param(*m, marks=pytest.mark.slow) for m in (MESHES[0], *MESHES[2:])),
    ],
    ids=str,
)
def test_the_bias_is_the_same_to_the_bit_on_every_mesh(
    on_one_device, sizes, grad_accum
):
    mesh_cfg = MeshConfig(**{"data": 1} | sizes)
    devices = jax.devices()[: math.prod(sizes.values())]
    assert biases_after_a_step(mesh_cfg, devices, grad_accum) == on_one_device


def test_runs_from_before_have_the_same_state():
    """Their configs are accepted, at their rates, and their biases have a place."""
    old = to_dict(dataclasses.replace(PLAIN, router=TopK(k=2, bias_rate=0.3)))
    old["router"]["bias_rule"] = "quantile"
    layer = from_dict(old)
    check(layer, "layer")
    spec = states.model_spec(tiny_lm(Segment(pattern=(layer,), repeat=2)))
    (place,) = flat_paths(spec.state)
    assert place == "segments/0/blocks/0/ffn/router/bias_E"
    leaf = flat_paths(spec.state)[place]
    assert (leaf.shape, leaf.dtype) == ((2, 8), np.float32)
