"""LoRAMoE against plain loops over tokens and experts in float64.

T tokens · N parts · E experts of an adapter · R rank · I, O inputs and outputs
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import make_plan
from moex.adapters.attach import attach
from moex.adapters.figures import FIGURES, gate_figures, gate_record, gate_summary
from moex.adapters.lora import LoRA
from moex.adapters.loramoe import LoRAMoE, localized_balance
from moex.config.base import ConfigError
from moex.model.losses import adapter_losses
from moex.model.paths import flat_paths
from moex.model.spec import check_mesh, model_spec, shardings
from moex.moe.experts.glu import Glu
from moex.nn.attention import Attention
from moex.nn.context import Compute, Context
from moex.nn.mlp import Dense
from moex.nn.projection import Product, project, tell_of_rows
from moex.report import training as report_training
from moex.report.material import read as read_material
from moex.runs.directory import RunDir
from moex.runs.keys import Loss
from moex.runs.lines import read_metrics
from moex.sharding import MeshConfig, shard_batch
from tests import runs
from tests.helpers import TASK, VOCAB, XLA, random_batch, tiny_lm
from tests.marks import slow
from tests.tolerances import TOLERANCE, assert_close

B, L, D, E, R = 2, 3, 8, 4, 2
FIELDS = {"experts": E, "rank": R, "alpha": 3.0, "targets": ("w_",)}
BALANCED = FIELDS | {"types": (0, 1), "beta": 0.1, "delta": 0.2}
EVERYTHING = (
    *("*attention/w_*", "*ffn/w_*", "shared", "experts/w_"),
    *("router/w_DE", "w_embed_VD", "w_logits_DV"),
)


def filled(module, cfg):
    """(graphdef, random float32 parameters by path) of a module with adapters."""
    attach(module, cfg, nnx.Rngs(params=0))
    graphdef, state = nnx.split(module)
    random = np.random.default_rng(0)
    flat = {
        "/".join(map(str, path)): jnp.asarray(
            0.3 * random.normal(size=variable.shape), jnp.float32
        )
        for path, variable in nnx.to_flat_state(state)
    }
    return graphdef, flat


def merged(graphdef, flat):
    tree: dict = {}
    for name, value in flat.items():
        *parts, last = (int(p) if p.isdigit() else p for p in name.split("/"))
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return nnx.merge(graphdef, tree)


def some_context(**fields):
    """Rows of 3 and 2 tokens of the domains 1 and 0; the first one is a prompt."""
    place = jnp.broadcast_to(jnp.arange(L), (B, L))
    real = place < jnp.asarray([[3], [2]])
    ctx = Context(
        segment_BL=real.astype(jnp.int32),
        position_BL=place,
        mode="train",
        compute=XLA,
        domain_B=jnp.asarray([1, 0]),
        scored_BL=real & (place >= 1),
    )
    return dataclasses.replace(ctx, **fields).listening()


# The reference: one row and one expert at a time.


def reference(x_I, w_INO, own, scale):
    """(output [N][O], gates [N][E]) of one row."""
    r, a, b = own["r_INE"], own["a_INER"], own["b_NERO"]
    b = b.reshape(*b.shape[:3], -1)
    outputs, gates = [], []
    for n in range(w_INO.shape[1]):
        powers = [jnp.exp(x_I @ r[:, n, e]) for e in range(E)]
        w = [power / sum(powers) for power in powers]
        y = x_I @ w_INO[:, n]
        for e in range(E):
            y = y + scale * w[e] * ((x_I @ a[:, n, e]) @ b[n, e])
        outputs.append(y)
        gates.append(w)
    return outputs, gates


def reference_loss(gates_TNE, ctx, cfg):
    """beta times the constraint, summed over parts; gates are nested lists."""
    counted = np.asarray(ctx.scored_BL).reshape(-1)
    total = 0.0
    for n in range(len(gates_TNE[0])):
        values = []
        for row in range(B):
            kind = cfg.types[int(ctx.domain_B[row])]
            for e in range(E):
                mass = sum(
                    gates_TNE[t][n][e]
                    for t in range(row * L, row * L + L)
                    if counted[t]
                )
                matched = (e < E // 2) == (kind == 1)
                values.append(mass * (1 + cfg.delta if matched else 1 - cfg.delta))
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        total = total + variance / (mean**2 if cfg.form == "code" else mean)
    return cfg.beta * total


def in_float64(function, *args):
    """The value and all gradients of a function of arrays, in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), args)
        return jax.tree.map(
            np.asarray, jax.value_and_grad(function, argnums=(0, 1))(*args)
        )


