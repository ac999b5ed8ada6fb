"""Loading ahead: what is loaded and when, and that it changes no token."""

import itertools

import jax
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.model.decode import generate
from moex.moe.chain import Chain
from moex.moe.routers.topp import TopP
from moex.nn.stack import Segment
from moex.offload import decode, setup
from moex.offload.cache import ExpertCache, allocate
from moex.offload.costs import Costs
from moex.offload.predictor import About, Predictor, windows_of
from moex.offload.routes import Routes
from moex.offload.settings import ALLOCATE, POLICIES, PREFETCH, Settings
from moex.offload.setup import of_arrays
from moex.offload.simulate import simulate
from tests.helpers import VOCAB, XLA, built, mesh_of, tiny_lm, tiny_moe
from tests.marks import thorough_but_for
from tests.offload.routes import routes_of

NEW = 5
GREEDY = {"max_new_tokens": NEW, "temperature": 0, "compute": XLA}
E, LAYERS = 8, 3
# Moves cost next to nothing, so that everything arrives in time, as in the executor.
COSTS = Costs(device=1.0, move=1e-9, layer=1.0)


def lm(moe):
    return tiny_lm(Segment(pattern=(moe,), repeat=LAYERS))


MODELS = {
    "top-k": lm(tiny_moe(E)),
    "top-p": lm(tiny_moe(E, router=TopP(p=0.6))),
    "chain": lm(Chain(moe=tiny_moe(E), iterations=2)),
}


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCAB, n).tolist() for n in (3, 7)]


