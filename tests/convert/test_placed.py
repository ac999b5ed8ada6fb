"""Placed experts: the model computes the same, and block p holds those of device p.

E experts
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.convert import to_placed
from moex.convert.plans import Place, Plan
from moex.interop.export import export_hf
from moex.model.losses import moe_layers
from moex.model.paths import flat_paths
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.forced import Forced
from moex.moe.routers.hash import Hash
from moex.moe.routers.topk import Groups, TopK
from moex.nn.stack import Segment
from moex.placement.affinity import Affinity, Layer, Term
from moex.placement.plan import Facts
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from tests.convert.test_prune import GROUPED, LATENT, LAYERS
from tests.helpers import (
    TASK,
    XLA,
    assert_equal_trees,
    built,
    random_batch,
    tiny_lm,
    tiny_moe,
)
from tests.interop.folders import SAY, import_fixture, tensors
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")

ALL = LAYERS | {
    "expert choice": tiny_moe(router=ExpertChoice(k=2)),
    "shared weights": tiny_moe(stored_experts=4),
    "capacity": tiny_moe(capacity_factor=1.0),
}
IN_HALVES = ("groups", "latent")
QUICK = ("groups", "latent", "shared weights")
STORED = {"shared weights": 4}


def order_of(name, rng):
    """The experts of a layer in another order; groups of four stay together."""
    if name in IN_HALVES:
        halves = [4 * g + rng.permutation(4) for g in rng.permutation(2)]
        return np.concatenate(halves)
    return rng.permutation(STORED.get(name, 8))


def plan_for(model, *orders, devices=2):
    layers = tuple(
        Place(
            layer=n,
            experts=len(order),
            devices=tuple(map(tuple, np.reshape(order, (devices, -1)).tolist())),
        )
        for n, order in enumerate(orders)
        if order is not None
    )
    base = "" if model is None else base_hash(model)
    return Plan(kind="place", run="run", step=0, base=base, layers=layers)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="some kinds"),
        pytest.param(tuple(ALL), marks=pytest.mark.slow, id="all kinds"),
    ],
)
def test_a_placed_model_computes_the_same_with_experts_in_other_places(names):
    """Two copies of each kind, each in another order; the second of one stays."""
    model = tiny_lm(Segment(pattern=tuple(ALL[n] for n in names), repeat=2))
    spec, params, state = built(model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # outputs of experts differ, biases too
        lambda a: a + jnp.float32(0.1 * rng.normal(size=a.shape)), params
    )
    state = jax.tree.map(
        lambda a: (
            a if a.dtype == jnp.int32 else a + jnp.float32(rng.normal(size=a.shape)) / 4
        ),
        state,
    )
    orders = [order_of(name, rng) for _ in range(2) for name in names]
    orders[len(names)] = None
    plan = plan_for(model, *orders)
    to_placed.check(plan, model)
    placed = [to_placed.placed_arrays(tree, model, plan) for tree in (params, state)]

    @jax.jit
    def run(params, state, batch):
        ctx = TASK.context(batch, mode="eval", compute=XLA)
        return spec.merge(params, state)(ctx)

    batch = random_batch(2, 16)
    (logits, aux), (again, other) = run(params, state, batch), run(*placed, batch)
    error = 1e-5 * len(names)  # through as many layers, and as many again
    np.testing.assert_allclose(again, logits, rtol=0, atol=error)
    assert float(jnp.max(jnp.abs(logits))) > 1
    theirs = dict(moe_layers(other))
    for path, own in moe_layers(aux):
        name = names[int(path[3])]  # segments/0/blocks/N
        if name in STORED:  # choices keep their numbers
            continue
        old, new = (a["stats"]["load_E"] for a in (own, theirs[path]))
        for r in range(2):
            order = orders[r * len(names) + int(path[3])]
            order = np.arange(8) if order is None else order
            ids = [*order, *range(8, old.shape[-1])]
            np.testing.assert_array_equal(new[r], np.asarray(old)[r][..., ids])


def test_arrays_are_those_of_the_experts_of_the_devices():
    model = tiny_lm(Segment(pattern=(ALL["top-k"],), repeat=2))
    _, params, state = built(model)
    order = [7, 5, 3, 1, 0, 2, 4, 6]
    placed = to_placed.placed_arrays(params, model, plan_for(model, None, order))
    old, new = flat_paths(params), flat_paths(placed)
    start = "segments/0/blocks/0/ffn"
    for name, axis in (
        ("experts/w_in_ED2F", 0),
        ("experts/bias_out_ED", 0),
        ("router/w_DE", 1),
        ("router/bias_logits_E", 0),
    ):
        was, now = (np.asarray(a[f"{start}/{name}"]) for a in (old, new))
        np.testing.assert_array_equal(now[0], was[0])
        np.testing.assert_array_equal(now[1], np.take(was[1], order, axis))
    kept = {p for p in old if "/router/" not in p and "/experts/" not in p}
    assert_equal_trees({p: new[p] for p in kept}, {p: old[p] for p in kept})
    made = to_placed.placed_arrays(state, model, plan_for(model, None, order))
    assert flat_paths(made).keys() == flat_paths(state).keys()


def test_sets_of_weights_move_and_experts_keep_their_numbers():
    model = tiny_lm(Segment(pattern=(ALL["shared weights"],)))
    _, params, state = built(model)
    name = "segments/0/blocks/0/ffn/stored_E"
    plan = plan_for(model, [2, 0, 3, 1])
    to_placed.check(plan, model)
    new = flat_paths(to_placed.placed_arrays(state, model, plan))[name]
    # Sets 0 and 1, in turn, are now the second and the last.
    assert flat_paths(state)[name].tolist() == [[0, 1] * 4]
    assert new.tolist() == [[1, 3] * 4]


GROUPS_OF_TWO = TopK(k=1, groups=Groups(num=4, keep=2))
MIXED = np.array([0, 1, 2, 4, 3, 5, 6, 7])
BAD = {
    "Hash depends on the numbers of experts": (tiny_moe(router=Hash(k=1)), MIXED),
    "Forced depends on the numbers": (tiny_moe(router=Forced(k=1)), MIXED),
    "groups of 4 experts must stay together": (tiny_moe(router=GROUPED), MIXED),
    "groups of 2 experts must stay together": (tiny_moe(router=GROUPS_OF_TWO), MIXED),
    "such as those of 0 and 4": (
        tiny_moe(experts=LATENT),
        MIXED[[0, 3, 1, 2, 4, 5, 6, 7]],
    ),
    "the last group is smaller": (
        tiny_moe(experts=dataclasses.replace(LATENT, group=3)),
        MIXED,
    ),
    "experts = 8: must be 4, as in the model": (ALL["shared weights"], MIXED),
    "the plan is for another model": (tiny_moe(), MIXED),
}


@pytest.mark.parametrize("told", BAD)
def test_a_layer_whose_experts_cannot_change_places_is_named(told):
    ffn, order = BAD[told]
    model = tiny_lm(Segment(pattern=(ffn,)))
    plan = plan_for(model, order)
    if "another" in told:
        plan = dataclasses.replace(plan, base="0")
    with pytest.raises(ConfigError, match=told):
        to_placed.check(plan, model)


def test_a_plan_without_a_base_fits_by_its_numbers_and_others_do_not():
    model = tiny_lm(Segment(pattern=(tiny_moe(),)))
    to_placed.check(plan_for(None, MIXED), model)
    with pytest.raises(ConfigError, match="the model has 1 layers"):
        to_placed.check(plan_for(None, None, MIXED), model)


def plan_file(file, orders, **facts):
    plan_for(None, *orders).save(file)
    if facts:
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | facts))
    return file


def test_the_verb_writes_a_run_with_the_plan_beside_it(moex, moe_run, tmp_path):
    file, new = tmp_path / "plan.json", tmp_path / "new"
    plan_file(file, [[2, 0, 1, 3], [3, 2, 1, 0]])
    to = ("convert", moe_run, "--to=placed")
    assert "--plan: missing; `moex place` makes" in moex(*to, f"--workdir={new}")
    error = moex(*to, f"--plan={file}", "--keep=2", f"--workdir={new}")
    assert "--keep: is for --to=pruned" in error
    text = moex(*to, f"--plan={file}", f"--workdir={new}")
    assert "7 experts of 2 layers have another place" in text
    loss = json.loads((new / "convert.json").read_text())["loss"]
    assert loss["before"] == pytest.approx(loss["after"], abs=1e-5)
    assert Plan.read(new / "plan.json", "place").layers[0].order() == [2, 0, 1, 3]
    old, placed = (flat_paths(load_run(r).params) for r in (moe_run, new))
    name = "segments/0/blocks/0/ffn/experts/w_out_EFD"
    for r, order in enumerate(([2, 0, 1, 3], [3, 2, 1, 0])):
        np.testing.assert_array_equal(placed[name][r], np.asarray(old[name])[r][order])
    plan_file(file, [[2, 0, 1, 3]], base="0")
    error = moex(*to, f"--plan={file}", f"--workdir={tmp_path / 'other'}")
    assert "the plan is for another model" in error
    plan_file(file, [[0, 1, 2, 3]])
    error = moex(*to, f"--plan={file}", f"--workdir={tmp_path / 'other'}")
    assert "changes nothing: all experts" in error
    plan_file(file, [[2, 0, 1, 3]], kind="keep")
    error = moex(*to, f"--plan={file}", f"--workdir={tmp_path / 'other'}")
    assert "kind = 'keep': must be 'place' for this conversion" in error
    assert not (tmp_path / "other").exists()


def test_a_run_tells_of_its_layers_and_only_of_its_own(moe_run):
    facts = Facts.of(RunDir(moe_run))
    assert facts.base == base_hash(RunDir(moe_run).config().model)
    assert (facts.stored, facts.blocks) == ({}, {0: (), 1: ()})
    counts = np.ones((4, 4), int)
    own = Affinity(
        layers=(Layer(0, 4), Layer(1, 4)),
        terms=(Term(0, 1, counts),),
        load=(counts[0],) * 2,
        tokens=16,
    )
    assert facts.tell(own, "t.parquet").base == facts.base
    for other in (
        dataclasses.replace(own, layers=(Layer(0, 4), Layer(2, 4))),
        dataclasses.replace(own, layers=(Layer(0, 8), Layer(1, 4))),
        dataclasses.replace(own, base="0"),
    ):
        with pytest.raises(ConfigError, match="--run: t.parquet is of another model"):
            facts.tell(other, "t.parquet")


@pytest.mark.slow
def test_the_placed_run_crosses_as_little_as_its_plan_says(moex, moe_run, tmp_path):
    trace, plan, new = (tmp_path / n for n in ("t.parquet", "plan.json", "new"))
    moex("trace", moe_run, f"--out={trace}")
    place = ("place", trace, "--devices=2", f"--run={moe_run}", "--json")
    before = json.loads(moex(*place, f"--out={plan}"))["crossings"]
    assert Plan.read(plan, "place").base == base_hash(RunDir(moe_run).config().model)
    moex("convert", moe_run, "--to=placed", f"--plan={plan}", f"--workdir={new}")
    moex("trace", new, f"--out={tmp_path / 'n.parquet'}")
    again = moex("place", tmp_path / "n.parquet", "--devices=2", "--json")
    after = json.loads(again)["crossings"]["contiguous"]
    assert after == before["placed"]
    assert after["all"] < before["contiguous"]["all"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "olmoe", "gpt_oss"])
def test_an_imported_model_stays_one_of_its_family(name, moex, tmp_path):
    run, new = tmp_path / "run", tmp_path / "new"
    import_fixture(name, run)
    facts = Facts.of(RunDir(run))
    config = RunDir(run).config()
    sizes = {
        n: site.sparse.moe.num_experts
        for site in to_placed.sites(config.model)
        if site.sparse is not None
        for n in site.numbers
    }
    rng, orders = np.random.default_rng(0), []
    for n in range(config.model.num_layers()):
        if n not in sizes:
            orders.append(None)
            continue
        size = max(facts.blocks[n], default=1)
        groups = rng.permutation(sizes[n] // size)
        orders.append(
            np.concatenate([size * g + rng.permutation(size) for g in groups])
        )
    file = plan_file(tmp_path / "plan.json", orders)
    text = moex("convert", run, "--to=placed", f"--plan={file}", f"--workdir={new}")
    assert "have another place" in text
    export_hf(run, tmp_path / "a", **SAY)
    export_hf(new, tmp_path / "b", **SAY)
    theirs, ours = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items()
    }
    differ = {k for k, v in theirs.items() if v.tobytes() != ours[k].tobytes()}
    assert differ
    assert all(".mlp." in k for k in differ)
    old, placed = load_run(run), load_run(new)
    tokens = np.random.default_rng(1).integers(0, config.model.vocab, (1, 12))

    def logits(run):
        batch = random_batch(1, 12)
        ctx = dataclasses.replace(
            TASK.context(batch, mode="eval", compute=XLA),
            token_BL=jnp.asarray(tokens, jnp.int32),
        )
        return jax.jit(lambda p, s: run.spec.merge(p, s)(ctx)[0])(run.params, run.state)

    assert_close(logits(placed), logits(old), "float32")
