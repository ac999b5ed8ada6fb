"""Every kind of adapter computes the same however it is computed.

The reference of each is one program: one device, a scan over layers, float32, the whole
batch at once. The kinds' own test files check it against loops in float64.

B batch · L length
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moex.adapters.lora import LoRA
from moex.adapters.loramoe import LoRAMoE
from moex.adapters.moram import MoRAM
from moex.adapters.v2 import AdapterV2, Visual
from moex.model.decode import generate
from moex.model.optim import AdamW, Optim
from moex.model.paths import flat_paths
from moex.model.spec import check_mesh, init_guard, shardings
from moex.moe.routers.topk import TopK
from moex.nn.context import Compute, Context
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Loss
from moex.sharding import MeshConfig, shard_batch
from moex.train.step import make_train_step
from tests.helpers import TASK, VOCAB, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.tolerances import assert_close

pytestmark = pytest.mark.slow
B, L, M, C = 8, 8, 2, 3
RATE = 1e4  # so large that rounding of the parameters does not count
# Two parts, three input dims, stacked experts, rows that are looked up.
MATRICES = {"targets": ("w_kv", "w_out_GRAD", "experts/w_", "w_embed_VD")}
KINDS = {
    "LoRA": LoRA(rank=2, alpha=4.0, also_train=("norm",), **MATRICES),
    "LoRAMoE": LoRAMoE(
        experts=4, rank=2, alpha=4.0, types=(0, 1), shared=True, **MATRICES
    ),
    "MoRAM": MoRAM(rank=3, alpha=6.0, k=4, bank=4, temperature=0.3, **MATRICES),
    "AdapterV2": AdapterV2(
        prompt_length=2,
        layers=2,
        visual=Visual(width=C, tokens=M, layers=1, disjoint=False),
    ),
    "AdapterV2, scales of inputs": AdapterV2(scale_side="input", prompt_length=3),
}
SETTINGS = {
    "a loop over layers": Compute(kernels="xla", scan_layers=False),
    "full recomputation": Compute(kernels="xla", remat="full"),
    "recomputation of all but matmuls": Compute(kernels="xla", remat="dots"),
    "the default kernels": Compute(),
}
MESHES = {
    "gather": MeshConfig(data=1, fsdp=2, expert=2, tensor=2, exchange="gather"),
    "all to all": MeshConfig(data=2, expert=4, exchange="all_to_all"),
    "sequences": MeshConfig(data=2, seq=2, tensor=2),
}


def model(kind, k=2):
    """(config, spec, params, state) of a small model with adapters, none at its start.

    Args:
      kind: a key of `KINDS`.
      k: experts of a token, of 4.
    """
    sparse = tiny_moe(num_experts=4, router=TopK(k=k, init_std=0.5))
    layers = (
        Segment(pattern=(Dense(hidden=24),)),
        Segment(pattern=(sparse,), repeat=2),
    )
    cfg = tiny_lm(*layers, adapter=KINDS[kind])
    return cfg, *built(cfg)


def batch_of(cfg):
    batch = random_batch(B, L)
    if cfg.adapter.fields():
        random = np.random.default_rng(1)
        batch["visual"] = random.normal(size=(B, M, C)).astype(np.float32)
        batch["has_visual"] = (np.arange(B) % 3 > 0).astype(np.int32)
    return batch


def outcome(made, compute=XLA, mesh=None):
    """(loss, sums about gates, gradients of what is trained by path)."""
    cfg, spec, params, state = made
    batch, coefs = batch_of(cfg), Loss(load_balance=0.0)

    def loss(params, batch):
        ctx = TASK.context(batch, mode="train", compute=compute)
        return TASK.loss(spec.merge(params, state), ctx, batch, coefs, num_domains=2)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    if mesh is None:
        (value, sums), gradients = step(params, batch)
    else:
        check_mesh(spec, mesh)
        params, state = jax.device_put((params, state), shardings(spec, mesh))
        with jax.set_mesh(mesh):
            (value, sums), gradients = step(params, shard_batch(batch, mesh))
    trained = {
        name: np.asarray(gradient, np.float64)
        for name, gradient in flat_paths(gradients).items()
        if not spec.info[name].frozen
    }
    return float(value), jax.device_get(sums["adapters"]), trained


@pytest.fixture(scope="module")
def expected():
    """`expected(kind)`: the outcome of the reference, computed once."""
    known = {}

    def of(kind):
        if kind not in known:
            known[kind] = outcome(model(kind))
        return known[kind]

    return of


def assert_same(found, expected):
    """All values, gradients and sums about gates; each array by its largest number."""
    assert_close(found[0], expected[0], "step")
    pairs = [tuple(flat_paths(sums) for sums in (found[1], expected[1]))]
    pairs.append((found[2], expected[2]))
    for own, right in pairs:
        assert own.keys() == right.keys()
        for name, value in right.items():
            largest = max(float(np.max(np.abs(value))), 1e-6)
            assert_close(own[name] / largest, value / largest, "step", name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_how_layers_are_run_changes_nothing(expected, kind, setting):
    _, gates, gradients = expected(kind)
    assert bool(gates) == KINDS[kind].MIXES
    assert all(np.any(gradient) for gradient in gradients.values())
    assert_same(outcome(model(kind), SETTINGS[setting]), expected(kind))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_compute_what_one_does(expected, kind, mesh):
    mesh = MESHES[mesh]
    compute = Compute(kernels="xla", exchange=mesh.exchange)
    assert_same(outcome(model(kind), compute, mesh.make()), expected(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near(kind):
    """Where a token uses all experts and atoms, so that rounding changes no choice.

    Gradients are sums over tokens that cancel for the most part, so they are less near.
    """
    cfg, spec, params, state = model(kind, k=4)
    if kind == "MoRAM":
        every = dataclasses.replace(cfg.adapter, k=7, temperature=1.0)
        cfg = dataclasses.replace(cfg, adapter=every)
        spec, params, state = built(cfg)
    made = cfg, spec, params, state
    value, _, gradients = outcome(made)
    low, _, found = outcome(made, Compute(kernels="xla", dtype="bfloat16"))
    assert 0 < abs(low - value) < 0.02 * value
    whole, near = (
        np.concatenate([own[name].ravel() for name in sorted(gradients)])
        for own in (gradients, found)
    )
    assert 0 < np.linalg.norm(near - whole) < 0.25 * np.linalg.norm(whole)


def updated(made, grad_accum):
    """The parameters after one step whose update is `RATE` times the gradient."""
    cfg, spec, params, state = made
    tx = optax.sgd(RATE)
    step = make_train_step(
        *(TASK, spec, tx, Loss(load_balance=0.0)),
        grad_accum=grad_accum,
        num_domains=2,
        optim=Optim(rule=AdamW(), lr=1.0, spike_factor=None),
        compute=XLA,
    )
    own = {"params": params, "state": state, "opt": tx.init(params)}
    own |= {"guard": init_guard()}
    new, _ = jax.jit(step)(own, 0, jax.random.key(0), batch_of(cfg))
    return flat_paths(new["params"])


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_add_up_to_the_gradient_of_the_batch(expected, kind):
    made = model(kind)
    before, after = flat_paths(made[2]), updated(made, 4)
    _, _, gradients = expected(kind)
    for name, old in before.items():
        if name not in gradients:
            np.testing.assert_array_equal(after[name], old, err_msg=name)
            continue
        largest = np.max(np.abs(gradients[name]))
        found = (np.float64(old) - np.float64(after[name])) / (RATE * largest)
        assert_close(found, gradients[name] / largest, "step", name)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_continues_as_the_whole_forward_pass_does(kind):
    cfg, spec, params, state = model(kind)
    prompts = np.random.default_rng(0).integers(0, VOCAB, (2, 5))
    visual = batch_of(cfg).get("visual")
    visual = None if visual is None else visual[:2]
    options = {"max_new_tokens": 4, "temperature": 0, "compute": XLA, "visual": visual}
    new = generate(spec, cfg, params, state, prompts.tolist(), **options)
    rows = jnp.asarray(np.concatenate([prompts, new], axis=1), jnp.int32)
    ctx = Context.of(rows[..., None], token_BL=rows, compute=XLA, visual_BMC=visual)
    best = jnp.argmax(spec.merge(params, state)(ctx)[0], axis=-1)
    assert new == best[:, 4:-1].tolist()
