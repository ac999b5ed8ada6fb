"""The scanned stack against a plain loop over its layers.

B batch · L length · D model width
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.config.base import Config, ConfigError, check
from moex.model.paths import flat_paths
from moex.nn.attention import Attention
from moex.nn.block import Block
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.helpers import XLA, built, context, split_module, tiny_lm, tiny_moe
from tests.marks import slow
from tests.tolerances import assert_close

B, L, D = 2, 6, 16
ATTENTION = Attention(heads=2)
# Two kinds of feed-forward, three times: the layers are 0 to 5.
PATTERN = (tiny_moe(num_experts=3), Dense(hidden=8))
REPEAT = 3


@pytest.fixture(scope="module")
def stack():
    """(graphdef, params, state, x_BLD, ctx)."""
    segment = Segment(pattern=PATTERN, repeat=REPEAT)
    module = segment.make(ATTENTION, D, nnx.Rngs(params=0), norm_eps=1e-6)
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, D))
    return *split_module(module), x_BLD, context(B, L, num_padding=1, compute=XLA)


def loss_and_aux(stack, ctx):
    """((loss, aux), gradients of params) of the scanned stack."""
    graphdef, params, state, x_BLD, _ = stack

    def loss(params):
        y_BLD, aux, cache = nnx.merge(graphdef, params, state)(x_BLD, ctx, None)
        assert cache is None
        return jnp.mean(y_BLD**2) + jnp.sum(_balance(aux)), (y_BLD, aux)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def _balance(aux):
    return aux["blocks"]["0"]["ffn"]["losses"]["load_balance"]


@pytest.fixture(scope="module")
def scanned(stack):
    return loss_and_aux(stack, stack[-1])


def test_scan_is_a_loop_over_sliced_parameters(stack, scanned):
    _, params, state, x_BLD, ctx = stack

    def one_block(position):
        block = Block(
            PATTERN[position], ATTENTION, D, nnx.Rngs(params=0), norm_eps=1e-6
        )
        graphdef = nnx.graphdef(block)
        return jax.jit(lambda p, s, x: nnx.merge(graphdef, p, s)(x, ctx, None)[:2])

    blocks = [one_block(position) for position in range(len(PATTERN))]
    balance, y_BLD = [], x_BLD
    for r in range(REPEAT):
        for position, block in enumerate(blocks):
            sliced = [
                jax.tree.map(lambda a, r=r: a[r], tree["blocks"].get(position, {}))
                for tree in (params, {"blocks": {}} | state)
            ]
            y_BLD, aux = block(*sliced, y_BLD)
            if aux["ffn"]:
                balance.append(aux["ffn"]["losses"]["load_balance"])
    (_, (scanned_BLD, aux)), _ = scanned
    assert_close(scanned_BLD, y_BLD, "order")
    assert_close(_balance(aux), balance, "order")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "change",
    [
        {"remat": "full"},
        *(slow({"remat": "dots"}), slow({"scan_layers": False})),
        slow({"scan_layers": False, "remat": "full"}),
    ],
    ids=str,
)
def test_rematerialisation_and_unrolling_change_nothing(stack, scanned, change):
    compute = dataclasses.replace(XLA, **change)
    ctx = dataclasses.replace(stack[-1], compute=compute)
    (loss, (y_BLD, aux)), grads = loss_and_aux(stack, ctx)
    (expected_loss, (expected_BLD, expected_aux)), expected_grads = scanned
    # Six blocks deep, each with its sums in another order.
    assert_close(loss, expected_loss, "step")
    assert_close(y_BLD, expected_BLD, "step")
    for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(expected_aux), strict=True):
        assert_close(a, b, "step")
    for path, gradient in flat_paths(grads).items():
        assert_close(gradient, flat_paths(expected_grads)[path], "step", path)


def test_aux_mirrors_the_modules_and_is_stacked(scanned):
    (_, (_, aux)), _ = scanned
    assert aux["blocks"].keys() == {"0", "1"}
    assert aux["blocks"]["1"]["ffn"] == {}
    assert aux["blocks"]["0"]["ffn"]["load"].shape == (REPEAT, 3)
    # Ten tokens that are not padding, k = 2.
    load_sum = jnp.sum(aux["blocks"]["0"]["ffn"]["load"], axis=1)
    np.testing.assert_array_equal(load_sum, [20] * REPEAT)


def test_layers_start_different(stack):
    for path, leaf in flat_paths(stack[1]).items():
        if "norm" in path:
            continue
        assert leaf.shape[0] == REPEAT
        assert jnp.any(leaf[0] != leaf[1]), path


def test_paths_of_a_heterogeneous_model():
    cfg = tiny_lm(
        Segment(pattern=(Dense(hidden=4),)),
        Segment(pattern=(tiny_moe(4, shared=None), tiny_moe(2)), repeat=2),
        attention=ATTENTION,
        tied_embeddings=True,
    )
    assert cfg.num_layers() == 5
    spec, params, state = built(cfg)
    attention = ["attention/w_kv_D2GA", "attention/w_out_GRAD", "attention/w_q_DGRA"]
    norms = ["norm_attention/scale_D", "norm_ffn/scale_D"]
    dense = ["w_in_D2F", "w_out_FD"]
    moe = ["experts/w_in_ED2F", "experts/w_out_EFD", "router/w_DE"]
    feed_forward = {
        "segments/0/blocks/0": dense,
        "segments/1/blocks/0": moe,
        "segments/1/blocks/1": moe + [f"shared/{name}" for name in dense],
    }
    expected = {"norm/scale_D", "w_embed_VD"}
    for block, names in feed_forward.items():
        expected |= {f"{block}/{name}" for name in attention + norms}
        expected |= {f"{block}/ffn/{name}" for name in names}
    assert flat_paths(params).keys() == expected
    biases = {f"segments/1/blocks/{i}/ffn/router/bias_E" for i in (0, 1)}
    assert flat_paths(state).keys() == biases
    assert spec.info.keys() == expected | biases
    for path, leaf in flat_paths(params).items():
        stacked = leaf.ndim - len(spec.info[path].axes)
        assert stacked == (1 if path.startswith("segments") else 0), path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ()}, r"layers\[0\].pattern = \(\): must be not empty"),
        ({"repeat": 0}, r"layers\[0\].repeat = 0: must be at least 1"),
        (
            {"pattern": (Config(),)},
            "must be a feed-forward config such as Dense or MoE",
        ),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        check(Segment(**{"pattern": PATTERN} | fields), "config.model.layers[0]")