def compare(found, expected):
    (value, (of_params, of_x)), (right, (right_params, right_x)) = found, expected
    assert_close(value / right, 1.0, "float32")
    for name, gradient in {**right_params, "x": right_x}.items():
        largest = max(np.max(np.abs(gradient)), 1e-6)
        own = of_x if name == "x" else of_params[name]
        assert_close(own / largest, gradient / largest, "step", name)


MATRICES = {
    "w_kv_D2GA": (Attention(heads=4, kv_heads=2), 1, (D,)),
    "w_out_GRAD": (Attention(heads=4, kv_heads=2), 3, (2, 2, 2)),
    "w_out_FD": (Dense(hidden=6), 1, (6,)),
}


def told_loss(ctx):
    return sum(adapter_losses(ctx.told).values())


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "form"),
    [
        slow("w_kv_D2GA", "code"),
        ("w_kv_D2GA", "paper"),
        ("w_out_GRAD", "code"),
        slow("w_out_FD", "code"),
    ],
)
def test_a_matrix_is_the_reference_with_its_gradients_and_its_constraint(name, form):
    layer, contract, inner = MATRICES[name]
    cfg = LoRAMoE(**BALANCED | {"targets": (name,), "form": form})
    graphdef, flat = filled(layer.make(D, nnx.Rngs(params=0)), cfg)
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(B, L, *inner)), jnp.float32)
    ctx = some_context()
    parts = 2 if name == "w_kv_D2GA" else 1
    width = math.prod(inner)
    out = flat[name].size // width
    target = random.normal(size=(B * L, out))

    def own(flat, x):
        here = some_context()
        y = project(merged(graphdef, flat), name, x, here, contract)
        told = jnp.vdot(y.reshape(B * L, out), jnp.asarray(target, jnp.float32))
        return told + told_loss(here)

    def truth(flat, x):
        w_INO = flat[name].reshape(width, parts, -1)
        adapter = {k.rpartition("/")[2]: v for k, v in flat.items() if "adapters" in k}
        total, gates = 0.0, []
        for t, row in enumerate(x.reshape(B * L, width)):
            y, w = reference(row, w_INO, adapter, 3.0 / R)
            total = total + jnp.concatenate(y) @ target[t]
            gates.append(w)
        return total + reference_loss(gates, ctx, cfg)

    used = {k: v for k, v in flat.items() if k == name or "adapters" in k}
    rest = {k: v for k, v in flat.items() if k not in used}
    value = jax.jit(jax.value_and_grad(lambda p, x: own(rest | p, x), (0, 1)))
    compare(value(used, x), in_float64(truth, used, x))


@pytest.mark.thorough
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stacked_experts_are_the_reference_with_their_gradients(shared):
    """Two of three experts for each token; one slot is not kept."""
    F, K, scale = 6, 2, 3.0 / R
    cfg = LoRAMoE(**BALANCED | {"shared": shared})
    module = Glu(hidden=F).make(D, 3, nnx.Rngs(params=0))
    graphdef, flat = filled(module, cfg)
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(B * L, D)), jnp.float32)
    expert = np.stack([random.permutation(3)[:K] for _ in range(B * L)])
    gate = random.uniform(0.2, 1.0, (B * L, K))
    keep = np.ones((B * L, K), bool)
    keep[3, 1] = False
    target = random.normal(size=(B * L, D))
    plan = make_plan(jnp.asarray(expert, jnp.int32), jnp.asarray(keep), 3)
    ctx = some_context()

    def own(flat, x):
        here, experts = some_context(), merged(graphdef, flat)
        y_TC = experts.sums(x, jnp.asarray(gate, jnp.float32), plan, here)
        assert y_TC.shape == (B * L, D + 2 * E)
        tell_of_rows(experts, y_TC[:, D:], here)
        told = jnp.vdot(y_TC[:, :D], jnp.asarray(target, jnp.float32))
        return told + told_loss(here)

    def truth(flat, x):
        def adapter(name, e):
            found = {
                k.rpartition("/")[2]: v
                for k, v in flat.items()
                if k.startswith(f"adapters/{name}/")
            }
            return found if shared else {k: v[e] for k, v in found.items()}

        total, into, outof = 0.0, [], []
        for t, row in enumerate(x):
            y, mass_in, mass_out = 0.0, [0.0] * E, [0.0] * E
            for k in range(K):
                if not keep[t, k]:
                    continue
                e = int(expert[t, k])
                w_in = flat["w_in_ED2F"][e].reshape(D, 1, 2 * F)
                w_out = flat["w_out_EFD"][e][:, None]
                (a,), (w,) = reference(row, w_in, adapter("w_in_ED2F", e), scale)
                h = a[:F] / (1 + jnp.exp(-a[:F])) * a[F:]
                (o,), (v,) = reference(h, w_out, adapter("w_out_EFD", e), scale)
                y = y + gate[t, k] * o
                mass_in = [m + g for m, g in zip(mass_in, w, strict=True)]
                mass_out = [m + g for m, g in zip(mass_out, v, strict=True)]
            total = total + y @ target[t]
            into.append([mass_in])
            outof.append([mass_out])
        losses = (reference_loss(gates, ctx, cfg) for gates in (into, outof))
        return total + sum(losses)

    compare(
        jax.jit(jax.value_and_grad(own, (0, 1)))(flat, x), in_float64(truth, flat, x)
    )


