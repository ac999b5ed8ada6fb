"""Losses that a router reports of its own: in the total, the metrics, by coefficient.

T tokens · D model width · E experts · C chain rounds
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError, check
from moex.config.schedule import Schedule
from moex.moe.chain import Chain
from moex.moe.contract import Router, RouterConfig
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.losses import own_losses
from moex.moe.metrics import layer_metrics
from moex.moe.routers.topk import TopK
from moex.moe.routing import Routing, router_logits
from moex.nn.param import param
from moex.nn.stack import Segment
from moex.runs.keys import COEFFICIENTS, Loss
from tests.helpers import TASK, built, lm_loss, random_batch, tiny_lm
from tests.tolerances import assert_close

E = 4


@dataclasses.dataclass(kw_only=True, slots=True)
class Relu(RouterConfig):
    """Gates are relu(x W): as many experts as are above 0, held down by an L1 loss."""

    l1: float | Schedule = 0.1  # of the sum of the gates of a token
    name: str = "l1"

    def expected_slots(self, num_experts):
        return num_experts / 2

    def losses(self):
        return {self.name: self.l1}

    def make(self, dim, num_experts, rngs):
        return ReluRouter(self, dim, num_experts, rngs)


class ReluRouter(Router):
    def __init__(self, cfg, dim, num_experts, rngs):
        self.name = cfg.name
        self.w_DE = param(rngs, (dim, num_experts), ("embed", None), std=0.3)

    def __call__(self, x_TD, ctx):
        logits_TE = router_logits(x_TD, self.w_DE[...])
        gate_TE = jax.nn.relu(logits_TE)
        ids_E = jnp.arange(logits_TE.shape[1], dtype=jnp.int32)
        return Routing(
            expert_TK=jnp.broadcast_to(ids_E[None], logits_TE.shape),
            gate_TK=gate_TE,
            keep_TK=gate_TE > 0,
            logits_TE=logits_TE,
            probs_TE=jax.nn.softmax(logits_TE),
            losses={self.name: jnp.sum(gate_TE, axis=1)},
        )


class Forgetful(ReluRouter):
    def __call__(self, x_TD, ctx):
        return dataclasses.replace(ReluRouter.__call__(self, x_TD, ctx), losses={})


def moe(router, **fields):
    return MoE(num_experts=E, router=router, experts=Glu(hidden=4), **fields)


def run(ffn, batch, coefs, step=0, counts=None, repeat=1):
    """(loss, sums) of a small model, and the gradient of its parameters."""
    cfg = tiny_lm(Segment(pattern=(ffn,), repeat=repeat))
    spec, params, state = built(cfg)

    def loss_fn(params):
        ctx = TASK.context(batch, step=jnp.int32(step), mode="train")
        model = spec.merge(params, state)
        how = {"step": step, "counts": counts, "num_domains": 2}
        return lm_loss(model, ctx, batch, coefs, **how)

    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)


def only(name, value):
    return Loss(**dict.fromkeys(COEFFICIENTS, 0.0) | {name: value})


NO_LOSS = only("z", 0.0)


@pytest.fixture(scope="module")
def batch():
    return random_batch(2, 8)


@pytest.mark.thorough
def test_it_is_part_of_the_total_with_its_coefficient(batch):
    (plain, sums), without = run(moe(Relu(l1=0.0)), batch, NO_LOSS)
    (loss, weighted), gradient = run(moe(Relu(l1=0.5)), batch, NO_LOSS)
    (path,) = sums["layers"]
    stats = sums["layers"][path]
    mean = stats["own_loss:l1"][0] / stats["num_tokens"][0]
    assert mean > 0.1
    assert_close(weighted["weighted"]["l1"], 0.5 * mean, "float32")
    assert_close(loss - plain, 0.5 * mean, "order")
    assert float(layer_metrics(stats)["l1_loss"][0]) == pytest.approx(float(mean))
    assert any(
        not np.allclose(a, b)
        for a, b in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(without), strict=True
        )
    )


@pytest.mark.thorough
def test_padding_has_no_part_in_it(batch):
    """The same tokens with more padding: the same loss."""
    (loss, sums), _ = run(moe(Relu()), batch, NO_LOSS)
    wide = {
        k: np.pad(v, ((0, 1), (0, 0))) if v.ndim == 2 else np.pad(v, (0, 1))
        for k, v in batch.items()
    }
    (padded, _), _ = run(moe(Relu()), wide, NO_LOSS)
    assert_close(loss, padded, "float32")


@pytest.mark.thorough
def test_its_coefficient_follows_a_schedule(batch):
    router = Relu(l1=Schedule(points=((0, 0.0), (10, 1.0))))
    weighted = [
        float(run(moe(router), batch, NO_LOSS, step=s)[0][1]["weighted"]["l1"])
        for s in (0, 5, 10)
    ]
    assert weighted[0] == 0 and weighted[2] > 0
    assert weighted[1] == pytest.approx(weighted[2] / 2)


@pytest.mark.thorough
def test_rounds_of_a_chain_and_copies_are_added_or_averaged(batch):
    """Only the second of three rounds has the loss, in both copies."""
    routers = (TopK(k=1), Relu(), TopK(k=1))
    chain = Chain(moe=moe(TopK(k=1)), iterations=3, routers=routers)
    (_, sums), _ = run(chain, batch, NO_LOSS, repeat=2)
    (path,) = sums["layers"]
    own = sums["layers"][path]["own_loss:l1"]
    assert own.shape == (2, 3) and np.all(np.asarray(own)[:, 1] > 0)
    assert np.all(np.asarray(own)[:, ::2] == 0)
    tokens = jnp.sum(batch["segment"] > 0, dtype=jnp.float32)
    total = 0.1 * jnp.sum(own) / tokens
    assert_close(sums["weighted"]["l1"], total, "float32")
    mean = own_losses(sums["layers"], tokens, "mean")["l1"]
    assert_close(mean, total / 6, "float32")


@pytest.mark.thorough
def test_microbatches_add_up_to_the_batch(batch):
    counts = {
        "targets": jnp.sum(batch["loss_mask"]),
        "tokens": jnp.sum(batch["segment"] > 0).astype(jnp.float32),
        "sequences": jnp.float32(2),
    }
    whole = run(moe(Relu()), batch, NO_LOSS)[0][1]["weighted"]["l1"]
    parts = [
        run(
            moe(Relu()),
            {k: v[i : i + 1] for k, v in batch.items()},
            NO_LOSS,
            counts=counts,
        )
        for i in range(2)
    ]
    assert_close(sum(p[0][1]["weighted"]["l1"] for p in parts), whole, "float32")


def test_a_router_reports_what_its_config_names(batch, monkeypatch):
    monkeypatch.setattr(Relu, "make", lambda self, *args: Forgetful(self, *args))
    with pytest.raises(ValueError, match=r"the losses \[\]; .* \['l1'\]"):
        run(moe(Relu()), batch, NO_LOSS)


@pytest.mark.parametrize("name", ["load_balance", "z", "a b"])
def test_names_of_the_losses_of_all_layers_are_taken(name):
    with pytest.raises(
        ConfigError, match=rf"ffn.router.losses\(\) = '{name}': must be"
    ):
        check(moe(Relu(name=name)), "config.ffn")
