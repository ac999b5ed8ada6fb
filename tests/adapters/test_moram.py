"""MoRAM on matrices of every kind, against float64 loops over tokens.

T tokens · I inputs · O outputs · N parts · E experts
"""

import dataclasses

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moex.adapters import moram
from moex.adapters.attach import adapter_table, attach
from moex.adapters.lora import LoRA
from moex.adapters.moram import MoRAM, atom_weights, consolidated
from moex.config.base import ConfigError
from moex.model.accounting import model_cost
from moex.model.decode import generate
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.moe.experts.glu import Glu
from moex.nn.attention import Attention
from moex.nn.context import Compute
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.projection import look_up, project, project_rows
from tests.helpers import VOCAB, XLA, built, context, split_module, tiny_lm
from tests.marks import thorough, thorough_but_for
from tests.tolerances import assert_close

D, M, R, K, TAU, DELTA, SCALE = 6, 4, 3, 4, 0.3, 0.2, 2.0
SIZES_E = np.array([3, 0, 2])  # rows of each expert
ROWS = int(SIZES_E.sum())


def moram_of(**fields):
    own = {"rank": R, "alpha": SCALE * R, "k": K, "bank": M, "temperature": TAU}
    return MoRAM(**own | {"targets": ("w_",), "threshold": DELTA} | fields)


# The reference: one row, one part, in float64.


def weights(z, k, tau, delta=None, eps=1e-12):
    s = [value / max(np.sqrt(sum(v * v for v in z)), eps) for value in z]
    chosen = sorted(range(len(z)), key=lambda i: (-s[i], i))[:k]
    top = max(s[i] for i in chosen)
    e = {i: np.exp((s[i] - top) / tau) for i in chosen}
    total = sum(e.values())
    w = np.zeros(len(z))
    for i in chosen:
        if delta is None or s[i] >= delta:
            w[i] = e[i] / total
    return w


def atoms_of(own, e=None):
    """(keys [I, N, atoms], values [N, atoms, O]): the bank, then new ones, scaled."""
    own = {name: v if e is None else v[e] for name, v in own.items()}
    a, b = [own["a_INR"]], [SCALE * own["b_NRO"]]
    if "bank_a_INM" in own:
        a, b = [own["bank_a_INM"], *a], [own["bank_b_NMO"], *b]
    b = [values.reshape(*values.shape[:2], -1) for values in b]
    return np.concatenate(a, axis=-1), np.concatenate(b, axis=-2)


def change(x_I, keys, values, delta):
    """What the adapter adds to one row: [N, O]."""
    y_NO = np.zeros((values.shape[0], values.shape[2]))
    for n in range(keys.shape[1]):
        z = [float(x_I @ keys[:, n, i]) for i in range(keys.shape[2])]
        for i, w in enumerate(weights(z, K, TAU, delta)):
            y_NO[n] += w * z[i] * values[n, i]
    return y_NO


# Modules, each with one matrix: (module, name of the matrix, how it multiplies x).


def attention_kv(rngs):
    module = Attention(heads=4, kv_heads=2).make(D, rngs)
    return module, "w_kv_D2GA", lambda m, x, ctx: project(m, "w_kv_D2GA", x, ctx)


def attention_out(rngs):
    module = Attention(heads=2, head_dim=3).make(D, rngs)

    def run(m, x, ctx):
        shape = m.w_out_GRAD.shape[:3]
        return project(m, "w_out_GRAD", x.reshape(-1, *shape), ctx, contract=3)

    return module, "w_out_GRAD", run


def dense_in(rngs):
    module = Dense(hidden=5).make(D, rngs)
    return module, "w_in_D2F", lambda m, x, ctx: project(m, "w_in_D2F", x, ctx)


def experts(name):
    def make(rngs):
        module = Glu(hidden=6).make(D, len(SIZES_E), rngs)
        sizes = jnp.asarray(SIZES_E, jnp.int32)
        return module, name, lambda m, x, ctx: project_rows(m, name, x, sizes, ctx)

    return make