def test_the_constraint_of_four_experts_by_hand():
    """I * mass = (0.11, 0.22, 0.27, 0.36): mean 0.24, variance 0.0326 / 3."""
    mass = jnp.asarray([[[0.1, 0.2, 0.3, 0.4]]])
    args = (mass, jnp.asarray([1]), jnp.asarray([True]), 0.1)
    assert_close(localized_balance(*args), [0.0326 / 3 / 0.24**2], "float32")
    assert_close(localized_balance(*args, "paper"), [0.0326 / 3 / 0.24], "float32")
    other = (mass[..., ::-1], jnp.asarray([0]), *args[2:])
    assert_close(localized_balance(*other), localized_balance(*args), "float32")


@pytest.mark.parametrize("kind", [0, 1])
def test_at_the_minimum_the_matched_half_has_less(kind):
    """The shares are those of 1 / I: 0.225 and 0.275 with delta = 0.1."""

    def loss(logits):
        mass = jax.nn.softmax(logits)[None, None]
        known = (jnp.asarray([kind]), jnp.asarray([True]))
        return localized_balance(mass, *known, 0.1)[0]

    @jax.jit
    def descend(logits):
        return jax.lax.fori_loop(0, 500, lambda _, v: v - jax.grad(loss)(v), logits)

    found = jax.nn.softmax(descend(jnp.asarray([1.0, -1.0, 0.3, 0.0])))
    matched, other = [0.225] * 2, [0.275] * 2
    expected = matched + other if kind == 1 else other + matched
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_short_sequence_among_long_ones_is_pulled_the_other_way():
    """One answer of 1 token of type 1, and nine of 3 tokens of type 0.

    I * mass wants to be near its mean, 0.69: with more in the matched half the short
    one comes nearer. 1.1 (1.1 a - 0.69) = 0.9 (0.9 (0.5 - a) - 0.69) has a = 0.269.
    """
    mass_B = jnp.asarray([1.0] + 9 * [3.0])
    kind_B = jnp.asarray([1] + 9 * [0])

    def loss(logits_BE):
        mass = mass_B[:, None] * jax.nn.softmax(logits_BE)
        return localized_balance(mass[:, None], kind_B, kind_B >= 0, 0.1)[0]

    @jax.jit
    def descend(logits):
        return jax.lax.fori_loop(0, 3000, lambda _, v: v - jax.grad(loss)(v), logits)

    found = jax.nn.softmax(descend(jnp.zeros((10, 4))))
    np.testing.assert_allclose(found[1:, :2], 0.275, atol=2e-3)
    np.testing.assert_allclose(found[0, :2], 0.269, atol=6e-3)


def test_a_sequence_without_a_counted_position_does_not_count():
    mass = jnp.asarray([[[0.1, 0.2, 0.3, 0.4]], [[0.0] * 4]])
    found = localized_balance(
        mass, jnp.asarray([1, 0]), jnp.asarray([True, False]), 0.1
    )
    assert_close(found, [0.0326 / 3 / 0.24**2], "float32")
    nothing = localized_balance(0 * mass, jnp.asarray([1, 0]), jnp.zeros(2, bool), 0.1)
    assert float(nothing[0]) == 0