def predictor(rounds=1, experts=E):
    """One that is not trained: it names experts by chance, but always the same."""
    routers = LAYERS * rounds
    sizes = {"experts": (experts,) * routers, "slots": (2,) * routers, "width": 4}
    about = About(tokenizer="", vocab=VOCAB, last=2, hidden=8, **sizes)
    return Predictor.fresh(about, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Costs that are not measured, and a trace that nobody wrote."""
    monkeypatch.setattr(setup, "profile", lambda *args: COSTS)
    ids = np.random.default_rng(1).integers(0, E, (40, LAYERS, 2))
    ids[:, 0] %= 2  # the first layer uses two experts
    routes = routes_of(ids, experts=E)
    monkeypatch.setattr(
        Settings, "routes", lambda self, pools: routes if self.trace else None
    )


def executor(name, folder, **fields):
    cfg = MODELS[name]
    _, params, state = built(cfg)
    needs = fields.get("policy") == "static" or fields.get("allocate") == "demand"
    settings = Settings(**fields, trace="a trace" if needs else None)
    named = predictor(2 if name == "chain" else 1)
    return of_arrays(cfg, params, state, folder, settings, XLA, named)


def watched(own):
    """The executor, which checks that what computes is never evicted."""
    load = own.ahead.load

    def checked(routed):
        before = routed.slots.slot_E(routed.place)
        load(routed)
        here = before >= 0
        np.testing.assert_array_equal(
            routed.slots.slot_E(routed.place)[here], before[here]
        )

    own.ahead.load = checked
    return own


WAYS = None, *PREFETCH
ALL = [
    dict(zip(("policy", "prefetch", "allocate"), way, strict=True))
    for way in itertools.product(POLICIES, WAYS, ALLOCATE)
    if way[0] != "predicted" or way[1]
]
SIZES = [str(size) for size in range(1, E + 1)]


def check_tokens(name, size, ways, folder):
    """With each of these ways the model writes what it writes without a bank."""
    cfg = MODELS[name]
    spec, params, state = built(cfg)
    want = generate(spec, cfg, params, state, prompts(), **GREEDY)
    ahead = 0
    with jax.set_mesh(mesh_of(1)):
        for fields in ways:
            own = executor(name, folder, size=size, **fields)
            own = own if own.ahead is None else watched(own)
            assert decode.generate(own, cfg, prompts(), **GREEDY) == want, fields
            (slots,) = own.slots
            told = slots.cache.statistics
            assert fields["prefetch"] or not told.prefetched_L.any()
            ahead += told.prefetched_L.sum()
    assert ahead > 0


@pytest.mark.parametrize("size", thorough_but_for(SIZES, "3"))
@pytest.mark.parametrize("name", thorough_but_for(MODELS, "chain"))
def test_tokens_do_not_depend_on_how_experts_are_kept(name, size, tmp_path):
    """All policies, with all ways to load ahead and to divide slots, in turn."""
    check_tokens(name, size, ALL[int(size) :: len(SIZES)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_do_not_depend_on_any_choice(name, size, tmp_path):
    check_tokens(name, size, ALL, tmp_path)


def replayed(own, passes, policy, per_layer, impact):
    """The statistics of the simulator for recorded passes and their forecasts."""
    rows_SLE = np.stack([one.rows_LE for one in passes])
    ids = np.full((*rows_SLE.shape[:2], E), -1, np.int32)
    for at in np.ndindex(rows_SLE.shape[:2]):
        used = np.flatnonzero(rows_SLE[at])
        ids[at][: len(used)] = used
    logits = np.log(np.stack([one.score_LE for one in passes]))
    routes: Routes = routes_of(ids, logits=logits, experts=E)

    def forecast(rows, router):
        told = passes[int(rows[0])].forecasts
        return [(later, count_E) for at, later, count_E in told if at == router]

    cache = ExpertCache(LAYERS, E, sum(per_layer), policy, per_layer=per_layer)
    steps = [np.array([n]) for n in range(len(passes))]
    given = forecast if own.ahead is not None else None
    return simulate(routes, steps, cache, COSTS, forecast=given, impact=impact)


@pytest.mark.parametrize("prefetch", PREFETCH)
def test_the_simulator_has_the_same_hits(prefetch, tmp_path):
    """The recorded routes and forecasts, replayed where every move is in time."""
    cfg = MODELS["top-k"]
    with jax.set_mesh(mesh_of(1)):
        for policy in ("lru", "mrs", "predicted"):
            fields = {"policy": policy, "prefetch": prefetch, "allocate": "demand"}
            own = executor("top-k", tmp_path, size="3", **fields)
            own.passes = []
            decode.generate(own, cfg, prompts(), **GREEDY)
            (slots,) = own.slots
            per_layer = slots.cache._sizes
            assert per_layer == [2, 4, 3] or len({*per_layer}) > 1
            fresh = own.settings.make_policy(slots.pool)
            impact = prefetch == "impact"
            found = replayed(own, own.passes, fresh, per_layer, impact).statistics
            here = slots.cache.statistics
            for count in ("hits_L", "misses_L", "prefetched_L", "useful_L"):
                want = getattr(here, count).tolist()
                assert getattr(found, count).tolist() == want, (policy, count)
            assert here.prefetched_L.sum() > 0 and here.useful_L.sum() > 0


def test_a_predictor_reads_the_text_so_far(tmp_path):
    """Its forecasts are those for the whole text, at every token of it."""
    cfg, own_predictor = MODELS["top-k"], predictor()
    with jax.set_mesh(mesh_of(1)):
        own = executor("top-k", tmp_path, size="4", prefetch="predictor")
        own.passes = []
        told = decode.generate(own, cfg, prompts(), **GREEDY)
    texts = [a + b for a, b in zip(prompts(), told, strict=True)]
    counts = np.zeros((NEW, LAYERS, E), int)
    for prompt, text in zip(prompts(), texts, strict=True):
        document_N = np.zeros(len(text), int)
        token_NH = windows_of(np.array(text), document_N, own_predictor.about)
        for n, ids_RK in enumerate(own_predictor.experts(token_NH)[:-1]):
            step = max(0, n - len(prompt) + 1)
            for layer, ids_K in enumerate(ids_RK):
                counts[step, layer, ids_K] += 1
    assert len(own.passes) == NEW
    for step, one in enumerate(own.passes):
        assert [own[:2] for own in one.forecasts] == [(-1, n) for n in range(LAYERS)]
        for _, layer, count_E in one.forecasts:
            np.testing.assert_array_equal(count_E, counts[step, layer])


def test_routers_are_asked_as_far_ahead_as_they_should(tmp_path):
    cfg = MODELS["top-k"]
    with jax.set_mesh(mesh_of(1)):
        for ahead, want in ((None, [(0, 1), (1, 2)]), (2, [(0, 1), (0, 2), (1, 2)])):
            fields = {"size": "4", "prefetch": "router", "ahead": ahead}
            own = executor("top-k", tmp_path, **fields)
            own.passes = []
            decode.generate(own, cfg, prompts(), **GREEDY)
            for one in own.passes:
                assert [told[:2] for told in one.forecasts] == want


def test_only_what_saves_time_is_loaded_ahead(tmp_path):
    """Moves that cost nothing save nothing; slow ones come one in a layer."""
    cfg, counts = MODELS["top-k"], {}
    with jax.set_mesh(mesh_of(1)):
        for move in (0.0, 100.0):
            own = executor("top-k", tmp_path, size="4", prefetch="impact")
            own.costs = Costs(device=1.0, move=move, layer=1.0)
            decode.generate(own, cfg, prompts(), **GREEDY)
            counts[move] = own.slots[0].cache.statistics.prefetched_L
    assert counts[0.0].sum() == 0
    assert 0 < counts[100.0].sum() <= NEW * (LAYERS - 1)


def test_a_predictor_of_other_experts_is_refused(tmp_path):
    cfg = MODELS["top-k"]
    _, params, state = built(cfg)
    settings = Settings("4", prefetch="predictor")
    told = "is for routers of .7, 7, 7. experts; this model keeps .8, 8, 8. sets"
    with pytest.raises(ConfigError, match=told):
        of_arrays(cfg, params, state, tmp_path, settings, XLA, predictor(experts=7))


def test_slots_are_divided_between_layers(tmp_path):
    own = executor("top-k", tmp_path, size="3", allocate="equal")
    (slots,) = own.slots
    assert slots.cache._sizes == [3, 3, 3]
    own = executor("top-k", tmp_path, size="3", allocate="demand")
    first, *others = own.slots[0].cache._sizes
    assert first + sum(others) == 9 and first < min(others)
    shared = executor("top-k", tmp_path, size="3", allocate="shared")
    assert shared.slots[0].cache._sizes == [9]
    few = executor("top-k", tmp_path, size="5%")
    assert few.slots[0].cache._sizes == [2]
    told = "--offload-allocate=equal: needs a slot for each of 3 layers, and --off"
    with pytest.raises(ConfigError, match=told):
        executor("top-k", tmp_path, size="5%", allocate="equal")


def test_no_layer_gets_more_slots_than_it_has_experts():
    assert allocate([1, 1], 7, [2, 5]) == [2, 5]
    assert allocate([9, 1], 6, [2, 5]) == [2, 4]
    assert allocate([9, 1], 60, [2, 5]) == [2, 5]
