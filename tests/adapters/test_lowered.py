"""The base of adapters in bfloat16 and in int8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.adapters.lora import LoRA
from moex.config.base import ConfigError
from moex.convert import apply
from moex.model.accounting import model_cost, num_bytes
from moex.model.paths import flat_paths, nested
from moex.model.spec import init_params, model_spec, shardings
from moex.moe.experts.glu import Glu
from moex.moe.routers.topk import TopK
from moex.nn.lowered import from_int8, lowered, to_int8
from moex.nn.stack import Segment
from tests.adapters.test_lora import EVERYTHING, logits
from tests.helpers import built, mesh_of, tiny_lm, tiny_moe
from tests.marks import slow, thorough

TARGETS = tuple(t for t in EVERYTHING if "*ffn" not in t)
# A token uses all experts: with a choice, rounding changes who is chosen.
SPARSE = tiny_moe(num_experts=4, router=TopK(k=4, bias_rate=0.01, init_std=0.5))
SEGMENTS = (Segment(pattern=(SPARSE,), repeat=2),)


def adapted(dtype, **fields):
    fields = {"also_train": ("norm",)} | fields
    lora = LoRA(rank=2, alpha=4.0, targets=TARGETS, base_dtype=dtype, **fields)
    return dataclasses.replace(tiny_lm(*SEGMENTS, dim=32), adapter=lora)


@pytest.fixture(scope="module")
def model():
    """(spec, flat parameters with a random change, state) in float32."""
    cfg = adapted("float32")
    params, state = init_params(cfg, jax.random.key(0))
    random, flat = np.random.default_rng(0), flat_paths(params)
    for name, array in flat.items():
        if "adapters" in name:
            flat[name] = jnp.asarray(0.1 * random.normal(size=array.shape), jnp.float32)
    return model_spec(cfg), flat, state


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((4, 130, 6), (4, 2, 6)),
        *(thorough((3, 8), (3, 1)), thorough((2, 7, 5), (2, 7, 5))),
        thorough((64,), (1,)),
    ],
)
def test_no_number_moves_by_more_than_half_a_scale(shape, scales):
    random = np.random.default_rng(0)
    w = random.normal(size=shape) * np.exp(random.normal(size=shape))
    w.flat[0], w[-1] = 0.0, 0.0  # a block of zeros stays
    values, scale = to_int8(jnp.asarray(w, jnp.float32), scales)
    assert values.dtype == jnp.int8 and scale.shape == scales
    found = np.asarray(from_int8(values, scale), np.float64)
    repeats = [n // m for n, m in zip(shape, scales, strict=True)]
    wide = np.asarray(scale, np.float64)
    for dim, times in enumerate(repeats):
        wide = np.repeat(wide, times, axis=dim)
    assert np.all(np.abs(found - w) <= wide * (0.5 + 1e-4))
    largest = np.abs(w).reshape(-1).max()
    assert float(scale.max()) == pytest.approx(largest / 127, rel=1e-6)
    assert not np.any(found[-1])


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_only_frozen_weights_are_lowered(model, dtype):
    spec = model_spec(adapted(dtype, also_train=("shared",)))
    kinds = {name: a.dtype.name for name, a in flat_paths(spec.params).items()}
    for name, kind in kinds.items():
        own = "/router" in name or "shared" in name or "adapters" in name
        own = own or "/w_" not in f"/{name}"
        if own or name.endswith("/scales"):
            assert kind == "float32", name
        else:
            int8 = dtype == "int8" and name not in ("w_embed_VD", "w_logits_DV")
            assert kind == ("int8" if int8 else "bfloat16"), name
    assert all(spec.info[n].frozen for n, kind in kinds.items() if kind != "float32")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtype", "scan_layers"),
    [slow("bfloat16", True), ("int8", True), slow("int8", False)],
)
def test_it_is_the_model_with_rounded_weights(model, dtype, scan_layers):
    spec, flat, state = model
    low = model_spec(adapted(dtype))
    small = lowered(flat, flat_paths(low.params))
    assert small.keys() == flat_paths(low.params).keys()
    rounded = {
        name: from_int8(small[f"{name}/values"], small[f"{name}/scales"])
        if name not in small
        else small[name].astype(jnp.float32)
        for name in flat
    }
    compute = {"scan_layers": scan_layers, "kernels": "xla"}
    own = logits(low, nested(small), state, **compute)
    want = logits(spec, nested(rounded), state, **compute)
    np.testing.assert_allclose(own, want, rtol=0, atol=2e-6 * np.abs(want).max())
    exact = logits(spec, nested(flat), state, **compute)
    apart = np.abs(own - exact).max() / np.abs(exact).max()
    assert 1e-5 < apart < 0.03, apart


@pytest.mark.slow
def test_a_mesh_splits_values_and_scales_alike():
    """Experts are 128 wide: a tensor axis of two has a block on each of its devices."""
    wide = tiny_moe(num_experts=4, experts=Glu(hidden=128), shared=None)
    lora = LoRA(rank=2, alpha=4.0, targets=("experts",), base_dtype="int8")
    cfg = tiny_lm(Segment(pattern=(wide,)), dim=32, adapter=lora)
    plain = dataclasses.replace(lora, base_dtype="float32")
    _, params, state = built(dataclasses.replace(cfg, adapter=plain))
    spec = model_spec(cfg)
    small = nested(lowered(flat_paths(params), flat_paths(spec.params)))
    want = logits(spec, small, state, kernels="xla")
    mesh = mesh_of(8, data=1, fsdp=2, expert=2, tensor=2)
    placed = jax.device_put(small, shardings(spec, mesh)[0])
    with jax.set_mesh(mesh):
        own = logits(spec, placed, state, kernels="xla")
    np.testing.assert_allclose(own, want, rtol=0, atol=2e-6 * np.abs(want).max())
    scales = placed["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]["w_out_EFD"]
    assert scales["scales"].shape == (1, 4, 2, 32)
    assert scales["scales"].addressable_shards[0].data.shape[2] == 1


@pytest.mark.thorough
def test_gradients_reach_only_what_is_trained(model):
    spec, flat, state = model
    low = model_spec(adapted("int8"))
    small = lowered(flat, flat_paths(low.params))
    trained = {n: a for n, a in small.items() if not low.info[n].frozen}
    rest = {n: a for n, a in small.items() if n not in trained}
    rounded = {n: small.get(n, None) for n in flat}
    for name, array in rounded.items():
        if array is None:
            pair = small[f"{name}/values"], small[f"{name}/scales"]
            rounded[name] = from_int8(*pair)
        else:
            rounded[name] = array.astype(jnp.float32)

    def gradients(spec, rest):
        def loss(own):
            return jnp.sum(jnp.sin(logits(spec, nested(rest | own), state)))

        return jax.grad(loss)(trained)

    own, want = gradients(low, rest), gradients(spec, rounded)
    for name, value in want.items():
        largest = float(jnp.abs(value).max())
        np.testing.assert_allclose(own[name], value, rtol=0, atol=1e-4 * largest)


def test_bytes_and_parameters_are_counted():
    specs = {d: model_spec(adapted(d)) for d in ("float32", "bfloat16", "int8")}
    costs = {d: model_cost(adapted(d), s, 16) for d, s in specs.items()}
    assert len({cost.num_params for cost in costs.values()}) == 1
    assert len({cost.train_flops for cost in costs.values()}) == 1
    assert len({apply._size(spec) for spec in specs.values()}) == 1
    frozen = {
        d: {n: a for n, a in flat_paths(s.params).items() if s.info[n].frozen}
        for d, s in specs.items()
    }
    weights = {n: a for n, a in frozen["float32"].items() if "/router" not in n}
    weights = {n: a for n, a in weights.items() if "/w_" in f"/{n}"}
    whole = num_bytes(frozen["float32"])
    assert num_bytes(frozen["bfloat16"]) == whole - num_bytes(weights) / 2
    small = num_bytes(frozen["int8"])
    ends = num_bytes({n: a for n, a in weights.items() if n.count("/") == 0})
    # One byte for each number, and four for each block of 8 to 32 numbers here.
    most = whole - num_bytes(weights) + ends / 2 + (num_bytes(weights) - ends) * 3 / 8
    assert small < most


def test_another_type_is_refused():
    with pytest.raises(ConfigError, match="base_dtype = 'int4': must be one of"):
        model_spec(adapted("int4"))
