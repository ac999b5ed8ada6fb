"""LLaMA-Adapter V2 against loops over tokens in float64, and what it promises.

B batch · L length · M visual tokens · C their width · P prompt length · D model width
"""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moex.adapters.v2 import AdapterV2, Visual
from moex.config.base import ConfigError, check
from moex.data.batches import Reading
from moex.model.decode import generate
from moex.model.optim import AdamW, Optim, make_optimizer
from moex.model.paths import flat_paths, path_name
from moex.model.spec import init_guard, init_params, model_spec, shardings
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute, Context
from moex.nn.extra_keys import ExtraKeys
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.train.step import make_train_step
from tests.adapters.test_lora import nested
from tests.helpers import TASK, mesh_of, random_batch
from tests.tolerances import assert_close

B, L, M, C, V = 2, 5, 2, 3, 12
SLOW = pytest.mark.slow
VISUAL = Visual(width=C, tokens=M, layers=1)
MLA = LatentAttention(heads=4, kv_latent=6, q_latent=5, nope_dim=4, rope_dim=2, v_dim=3)
FULL = Attention(heads=4, kv_heads=2, qk_norm=True, window=3, sinks=True)


def small(attention=FULL, adapter=None, **fields):
    """A dense layer, then two with experts, all of which every token uses."""
    moe = MoE(num_experts=2, router=TopK(k=2, init_std=0.5), experts=Glu(hidden=6))
    layers = (Segment(pattern=(Dense(hidden=12),)), Segment(pattern=(moe,), repeat=2))
    fields = {"layers": layers, "dim": 8, "vocab": V} | fields
    return LM(attention=attention, adapter=adapter, **fields)


def v2(**fields):
    return AdapterV2(**{"prompt_length": 2, "layers": 2, "visual": VISUAL} | fields)


def started(attention=FULL, **fields):
    """(config, spec, parameters at the start, state)."""
    cfg = small(attention=attention, adapter=v2(**fields))
    return cfg, model_spec(cfg), *init_params(cfg, jax.random.key(0))


def changed(params, seed=0):
    """The parameters, with another number added to each of an adapter or norm."""
    random = np.random.default_rng(seed)

    def change(path, a):
        own = "adapters" in path_name(path) or "norm" in path_name(path)
        noise = 0.5 * random.normal(size=a.shape)
        return a + jnp.asarray(noise, a.dtype) if own else a

    return jax.tree_util.tree_map_with_path(change, params)


TOKENS = np.random.default_rng(1).integers(0, V, (B, L)).astype(np.int32)
FEATURES = np.random.default_rng(2).normal(size=(B, M, C)).astype(np.float32)
HAS = np.array([1, 0], np.int32)


def context(tokens=TOKENS, visual=True, mode="eval", **compute):
    rows, length = tokens.shape
    own = {"visual_BMC": jnp.asarray(FEATURES), "has_visual_B": jnp.asarray(HAS)}
    return Context(
        segment_BL=jnp.ones((rows, length), jnp.int32),
        position_BL=jnp.broadcast_to(jnp.arange(length), (rows, length)),
        token_BL=jnp.asarray(tokens),
        mode=mode,
        compute=Compute(**{"kernels": "xla"} | compute),
        **(own if visual else {}),
    )


def logits(spec, params, state, ctx):
    return jax.jit(lambda p: spec.merge(p, state)(ctx)[0])(params)


# The loops.


def linear(p, owner, name, c, x_I):
    """One matrix times one vector, with bias and scale: [N, O]."""
    own = f"{owner}/adapters/{name}/"
    bias = p[own + "bias_NO"][c]
    bias = bias.reshape(len(bias), -1)
    w = p[f"{owner}/{name}"][c].reshape(len(x_I), *bias.shape)
    if own + "scale_NI" in p:
        s = p[own + "scale_NI"][c]
        return np.stack([(s[n] * x_I) @ w[:, n] + bias[n] for n in range(len(bias))])
    s = p[own + "scale_NO"][c].reshape(bias.shape)
    return np.stack([s[n] * (x_I @ w[:, n] + bias[n]) for n in range(len(bias))])


