"""The language model: shapes, tied embeddings, gradients everywhere.

B batch · L length · D model width · V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import ConfigError, check
from moex.model.paths import flat_paths
from moex.model.spec import init_params, model_spec
from moex.moe.chain import Chain
from moex.moe.replay import recorded
from moex.moe.routers.hash import Hash, hashed_experts, own_seed
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.mlp import Dense
from moex.nn.norm import RMSNorm
from moex.nn.stack import Segment
from moex.tasks.lm import token_losses
from tests.helpers import (
    TASK,
    VOCAB,
    XLA,
    built,
    context,
    random_batch,
    tiny_lm,
    tiny_moe,
)
from tests.tolerances import assert_close

BATCH = random_batch(4, 12)
DENSE = (Segment(pattern=(Dense(hidden=8),)),)
SPARSE = (Segment(pattern=(tiny_moe(),)),)


def gradients(cfg):
    spec, params, state = built(cfg)
    ctx = TASK.context(BATCH, compute=XLA)

    def loss(params):
        logits_BLV, aux = spec.merge(params, state)(ctx)
        nll_BL, _ = token_losses(logits_BLV, jnp.asarray(BATCH["targets"]))
        return jnp.sum(nll_BL * BATCH["loss_mask"])

    return params, jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(dtype):
    cfg = tiny_lm()
    spec = model_spec(cfg)
    ctx = TASK.context(BATCH, compute=Compute(dtype=dtype))
    run = lambda params, state: spec.merge(params, state)(ctx)  # noqa: E731
    logits, aux = jax.eval_shape(run, spec.params, spec.state)
    assert (logits.shape, logits.dtype) == ((4, 12, VOCAB), jnp.float32)
    assert aux["segments"].keys() == {"0", "1"}
    for leaf in jax.tree.leaves((spec.params, spec.state, aux)):
        assert leaf.dtype == jnp.float32


def test_every_parameter_gets_a_gradient():
    params, grads = gradients(tiny_lm(*SPARSE))
    used = np.unique(BATCH["tokens"][BATCH["loss_mask"] > 0])
    for path, gradient in flat_paths(grads).items():
        assert gradient.shape == flat_paths(params)[path].shape
        assert jnp.all(jnp.isfinite(gradient)), path
        assert jnp.any(gradient != 0), path
    embed_V = jnp.any(grads["w_embed_VD"] != 0, axis=1)
    assert jnp.all(embed_V[used])


@pytest.mark.thorough
def test_tied_embeddings_are_one_leaf_with_the_sum_of_both_gradients():
    cfg, tied = (tiny_lm(*DENSE, tied_embeddings=t) for t in (False, True))
    (spec, params, state), (tied_spec, _, _) = built(cfg), built(tied)
    assert "w_logits_DV" not in tied_spec.params
    params = params | {"w_logits_DV": params["w_embed_VD"].T}
    tied_params = {k: v for k, v in params.items() if k != "w_logits_DV"}

    def grad(spec, params):
        def loss(params):
            logits_BLV, _ = spec.merge(params, state)(TASK.context(BATCH))
            nll_BL, _ = token_losses(logits_BLV, jnp.asarray(BATCH["targets"]))
            return jnp.mean(nll_BL)

        return jax.jit(jax.grad(loss))(params)

    both, one = grad(spec, params), grad(tied_spec, tied_params)
    expected_VD = both["w_embed_VD"] + both["w_logits_DV"].T
    assert_close(one["w_embed_VD"], expected_VD, "step")
    # The input side reaches only tokens of the batch.
    unused = np.setdiff1d(np.arange(VOCAB), BATCH["tokens"])
    assert len(unused)
    assert jnp.all(both["w_embed_VD"][unused] == 0)


def test_packed_documents_do_not_see_each_other():
    """Changing the first document moves no logit of the others."""
    spec, params, state = built(tiny_lm(*SPARSE))
    run = jax.jit(
        lambda batch: spec.merge(params, state)(TASK.context(batch, compute=XLA))[0]
    )
    changed = (BATCH["segment"] == 1).astype(np.int32)
    other = dict(BATCH, tokens=(BATCH["tokens"] + changed) % VOCAB)
    logits, moved = run(BATCH), run(other)
    elsewhere = BATCH["segment"] > 1
    assert_close(moved[elsewhere], logits[elsewhere], "order")
    here = BATCH["segment"] == 1
    assert jnp.all(jnp.any(moved[here] != logits[here], axis=-1))


def test_initial_loss_is_nearly_that_of_a_uniform_guess():
    cfg = tiny_lm(*DENSE, dim=64, vocab=500)
    batch = random_batch(4, 32, vocab=500)
    spec = model_spec(cfg)

    @jax.jit
    def nll(key):
        logits_BLV, _ = spec.merge(*init_params(cfg, key))(TASK.context(batch))
        return token_losses(logits_BLV, jnp.asarray(batch["targets"]))[0]

    nll_BL = nll(jax.random.key(0))
    mean = np.sum(nll_BL * batch["loss_mask"]) / batch["loss_mask"].sum()
    # Logits of unit variance cost half a nat over log V.
    assert np.log(500) < mean < np.log(500) + 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norm_by_hand(dtype):
    norm = RMSNorm(2, nnx.Rngs(params=0), eps=0.5)
    norm.scale_D[...] = jnp.array([1.0, 2.0])
    # mean square of (1, 2) is 2.5; 1 / sqrt(3) = 0.57735.
    y = norm(jnp.array([[1.0, 2.0]], dtype))
    assert y.dtype == dtype
    assert_close(y, [[0.57735, 2.309401]], dtype)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 0}, "config.model.dim = 0"),
        (
            {"dim": 18},
            r"heads = 4: must be so many that dim = 18 is heads times an even width",
        ),
        (
            {"dim": 12},
            r"heads = 4: must be so many that dim = 12 is heads times an even width",
        ),
        ({"vocab": 1}, "vocab = 1: must be at least 2"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0: must be above 0"),
        ({"layers": ()}, "layers = .*must be not empty"),
    ],
)
def test_refusals(fields, message):
    cfg = tiny_lm(Segment(pattern=(tiny_moe(),)), attention=Attention(heads=4))
    for name, value in fields.items():
        setattr(cfg, name, value)
    with pytest.raises(ConfigError, match=message):
        check(cfg, "config.model")


@pytest.mark.thorough
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_block_of_a_model_hashes_on_its_own(scan_layers):
    """Copies of a segment, blocks of a pattern, segments, and rounds of a chain."""
    moe = tiny_moe(router=Hash(k=2), shared=None)
    model = tiny_lm(
        Segment(pattern=(moe, moe), repeat=2),
        Segment(pattern=(Chain(moe=moe, iterations=2, routers="shared"),)),
    )
    spec, params, state = built(model)
    token_BL = jnp.arange(12)[None]
    compute = Compute(scan_layers=scan_layers)
    ctx = context(1, 12, token_BL=token_BL, collect=True, compute=compute)
    aux = jax.jit(lambda p: spec.merge(p, state)(ctx)[1])(params)
    forced = recorded(aux)
    ids = [
        leaf.reshape(-1, 24)
        for path, leaf in jax.tree_util.tree_leaves_with_path(forced)
        if "expert" in jax.tree_util.keystr(path)
    ]
    rows = np.concatenate([np.asarray(a) for a in ids])
    assert len(rows) == 6
    assert len({row.tobytes() for row in rows}) == 6
    first = hashed_experts(token_BL[0], 8, 2, own_seed(0, 0, 0))
    np.testing.assert_array_equal(rows[0].reshape(12, 2), first)
    last = hashed_experts(token_BL[0], 8, 2, own_seed(0, 4, 1))
    np.testing.assert_array_equal(rows[-1].reshape(12, 2), last)