def adapter_of(**fields):
    layer = Dense(hidden=6).make(D, nnx.Rngs(params=0))
    attach(layer, LoRAMoE(**BALANCED | fields), nnx.Rngs(params=0))
    return layer.adapters["w_in_D2F"]


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_prompts_and_padding_count_where_that_is_asked(prompts, padding):
    adapter = adapter_of(count_prompts=prompts, count_padding=padding)
    ctx = some_context()
    gates = np.random.default_rng(0).dirichlet(np.ones(E), (B, L, 2))

    def loss(gates):
        own = adapter.losses(jnp.asarray(gates, jnp.float32), ctx)
        return float(own["localized_balance"])

    def changes(place):
        other = gates.copy()
        other[place] = other[place][..., ::-1]
        return abs(loss(other) - loss(gates)) > 1e-6

    assert changes((0, 2)), "an answer always counts"
    assert changes((0, 0)) == prompts
    assert changes((1, 2)) == padding


def test_without_known_types_there_is_no_constraint():
    gates = jnp.full((B, L, 2, E), 0.25).at[..., 0].set(1.0)
    ctx = some_context(domain_B=None)
    assert float(adapter_of().losses(gates, ctx)["localized_balance"]) == 0
    assert adapter_of(beta=0.0).losses(gates, some_context()) == {}


@pytest.mark.thorough
def test_experts_have_masks_of_their_own_and_the_router_sees_all():
    layer = Dense(hidden=6).make(32, nnx.Rngs(params=0))
    attach(layer, LoRAMoE(**FIELDS | {"dropout": 0.5}), nnx.Rngs(params=0))
    adapter = layer.adapters["w_in_D2F"]
    same = jnp.broadcast_to(adapter.a_INER[...][:, :, :1], adapter.a_INER.shape)
    adapter.a_INER[...] = same
    x = jax.random.normal(jax.random.key(1), (B, L, 32))
    ctx = some_context(key=jax.random.key(2))
    z = adapter._inward(x, Product(ctx), ctx)
    for e in range(1, E):
        assert float(jnp.max(jnp.abs(z[..., 0, :] - z[..., e, :]))) > 0.1
    kept = adapter._inward(jnp.ones((400, 32)), Product(ctx), ctx)
    plain = product_of(adapter, jnp.ones((400, 32)), ctx)
    np.testing.assert_allclose(jnp.mean(kept, 0), plain[0], atol=0.1)

    def gates(mode):
        own = dataclasses.replace(ctx, mode=mode)
        return adapter(x, lambda x: jnp.zeros((B, L, 2, 6)), Product(own), own)[1]

    np.testing.assert_array_equal(gates("train"), gates("eval"))
    still = dataclasses.replace(ctx, mode="eval")
    one = adapter._inward(x, Product(still), still)
    np.testing.assert_array_equal(one, product_of(adapter, x, ctx))


def product_of(adapter, x, ctx):
    return Product(ctx).inward(x, adapter.a_INER)


@pytest.mark.slow
def test_bfloat16_is_near():
    cfg = LoRAMoE(**BALANCED)
    graphdef, flat = filled(Dense(hidden=6).make(D, nnx.Rngs(params=0)), cfg)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    layer = merged(graphdef, flat)
    ctx = some_context()
    expected = layer(x, ctx)[0]
    own = some_context()
    found = layer(x.astype(jnp.bfloat16), own)[0]
    assert found.dtype == jnp.bfloat16
    scale = float(jnp.max(jnp.abs(expected)))
    assert_close(found / scale, expected / scale, "bfloat16")
    for path, report in ctx.told.items():
        for name, value in report["losses"].items():
            near = own.told[path]["losses"][name]
            np.testing.assert_allclose(near, value, rtol=TOLERANCE["bfloat16"][0])


def model_with(**fields):
    """(spec, random parameters, state) of a small model with every matrix adapted."""
    cfg = LoRAMoE(**BALANCED | {"targets": EVERYTHING} | fields)
    spec = model_spec(dataclasses.replace(tiny_lm(), adapter=cfg))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(0.3 * random.normal(size=a.shape), a.dtype), spec.params
    )
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), spec.state)
    return spec, params, state


def outcome(spec, params, state, batch, compute, mesh=None):
    """(loss, sums, gradients) of a step on a mesh, or on the default device."""

    def loss(params, batch):
        ctx = TASK.context(batch, mode="train", compute=compute)
        model = spec.merge(params, state)
        return TASK.loss(model, ctx, batch, Loss(), num_domains=2)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        (value, sums), gradients = step(params, batch)
    else:
        check_mesh(spec, mesh)
        params, state = jax.device_put((params, state), shardings(spec, mesh))
        with jax.set_mesh(mesh):
            (value, sums), gradients = step(params, shard_batch(batch, mesh))
    flat = {k: np.asarray(v) for k, v in flat_paths(gradients).items()}
    return float(value), jax.device_get(sums), flat