def norm(scale, x):
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def rotated(x_A, position):
    half = len(x_A) // 2
    turn = np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
    pairs = (x_A[:half] + 1j * x_A[half:]) * turn
    return np.concatenate([pairs.real, pairs.imag])


def softmax(score, *others):
    weight = np.exp(np.array([*score, *others]))
    return (weight / weight.sum())[: len(score)]


def attention(p, owner, c, x_LD, extras, cfg):
    """The output for each token of a sequence; extras: (states, gate of each head)."""
    H, G = cfg.heads, cfg.kv_heads

    def keys(x_D):
        k, v = linear(p, owner, "w_kv_D2GA", c, x_D).reshape(2, G, -1)
        return norm(p[owner + "/norm_k/scale_D"][c], k), v

    kv = [keys(x_D) for x_D in x_LD]
    out = []
    for i, x_D in enumerate(x_LD):
        q = linear(p, owner, "w_q_DGRA", c, x_D).reshape(H, -1)
        q = norm(p[owner + "/norm_q/scale_D"][c], q)
        y = np.zeros_like(q)
        for h in range(H):
            g, turned = h // (H // G), rotated(q[h], i)
            root = math.sqrt(len(turned))
            seen = range(max(0, i + 1 - cfg.window), i + 1)
            score = [turned @ rotated(kv[j][0][g], j) / root for j in seen]
            sink = p[owner + "/sink_GR"][c].reshape(-1)[h]
            for j, weight in zip(seen, softmax(score, sink), strict=True):
                y[h] += weight * kv[j][1][g]
            for states, gates in extras:
                pairs = [keys(x) for x in states]
                weights = softmax([turned @ k[g] / root for k, _ in pairs])
                for weight, (_, v) in zip(weights, pairs, strict=True):
                    y[h] += math.tanh(gates[h]) * weight * v[g]
        out.append(linear(p, owner, "w_out_GRAD", c, y.reshape(-1))[0])
    return np.stack(out)


def silu(x):
    return x / (1 + np.exp(-x))


def experts(p, owner, c, x_D):
    """Both experts of a token, each with its own biases and scales."""
    gates = softmax(x_D @ p[f"{owner}/router/w_DE"][c])
    y = 0
    for e, gate in enumerate(gates):
        own = {
            n: a[:, e] if n.startswith(f"{owner}/experts/") else a for n, a in p.items()
        }
        a = linear(own, f"{owner}/experts", "w_in_ED2F", c, x_D).reshape(2, -1)
        h = silu(a[0]) * a[1]
        y = y + gate * linear(own, f"{owner}/experts", "w_out_EFD", c, h)[0]
    return y


def loop_logits(p, cfg):
    out = []
    for tokens, features, has in zip(TOKENS, FEATURES, HAS, strict=True):
        x = p["w_embed_VD"][tokens] * math.sqrt(cfg.dim)
        for depth, (segment, c) in enumerate([(0, 0), (1, 0), (1, 1)]):
            block = f"segments/{segment}/blocks/0"
            extras = []
            if depth == 0 and has:
                own = "adapters/visual/"
                states = features @ p[own + "w_CD"] + p[own + "bias_D"]
                states = norm(p[own + "norm/scale_D"], states)
                extras.append((states, p[own + "gate_YH"][0]))
            if depth >= 1:
                own = "adapters/prompts/"
                states, gates = (p[own + n] for n in ("prompt_YPD", "gate_YH"))
                extras.append((states[depth - 1], gates[depth - 1]))
            z = norm(p[block + "/norm_attention/scale_D"][c], x)
            x = x + attention(p, block + "/attention", c, z, extras, cfg.attention)
            z = norm(p[block + "/norm_ffn/scale_D"][c], x)
            if depth:
                x = x + np.stack([experts(p, block + "/ffn", c, z_D) for z_D in z])
                continue
            for t, z_D in enumerate(z):
                gate, up = linear(p, block + "/ffn", "w_in_D2F", c, z_D)
                x[t] += linear(p, block + "/ffn", "w_out_FD", c, silu(gate) * up)[0]
        out.append(norm(p["norm/scale_D"], x) @ p["w_logits_DV"])
    return np.stack(out)


