"""The library is the same in both modes of nnx, whichever a user has set."""

import dataclasses

import jax
import pytest
from flax import nnx

from experiments.sharding.matrix import LAYERS, VOCAB, batch
from moex.model.decode import generate
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.spec import init_guard, model_spec
from moex.moe.chain import Chain
from moex.moe.experts.latent import Latent
from moex.moe.replay import recorded
from moex.moe.routers.topp import TopP
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.rope import Linear, Llama3, Yarn
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.train.step import make_train_step
from tests.helpers import TASK, built, tiny_lm, tiny_moe

SCALINGS = (
    Linear(factor=2.0),
    Llama3(factor=8.0, original=16),
    Yarn(factor=2.0, original=16),
)
LATENT_ATTENTION = LatentAttention(
    heads=2, kv_latent=8, nope_dim=4, rope_dim=4, v_dim=4, rope_scaling=SCALINGS[2]
)
SEGMENT = Segment(
    pattern=(
        tiny_moe(experts=Latent(hidden=8, latent=4, group=4)),
        Chain(
            moe=tiny_moe(router=TopP(p=[0.3, 0.6], k_max=4)),
            iterations=2,
            routers="shared",
        ),
    ),
    attention=(Attention(heads=2, rope_scaling=SCALINGS[2]), LATENT_ATTENTION),
    repeat=2,
)
MODEL = tiny_lm(SEGMENT)
BATCH = batch(2)


@pytest.fixture(params=[True, False], ids=["graphs", "trees"])
def mode(request):
    with nnx.set_graph_mode(request.param):
        yield request.param


@pytest.mark.thorough
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_a_model_holds_numbers_that_do_not_follow_its_config(mode, scaling):
    cfg = tiny_lm(attention=Attention(heads=2, rope_scaling=scaling))
    before = model_spec(cfg)
    assert hash(before.graphdef) == hash(model_spec(cfg).graphdef)
    cfg.attention.rope_scaling.factor *= 2
    after = model_spec(cfg)
    assert before.graphdef != after.graphdef


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_can_be_hashed(name):
    attention = Attention(heads=2)
    cfg = LM(
        dim=16,
        attention=attention,
        layers=(Segment(pattern=(LAYERS[name],)),),
        vocab=VOCAB,
    )
    spec = model_spec(cfg)
    hash(spec.graphdef)
    hash(tuple(spec.info.items()))


@pytest.mark.thorough
def test_training_is_traced(mode):
    spec = model_spec(MODEL)
    optim = Optim(rule=AdamW(), lr=0.1)
    tx, _ = make_optimizer(optim, 10, spec.params, spec.info)
    step = make_train_step(
        TASK,
        spec,
        tx,
        Loss(),
        grad_accum=2,
        num_domains=1,
        optim=optim,
        compute=Compute(),
    )
    state = {
        "params": spec.params,
        "state": spec.state,
        "opt": jax.eval_shape(tx.init, spec.params),
        "guard": jax.eval_shape(init_guard),
    }
    new, metrics = jax.eval_shape(step, state, 0, jax.random.key(0), BATCH)
    assert jax.tree.map(lambda a: a.shape, new["params"]) == jax.tree.map(
        lambda a: a.shape, spec.params
    )
    assert metrics["loss"].shape == ()


def test_recording_is_traced(mode):
    spec, params, state = built(MODEL)
    ctx = TASK.context(dict(BATCH), mode="eval", collect=True)
    aux = jax.eval_shape(lambda p, s: spec.merge(p, s)(ctx)[1], params, state)
    assert len(jax.tree.leaves(recorded(aux))) == 9  # expert, gate, keep, three times


@pytest.mark.thorough
def test_what_the_library_generates_needs_no_mode():
    """In the mode that nnx starts in: the command line, once, set the other."""
    assert nnx.set_graph_mode.current_value()
    cfg = tiny_lm(
        dataclasses.replace(
            SEGMENT,
            repeat=1,
            pattern=SEGMENT.pattern[:1],
            attention=SEGMENT.attention[1:],
        )
    )
    spec, params, state = built(cfg)
    (new,) = generate(spec, cfg, params, state, [[1, 2, 3]], max_new_tokens=3)
    assert len(new) == 3
