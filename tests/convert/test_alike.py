"""Similarities that are measured on data: against loops over tokens and differences.

T tokens · E experts · F expert width · D model width
"""

import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.convert.kinds.merged import Merged
from moex.convert.merge import similarity
from moex.convert.used import Counter
from moex.model.losses import moe_layers
from moex.model.paths import flat_paths, nested
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.zero import Zero
from moex.nn.attention import Attention
from moex.nn.stack import Segment
from moex.sharding import MeshConfig
from tests import runs
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.marks import slow
from tests.moe import oracle

E, F, D = 5, 3, 8
MOE = tiny_moe(
    E, shared=None, experts=Glu(hidden=F), capacity_factor=0.8, zero=Zero(copy=1)
)
CHAIN = Segment(pattern=(Chain(moe=MOE, iterations=2),))
SMALL = {"dim": D, "attention": Attention(heads=2)}
MODEL = tiny_lm(Segment(pattern=(MOE,), repeat=2), CHAIN, **SMALL)
ONE_LAYER = tiny_lm(Segment(pattern=(MOE,)), **SMALL)
PATHS = {0: ("segments/0/blocks/0/ffn", 0), 1: ("segments/0/blocks/0/ffn", 1)}
PATHS |= {2: ("segments/1/blocks/0/ffn", 0)}
BATCHES = [random_batch(2, 12, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def model():
    return built(MODEL)


def used_by(cfg, arrays, name, align="dominant", layers="all"):
    spec, params, state = arrays
    cfg = types.SimpleNamespace(model=cfg, task=TASK, batch_size=2)
    with runs.one_device():
        run = types.SimpleNamespace(cfg=cfg, spec=spec, state=state, params=params)
        job = types.SimpleNamespace(
            cfg=cfg,
            mesh=MeshConfig().make(),
            batches=lambda start: iter(BATCHES),
            compute=lambda train: XLA,
            num_domains=2,
        )
        options = Merged(groups=2, similarity=name, align=align, layers=layers)
        return Counter(run, job, 4, options).used(params)


def layer_of(flat, number):
    """The weights of the experts of a layer, float64."""
    path, r = PATHS[number]
    start = f"{path}/experts/"
    own = {k.removeprefix(start): v for k, v in flat.items() if k.startswith(start)}
    return {k: np.float64(np.asarray(v)[r]) for k, v in own.items()}


def in_order(w, e, order):
    """The expert with its hidden units in another order."""
    order = list(order)
    return {
        "w_in_ED2F": w["w_in_ED2F"][e][:, :, order],
        "w_out_EFD": w["w_out_EFD"][e][order],
    }


def orders_like_the_first(w):
    """For each expert the best of all orders of hidden units, by trying them."""

    def likeness(e, order):
        moved = in_order(w, e, order)
        return sum(np.sum(moved[name] * w[name][0]) for name in w)

    every = list(itertools.permutations(range(F)))
    return [max(every, key=lambda order, e=e: likeness(e, order)) for e in range(E)]


@pytest.fixture(scope="module")
def tokens(model):
    """By layer: (x_D, {expert: gate}) of each valid token and round, after capacity."""
    spec, params, state = model

    @jax.jit
    def layers(batch):
        ctx = TASK.context(batch, mode="eval", collect=True, compute=XLA)
        aux = spec.merge(params, state)(ctx)[1]
        found = {"/".join(path): own for path, own in moe_layers(aux)}
        return {
            path: {"trace": own["trace"], "x": own["inputs"]}
            for path, own in found.items()
        }

    found = {number: [] for number in PATHS}
    for batch in BATCHES:
        aux, valid_T = jax.device_get(layers(batch)), (batch["segment"] > 0).ravel()
        for number, (path, r) in PATHS.items():
            own = jax.tree.map(lambda a, r=r: a[r], aux[path])
            rounds = [(own["trace"], own["x"])]
            if number == 2:
                rounds = [(own["trace"][t], own["x"][int(t)]) for t in "01"]
            for trace, x in rounds:
                slots = zip(trace["expert"], trace["gate"], trace["keep"], strict=True)
                gates = [
                    {int(e): g for e, g, keep in zip(*slot, strict=True) if keep}
                    for slot in slots
                ]
                capacity = math.ceil(0.8 * 2 * len(gates) / (E + 1))
                kept = oracle.keep_within(capacity, gates, E)
                rows = zip(np.float64(x.reshape(-1, D)), kept, valid_T, strict=True)
                found[number] += [(x_D, own) for x_D, own, valid in rows if valid]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("align", ["none", slow("dominant")])
def test_pairs_merge_with_an_error_over_the_tokens_of_both(model, tokens, align):
    """And inputs and scores of an expert are means over its tokens."""
    found, flat = used_by(MODEL, model, "mse", align), flat_paths(model[1])
    for number in PATHS:
        w, sums, count = layer_of(flat, number), np.zeros((E, D)), np.zeros(E)
        gate_norm = np.zeros(E)
        order = orders_like_the_first(w)
        if align == "none":
            order = [tuple(range(F))] * E
        for x_D, gates in tokens[number]:
            for e in set(gates) - {E}:  # the last one computes nothing
                sums[e] += x_D
                count[e] += 1
                norm = np.linalg.norm(oracle.glu_expert(MOE.experts, x_D, w, e))
                gate_norm[e] += gates[e] / sum(gates.values()) * norm
        expected = np.zeros((E, E))
        for i, j in itertools.combinations(range(E), 2):
            one, two = in_order(w, i, order[i]), in_order(w, j, order[j])
            both = {name: np.stack([(one[name] + two[name]) / 2]) for name in one}
            for x_D, gates in tokens[number]:
                m_D = oracle.glu_expert(MOE.experts, x_D, both, 0)
                for e in {i, j} & set(gates):
                    f_D = oracle.glu_expert(MOE.experts, x_D, w, e)
                    expected[i, j] += np.sum((m_D - f_D) ** 2)
        expected = (expected + expected.T) / len(tokens[number])
        own, mean = found[number], sums / np.maximum(count, 1)[:, None]
        np.testing.assert_array_equal(own.count_E, count)
        np.testing.assert_allclose(own.gate_norm_E, gate_norm, rtol=1e-4)
        np.testing.assert_allclose(own.input_gram_EE, mean @ mean.T, rtol=1e-4)
        np.testing.assert_allclose(own.merge_error_EE, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.thorough
def test_layers_that_do_not_merge_are_not_looked_at():
    """Such as one whose experts share weights already: it stores fewer than E."""
    pair = (tiny_moe(E, shared=None, stored_experts=2), tiny_moe(E, shared=None))
    cfg = tiny_lm(Segment(pattern=pair), **SMALL)
    found = used_by(cfg, built(cfg), "logits", layers="1")
    assert list(found) == [1] and found[1].count_E.sum() > 0


@pytest.mark.slow
def test_gradients_are_those_of_differences():
    spec, params, state = model = built(ONE_LAYER)
    flat, path = flat_paths(params), "segments/0/blocks/0/ffn/experts"
    contexts = [TASK.context(b, mode="eval", compute=XLA) for b in BATCHES]

    def losses(name, values):
        """The losses of all tokens for each of these values of one array."""

        def of_one(value):
            new = nested(flat | {f"{path}/{name}": value})
            model = spec.merge(new, state)
            both = [
                TASK.losses(model(ctx)[0], batch)[0] * batch["loss_mask"]
                for ctx, batch in zip(contexts, BATCHES, strict=True)
            ]
            return jnp.stack(both)

        return jax.lax.map(of_one, values)

    losses = jax.jit(losses, static_argnums=0)
    w, slopes, step = layer_of(flat, 0), {}, 1e-2
    for name, value in w.items():
        total = 0.0
        for sign in (1, -1):
            moved = value.ravel() + sign * step * np.eye(value.size)
            moved = jnp.asarray(moved.reshape(-1, 1, *value.shape), jnp.float32)
            told = np.float64(losses(name, moved)).reshape(value.size, -1)
            total = total + sign * told.sum(1) / (2 * step)
        slopes[name] = total.reshape(value.shape)
    order = orders_like_the_first(w)
    rows = [
        np.concatenate([v.ravel() for v in in_order(slopes, e, order[e]).values()])
        for e in range(E)
    ]
    expected = np.array(rows) @ np.array(rows).T
    gram = used_by(ONE_LAYER, model, "gradients")[0].gradient_gram_EE
    np.testing.assert_allclose(gram, expected, rtol=0, atol=3e-3 * expected.max())
    assert np.abs(similarity(gram)[0, 1:] - 0.5).max() > 0.05
