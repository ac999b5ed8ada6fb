"""Rows between devices: how many collectives, how they travel, and where none has room.

That sharded is unsharded for every kind of layer is `tests/test_sharded.py`.

B batch · L length · D model width · E experts
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from moex.moe import all_to_all
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.layer import MoE
from moex.moe.parallel import Rows, local_sums
from moex.moe.routers.forced import Forced
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.context import Compute
from moex.sharding import BATCH_AXES, MeshConfig, param_sharding
from tests.helpers import context
from tests.marks import thorough
from tests.tolerances import assert_close

B, L, D, E = 16, 4, 8, 8
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) "
    r"(all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all)(?:-start)?\("
)


def moe(router=None, experts=None, **fields):
    router = TopK(k=3, init_std=0.7) if router is None else router
    experts = Glu(hidden=4) if experts is None else experts
    return MoE(num_experts=E, router=router, experts=experts, **fields)


def on_mesh(cfg, mesh_cfg):
    """(function of (params, x) -> (y, aux), params, x) on a mesh; None: one device."""
    module = cfg.make(D, nnx.Rngs(params=0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    axes = {path: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(params)}
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, D))
    compute = Compute()
    if mesh_cfg is not None:
        mesh = mesh_cfg.make()
        buffer = mesh_cfg.exchange_buffer
        compute = Compute(exchange=mesh_cfg.exchange, exchange_buffer=buffer)
        place = lambda path, leaf: jax.device_put(  # noqa: E731
            leaf, param_sharding(leaf.shape, axes[tuple(k.key for k in path)], mesh)
        )
        params = jax.tree_util.tree_map_with_path(place, params)
        batch = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        x_BLD = jax.device_put(x_BLD, batch)

    def run(params, x_BLD):
        ctx = context(B, L, num_padding=1, compute=compute)
        return nnx.merge(graphdef, params, rest)(x_BLD, ctx)

    return run, params, x_BLD


def values(cfg, mesh_cfg):
    """(y, aux, gradients) as numpy; the loss reaches outputs and balance losses."""
    run, params, x_BLD = on_mesh(cfg, mesh_cfg)
    weight_BLD = jax.random.normal(jax.random.key(2), (B, L, D))

    def loss(params, x_BLD):
        y_BLD, aux = run(params, x_BLD)
        losses = sum(jnp.sum(v) for v in aux["losses"].values())
        return jnp.sum(y_BLD * weight_BLD) + losses, (y_BLD, aux)

    with jax.set_mesh((mesh_cfg or MeshConfig(data=1)).make(devices(mesh_cfg))):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        grads, (y_BLD, aux) = grad(params, x_BLD)
    return jax.tree.map(np.asarray, (y_BLD, aux, grads))


def devices(mesh_cfg):
    return jax.devices()[: 8 if mesh_cfg is not None else 1]


def collectives(cfg, mesh_cfg, *, gradient):
    """What the compiled layer sends: a list of (operation, sizes of its results)."""
    run, params, x_BLD = on_mesh(cfg, mesh_cfg)

    def pull(params, x_BLD, dy_BLD):
        y_BLD, vjp = jax.vjp(lambda *args: run(*args)[0], params, x_BLD)
        return y_BLD, vjp(dy_BLD)

    with jax.set_mesh(mesh_cfg.make()):
        lowered = (
            jax.jit(pull).lower(params, x_BLD, x_BLD)
            if gradient
            else jax.jit(run).lower(params, x_BLD)
        )
    found = COLLECTIVE.findall(lowered.compile().as_text())
    return [(name, _elements(shapes)) for shapes, name in found]


def _elements(shapes):
    return [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]


@pytest.mark.parametrize(
    ("sizes", "forward", "both"),
    [
        # Tokens, and ids with gates, there; sums back. The same the other way round.
        ({"expert": 8, "exchange": "all_to_all"}, {"all-to-all": 3}, {"all-to-all": 6}),
        # Beside them: two weights gathered over fsdp, their gradients scattered.
        thorough(
            {"expert": 4, "fsdp": 2, "exchange": "all_to_all"},
            {"all-to-all": 3, "all-gather": 3},
            {"all-to-all": 6, "all-gather": 3, "reduce-scatter": 2},
        ),
        # Tokens, and ids with gates, gathered; parts of sums scattered.
        (
            {"expert": 8, "exchange": "gather"},
            {"all-gather": 2, "reduce-scatter": 1},
            {"all-gather": 3, "reduce-scatter": 3},
        ),
        # Nothing but sums travels without an expert axis.
        thorough({"data": 8}, {}, {}),
    ],
    ids=str,
)
def test_collectives_are_exactly_these(sizes, forward, both):
    mesh_cfg = MeshConfig(**{"data": 1} | sizes)
    for gradient, expected in ((False, forward), (True, both)):
        found = collectives(moe(), mesh_cfg, gradient=gradient)
        counts = collections.Counter(name for name, _ in found)
        del counts["all-reduce"]
        if not gradient:  # counts and losses; the gradient has those of weights too
            sums = [max(sizes_of) for name, sizes_of in found if name == "all-reduce"]
            assert all(size <= E for size in sums)
        assert counts == expected
        # An expert's weights never leave the expert axis: what is gathered is smaller
        # than all experts' input weights, [E, D, 2, F], over what splits them.
        whole = E * D * 2 * 4 // (mesh_cfg.expert if "fsdp" in sizes else 1)
        for name, sizes_of in found:
            if name == "all-gather" and mesh_cfg.exchange == "all_to_all":
                assert max(sizes_of) <= whole
                assert "fsdp" in sizes


@pytest.fixture
def ragged_on_cpu(monkeypatch):
    """`lax.ragged_all_to_all` as its documentation has it, out of gathers.

    XLA:CPU has none. Rows that a sender and a receiver do not agree on become NaN.
    """

    def ragged(operand, output, begin, send, begin_there, receive, *, axis_name):
        me = lax.axis_index(axis_name)
        everyone = [
            lax.all_gather(a, axis_name) for a in (operand, begin, send, begin_there)
        ]
        operands, begin, send, begin_there = everyone
        row_R1 = jnp.arange(output.shape[0])[:, None]
        for s in range(operands.shape[0]):
            place_R1 = row_R1 - begin_there[s, me]
            here_R1 = (place_R1 >= 0) & (place_R1 < send[s, me])
            rows = (
                operands[s]
                .at[(begin[s, me] + place_R1)[:, 0]]
                .get(mode="fill", fill_value=jnp.nan)
            )
            agreed = send[s, me] == receive[s]
            output = jnp.where(here_R1, jnp.where(agreed, rows, jnp.nan), output)
        return output

    monkeypatch.setattr(lax, "ragged_all_to_all", ragged)
    monkeypatch.setattr(all_to_all, "RAGGED", ("cpu",))


LATENT = Latent(hidden=4, latent=3, group=4, ops=("gate", "up", "down"))


@pytest.mark.parametrize(
    "cfg",
    [
        thorough(moe(TopP(p=0.4, k_max=5, init_std=0.7)), id="top-p"),
        thorough(moe(experts=LATENT), id="latent"),
        pytest.param(
            moe(Forced(k=2, load="adversarial", init_std=0.7)), id="all to two"
        ),
    ],
)
def test_ragged_rows_arrive_and_come_back(cfg, ragged_on_cpu):
    mesh_cfg = MeshConfig(data=2, expert=4, exchange="all_to_all")
    actual, expected = values(cfg, mesh_cfg), values(cfg, None)
    jax.tree.map(lambda a, b: assert_close(a, b, "order"), actual, expected)


def test_rooms_are_of_the_numbers_that_were_written():
    """1.1 * 180 / 2 = 99 and 1.1 * 90 = 99: in float64 a little more, so 100."""
    assert all_to_all.rows_per_pair(2, 180, 1, 1.1) == 99
    assert all_to_all.rows_per_pair(2, 180, 1, 1.11) == 100  # 99.9
    assert Rows(buffer_slots=1.1).limits(90, 90, 2) == {"buffer_rows": 99}


@pytest.mark.thorough
def test_latents_travel_in_their_width():
    """What is sent once per (token, device) has 2 Z columns there, Z back, not D."""
    mesh_cfg = MeshConfig(data=2, expert=4, exchange="all_to_all")
    local = B * L // 8
    sent = {
        name: [
            sum(sizes)
            for op, sizes in collectives(moe(experts=experts), mesh_cfg, gradient=False)
            if op == "all-to-all"
        ]
        for name, experts in (("glu", Glu(hidden=4)), ("latent", LATENT))
    }
    rows, k = 4 * local, 3
    assert sorted(sent["glu"]) == sorted([rows * D, rows * 2 * k, rows * D])
    assert sorted(sent["latent"]) == sorted([rows * 6, rows * 2 * k, rows * 3])


def test_a_token_goes_once_to_a_device_and_groups_shorten_its_way():
    """Pairs (token, device) by hand: with one group per device and keep = 2, two."""
    groups = Groups(num=4, keep=2)
    routers = (TopK(k=4, init_std=0.7), TopK(k=4, groups=groups, init_std=0.7))
    x_TD = jax.random.normal(jax.random.key(3), (64, D))
    pairs = []
    for router in routers:
        module = router.make(D, E, nnx.Rngs(params=0))
        expert_TK = np.asarray(module(x_TD, context(16, 4)).expert_TK)
        devices_of = [len({e // 2 for e in token}) for token in expert_TK]
        pairs_T = jax.vmap(
            lambda expert_tK: all_to_all.device_pairs(
                expert_tK // 2, jnp.ones(expert_tK.shape, bool)
            ).sum()
        )(jnp.asarray(expert_TK)[:, None])
        np.testing.assert_array_equal(pairs_T, devices_of)
        pairs.append(np.mean(devices_of))
    assert pairs[1] == 2.0 < pairs[0]


@pytest.mark.parametrize(
    "ragged", [thorough(False, id="padded"), pytest.param(True, id="ragged")]
)
def test_rows_without_room_are_counted(ragged, request):
    """All tokens to experts 0 and 1, on the first of four devices, room for the mean.

    A device has 8 tokens, 2 of them padding. Even routing sends 1 - (3/4)^2 = 7/16 of 8
    to a device, so there is room for ceil(3.5) = 4 rows from each, and of 6 rows 2 are
    lost, of all 8 devices, each with two slots. Ragged rows share their room: of 24
    that come to one device 16 find room, at each of two devices. These hold two slots
    each, and a device computes ceil(8 * 2) of 32, in the order of experts: those of
    expert 1 are lost. So 32 tokens have the part of expert 0, all others nothing.
    """
    if ragged:
        request.getfixturevalue("ragged_on_cpu")
    cfg = moe(Forced(k=2, load="adversarial", init_std=0.7))
    mesh_cfg = MeshConfig(data=2, expert=4, exchange="all_to_all", exchange_buffer=1.0)
    run, params, x_BLD = on_mesh(cfg, mesh_cfg)
    with jax.set_mesh(mesh_cfg.make()):
        y_BLD, aux = jax.jit(run)(params, x_BLD)
    assert aux["stats"]["num_lost"] == 8 * 2 * 2 + 2 * 16
    assert aux["stats"]["num_kept"] == 32
    graphdef, whole, rest = nnx.split(cfg.make(D, nnx.Rngs(params=0)), nnx.Param, ...)
    layer = nnx.merge(graphdef, whole, rest)
    x_TD = jnp.asarray(np.asarray(x_BLD).reshape(-1, D))
    routing = layer.router(x_TD, context(B, L))
    only_first = routing.keep_only(routing.expert_TK == 0)
    slots = (only_first.expert_TK, only_first.gate_TK, only_first.keep_TK)
    part_TD = local_sums(layer.experts.sums, x_TD, slots, E, context(B, L))
    y_TD = np.asarray(y_BLD).reshape(-1, D)
    has_part_T = np.isclose(y_TD, part_TD, atol=1e-5).all(axis=1)
    has_none_T = (y_TD == 0).all(axis=1)
    assert has_part_T.sum() == 32 and has_none_T.sum() == B * L - 32


def test_auto_gathers_where_all_to_all_moves_as_much():
    moves = all_to_all.moves_all_to_all
    assert not moves(8, 64, 2, None)  # padded to the worst case: all tokens
    assert moves(8, 64, 2, 1.5)  # 1.5 times the mean, 15/64 of the tokens
    assert not moves(2, 64, 2, None)  # 3 of 4 tokens, on any platform
    assert not moves(2, 64, 8, 1.0)  # nearly every token has an expert on each of two