def embedding(rngs):
    cfg = LM(dim=5, attention=Attention(heads=1), layers=(), vocab=D)
    run = lambda m, x, ctx: look_up(m, "w_embed_VD", jnp.argmax(x, -1), ctx)  # noqa: E731
    return cfg.make(rngs), "w_embed_VD", run


KINDS = {
    "attention, two parts": (attention_kv, False),
    "attention, three input dims": (attention_out, False),
    "dense": (dense_in, False),
    "experts in": (experts("w_in_ED2F"), False),
    "experts out": (experts("w_out_EFD"), False),
    "shared by experts": (experts("w_in_ED2F"), True),
    "embedding": (embedding, False),
}
SLOWER = ("attention, two parts", "attention, three input dims", "experts out")


def adapted(kind, *, bank=M, seed=0, k=K):
    """(run(own, x, mode), base's own float64 y [T, N, O], x, own parameters)."""
    make, shared = KINDS[kind]
    module, name, multiply = make(nnx.Rngs(params=0))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, D))
    if kind == "embedding":
        x = np.eye(D)[rng.integers(0, D, ROWS)]
    ctx = context(1, ROWS, compute=XLA)
    base = multiply(module, jnp.asarray(x, jnp.float32), ctx)
    cfg = moram_of(bank=bank, k=k, shared=shared, targets=(name,))
    attach(module, cfg, nnx.Rngs(0))
    graphdef, params, state = split_module(module)
    shapes = params["adapters"][name]
    own = {n: rng.normal(size=a.shape) for n, a in sorted(shapes.items())}

    def run(own, x, mode):
        params["adapters"][name] = own
        adapted = nnx.merge(graphdef, params, state)
        return multiply(adapted, x, dataclasses.replace(ctx, mode=mode))

    parts = module.adapters[name].parts
    return run, np.asarray(base, np.float64).reshape(ROWS, parts, -1), x, own


def reference(kind, base_TNO, x_TI, own, delta):
    per_expert = kind.startswith("experts")
    expert_T = np.repeat(np.arange(len(SIZES_E)), SIZES_E)
    rows = []
    for t, x_I in enumerate(x_TI):
        atoms = atoms_of(own, expert_T[t] if per_expert else None)
        rows.append(change(x_I, *atoms, delta))
    return base_TNO + np.stack(rows)


def float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", thorough_but_for(KINDS, "dense", later=SLOWER))
def test_values_and_all_gradients_are_those_of_a_loop(kind, mode):
    run, base_TNO, x, own = adapted(kind)
    delta = None if mode == "train" else DELTA
    expected = reference(kind, base_TNO, x, own, delta)
    found = run(*float32((own, x)), mode)
    assert_close(found.reshape(expected.shape), expected, "float32")
    assert np.max(np.abs(expected - base_TNO)) > 0.5

    target = np.random.default_rng(1).normal(size=expected.shape)

    def loss(own, x):
        y = run(own, x, mode).reshape(expected.shape)
        return jnp.vdot(y, target.astype(np.float32))

    grads = jax.grad(loss, argnums=(0, 1))(*float32((own, x)))

    def exact(own, x):  # of the adapter alone: the base is linear
        return np.vdot(reference(kind, 0 * base_TNO, x, own, delta), target)

    for name, array in own.items():
        off = difference(lambda a: exact(own | {name: a}, x), array)  # noqa: B023
        assert_close(grads[0][name], off, "difference", name)
    if kind == "embedding":  # its rows are numbers of ones, without a gradient
        return
    zeros = {name: 0 * array for name, array in own.items()}
    of_base = jax.grad(loss, argnums=1)(*float32((zeros, x)))
    off = difference(lambda x: exact(own, x), x)
    assert_close(grads[1] - of_base, off, "difference", "x")


