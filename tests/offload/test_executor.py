"""Offloaded models against plain ones: the same tokens, whatever is resident."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.model.decode import generate
from moex.model.paths import flat_paths, nested
from moex.model.spec import model_spec
from moex.model.steering import LayerSteering, Steering
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.lowrank import LowRank
from moex.moe.experts.lowrank_glu import LowRankGlu
from moex.moe.experts.zero import Zero
from moex.moe.narrow import Narrow
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.lowered import lowered
from moex.nn.stack import Segment
from moex.offload import decode
from moex.offload.bank import FileBank, write_bank
from moex.offload.block import run_block
from moex.offload.costs import Costs
from moex.offload.layout import abstract, pools
from moex.offload.measure import measure
from moex.offload.settings import Settings
from moex.offload.setup import of_arrays
from moex.offload.slots import TRACED
from tests.helpers import VOCAB, XLA, built, mesh_of, tiny_lm, tiny_moe
from tests.marks import slow, thorough_but_for

PROMPTS = (3, 7)
GREEDY = {"max_new_tokens": 4, "temperature": 0, "compute": XLA}


def lm(*pattern, repeat=2):
    return tiny_lm(Segment(pattern=pattern, repeat=repeat))


GROUPED = TopK(k=2, score="sigmoid", bias_rate=0.01, groups=Groups(num=4, keep=2))
MODELS = {
    "top-k, shared expert": tiny_lm(),
    "top-p": lm(tiny_moe(router=TopP(p=0.6))),
    "chain": lm(Chain(moe=tiny_moe(), iterations=2)),
    "sigmoid, bias, groups": lm(tiny_moe(router=GROUPED)),
    "biases, zero-computation experts": lm(
        tiny_moe(experts=Glu(hidden=8, bias=True), zero=Zero(null=1, copy=1))
    ),
    "latent": lm(
        tiny_moe(experts=Latent(hidden=8, latent=4, group=3, ops=("gate", "down")))
    ),
    "one latent space": lm(tiny_moe(experts=Latent(hidden=8, latent=4, group=8))),
    "narrow": lm(Narrow(latent=8, inner=tiny_moe())),
    "low rank": lm(tiny_moe(experts=LowRank(rank=2))),
    "low rank and rows": lm(
        tiny_moe(experts=LowRankGlu(hidden=8, rank=2, rows=(3, 2)))
    ),
    "merged": lm(tiny_moe(stored_experts=3)),
    "two kinds": lm(tiny_moe(), tiny_moe(5, experts=Glu(hidden=4))),
}


def offloaded(cfg, folder, size, policy="lru"):
    """An executor of the model that `built` makes, whose bank is in `folder`."""
    _, params, state = built(cfg)
    return of_arrays(cfg, params, state, folder, Settings(size, policy), XLA)


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).tolist() for n in PROMPTS]


@pytest.fixture(scope="module")
def plain():
    made = {}

    def of(name):
        if name not in made:
            cfg = MODELS[name]
            spec, params, state = built(cfg)
            made[name] = generate(spec, cfg, params, state, prompts(), **GREEDY)
        return made[name]

    return of


LATER = (
    *("top-k, shared expert", "top-p", "biases, zero-computation experts", "latent"),
    *("one latent space", "narrow", "low rank"),
)


@pytest.mark.parametrize("name", thorough_but_for(MODELS, "chain", later=LATER))
def test_tokens_are_those_of_the_whole_model(name, plain, tmp_path):
    """With fewer slots than a token has experts."""
    with jax.set_mesh(mesh_of(1)):
        own = offloaded(MODELS[name], tmp_path, "1")
        assert decode.generate(own, MODELS[name], prompts(), **GREEDY) == plain(name)
    assert sum(slots.cache.statistics.evictions_L.sum() for slots in own.slots) > 0


SMALL = "two kinds"


@pytest.mark.parametrize(
    "size", thorough_but_for([*"12345678", "100%"], "1", later="2345678")
)
def test_tokens_do_not_depend_on_policy_or_size(size, plain, tmp_path):
    cfg = MODELS[SMALL]
    with jax.set_mesh(mesh_of(1)):
        for policy in ("lru", "lfu", "mrs"):
            own = offloaded(cfg, tmp_path, size, policy)
            assert decode.generate(own, cfg, prompts(), **GREEDY) == plain(SMALL)
            assert policy in type(own.slots[0].cache.policy).__name__.lower()


def test_a_cache_that_holds_all_moves_each_expert_once(tmp_path):
    cfg = MODELS[SMALL]
    with jax.set_mesh(mesh_of(1)):
        own = offloaded(cfg, tmp_path, "50")
        decode.generate(own, cfg, prompts(), **GREEDY)
        before = [slots.cache.statistics.loads for slots in own.slots]
        for slots, count in zip(own.slots, before, strict=True):
            assert 0 < count <= slots.pool.num_rows
            assert slots.cache.statistics.evictions_L.sum() == 0
        decode.generate(own, cfg, prompts(), **GREEDY)
        assert [slots.cache.statistics.loads for slots in own.slots] == before


def test_a_kind_of_block_is_compiled_once_whatever_is_resident(tmp_path):
    """A dense one and two copies of an MoE layer, each for a prompt and a token."""
    cfg = MODELS["top-k, shared expert"]
    with jax.set_mesh(mesh_of(1)):
        own = offloaded(cfg, tmp_path, "3")
        run_block.clear_cache()  # of other tests
        before = TRACED["block"]
        decode.generate(own, cfg, prompts(), **GREEDY)
        assert TRACED["block"] - before == 4
        other = [list(reversed(prompt)) for prompt in prompts()]
        decode.generate(own, cfg, other, **GREEDY)
        assert TRACED["block"] - before == 4
        assert own.slots[0].cache.statistics.evictions_L.sum() > 0


@pytest.mark.thorough
def test_a_steered_model_is_steered_with_offloaded_experts(tmp_path):
    cfg = MODELS[SMALL]
    spec, params, state = built(cfg)
    rows = [LayerSteering(layer=n, scale={1: 3.0}, ban=(0,)) for n in range(4)]
    steer = Steering(layers=tuple(rows)).arrays(cfg)
    told: dict = {"plain": [], "own": []}
    how = GREEDY | {"steer": steer}
    want = generate(
        spec, cfg, params, state, prompts(), on_peak=told["plain"].append, **how
    )
    with jax.set_mesh(mesh_of(1)):
        own = offloaded(cfg, tmp_path, "2")
        found = decode.generate(own, cfg, prompts(), on_peak=told["own"].append, **how)
    assert found == want
    assert told["own"][0] >= told["plain"][0] * (1 - 1e-5)


def test_rows_are_read_piece_by_piece_and_cast_as_the_model_is(tmp_path):
    cfg = MODELS["merged"]
    spec, params, _ = built(cfg)
    flat = flat_paths(params)
    (pool,) = pools(cfg, spec, abstract(cfg), "bfloat16")

    def read(item, path, index):
        part = np.asarray(flat[path])[index]
        assert part.shape[:2] in (
            (1, 2),
            (1, 1),
        )  # of pieces (1, 2, ...), and 3 experts
        return part

    write_bank(tmp_path / "rows", pool, read, lambda item, path: (1, 2, 0, 0))
    bank = FileBank(pool, tmp_path / "rows")
    whole = params["segments"]["0"]["blocks"]["0"]["ffn"]["experts"]["w_out_EFD"]
    for layer in pool.layers:
        for e in range(layer.experts):
            row = bank.row(layer.first + e)["w_out_EFD"]
            assert row.dtype == jnp.bfloat16
            want = np.asarray(whole[layer.copy, e].astype(jnp.bfloat16))
            np.testing.assert_array_equal(row, want)


WEIGHTS = {"weights": "int8"}, slow({"weights": "int4", "host": True})


@pytest.mark.thorough
@pytest.mark.parametrize("fields", WEIGHTS, ids=lambda fields: fields["weights"])
def test_weights_in_fewer_bytes_can_be_offloaded(fields, tmp_path):
    """Rounded row by row they are those of the whole model."""
    cfg = lm(tiny_moe(experts=Glu(hidden=32)), repeat=2)
    cfg = dataclasses.replace(cfg, dim=32)
    _, params, state = built(cfg)
    spec = model_spec(cfg, weights=fields["weights"])
    low = nested(lowered(flat_paths(params), flat_paths(spec.params)))
    want = generate(spec, cfg, low, state, prompts(), **GREEDY)
    with jax.set_mesh(mesh_of(1)):
        own = of_arrays(cfg, params, state, tmp_path, Settings("2", **fields), XLA)
        if own.host is not None:
            own.costs = Costs(cpu_row=1.0, device=0.0, move=1.0)
        assert decode.generate(own, cfg, prompts(), **GREEDY) == want
    (slots,) = own.slots
    kinds = {part.name: part.dtype for part in slots.pool.parts}
    packed = np.int8 if fields["weights"] == "int8" else np.int32
    assert kinds["w_in_ED2F/values"] == packed


MODES = {
    "prefetch": {"prefetch": "router"},
    "predicted": {"prefetch": "router", "policy": "predicted"},
    "host": {"host": True},
    "host and prefetch": {"host": True, "prefetch": "router"},
}


@pytest.mark.parametrize("name", thorough_but_for(MODES, "host and prefetch"))
@pytest.mark.parametrize("model", thorough_but_for(["chain", SMALL], "chain"))
def test_tokens_do_not_depend_on_who_loads_or_computes(name, model, plain, tmp_path):
    cfg = MODELS[model]
    _, params, state = built(cfg)
    settings = Settings("4", **MODES[name])
    with jax.set_mesh(mesh_of(1)):
        own = of_arrays(cfg, params, state, tmp_path, settings, XLA)
        if own.host is not None:  # which computes every other one that is missing
            own.costs = Costs(cpu_row=1.0, device=0.0, move=1.0)
        assert decode.generate(own, cfg, prompts(), **GREEDY) == plain(model)
    if own.host is not None:
        assert own.host.count > 0
    counts = [slots.cache.statistics for slots in own.slots]
    assert sum(own.misses_L.sum() for own in counts) > 0
    ahead = sum(own.prefetched_L.sum() for own in counts)
    assert (ahead > 0) == (settings.prefetch is not None)


def test_measuring_costs_leaves_nothing_behind(tmp_path):
    settings = Settings("4", host=True, prefetch="router")
    cfg = MODELS["narrow"]
    _, params, state = built(cfg)
    with jax.set_mesh(mesh_of(1)):
        own = of_arrays(cfg, params, state, tmp_path, settings, XLA)
    assert own.host is not None and own.settings == settings and own.passes is None
    (slots,) = own.slots
    assert np.all(slots.cache.slot_of_LE < 0) and slots.cache.statistics.loads == 0
    costs = own.costs
    assert 0 < costs.move < 1 and 0 < costs.layer < 1 and 0 < costs.cpu(1) < 1


def test_the_host_cannot_compute_experts_that_share_projections(tmp_path):
    cfg = MODELS["latent"]
    _, params, state = built(cfg)
    settings = Settings("4", host=True)
    with pytest.raises(ConfigError, match="LatentExperts share b_down_GZD"):
        of_arrays(cfg, params, state, tmp_path, settings, XLA)


@pytest.mark.thorough
def test_a_measured_run_tells_what_each_step_used(plain, tmp_path):
    cfg = MODELS[SMALL]
    with jax.set_mesh(mesh_of(1)):
        own = offloaded(cfg, tmp_path, "2")
        found = measure(own, cfg, prompts(), GREEDY["max_new_tokens"], XLA)
    assert found.tokens == plain(SMALL)
    num_layers = sum(len(slots.pool.layers) for slots in own.slots)
    steps = GREEDY["max_new_tokens"]
    assert found.rows_SLE.shape == (steps, num_layers, 8)
    assert found.seconds_S.shape == (steps,) and np.all(found.seconds_S > 0)
    # Each token has two experts in each layer: padding has none.
    tokens_S = [sum(PROMPTS)] + [len(PROMPTS)] * (steps - 1)
    want = np.broadcast_to(2 * np.array(tokens_S)[:, None], (steps, num_layers))
    np.testing.assert_array_equal(found.rows_SLE.sum(axis=2), want)
    used = int((found.rows_SLE > 0).sum())
    assert found.hits + found.misses == used
    moved = sum(
        slots.cache.statistics.loads * slots.pool.row_bytes for slots in own.slots
    )
    assert found.bytes == moved
    np.testing.assert_allclose(found.score_SLE.sum(axis=2), 1.0, rtol=1e-5)
    turns = [turn for step in found.turns for turn in step]
    assert sum(turn.experts for turn in turns) == used
    assert sum(turn.moves for turn in turns) == found.misses
    for step in found.turns:
        assert [t.layer for t in step if t.first] == list(range(num_layers))
        # Whoever loads something runs again, and nobody else does.
        assert [t.moves > 0 for t in step[:-1]] == [not t.first for t in step[1:]]
    for turn in turns:
        assert turn.seconds > 0 and (turn.moving > 0) == (turn.moves > 0)
    parts_S = [sum(t.seconds + t.moving for t in step) for step in found.turns]
    np.testing.assert_array_less(parts_S, found.seconds_S)
