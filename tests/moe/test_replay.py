"""Replay through a whole model: every layer repeats what was recorded, under remat too.

B batch · L length
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.model.losses import moe_layers
from moex.model.paths import flat_paths
from moex.moe.chain import Chain
from moex.moe.narrow import Narrow
from moex.moe.replay import recorded
from moex.moe.routers.topp import TopP
from moex.nn.stack import Segment
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.tolerances import assert_close

ROUNDS = Chain(moe=tiny_moe(4, router=TopP(p=0.4, k_max=3), shared=None), iterations=2)
CFG = tiny_lm(Segment(pattern=(Narrow(latent=8, inner=ROUNDS),), repeat=2))


@pytest.fixture(scope="module")
def model():
    """(forward, its gradient, params, what was recorded)."""
    spec, params, state = built(CFG)
    batch = random_batch(2, 8)
    ctx = TASK.context(batch, mode="train", collect=True, compute=XLA)

    @functools.partial(jax.jit, static_argnames="remat")
    def forward(params, forced=None, remat="none"):
        compute = dataclasses.replace(XLA, remat=remat)
        own = dataclasses.replace(ctx, forced=forced, compute=compute)
        logits_BLV, aux = spec.merge(params, state)(own)
        return jnp.mean(logits_BLV**2), aux

    gradient = jax.jit(
        jax.value_and_grad(forward, has_aux=True), static_argnames="remat"
    )
    return forward, gradient, params, recorded(forward(params)[1])


def loads(aux):
    return {"/".join(path): np.asarray(a["load"]) for path, a in moe_layers(aux)}


@pytest.mark.slow
def test_replay_repeats_every_layer_with_live_gates_under_remat(model):
    forward, gradient, params, forced = model
    other = jax.tree.map(lambda a: -a, params)
    recorded_loads = loads(forward(params)[1])
    free_loads = loads(forward(other)[1])
    assert any(np.any(free_loads[k] != v) for k, v in recorded_loads.items())
    found = {}
    for remat in ("none", "full"):
        (loss, aux), grads = gradient(other, forced, remat=remat)
        jax.tree.map(np.testing.assert_array_equal, loads(aux), recorded_loads)
        found[remat] = (loss, grads)
    jax.tree.map(lambda a, b: assert_close(a, b, "order"), found["full"], found["none"])
    routers = [g for k, g in flat_paths(found["none"][1]).items() if "/router" in k]
    assert len(routers) == 2
    assert all(jnp.any(g != 0) for g in routers), "gates are not live"


@pytest.mark.thorough
def test_a_replay_of_what_was_recorded_changes_nothing(model):
    forward, _, params, forced = model
    assert forward(params)[0] == forward(params, forced)[0]