def difference(function, array, step=1e-6):
    """Central differences of a float64 function of one array."""
    out = np.zeros(array.shape)
    for at in np.ndindex(array.shape):
        moved = []
        for sign in (1, -1):
            other = array.copy()
            other[at] += sign * step
            moved.append(function(other))
        out[at] = (moved[0] - moved[1]) / (2 * step)
    return out


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["dense", "experts in"])
def test_after_a_task_its_atoms_count_with_their_scale(kind, mode):
    """The bank of the next task against a loop over the atoms of the one before."""
    _, base_TNO, x, before = adapted(kind, bank=0)
    run, _, _, own = adapted(kind, bank=R, seed=1)
    kept = consolidated({"adapters": {"w": float32(before)}}, SCALE)["adapters"]["w"]
    assert kept.keys() == {"bank_a_INM", "bank_b_NMO"}  # no fresh, random atoms
    np.testing.assert_array_equal(kept["bank_a_INM"], float32(before["a_INR"]))
    own |= {"bank_a_INM": before["a_INR"], "bank_b_NMO": SCALE * before["b_NRO"]}
    delta = None if mode == "train" else DELTA
    expected = reference(kind, base_TNO, x, own, delta)
    y = run(float32(own) | kept, *float32((x,)), mode)
    assert_close(y.reshape(expected.shape), expected, "float32")
    lost = reference(kind, base_TNO, x, own | {"bank_b_NMO": before["b_NRO"]}, delta)
    assert np.max(np.abs(lost - expected)) > 0.1  # the released code would give this


def test_two_tasks_are_in_the_bank_in_their_order():
    rng = np.random.default_rng(0)
    shapes = {"a_INR": (D, 1, R), "b_NRO": (1, R, 5)}
    shapes |= {"bank_a_INM": (D, 1, M), "bank_b_NMO": (1, M, 5)}
    own = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    params = {"layer": {"w": np.ones(2), "adapters": {"w": own}}, "norm": np.ones(3)}
    found = consolidated(params, 0.5)
    assert found["norm"] is params["norm"]
    assert found["layer"]["w"] is params["layer"]["w"]
    bank = found["layer"]["adapters"]["w"]
    a = np.concatenate([own["bank_a_INM"], own["a_INR"]], axis=-1)
    b = np.concatenate([own["bank_b_NMO"], 0.5 * own["b_NRO"]], axis=-2)
    np.testing.assert_array_equal(bank["bank_a_INM"], a)
    np.testing.assert_array_equal(bank["bank_b_NMO"], b)


def test_fresh_atoms_only_share_the_norm_and_the_places():
    """The one exception: with values of 0 the model is not exactly the one before."""
    kind = "dense"
    _, base_TNO, x, before = adapted(kind, bank=0)
    run, _, _, own = adapted(kind, bank=R, seed=1)
    kept = consolidated({"adapters": {"w": before}}, SCALE)["adapters"]["w"]
    own |= {n: np.asarray(a, np.float64) for n, a in kept.items()}
    own["b_NRO"] = 0 * own["b_NRO"]
    y = run(*float32((own, x)), "train").reshape(base_TNO.shape)
    assert_close(y, reference(kind, base_TNO, x, own, None), "float32")
    off = reference(kind, base_TNO, x, before, None) - np.float64(y)
    assert np.max(np.abs(off)) > 1e-3


@pytest.mark.thorough
def test_bfloat16_is_close_to_the_loop():
    run, base_TNO, x, own = adapted("dense")
    rounded = jax.tree.map(lambda a: np.float64(a.astype(jnp.bfloat16)), (own, x))
    expected = reference("dense", base_TNO, *rounded[::-1], None)
    y = run(float32(own), jnp.asarray(x, jnp.bfloat16), "train")
    assert y.dtype == jnp.bfloat16
    largest = np.max(np.abs(expected))
    found = np.asarray(y, np.float64).reshape(expected.shape)
    assert_close(found / largest, expected / largest, "bfloat16")


@pytest.mark.thorough
def test_at_the_first_step_only_values_have_a_gradient():
    run, _, x, own = adapted("dense", bank=0, k=2)
    own["b_NRO"] = 0 * own["b_NRO"]
    loss = lambda own: jnp.sum(run(own, jnp.float32(x), "train") ** 2)  # noqa: E731
    grads = jax.grad(loss)(float32(own))
    assert not np.any(grads["a_INR"])
    assert np.any(grads["b_NRO"])


