"""LoRA on every matrix of a model, against the model whose matrices have the change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.adapters.lora import LoRA
from moex.config.base import ConfigError
from moex.model.paths import flat_paths, nested, path_name
from moex.model.spec import init_params, model_spec
from moex.moe.experts.glu import Glu
from moex.nn.context import Compute, Context
from moex.nn.mla import LatentAttention
from moex.nn.stack import Segment
from tests.helpers import VOCAB, tiny_lm, tiny_moe
from tests.marks import slow, thorough
from tests.tolerances import assert_close

EVERYTHING = (
    *("*attention/w_*", "*ffn/w_*", "shared", "experts/w_"),
    *("router/w_DE", "w_embed_VD", "w_logits_DV"),
)


LATENT = {"heads": 2, "kv_latent": 8, "q_latent": 8, "nope_dim": 4, "rope_dim": 2}
MODELS = {
    "grouped queries": tiny_lm(),
    "latent attention, biases": tiny_lm(
        Segment(pattern=(tiny_moe(experts=Glu(hidden=8, bias=True)),), repeat=2),
        attention=LatentAttention(**LATENT, v_dim=4),
    ),
}


def adapted_model(base=None, **fields):
    """(base spec, adapted spec, adapted params with a random change, state)."""
    base = base or MODELS["grouped queries"]
    lora = LoRA(**{"rank": 2, "alpha": 4.0, "targets": EVERYTHING} | fields)
    cfg = dataclasses.replace(base, adapter=lora)
    params, state = init_params(cfg, jax.random.key(0))
    random = np.random.default_rng(0)

    def changed(path, array):
        if "adapters" not in path_name(path):
            return array
        return jnp.asarray(0.1 * random.normal(size=array.shape), array.dtype)

    params = jax.tree_util.tree_map_with_path(changed, params)
    return model_spec(base), model_spec(cfg), params, state


def merged(params, shapes, scale):
    """The parameters of the base with each change added, in float64."""
    flat = flat_paths(params)
    full = {n: np.asarray(a, np.float64) for n, a in flat.items() if n in shapes}
    for name in flat:
        if not name.endswith("/a_INR"):
            continue
        owner, _, own = name.removesuffix("/a_INR").rpartition("adapters/")
        a, b = (np.asarray(flat[n], np.float64) for n in (name, name[:-5] + "b_NRO"))
        b = b.reshape(*a.shape[:-3], *a.shape[-2:], -1)
        change = scale * np.einsum("...inr,...nro->...ino", a, b)
        target = f"{owner}{own}"
        if "experts/" in target and change.ndim == 4:  # all experts share it
            change = np.repeat(change[:, None], full[target].shape[1], axis=1)
        full[target] = full[target] + change.reshape(full[target].shape)
    return full


def as_params(flat):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), nested(flat))


def tokens(rows=2, length=12):
    return jax.random.randint(jax.random.key(1), (rows, length), 0, VOCAB)


def context(token_BL, **compute):
    B, L = token_BL.shape
    return Context(
        segment_BL=jnp.ones((B, L), jnp.int32),
        position_BL=jnp.broadcast_to(jnp.arange(L), (B, L)),
        token_BL=token_BL,
        mode="eval",
        compute=Compute(**compute),
    )


def logits(spec, params, state, **compute):
    ctx = context(tokens(), **compute)
    return jax.jit(lambda p: spec.merge(p, state)(ctx)[0])(params)


COMPUTE = {
    "unrolled": {"scan_layers": False},
    "xla": {"kernels": "xla"},
    "bfloat16": {"kernels": "xla", "dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    ("model", "compute"),
    [
        slow("grouped queries", "unrolled"),
        slow("grouped queries", "bfloat16"),
        thorough("latent attention, biases", "xla"),
    ],
)
def test_it_is_the_model_with_changed_matrices(model, compute):
    targets = tuple(
        t for t in EVERYTHING if model == "grouped queries" or t != "*ffn/w_*"
    )
    base, adapted, params, state = adapted_model(MODELS[model], targets=targets)
    full = as_params(merged(params, base.shapes(), 2.0))
    own = logits(adapted, params, state, **COMPUTE[compute])
    kind = "bfloat16" if compute == "bfloat16" else "step"
    whole = logits(base, full, state, **COMPUTE[compute])
    largest = float(jnp.max(jnp.abs(whole)))
    assert_close(own / largest, whole / largest, kind)
    plain = {n: a for n, a in flat_paths(params).items() if n in base.shapes()}
    start = logits(base, as_params(plain), state, **COMPUTE[compute])
    assert float(jnp.max(jnp.abs(own - start))) > 0.1


@pytest.mark.thorough
def test_experts_may_share_a_change():
    model = tiny_lm(Segment(pattern=(tiny_moe(),), repeat=2))
    fields = {"targets": ("experts/w_",), "shared": True}
    base, adapted, params, state = adapted_model(model, **fields)
    full = as_params(merged(params, base.shapes(), 2.0))
    own, whole = (logits(*m, state) for m in ((adapted, params), (base, full)))
    largest = float(jnp.max(jnp.abs(whole)))
    assert_close(own / largest, whole / largest, "step")


@pytest.mark.thorough
def test_its_gradients_are_those_of_the_changed_matrices():
    model = tiny_lm(Segment(pattern=(tiny_moe(),)))
    targets = tuple(t for t in EVERYTHING if t != "*ffn/w_*")
    base, adapted, params, state = adapted_model(model, targets=targets)
    full = as_params(merged(params, base.shapes(), 2.0))
    target = jax.random.normal(jax.random.key(2), logits(base, full, state).shape)

    def loss(spec, params):
        ctx = context(tokens(), kernels="xla")
        return jnp.vdot(spec.merge(params, state)(ctx)[0], target)

    own = flat_paths(jax.jit(jax.grad(lambda p: loss(adapted, p)))(params))
    of_full = flat_paths(jax.jit(jax.grad(lambda p: loss(base, p)))(full))
    flat = flat_paths(params)
    for name in flat:
        if not name.endswith("/a_INR"):
            continue
        owner, _, weight = name.removesuffix("/a_INR").rpartition("adapters/")
        a, b = flat[name], flat[name[:-5] + "b_NRO"]
        shape, b = b.shape, b.reshape(*a.shape[:-3], *a.shape[-2:], -1)
        g = of_full[f"{owner}{weight}"].reshape(*a.shape[:-1], b.shape[-1])
        expected_a = 2.0 * jnp.einsum("...ino,...nro->...inr", g, b)
        expected_b = 2.0 * jnp.einsum("...ino,...inr->...nro", g, a)
        for found, expected in (
            (own[name], expected_a),
            (own[name[:-5] + "b_NRO"], expected_b.reshape(shape)),
        ):
            largest = float(jnp.max(jnp.abs(expected)))
            assert_close(found / largest, expected / largest, "step", name)


def test_at_the_start_it_is_the_base():
    base = tiny_lm()
    targets = tuple(t for t in EVERYTHING if t != "experts/w_")
    lora = LoRA(rank=2, alpha=4.0, targets=targets, dropout=0.5)
    cfg = dataclasses.replace(base, adapter=lora)
    params, state = init_params(cfg, jax.random.key(0))
    spec = model_spec(base)
    plain = as_params(
        {n: a for n, a in flat_paths(params).items() if n in spec.shapes()}
    )
    own = logits(model_spec(cfg), params, state)
    np.testing.assert_array_equal(own, logits(spec, plain, state))


def test_only_adapters_and_what_is_asked_for_are_trained():
    lora = LoRA(rank=2, alpha=4.0, targets=("attention",), also_train=("router",))
    info = model_spec(dataclasses.replace(tiny_lm(), adapter=lora)).info
    trained = {n for n, i in info.items() if not i.frozen and i.rule is None}
    assert all("/adapters/" in n or "router/w_DE" in n for n in trained)
    assert sum("router/w_DE" in n for n in trained) == 1
    assert any("/attention/adapters/w_q_DGRA/" in n for n in trained)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"targets": ("atention",)},
            "'atention' matches no .*Did you mean 'attention'",
        ),
        ({"targets": ("norm",)}, "'norm' matches .*scale_D.*takes no adapter"),
        ({"targets": ("q_proj",)}, "made of attention, .*embed.*, w_q_DGRA"),
        ({"targets": ()}, r"targets = \(\): must be not empty"),
        ({"targets": ("attention", " ")}, "targets = ' ': must be a pattern"),
        ({"rank": 0}, "rank = 0: must be at least 1"),
        ({"alpha": 0.0}, "alpha = 0.0: must be above 0"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"also_train": ("ruoter",)}, "'ruoter' matches no"),
    ],
)
def test_a_mistake_is_one_clear_line(fields, told):
    fields = {"rank": 2, "alpha": 4.0, "targets": ("attention",)} | fields
    lora = LoRA(**fields)
    with pytest.raises(ConfigError, match=told):
        lora.validate("config.model.adapter")
        model_spec(dataclasses.replace(tiny_lm(), adapter=lora))