@pytest.mark.thorough
@pytest.mark.parametrize("side", ["input", pytest.param("output", marks=SLOW)])
def test_it_is_the_loop_over_tokens_and_so_are_all_gradients(side):
    cfg, spec, params, state = started(scale_side=side)
    params = changed(params)
    random = np.random.default_rng(3)
    target = random.normal(size=(B, L, V))

    def loss(params):
        y = spec.merge(params, state)(context())[0]
        return jnp.vdot(y, jnp.asarray(target, jnp.float32)), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(params)
    p = {n: np.float64(a) for n, a in flat_paths(params).items()}
    assert_close(y, loop_logits(p, cfg), "float32")
    gradients = {n: np.float64(g) for n, g in flat_paths(gradients).items()}
    own = [n for n in gradients if "adapters" in n or "norm" in n]
    assert all(np.abs(gradients[name]).max() > 1e-3 for name in own)
    for _ in range(3):  # along each, all parameters together, each with an equal part
        found, direction = 0.0, {}
        for name, gradient in gradients.items():
            step = random.normal(size=gradient.shape)
            direction[name] = step / max(np.linalg.norm(gradient), 1.0)
            found += np.vdot(gradient, direction[name])
        sides = [
            np.vdot(loop_logits({n: p[n] + s * direction[n] for n in p}, cfg), target)
            for s in (1e-5, -1e-5)
        ]
        assert_close(found, (sides[0] - sides[1]) / 2e-5, "difference")


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(FULL, marks=SLOW, id="full"),
        pytest.param(MLA, marks=SLOW, id="latent"),
    ],
)
def test_at_the_start_it_is_the_base_bit_for_bit(attention):
    """Operation by operation; a compiled program rounds in other orders.

    So do scales of inputs: keys and values are then products of their own.
    """
    layers = (Segment(pattern=(Dense(hidden=12),), repeat=3),)
    cfg, base = (small(attention, a, layers=layers) for a in (v2(), None))
    params, state = init_params(cfg, jax.random.key(0))
    own, spec = model_spec(cfg), model_spec(base)
    plain = {n: a for n, a in flat_paths(params).items() if n in spec.shapes()}
    with jax.disable_jit():
        found = own.merge(params, state)(context())[0]
        want = spec.merge(nested(plain), state)(context())[0]
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [FULL, MLA], ids=["full", "latent"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_at_the_start_the_compiled_model_is_the_base(side, attention):
    spec = model_spec(small(attention))
    _, own, params, state = started(attention, scale_side=side)
    plain = {n: a for n, a in flat_paths(params).items() if n in spec.shapes()}
    found = logits(own, params, state, context())
    want = logits(spec, nested(plain), state, context())
    assert_close(found, want, "order")


@pytest.mark.slow
def test_extra_keys_of_latent_attention_are_those_of_the_loop():
    layer = MLA.make(8, nnx.Rngs(params=0))
    random = np.random.default_rng(0)
    x, states = random.normal(size=(B, L, 8)), random.normal(size=(1, 1, 3, 8))
    gate = random.normal(size=(1, 1, 4))
    extra = ExtraKeys(
        x_YBPD=jnp.asarray(states, jnp.float32),
        gate_YBH=jnp.asarray(gate, jnp.float32),
        first=0,
        everywhere=False,
    )
    x32, ctx = jnp.asarray(x, jnp.float32), context(visual=False)
    plain, _ = layer(x32, ctx, None)
    found, _ = layer(x32, dataclasses.replace(ctx, depth=0, extra_keys=(extra,)), None)
    deeper, _ = layer(x32, dataclasses.replace(ctx, depth=1, extra_keys=(extra,)), None)
    np.testing.assert_array_equal(deeper, plain)
    names = ("w_qa_DQ", "w_qb_QHC", "w_kva_DC", "w_kvb_ZHC", "w_out_HVD")
    p = {name: np.float64(getattr(layer, name)[...]) for name in names}
    q = norm(np.float64(layer.norm_q.scale_D[...]), x @ p["w_qa_DQ"])
    q = np.einsum("blq,qhc->blhc", q, p["w_qb_QHC"])
    # Pairs (0, 1) of the part with position are turned; prompts are not.
    angle = np.arange(L)[None, :, None]
    turned = (q[..., 4] + 1j * q[..., 5]) * np.exp(1j * angle)
    c = states[0, 0] @ p["w_kva_DC"]
    kv = np.einsum(
        "pz,zhc->phc",
        norm(np.float64(layer.norm_kv.scale_D[...]), c[:, :6]),
        p["w_kvb_ZHC"],
    )
    y = np.zeros((B, L, 4, 3))
    for b, i, h in np.ndindex(B, L, 4):
        place = [turned[b, i, h].real, turned[b, i, h].imag]
        score = [q[b, i, h, :4] @ kv[n, h, :4] + place @ c[n, 6:] for n in range(3)]
        y[b, i, h] = gate[0, 0, h] * softmax(np.array(score) / 6**0.5) @ kv[:, h, 4:]
    want = np.einsum("blhv,hvd->bld", y, p["w_out_HVD"])
    assert_close(found - plain, want, "float32")


@pytest.mark.parametrize(
    ("dim", "hidden", "layers", "input_side", "output_side"),
    [  # Llama 7B, 13B and 65B
        (4096, 11008, 32, 2_764_800, 2_985_984),
        (5120, 13824, 40, 4_326_400, 4_674_560),
        (8192, 22016, 80, 13_811_712, 14_917_632),
    ],
)
def test_it_has_as_many_parameters_as_the_formula_says(
    dim, hidden, layers, input_side, output_side
):
    bias, norms = 5 * dim + 2 * hidden, 2 * dim
    formula = {
        "input": layers * (bias + 6 * dim + hidden + norms) + dim,
        "output": layers * (bias + bias + norms) + dim,
    }
    assert formula == {"input": input_side, "output": output_side}
    heads = dim // 128
    for side, expected in formula.items():
        adapter = AdapterV2(scale_side=side, prompt_length=20, layers=layers - 1)
        stack = (Segment(pattern=(Dense(hidden=hidden),), repeat=layers),)
        attention = Attention(heads=heads)
        cfg = LM(
            dim=dim, vocab=32000, attention=attention, layers=stack, adapter=adapter
        )
        spec = model_spec(cfg)
        sizes = {
            name: math.prod(a.shape)
            for name, a in flat_paths(spec.params).items()
            if not spec.info[name].frozen
        }
        prompts = sum(v for n, v in sizes.items() if "prompts" in n)
        assert prompts == (layers - 1) * (20 * dim + heads)
        assert sum(sizes.values()) - prompts == expected


@pytest.mark.thorough
@pytest.mark.parametrize(
    "attention",
    [pytest.param(FULL, id="full"), pytest.param(MLA, marks=SLOW, id="latent")],
)
def test_decoding_sees_prompts_and_visual_tokens_as_the_whole_model_does(attention):
    cfg, spec, params, state = started(attention)
    params = changed(params)
    new = generate(
        *(spec, cfg, params, state, TOKENS.tolist()),
        max_new_tokens=4,
        temperature=0.0,
        visual=FEATURES,
    )
    rows = np.concatenate([TOKENS, np.array(new, np.int32)], axis=1)
    ctx = dataclasses.replace(context(rows), has_visual_B=None)
    best = np.argmax(logits(spec, params, state, ctx), axis=-1)
    assert new == best[:, L - 1 : -1].tolist()


@pytest.mark.thorough
def test_a_sequence_without_visual_tokens_is_not_changed_by_them():
    _, spec, params, state = started()
    params = changed(params)
    both = logits(spec, params, state, context())
    none = logits(spec, params, state, context(visual=False))
    assert_close(both[1], none[1], "order")
    assert np.abs(both[0] - none[0]).max() > 1e-2


def gradients_of(spec, params, state, ctx):
    def loss(params):
        y = spec.merge(params, state)(ctx)[0].astype(jnp.float32)
        return jnp.sum(jnp.sin(3 * y))

    return flat_paths(jax.jit(jax.grad(loss))(params))


@pytest.mark.slow
def test_latent_attention_is_the_same_without_a_scan_and_with_remat():
    """Other attentions, and all that can be set, are in `test_settings.py`."""
    _, spec, params, state = started(MLA)
    params = changed(params)
    expected = gradients_of(spec, params, state, context())
    for how in ({"scan_layers": False}, {"remat": "full"}):
        found = gradients_of(spec, params, state, context(**how))
        for name, want in expected.items():
            size = max(1.0, float(jnp.max(jnp.abs(want))))
            assert_close(found[name] / size, want / size, "step", name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "seq": 2, "tensor": 2}],
    ids=str,
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_on_eight_devices_it_is_as_on_one(sizes, side):
    tokens = np.random.default_rng(1).integers(0, V, (4, 6)).astype(np.int32)
    _, spec, params, state = started(scale_side=side)
    params = changed(params)
    ctx = dataclasses.replace(
        context(tokens, mode="train"),
        visual_BMC=jnp.tile(FEATURES, (2, 1, 1)),
        has_visual_B=jnp.tile(HAS, 2),
    )
    expected = gradients_of(spec, params, state, ctx)
    mesh = mesh_of(8, **sizes)
    params, state = (
        jax.tree.map(jax.device_put, tree, placed)
        for tree, placed in zip((params, state), shardings(spec, mesh), strict=True)
    )
    with jax.set_mesh(mesh):
        found = gradients_of(spec, params, state, ctx)
    for name, want in expected.items():
        size = max(1.0, float(jnp.max(jnp.abs(want))))
        assert_close(found[name] / size, want / size, "step", name)