def test_an_input_of_zeros_is_finite_and_the_base():
    run, _, x, own = adapted("dense")
    for mode in ("train", "eval"):
        y = run(*float32((own, 0 * x)), mode)
        np.testing.assert_array_equal(y, np.zeros_like(y))
        loss = lambda own, x: jnp.sum(run(own, x, mode) + 1) ** 2  # noqa: B023, E731
        grads = jax.grad(loss, argnums=(0, 1))(*float32((own, 0 * x)))
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_below_the_threshold_it_is_exactly_the_base():
    make, _ = KINDS["dense"]
    module, name, multiply = make(nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(0), (ROWS, D))
    ctx = context(1, ROWS, compute=XLA)
    base = multiply(module, x, ctx)
    attach(module, moram_of(threshold=1.0, targets=(name,)), nnx.Rngs(0))
    module.adapters[name].b_NRO[...] += 1
    evaluated = multiply(module, x, dataclasses.replace(ctx, mode="eval"))
    np.testing.assert_array_equal(evaluated, base)
    assert np.any(multiply(module, x, ctx) != base)


def test_equal_scores_go_to_the_first_atoms():
    w = atom_weights(jnp.ones((1, 5)), 2, 0.1, None, 1e-12)
    np.testing.assert_array_equal(w, [[0.5, 0.5, 0, 0, 0]])


def test_the_highest_signed_scores_are_chosen_not_the_largest():
    w = atom_weights(jnp.array([[-3.0, 1.0, -0.5, -1.0]]), 2, 1e3, None, 1e-12)
    np.testing.assert_array_equal(np.flatnonzero(w), [1, 2])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    z=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(6)),
        elements=st.floats(-100, 100, width=32),
    ),
    k=st.integers(2, 6),
    tau=st.sampled_from([0.01, 0.1, 1.0]),
    delta=st.sampled_from([None, 0.2, 0.6]),
)
def test_weights_of_any_responses(z, k, tau, delta):
    whole = np.asarray(atom_weights(z, k, tau, None, 1e-12), np.float64)
    np.testing.assert_allclose(whole.sum(axis=-1), 1, rtol=1e-5)
    assert np.all(np.count_nonzero(whole, axis=-1) <= k)
    assert np.all(whole >= 0)
    kept = np.asarray(atom_weights(z, k, tau, delta, 1e-12), np.float64)
    assert np.all((kept == 0) | (kept == whole))  # not scaled to sum to 1 again
    if delta is None:
        np.testing.assert_array_equal(kept, whole)


# In a model.

EVERYTHING = (
    *("*attention/w_*", "*ffn/w_*", "shared", "experts/w_"),
    *("router/w_DE", "w_embed_VD", "w_logits_DV"),
)


@pytest.fixture(scope="module")
def model():
    """(config, spec, params, state) of a model with atoms everywhere."""
    cfg = dataclasses.replace(tiny_lm(), adapter=moram_of(targets=EVERYTHING))
    return (cfg, *built(cfg))


def logits(model, **compute):
    _, spec, params, state = model
    token_BL = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    ctx = context(2, 12, token_BL=token_BL, mode="eval", compute=Compute(**compute))
    return jax.jit(lambda p: spec.merge(p, state)(ctx)[0])(params)


