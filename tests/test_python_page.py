"""The examples of docs/python.md, which run one after the other as in a notebook."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moex
from tests.marks import thorough_but_for

PAGE = pathlib.Path(__file__).parents[1] / "docs/python.md"


@pytest.fixture(scope="module")
def page():
    names: dict = {}
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def test_a_layer_is_called_on_an_array(page):
    y_BLD, aux = page["y_BLD"], page["aux"]
    assert y_BLD.shape == (4, 16, 32)
    assert float(aux["load"].sum()) == 4 * 12 * 2


def test_a_model_of_ones_own_learns_with_a_layer_in_it(page):
    assert page["losses"][0] > 2 and page["losses"][-1] < 0.1


KINDS = {
    "moe": moex.MoE(num_experts=4, router=moex.TopK(k=2), experts=moex.Glu(hidden=8)),
    "dense": moex.Dense(hidden=8),
}
KINDS["chain"] = moex.Chain(moe=KINDS["moe"], iterations=2)
KINDS["narrow"] = moex.Narrow(latent=4, inner=KINDS["moe"])


@pytest.mark.parametrize("kind", thorough_but_for(KINDS, "dense", "narrow"))
def test_without_a_context_each_row_is_one_whole_document(kind):
    config = KINDS[kind]
    moex.check(config)
    layer = config.make(8, nnx.Rngs(0))
    x_BLD = jax.random.normal(jax.random.key(0), (2, 3, 8))
    whole = moex.Context(
        segment_BL=jnp.ones((2, 3), jnp.int32),
        position_BL=jnp.tile(jnp.arange(3)[None], (2, 1)),
        mode="eval",
    )
    alone, told = layer(x_BLD)[0], layer(x_BLD, whole)[0]
    np.testing.assert_array_equal(alone, told)


def test_a_context_made_of_an_array_takes_other_fields():
    x_BLD = jnp.zeros((2, 3, 8))
    segment_BL = jnp.array([[1, 1, 0], [1, 2, 2]])
    ctx = moex.Context.of(x_BLD, segment_BL=segment_BL, mode="train", collect=True)
    assert ctx.mode == "train" and ctx.collect
    np.testing.assert_array_equal(ctx.valid_BL, segment_BL > 0)
    np.testing.assert_array_equal(ctx.position_BL, [[0, 1, 2]] * 2)


@pytest.mark.thorough
def test_a_router_that_needs_token_ids_says_so():
    config = moex.MoE(num_experts=4, router=moex.Hash(k=1), experts=moex.Glu(hidden=8))
    layer = config.make(8, nnx.Rngs(0))
    x_BLD = jnp.zeros((2, 3, 8))
    with pytest.raises(moex.ConfigError, match="token_BL"):
        layer(x_BLD)
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    layer(x_BLD, moex.Context.of(x_BLD, token_BL=ids))