def trained_steps(kinds):
    """The parameters and moments before, and after each batch of the kinds."""
    cfg, spec, params, state = started()
    optim = Optim(rule=AdamW(), lr=1e-2, weight_decay=0.1, spike_factor=None)
    tx, _ = make_optimizer(optim, 10, spec.params, spec.info)
    step = jax.jit(
        make_train_step(
            *(TASK, spec, tx, Loss(load_balance=0.0)),
            grad_accum=1,
            num_domains=2,
            optim=optim,
            compute=Compute(kernels="xla"),
        )
    )
    own = {"params": params, "opt": tx.init(params), "state": state}
    states = [own | {"guard": init_guard()}]
    for i, kind in enumerate(kinds):
        batch = random_batch(B, L, vocab=V, seed=i)
        visual = FEATURES if kind == "visual" else np.zeros_like(FEATURES)
        has = np.full(B, kind == "visual", np.int32)
        batch |= {"visual": visual, "has_visual": has}
        states.append(step(states[-1], i, jax.random.key(0), batch)[0])
    return spec, states


@pytest.mark.thorough
def test_a_batch_of_one_kind_moves_only_its_own_parameters_and_their_moments():
    order = ["visual", "visual", "text", "text", "visual"]
    spec, states = trained_steps(order)
    paths = {n: i.trained_by for n, i in spec.info.items() if not i.frozen}
    assert set(paths.values()) == {"visual", "text"}
    moved: dict[str, set] = {"visual": set(), "text": set()}
    for kind, before, after in zip(order, states, states[1:], strict=False):
        for tree in ("params", "opt"):
            leaves = jax.tree_util.tree_leaves_with_path(before[tree])
            new = jax.tree.leaves(after[tree])
            for (path, old), now in zip(leaves, new, strict=True):
                where = "/".join(str(getattr(k, "key", "")) for k in path)
                owner = next((n for n in paths if where.endswith(n)), None)
                same = np.array_equal(old, now)
                if owner is not None and paths[owner] != kind:
                    assert same, (kind, tree, where)
                elif owner is not None and tree == "params" and not same:
                    moved[kind].add(owner)
    # A gate moves first; what is behind it has no gradient while it is 0.
    assert moved["visual"] == {n for n, kind in paths.items() if kind == "visual"}
    assert moved["text"] == {n for n, kind in paths.items() if kind == "text"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt_length": 0}, "prompt_length = 0: must be at least 1, or None"),
        ({"layers": 0}, "layers = 0: must be at least 1; prompt_length=None"),
        ({"prompt_length": None, "layers": 2}, "layers = 2: must be None without pro"),
        ({"layers": 4}, "layers = 4: must be at most 3, the layers of the model"),
        (
            {"layers": 3, "visual": VISUAL},
            "layers = 3: must be at most 2, the lay",
        ),
        ({"scale_side": "left"}, "scale_side = 'left': must be input, output or None"),
        ({"targets": ()}, r"targets = \(\): must be not empty"),
        (
            {"bias": False, "scale_side": None},
            r"targets = .* must be \(\) without bias and scale",
        ),
        ({"targets": ("w_embed",), "scale_side": "input"}, "whose rows are looked up"),
        ({"visual": Visual(width=0)}, "visual.width = 0: must be at least 1"),
        ({"visual": Visual(width=1, layers=0)}, "visual.layers = 0: must be at least"),
        ({"visual": Visual(width=1, layers=4)}, "visual.layers = 4: must be at most 3"),
        ({"also_train": ("ruoter",)}, "'ruoter' matches no"),
    ],
)
def test_a_mistake_is_one_clear_line(fields, told):
    cfg = small(adapter=AdapterV2(**fields))
    with pytest.raises(ConfigError, match=told) as e:
        check(cfg, "config.model")
        model_spec(cfg)
    assert "\n" not in str(e.value)