def assert_same(found, expected):
    assert_close(found[0], expected[0], "step")
    for name, gradient in expected[2].items():
        largest = max(np.max(np.abs(gradient)), 1e-6)
        assert_close(found[2][name] / largest, gradient / largest, "step", name)
    own, right = (flat_paths(sums["adapters"]) for _, sums, _ in (found, expected))
    assert own.keys() == right.keys()
    for name, value in right.items():
        largest = max(float(np.max(np.abs(value))), 1e-6)
        assert_close(own[name] / largest, value / largest, "step", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2, exchange="gather"),
        MeshConfig(data=2, expert=4, exchange="all_to_all"),
        MeshConfig(data=2, seq=2, tensor=2),
    ],
)
def test_a_mesh_changes_nothing(mesh):
    made, batch = model_with(), random_batch(8, 8)
    compute = Compute(kernels="xla", exchange=mesh.exchange)
    expected = outcome(*made, batch, compute)
    assert len(expected[1]["adapters"]) == 15
    assert float(expected[1]["weighted"]["localized_balance"]) > 0.01
    assert_same(outcome(*made, batch, compute, mesh.make()), expected)


@pytest.mark.thorough
def test_decoding_is_the_whole_forward_pass():
    spec, params, state = model_with()
    token_BL = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCAB)
    ctx = Context.of(jnp.zeros((2, 6, 1)), token_BL=token_BL, compute=XLA)

    @jax.jit
    def whole(params):
        return spec.merge(params, state)(ctx)[0]

    @jax.jit
    def step(params, cache, token_B1, t):
        place = jnp.arange(6)[None]
        here = Context(
            segment_BL=jnp.ones((2, 1), jnp.int32),
            position_BL=jnp.full((2, 1), t),
            token_BL=token_B1,
            key_segment_BS=jnp.broadcast_to(place <= t, (2, 6)).astype(jnp.int32),
            key_position_BS=jnp.broadcast_to(place, (2, 6)),
            cache_index=t,
            mode="decode",
            compute=XLA,
        )
        return spec.merge(params, state).decode(here, cache)

    expected = whole(params)
    cache = tiny_lm().init_cache(2, 6, jnp.float32)
    for t in range(6):
        found, _, cache = step(params, cache, token_BL[:, t : t + 1], jnp.int32(t))
        assert_close(found, expected[:, t], "step", f"token {t}")


@pytest.mark.parametrize(
    "layer",
    [slow(Attention(heads=4, kv_heads=2)), Dense(hidden=6)],
)
def test_at_the_start_it_is_the_base_bit_for_bit(layer):
    plain, adapted = (layer.make(D, nnx.Rngs(params=0)) for _ in range(2))
    attach(adapted, LoRAMoE(**BALANCED | {"dropout": 0.5}), nnx.Rngs(params=1))
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    more = [None] if isinstance(layer, Attention) else []
    for mode in ("train", "eval"):
        ctx = some_context(mode=mode, key=jax.random.key(2))
        own, base = (module(x, ctx, *more)[0] for module in (adapted, plain))
        np.testing.assert_array_equal(own, base)
    assert len(ctx.told) == len(adapted.adapters) >= 2


def test_losses_of_microbatches_are_averaged():
    reports = {"a": {"losses": {"x": jnp.asarray([1.0, 2.0])}}, "b": {"losses": {}}}
    assert adapter_losses(reports) == {"x": 3.0}
    assert adapter_losses(reports, 2) == {"x": 1.5}


