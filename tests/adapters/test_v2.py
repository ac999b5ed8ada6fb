"""LLaMA-Adapter V2 against loops over tokens in float64, and what it promises.

B batch · L length · M visual tokens · C their width · P prompt length · D model width
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.adapters.v2 import AdapterV2, Visual
from moex.config.base import ConfigError, check
from moex.model.decode import generate
from moex.model.paths import flat_paths, path_name
from moex.model.spec import init_params, model_spec
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute, Context
from moex.nn.lm import LM
from moex.nn.mla import LatentAttention
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from tests.adapters.test_lora import nested
from tests.helpers import mesh_of
from tests.tolerances import assert_close

B, L, M, C, V = 2, 5, 2, 3, 11
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
    w = p[f"{owner}/{name}"][c].reshape(len(x_I), *bias.shape)
    if own + "scale_NI" in p:
        s = p[own + "scale_NI"][c]
        return np.stack([(s[n] * x_I) @ w[:, n] + bias[n] for n in range(len(bias))])
    s = p[own + "scale_NO"][c]
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
    """The output for each token of one sequence; extras: (states, gate of each head)."""
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


@pytest.mark.parametrize("side", ["input", "output"])
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
    for name, gradient in flat_paths(gradients).items():
        direction = random.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-5
        up, down = (
            np.vdot(loop_logits(p | {name: p[name] + s * direction}, cfg), target)
            for s in (step, -step)
        )
        slope = (up - down) / (2 * step)
        size = max(1.0, float(np.linalg.norm(gradient)))
        found = np.vdot(np.float64(gradient), direction)
        assert_close(found / size, slope / size, "difference", name)
