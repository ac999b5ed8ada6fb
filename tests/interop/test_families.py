"""Every family against what transformers made of the same weights (`make_fixtures.py`).

T real tokens · K experts chosen per token
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.interop.arrays import tensor_of
from moex.interop.folder import Folder
from moex.model.decode import generate
from moex.model.losses import moe_layers
from moex.model.paths import flat_paths
from tests.helpers import XLA
from tests.interop import parity
from tests.marks import thorough_but_for

families = pytest.mark.parametrize(
    "name", thorough_but_for(parity.NAMES, "mixtral", "deepseek_v3")
)


@functools.cache
def loaded(name):
    return parity.load(name)


def run(name, params=None, collect=True):
    """(logits at real tokens [T, V], {layer: experts [T, K]})."""
    model, spec, arrays, _ = loaded(name)
    ctx = parity.context(parity.expected(name), collect=collect)
    params = arrays["params"] if params is None else params
    logits_BLV, aux = spec.merge(params, arrays["state"])(ctx)
    return logits_BLV, aux


@families
def test_logits_and_choices_are_those_of_transformers(name):
    model, _, _, _ = loaded(name)
    want = parity.expected(name)
    logits_BLV, aux = jax.jit(functools.partial(run, name))()
    got = np.asarray(logits_BLV)[want["mask"]]
    scale = np.abs(want["logits"]).max()
    assert np.abs(got - want["logits"]).max() <= 2e-5 * scale
    chosen = chosen_experts(model, aux, want["mask"])
    theirs = {k: v for k, v in want.items() if k.startswith("experts/")}
    assert chosen.keys() == theirs.keys()
    for layer, experts_TK in theirs.items():
        np.testing.assert_array_equal(chosen[layer], experts_TK)


def chosen_experts(model, aux, mask) -> dict:
    """{"experts/LAYER": int[T, K], sorted}."""
    found = {}
    first = np.cumsum([0, *(s.repeat * len(s.pattern) for s in model.layers)])
    for path, layer in moe_layers(aux):
        s, b = int(path[1]), int(path[3])
        for r, expert in enumerate(np.asarray(layer["trace"]["expert"])):
            number = first[s] + r * len(model.layers[s].pattern) + b
            rows = expert.reshape(*mask.shape, -1)[mask]
            found[f"experts/{number}"] = np.sort(rows, axis=-1)
    return found


@pytest.mark.parametrize(
    "name", thorough_but_for(["mixtral", "deepseek_v3"], "mixtral")
)
def test_gradients_are_those_of_transformers(name):
    _, _, arrays, wanted = loaded(name)
    want = parity.expected(name)
    mask_BL1 = jnp.asarray(want["mask"])[:, :, None]
    count = want["logits"].size

    def loss(params):
        logits_BLV, _ = run(name, params, collect=False)
        return jnp.sum(jnp.where(mask_BL1, logits_BLV, 0.0) ** 2) / count

    grads = flat_paths(jax.jit(jax.grad(loss))(arrays["params"]))
    pieces = {piece.name: piece for piece in wanted}
    compared = 0
    for key, theirs in want.items():
        if not key.startswith("grad/"):
            continue
        for piece, part in parts_of(key.removeprefix("grad/"), theirs, pieces):
            ours = tensor_of(piece, grads[piece.path], np.float32)
            assert np.linalg.norm(ours - part) <= 1e-4 * np.linalg.norm(part), key
            compared += 1
    assert compared > 10


def parts_of(name, grad, pieces):
    """transformers holds the experts of a layer stacked, and saves them one by one."""
    w_gate, w_up, w_down = "gate_proj", "up_proj", "down_proj"
    if any(".block_sparse_moe." in known for known in pieces):
        name = name.replace(".mlp.", ".block_sparse_moe.")
        w_gate, w_up, w_down = "w1", "w3", "w2"
    if name in pieces:
        yield pieces[name], grad
        return
    own, which = name.rsplit(".", 1)
    names = (w_down,) if which == "down_proj" else (w_gate, w_up)
    for e, of_expert in enumerate(grad):
        parts = np.split(of_expert, len(names))
        for part, each in zip(parts, names, strict=True):
            yield pieces[f"{own}.{e}.{each}.weight"], part


@families
def test_every_tensor_leaves_as_it_came(name):
    _, _, arrays, wanted = loaded(name)
    flat = flat_paths(arrays["params"]) | flat_paths(arrays["state"])
    folder = Folder.open(parity.FIXTURES / name)
    for piece in wanted:
        theirs = folder[piece.name].read()
        ours = tensor_of(piece, flat[piece.path], theirs.dtype)
        assert ours.tobytes() == theirs.tobytes(), piece.name


@pytest.mark.parametrize(
    "name",
    thorough_but_for(
        parity.NAMES, "mixtral", later=("deepseek_v2", "olmoe", "qwen3_moe")
    ),
)
def test_greedy_decoding_is_that_of_transformers(name):
    model, spec, arrays, _ = loaded(name)
    want = parity.expected(name)
    prompts = [want["tokens"][1, :9].tolist(), want["tokens"][0, :17].tolist()]
    made = generate(
        spec,
        model,
        arrays["params"],
        arrays["state"],
        prompts,
        max_new_tokens=64,
        temperature=0,
        compute=XLA,
    )
    assert made[0] == want["greedy"].tolist()
