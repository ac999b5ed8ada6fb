"""Small models and batches that many tests build.

B batch · L length · D model width · E experts
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moex.model.paths import flat_paths, path_name
from moex.model.spec import model_spec
from moex.moe.experts.glu import Glu
from moex.moe.layer import MoE
from moex.moe.routers.topk import TopK
from moex.nn.attention import Attention
from moex.nn.context import Compute, Context
from moex.nn.lm import LM
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.sharding import MeshConfig
from moex.tasks.lm import LanguageModelling

VOCAB = 48
TASK = LanguageModelling()
XLA = Compute(kernels="xla")
lm_loss = TASK.loss


def tiny_moe(num_experts=8, **fields):
    defaults = {
        "router": TopK(k=2, bias_rate=0.01, init_std=0.5),
        "experts": Glu(hidden=8),
        "shared": Dense(hidden=8),
    }
    return MoE(num_experts=num_experts, **defaults | fields)


def tiny_lm(*segments, **fields):
    """A dense layer and two MoE layers, unless `segments` are given."""
    if not segments:
        segments = (
            Segment(pattern=(Dense(hidden=24),)),
            Segment(pattern=(tiny_moe(),), repeat=2),
        )
    defaults = {
        "dim": 16,
        "attention": Attention(heads=4, kv_heads=2, qk_norm=True),
        "vocab": VOCAB,
    }
    return LM(layers=segments, **defaults | fields)


def built(cfg, seed=0):
    """(spec, params, state) of a config.

    Random numbers of a plain kind: the real initialisation takes seconds to compile.
    """
    spec = model_spec(cfg)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        info = spec.info[path_name(path)]
        if len(info.axes) == 1:
            return jnp.asarray(1 + 0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        own = leaf.shape[leaf.ndim - len(info.axes) :]
        inputs = (0,) if info.matrix is None else info.matrix[0]
        std = math.prod(own[i] for i in inputs) ** -0.5
        return jnp.asarray(std * rng.normal(size=leaf.shape), leaf.dtype)

    def start(leaf):
        if leaf.dtype == jnp.int32:  # experts that share weights use two sets in turn
            turns = jnp.arange(leaf.shape[-1], dtype=jnp.int32)[None] % 2
            return jnp.broadcast_to(turns, leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, spec.params)
    return spec, params, jax.tree.map(start, spec.state)


def split_module(module):
    """(graphdef, parameters, other state) of one module, as plain dicts."""
    graphdef, params, state = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(state)


def random_batch(batch_size, length, *, vocab=VOCAB, seed=0, num_domains=2):
    """Packed rows of two or three documents; every other row ends in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch_size, length + 1)).astype(np.int32)
    segment = np.zeros((batch_size, length), np.int32)
    position = np.zeros((batch_size, length), np.int32)
    for b in range(batch_size):
        end = length - (b % 2) * (length // 4)
        cuts = sorted(rng.choice(np.arange(1, end), size=1 + b % 2, replace=False))
        bounds = [0, *cuts, end]
        for i, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            segment[b, start:stop] = i + 1
            position[b, start:stop] = np.arange(stop - start)
    following = np.pad(segment[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment": segment,
        "position": position,
        "loss_mask": ((segment > 0) & (segment == following)).astype(np.float32),
        "num_bytes": rng.integers(1, 5, (batch_size, length)).astype(np.int32),
        "domain": (np.arange(batch_size) % num_domains).astype(np.int32),
        "example_id": np.arange(batch_size, dtype=np.int32),
    }


def context(batch_size, length, *, num_padding=0, **fields):
    """One document per row, with `num_padding` tokens of padding at its end."""
    position = jnp.broadcast_to(jnp.arange(length)[None], (batch_size, length))
    defaults = {
        "segment_BL": (position < length - num_padding).astype(jnp.int32),
        "position_BL": position,
        "token_BL": jnp.zeros((batch_size, length), jnp.int32),
    }
    return Context(**defaults | fields)


def mesh_of(num_devices=1, **sizes):
    """A mesh over the first `num_devices` devices."""
    return MeshConfig(**{"data": 1} | sizes).make(jax.devices()[:num_devices])


def assert_equal_trees(actual, expected):
    """Bit for bit, with the path of the first difference."""
    actual, expected = flat_paths(actual), flat_paths(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