@pytest.mark.thorough
def test_every_matrix_of_a_model_is_adapted_by_the_rule(model, monkeypatch):
    """The rule of the loop, patched in, with layers that are not scanned."""
    plain = np.asarray(logits(model))
    seen = []

    def slow(z, k, temperature, threshold, eps):
        seen.append(z.shape)
        flat = jax.pure_callback(
            lambda z: np.stack(
                [weights(row, k, temperature, threshold) for row in np.float64(z)]
            ).astype(np.float32),
            jax.ShapeDtypeStruct((z.size // z.shape[-1], z.shape[-1]), jnp.float32),
            z.reshape(-1, z.shape[-1]),
        )
        return flat.reshape(z.shape)

    monkeypatch.setattr(moram, "atom_weights", slow)
    assert_close(logits(model, scan_layers=False), plain, "step")
    assert len(seen) == 2 + 5 + 2 * 8
    assert {shape[-1] for shape in seen} == {M + R}


@pytest.mark.thorough
def test_generation_is_the_full_forward_pass(model):
    cfg, spec, params, state = model
    prompt = [3, 1, 4, 1, 5]
    options = {"max_new_tokens": 4, "temperature": 0, "compute": XLA}
    (end,) = generate(spec, cfg, params, state, [prompt], **options)
    row = jnp.array([prompt + end])
    ctx = context(1, 9, token_BL=row, mode="eval", compute=XLA)
    best = jnp.argmax(spec.merge(params, state)(ctx)[0], axis=-1)[0]
    assert end == best[4:8].tolist()


def test_the_bank_is_frozen_and_the_new_atoms_are_trained(model):
    cfg, spec, params, _ = model
    for name in flat_paths(params):
        own = "adapters" in name.split("/")
        bank = name.rpartition("/")[2].startswith("bank_")
        assert spec.info[name].frozen == (bank or not own), name


def test_the_cost_of_scoring_all_atoms_is_told():
    adapter = moram_of(targets=("w_q", "experts/w_in"))
    cfg = dataclasses.replace(tiny_lm(), adapter=adapter)
    spec = model_spec(cfg)
    query, expert = ([16, M + R], [M + R, 16]), ([16, M + R], [M + R, 2 * 8])
    flops = [2 * sum(map(np.prod, shapes)) for shapes in (query, expert)]
    # Three layers have attention; two have experts, of which a token uses two.
    expected = 3 * flops[0] + 2 * 2 * flops[1]
    cost = model_cost(cfg, spec, 32)
    assert cost.adapter_flops == expected
    assert cost.total["adapters"] == (3 * flops[0] + 2 * 8 * flops[1]) / 2
    table = adapter_table(adapter, flat_paths(spec.params), spec.info)
    assert "scores 7 atoms at each adapted matrix (4 in the bank, 3 new)" in table


def test_tasks_of_one_seed_have_keys_of_their_own():
    first, second = (
        dense.adapters["w_in_D2F"].a_INR[...] for dense in map(_dense_with_bank, (0, R))
    )
    assert not np.any(first == second)


def _dense_with_bank(bank):
    rngs = nnx.Rngs(params=0)
    module = Dense(hidden=5).make(D, rngs)
    attach(module, moram_of(bank=bank, k=2, targets=("w_in_D2F",)), rngs)
    return module


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"k": 1}, "k = 1: must be at least 2"),
        ({"k": 8}, r"k = 8: must be at most 7, the atoms: bank \+ rank"),
        ({"rank": 1, "bank": 0, "k": 2}, "k = 2: must be at most 1"),
        ({"rank": 0}, "rank = 0: must be at least 1"),
        ({"bank": -1}, "bank = -1: must be at least 0"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"threshold": 0.0}, r"threshold = 0.0: must be in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold = 1.5: must be in \(0, 1\]"),
        ({"alpha": 0.0}, "alpha = 0.0: must be above 0"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps = 0.0: must be at least 1e-18"),
    ],
)
def test_a_mistake_is_one_clear_line(fields, told):
    with pytest.raises(ConfigError, match=rf"^config.model.adapter\.{told}"):
        moram_of(**fields).validate("config.model.adapter")


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (None, "bank = 4: must be 0: there is no run with MoRAM atoms"),
        (moram_of(bank=0), "bank = 4: must be 3 for a new task"),
        (moram_of(bank=4, rank=4), "bank = 4: must be 8 for a new task"),
        thorough(LoRA(rank=3, alpha=6.0, targets=("w_",)), r"must be LoRA\(...\)"),
    ],
)
def test_a_bank_that_does_not_fit_the_run_before_is_refused(before, told):
    with pytest.raises(ConfigError, match=told):
        moram_of().continued(before, {}, "config.model.adapter")