@pytest.mark.thorough
def test_figures_by_type():
    """Type 0 uses expert 0 alone, type 1 all alike; expert 3 is dead in type 0."""
    sums = {
        "gate_sum_YNE": jnp.asarray([[[4.0, 0, 0, 0]], [[1.0, 1, 1, 1]]]),
        "used_sum_YNE": jnp.asarray([[[4.0, 0, 0, 0]], [[4.0, 4, 4, 4]]]),
        "entropy_sum_YN": jnp.asarray([[0.0], [4 * math.log(4)]]),
        "tokens_Y": jnp.asarray([4.0, 4.0]),
    }
    found = gate_figures(sums)
    assert_close(found["entropy"], [math.log(4) / 2], "float32")
    assert_close(found["max_violation"], [5 / 8 * 4 - 1], "float32")
    assert_close(found["type_distance"], [0.75], "float32")
    assert_close(found["dead_frac"], [0.0], "float32")
    assert_close(found["dead_frac_YN"], [[0.75], [0.0]], "float32")
    one = {"tokens_Y": jnp.asarray([4.0, 0.0])}
    found |= {"unseen": gate_figures(sums | one)["entropy_YN"][1, 0]}
    assert math.isnan(found.pop("unseen"))
    summary = gate_summary({"a": found, "b": found | {"entropy": jnp.zeros(1)}})
    assert summary["entropy"] == pytest.approx(math.log(4) / 4)
    assert summary["entropy_worst"] == 0
    assert gate_summary({}) == {}
    stacked = {k: jnp.stack([v, v]) for k, v in sums.items()}
    record = gate_record({"a": found, "b": gate_figures(stacked)})
    assert sorted(record) == ["a", "b[0]", "b[1]"]
    assert record["b[1]"] == record["a"]
    assert record["a"]["load_frac_by_type"] == [[[1, 0, 0, 0]], [[0.25] * 4]]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"experts": 1}, r"config.model.adapter.experts = 1: must be an even number"),
        ({"experts": 3}, "experts = 3: must be an even number >= 2"),
        ({"rank": 0}, "rank = 0: must be at least 1"),
        ({"alpha": 0.0}, "alpha = 0.0: must be above 0"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"delta": 1.0}, r"delta = 1.0: must be in \[0, 1\)"),
        ({"delta": -0.1}, r"delta = -0.1: must be in \[0, 1\)"),
        ({"beta": -1.0}, "beta = -1.0: must be at least 0"),
        ({"types": ()}, "beta = 0.1: must be 0 without config.model.adapter.types"),
        ({"types": (0, 2)}, r"types = \(0, 2\): must be 0 or 1 for each domain"),
        ({"form": "cod"}, "form = 'cod'.*Did you mean 'code'"),
        (
            {"types": (0, 1, 1)},
            r"types = \(0, 1, 1\): .* each of the 2 domains .*: a, b",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(fields, told):
    cfg = LoRAMoE(**BALANCED | {"targets": ("attention",)} | fields)
    with pytest.raises(ConfigError, match=told):
        cfg.validate("config.model.adapter")
        cfg.validate_domains(("a", "b"), "config.model.adapter")
        model_spec(dataclasses.replace(tiny_lm(), adapter=cfg))


@pytest.mark.slow
def test_a_run_logs_gates_and_the_constraint(tmp_path):
    own = (
        "LoRAMoE(experts=2, rank=2, alpha=4.0, targets=('attention', 'experts'), "
        "types=(1,), beta=0.1)"
    )
    run = tmp_path / "run"
    with runs.one_device():
        runs.train(tmp_path, run, "steps=2", f"model.adapter={own}", "eval.every=2")
    lines = read_metrics(run / "metrics.jsonl")
    for kind in ("train", "eval"):
        line = lines[kind][2]
        assert 0 < line["adapters/entropy_worst"] <= line["adapters/entropy"]
        assert line["adapters/entropy"] <= math.log(2) + 1e-6
        assert line["adapters/dead_frac"] == 0
    assert lines["train"][2]["loss/localized_balance"] > 0
    logged = [json.loads(line) for line in (run / "adapters.jsonl").open()]
    found = [(line["kind"], line["step"]) for line in logged]
    assert found == [("train", 1), ("train", 2), ("eval", 2)]
    matrices = logged[-1]["matrices"]
    assert "segments/1/blocks/0/ffn/experts/w_in_ED2F[0]" in matrices
    shown = report_training.section(read_material(RunDir(run)))
    drawn = {plot.figure.layout.title.text for plot in shown.parts[0].plots}
    assert {f"{figure.title} in adapters" for figure in FIGURES} <= drawn
    for own in matrices.values():
        (load,) = [np.sum(of_type, -1) for of_type in own["load_frac_by_type"][1:]]
        np.testing.assert_allclose(load, 1, rtol=1e-5)
        assert own["load_frac_by_type"][0][0] == [None, None]


@pytest.mark.slow
def test_adapters_without_experts_tell_nothing():
    lora = LoRA(rank=2, alpha=4.0, targets=("w_",))
    graphdef, flat = filled(Dense(hidden=6).make(D, nnx.Rngs(params=0)), lora)
    ctx = some_context()
    merged(graphdef, flat)(jnp.ones((B, L, D)), ctx)
    assert ctx.told == {}
    assert ctx.reports() == {}
