"""Tokens that stay with their experts: one all-to-all a layer, and the same outputs.

B sequences · E experts
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert.plans import Place, Plan
from moex.convert.to_placed import placed_arrays
from moex.model import decode
from moex.model.spec import model_spec, shardings
from moex.moe.chain import Chain
from moex.moe.experts.latent import Latent
from moex.moe.experts.zero import Zero
from moex.moe.routers.forced import Forced
from moex.moe.routers.hash import Hash
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.placement import coherent
from moex.placement.coherent_step import Programs
from moex.placement.residents import Room
from tests.helpers import VOCAB, XLA, built, mesh_of, tiny_lm, tiny_moe
from tests.moe.test_parallel import COLLECTIVE
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")

B, NEW = 16, 4
TOP_1 = TopK(k=1, init_std=0.5, normalize="none", bias_rate=0.01)
PLAIN = tiny_moe(num_experts=16, router=TOP_1, shared=None)


def made(*pattern, repeat=1):
    """(spec, config, params, state, mesh of 8 devices) of a model."""
    model = tiny_lm(Segment(pattern=pattern, repeat=repeat))
    _, params, state = built(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda a: (
            a
            if a.dtype == jnp.int32
            else a + jnp.float32(0.1 * rng.normal(size=a.shape))
        ),
        state,
    )
    return placed_on_mesh(model, params, state)


def placed_on_mesh(model, params, state):
    mesh = mesh_of(8, expert=8)
    spec = model_spec(model, mesh)
    places = shardings(spec, mesh)
    arrays = jax.device_put((params, state), places)
    return spec, model, *arrays, mesh


def prompts(count=B, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(3, 12)).tolist() for _ in range(count)]


def ordinary(spec, model, params, state, mesh, given, **options):
    with jax.set_mesh(mesh):
        return decode.generate(
            spec,
            model,
            params,
            state,
            given,
            max_new_tokens=NEW,
            compute=XLA,
            **{"temperature": 0.0} | options,
        )


def stayed(spec, model, params, state, mesh, given, **options):
    facts = {"mesh": mesh, "max_new_tokens": NEW, "compute": XLA}
    return coherent.generate(spec, model, params, state, given, **facts | options)


@pytest.mark.parametrize("repeat", [2])
def test_one_all_to_all_a_layer_and_the_logits_of_ordinary_expert_parallelism(repeat):
    """A step of both from the same cache, with the program of the one looked at."""
    spec, model, params, state, mesh = made(PLAIN, repeat=repeat)
    prompt_BP, padding_B = decode.padded_left(prompts())
    slots, first = prompt_BP.shape[1] + 1, jnp.int32(prompt_BP.shape[1])
    run = Programs(spec, mesh, XLA, slots, (0.0, 0, 1.0))
    stopped_B, room = jnp.zeros(B, bool).at[3].set(True), Room(B, B)
    home_B = jnp.arange(B, dtype=jnp.int32) // 2
    with jax.set_mesh(mesh):
        cache = model.init_cache(B, slots, jnp.dtype("float32"))
        logits_BV, cache = run.prompt(params, state, cache, prompt_BP, padding_B)
        token_B1 = jnp.argmax(logits_BV, axis=1)[:, None].astype(jnp.int32)

        @jax.jit
        def plain(params, state, cache):
            ctx = run._context(token_B1, first, padding_B, stopped_B)
            return spec.merge(params, state).decode(ctx, cache)

        expected_BV, aux, expected = plain(params, state, cache)
        batch = (token_B1, first, padding_B, stopped_B, home_B)
        step = run.step.lower(params, state, cache, batch, room).compile()
        found = collections.Counter(
            name for _, name in COLLECTIVE.findall(step.as_text())
        )
        out = step(params, state, cache, batch)
    assert found["all-to-all"] == repeat
    assert int(out.lost) == 0
    alive = np.flatnonzero(~np.asarray(stopped_B))
    assert_close(out.logits_BV[alive], expected_BV[alive], "float32")
    for ours, theirs in zip(
        jax.tree.leaves(out.cache), jax.tree.leaves(expected), strict=True
    ):
        assert_close(ours[:, alive], theirs[:, alive], "float32")
    load_RE = np.asarray(aux["segments"]["0"]["blocks"]["0"]["ffn"]["stats"]["load_E"])
    assert load_RE.sum() == repeat * (B - 1)
    # The sequences end where the experts of the last layer are.
    at_P = np.bincount(np.asarray(out.home_B)[alive], minlength=8)
    np.testing.assert_array_equal(at_P, load_RE[-1].reshape(8, 2).sum(1))
    assert 0 < int(out.moved_M[0]) < B
    np.testing.assert_array_equal(out.moved_M[0], out.ordinary_M[0])


LATENT = Latent(hidden=8, latent=8, group=8, ops=("gate", "up", "down"))
GROUPED = TopK(k=1, score="sigmoid", groups=Groups(num=4, keep=2, score="top2"))
KINDS = {
    "dense between": (Dense(hidden=8), PLAIN),
    "zero and shared": (
        tiny_moe(num_experts=16, router=TOP_1, zero=Zero(null=1, copy=1, constant=1)),
    ),
    "gated shared": (tiny_moe(num_experts=8, router=TOP_1, shared_gate=True),),
    "shared weights": (tiny_moe(num_experts=16, router=TOP_1, stored_experts=8),),
    "latent": (tiny_moe(num_experts=16, router=TOP_1, experts=LATENT),),
    "groups": (tiny_moe(num_experts=16, router=GROUPED),),
    "top-p of one": (tiny_moe(router=TopP(p=0.5, k_max=1)),),
    "hash": (tiny_moe(router=Hash(k=1)),),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_the_tokens_that_it_writes_at_home(kind):
    own = made(*KINDS[kind], repeat=2)
    found = stayed(*own, prompts())
    assert found.tokens == ordinary(*own, prompts())
    assert found.rows == B * (NEW - 1)
    assert all(0 <= n <= found.rows for n in found.moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "room", "fits"),
    [(4, Room(1, 1), False), (B, Room(B, 1), False), (4, Room(4, 4), True)],
)
def test_what_finds_no_room_is_computed_again(count, room, fits):
    """No room for sequences, or for the rows of a pair of devices alone, or for all."""
    own, given = made(PLAIN, repeat=2), prompts(count)
    found = stayed(*own, given, room=room)
    assert found.tokens == ordinary(*own, given)
    assert (found.reruns == 0) == fits


@pytest.mark.slow
def test_few_sequences_random_tokens_and_stops_are_as_always():
    own = made(PLAIN, repeat=2)
    given = prompts(3)
    wanted = ordinary(*own, given, temperature=1.0, top_k=9, seed=5)
    found = stayed(*own, given, sampling=(1.0, 9, 1.0), seed=5)
    assert found.tokens == wanted
    stop = wanted[1][1]
    stops = {"stop_tokens": [stop]}
    wanted = ordinary(*own, given, **stops)
    assert stayed(*own, given, **stops).tokens == wanted


@pytest.mark.slow
def test_placed_experts_move_fewer_rows_and_write_the_same():
    """Experts of two layers that follow each other are put on one device."""
    spec, model, params, state, mesh = made(PLAIN, repeat=2)
    before = stayed(spec, model, params, state, mesh, prompts())
    rng = np.random.default_rng(1)
    layers = tuple(
        Place(
            layer=n,
            experts=16,
            devices=tuple(map(tuple, rng.permutation(16).reshape(8, 2).tolist())),
        )
        for n in range(2)
    )
    plan = Plan(kind="place", run="r", step=0, base="", layers=layers)
    arrays = [placed_arrays(tree, model, plan) for tree in (params, state)]
    after = stayed(*placed_on_mesh(model, *arrays), prompts())
    assert after.tokens == before.tokens
    assert after.moved != before.moved


BAD = {
    "router: experts of a token = 2: must be 1: .*second all-to-all": tiny_moe(),
    "must be MoE or Dense": Chain(moe=PLAIN, iterations=2),
    "= 'Forced': must be a router that looks": tiny_moe(router=Forced(k=1)),
    "config.mesh.expert = 8: must be a divisor of the 12": tiny_moe(
        num_experts=12, router=TOP_1
    ),
    "has no MoE layer": Dense(hidden=8),
}


@pytest.mark.parametrize("told", BAD)
def test_a_model_that_cannot_stay_is_refused(told):
    with pytest.raises(ConfigError, match=told):
        coherent.check(tiny_lm(Segment(pattern=(BAD[told],))), 8)


def test_another_mesh_is_refused():
    model = tiny_lm(Segment(pattern=(PLAIN,)))
    mesh = mesh_of(8, data=2, expert=4)
    with pytest.raises(ConfigError, match="config.mesh = .*expert alone above 1"):
        coherent.generate(None, model, None, None, [[1]], mesh=mesh, max_new_tokens=1)


def test_room_grows_until_all_have_room():
    room = Room.of(64, 8)
    assert room == Room(16, 4)
    assert room.grown(64) == Room(32, 8)
    for _ in range(6):
        room = room.grown(64)
    assert room == Room(64, 64)
    assert Room.of(2, 8) == Room(2, 2)
    with pytest.raises(ConfigError, match=r"room.per_pair = 0: must be 1 or more"):
        Room(4, 0)