def test_nothing_to_train_is_a_mistake():
    off = {"bias": False, "scale_side": None, "norms": False, "prompt_length": None}
    with pytest.raises(ConfigError, match="nothing is trained"):
        check(small(adapter=AdapterV2(targets=(), **off)), "config.model")


def test_an_attention_that_takes_no_extra_keys_is_refused(monkeypatch):
    monkeypatch.setattr(Attention, "takes_extra_keys", False)
    with pytest.raises(ConfigError, match="Attention cannot attend to extra keys"):
        model_spec(small(adapter=v2()))


def test_visual_tokens_of_another_shape_are_refused():
    cfg, spec, params, state = started()
    options = {"max_new_tokens": 1, "visual": FEATURES[:, :1]}
    with pytest.raises(ValueError, match=r"visual tokens of shape \[2, 2, 3\]; got"):
        generate(spec, cfg, params, state, TOKENS.tolist(), **options)
    with pytest.raises(ValueError, match="for a model that takes none"):
        generate(spec, small(), params, state, TOKENS.tolist(), **options)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("data", Reading(), "config.data.one_source = False: must be True with "),
        (
            "optim",
            Optim(rule=AdamW(), lr=1.0),
            "spike_factor = 10.0: must be None",
        ),
    ],
)
def test_a_run_that_would_mix_kinds_of_batches_is_refused(key, value, told):
    cfg = types.SimpleNamespace(
        data=Reading(one_source=True),
        optim=Optim(rule=AdamW(), lr=1.0, spike_factor=None),
        task=types.SimpleNamespace(num_domains=lambda cfg: 2),
    )
    v2().check_run(cfg, "config.model.adapter")
    setattr(cfg, key, value)
    AdapterV2().check_run(cfg, "config.model.adapter")  # it has no visual tokens
    with pytest.raises(ConfigError, match=told):
        v2().check_run(cfg, "config.model.adapter")
