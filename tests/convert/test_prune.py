"""Pruning: which experts stay, and what the model is without the others.

B batch · L length · E experts · N tokens · P experts of a token's pool
"""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.analysis.header import LayerInfo
from moex.analysis.scores import pool_probs, score_sums
from moex.analysis.sums import LayerSums, Sums
from moex.config.base import ConfigError
from moex.convert import apply
from moex.convert.kinds.pruned import Pruned, checked
from moex.convert.plans import Keep, Plan
from moex.convert.prune import by_layer, kept, permutations, ranked, scores
from moex.convert.source import Source
from moex.convert.to_pruned import Pruned as Applied
from moex.model.losses import moe_layers
from moex.model.paths import flat_paths
from moex.model.spec import model_spec
from moex.model.steering import Steering
from moex.moe.chain import Chain
from moex.moe.experts.glu import Glu
from moex.moe.experts.latent import Latent
from moex.moe.experts.zero import Zero
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.hash import Hash
from moex.moe.routers.soft import Soft
from moex.moe.routers.topk import Groups, TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::moex.config.base.ConfigWarning")

# Which experts stay.


def layer_sums(layer=0, chain_round=0, tokens=1, E=3, **arrays):
    info = LayerInfo(
        layer=layer,
        round=chain_round,
        num_experts=E,
        num_choices=E,
        slots=1,
        router="TopK",
        causal=True,
        capacity_factor=None,
    )
    names = ("count", "gate", "norm", "gate_norm", "logit", "tcess", "peu")
    zeros = {f"{name}_E": np.zeros(E) for name in names}
    facts = {"marker_count_RE": np.zeros((0, E)), "marker_total_R": np.zeros(0)}
    own = zeros | facts | {k: np.asarray(v) for k, v in arrays.items()}
    return LayerSums(info=info, tokens=tokens, threshold=0.5, **own)


def test_the_worked_example_of_premoe():
    """Section 2h of the paper notes: key, PEU, permutation and what stays."""
    logits_NE = np.array([[3.0, 1, 2], [-1, -3, -2], [0, 5, 1]])
    expert_N1, valid_N1 = np.argmax(logits_NE, 1)[:, None], np.ones((3, 1), bool)
    best_N1 = np.take_along_axis(logits_NE, expert_N1, 1)
    task = (expert_N1, best_N1, valid_N1, np.zeros(3, int), 1, 3)
    tcess_E = score_sums(*task)[0]
    peu_E = score_sums(*task, positive=True)[0]
    own = layer_sums(tokens=3, tcess_E=tcess_E, peu_E=peu_E)
    np.testing.assert_allclose(scores([own], "tcess"), [2 / 3, 5 / 3, 0])
    np.testing.assert_allclose(scores([own], "peu"), [1.0896, 5 / 3, 0], atol=5e-5)
    assert pool_probs(best_N1, valid_N1).tolist() == [[1], [1], [1]]
    first, second = ranked((0.1, 0.9, 0.5), [0] * 3), ranked((0.7, 0.2, 0.4), [0] * 3)
    (permutation,) = permutations([first, second])
    assert permutation == [1, 0, 2]
    assert kept(first, 2) == (1, 2)
    assert kept(second, 2) == (0, 2)
    assert sorted(permutation[e] for e in kept(first, 2)) == [0, 2]


def test_equal_scores_go_by_usage_and_then_by_number():
    assert ranked((0, 0, 0, 1, 0), (1, 3, 1, 0, 3)) == [3, 1, 4, 0, 2]
    assert ranked(np.zeros(4), np.zeros(4)) == [0, 1, 2, 3]
    # One that is used little, with a negative logit, is below those never looked at.
    assert ranked((-1, 0, 0), (9, 0, 1)) == [2, 1, 0]


def test_each_group_keeps_as_many():
    order = [7, 6, 5, 4, 0, 1, 2, 3]
    assert kept(order, 4) == (4, 5, 6, 7)
    assert kept(order, 4, parts=2) == (0, 1, 6, 7)
    assert kept(order, 4, parts=4) == (0, 2, 5, 7)


def test_rounds_of_a_chain_are_one_layer_and_domains_are_averaged():
    rounds = {
        "000.1": layer_sums(0, 1, tokens=4, count_E=[4, 0, 0], gate_norm_E=[8, 0, 0]),
        "000.2": layer_sums(0, 2, tokens=4, count_E=[1, 3, 0], gate_norm_E=[7, 9, 0]),
        "001": layer_sums(1, tokens=4, count_E=[0, 0, 4]),
    }
    layers = by_layer(rounds)
    assert sorted(layers) == [0, 1]
    np.testing.assert_allclose(scores([layers[0]], "reap"), [3, 3, 0])
    np.testing.assert_allclose(scores([layers[0]], "frequency"), [5 / 8, 3 / 8, 0])
    # A domain counts as much as another, however many tokens it has.
    both = [layers[0], layer_sums(0, tokens=100, count_E=[0, 0, 100])]
    np.testing.assert_allclose(scores(both, "frequency"), [5 / 16, 3 / 16, 1 / 2])


# The model without the others.

SIGMOID = TopK(k=2, score="sigmoid", bias_rate=0.01, init_std=0.5)
GROUPED = dataclasses.replace(SIGMOID, groups=Groups(num=2, keep=1, score="top2"))
LATENT = Latent(hidden=8, latent=8, group=4, ops=("gate", "up", "down"))
PLAIN = {"router": TopK(k=2, logit_bias=True), "experts": Glu(hidden=8, bias=True)}
LAYERS = {
    "top-k": tiny_moe(**PLAIN),
    "sigmoid and bias": tiny_moe(router=SIGMOID),
    "groups": tiny_moe(router=GROUPED),
    "top-p": tiny_moe(router=TopP(p=(0.3, 0.7), k_max=7, normalize="after")),
    "all": tiny_moe(router=Soft()),
    "zero experts": tiny_moe(zero=Zero(null=1, constant=1)),
    "latent": tiny_moe(experts=LATENT),
    "narrow": Narrow(latent=8, inner=tiny_moe()),
    "chain": Chain(moe=tiny_moe(), iterations=2),
    "chain with one router": Chain(moe=tiny_moe(), iterations=2, routers="shared"),
    "chain of routers": Chain(
        moe=tiny_moe(), iterations=2, routers=(TopK(k=1), TopP(p=0.4, k_max=3))
    ),
}
KEEPS = ((0, 3, 4, 7), (1, 2, 5, 6))  # two of each half


def plan_for(model, *keeps):
    layers = [
        Keep(layer=n, experts=8, keep=keep) for n, keep in enumerate(keeps) if keep
    ]
    facts = {"kind": "keep", "run": "run", "step": 0, "base": base_hash(model)}
    return Plan(layers=tuple(layers), **facts)


QUICK = ("groups", "zero experts", "latent", "chain of routers")
KINDS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
    for name in LAYERS
]


@pytest.mark.parametrize("name", KINDS)
def test_arrays_of_the_experts_that_stay_are_theirs(name):
    """Each copy of a layer keeps others; everything else is as it was."""
    model = tiny_lm(Segment(pattern=(LAYERS[name],), repeat=2))
    _, params, state = built(model)
    state = jax.tree.map(
        lambda a: jnp.arange(a.size, dtype=a.dtype).reshape(a.shape), state
    )
    pruned = Applied.of(model, plan_for(model, *KEEPS))
    assert len(pruned.model.layers) == 1  # the copies are alike, still
    wanted = model_spec(pruned.model).shapes()
    found = flat_paths(pruned.arrays(params)) | flat_paths(pruned.arrays(state))
    assert {path: a.shape for path, a in found.items()} == wanted
    changed = 0
    for path, old in (flat_paths(params) | flat_paths(state)).items():
        last, new = path.split("/")[-1], np.asarray(found[path])
        if new.shape == old.shape:
            np.testing.assert_array_equal(new, old, err_msg=path)
            continue
        changed += 1
        axis = last.split("_")[-1].index("E")
        for r, keep in enumerate(KEEPS):
            ids = [*keep, 8, 9] if old.shape[1 + axis] == 10 else list(keep)
            expected = np.take(np.asarray(old)[r], ids, axis)
            np.testing.assert_array_equal(new[r], expected, err_msg=path)
    assert changed >= 2


def test_layers_may_keep_other_numbers_and_routers_are_clipped():
    model = tiny_lm(Segment(pattern=(Dense(hidden=8), tiny_moe()), repeat=3))
    _, params, state = built(model)
    keeps = (None, (3,), None, (0, 1, 2, 3), None, (4, 5, 6, 7))
    pruned = Applied.of(model, plan_for(model, *keeps))
    moes = [s.pattern[1] for s in pruned.model.layers]
    assert [(m.num_experts, m.router.k) for m in moes] == [(1, 1), (4, 2)]
    assert [s.repeat for s in pruned.model.layers] == [1, 2]
    assert pruned.clipped == [
        "layer 1: 1 experts stay, so a token gets 1 of them at most, and not 2"
    ]
    made = flat_paths(pruned.arrays(params)) | flat_paths(pruned.arrays(state))
    assert {path: a.shape for path, a in made.items()} == model_spec(
        pruned.model
    ).shapes()
    old = params["segments"]["0"]["blocks"]["1"]["ffn"]["router"]["w_DE"]
    new = made["segments/1/blocks/1/ffn/router/w_DE"]
    np.testing.assert_array_equal(new[1], old[2][:, 4:])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "names",
    [
        ("top-k", "groups", "top-p"),
        pytest.param(tuple(LAYERS), marks=pytest.mark.slow),
    ],
    ids=["some kinds", "all kinds"],
)
def test_a_pruned_model_is_the_whole_one_with_the_others_banned(names, tmp_path):
    """The last layer keeps one expert, where tokens had two."""
    model = tiny_lm(Segment(pattern=(*(LAYERS[n] for n in names), tiny_moe())))
    spec, params, state = built(model)
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)) / 4, state)
    keeps = [*(KEEPS[n % 2] for n in range(len(names))), (5,)]
    plan = plan_for(model, *keeps)
    plan.save(tmp_path / "plan.json")
    steer = Steering.read(tmp_path / "plan.json").arrays(model)
    pruned = Applied.of(model, plan)
    small = model_spec(pruned.model)
    batch = random_batch(2, 16)

    @jax.jit
    def both(params, state, kept, kept_state, steer):
        ctx = TASK.context(batch, mode="eval", compute=XLA)
        masked = dataclasses.replace(ctx, steer=steer)
        return spec.merge(params, state)(masked), small.merge(kept, kept_state)(ctx)

    masked, compact = both(
        params, state, pruned.arrays(params), pruned.arrays(state), steer
    )
    assert_close(compact[0], masked[0], "float32")
    without = dict(moe_layers(compact[1]))
    for path, with_bans in moe_layers(masked[1]):
        keep = keeps[int(path[3])]  # segments/0/blocks/N
        load = np.asarray(with_bans["stats"]["load_E"])
        ids = [*keep, *range(8, load.shape[-1])]
        assert load.sum() == load[..., ids].sum(), path
        np.testing.assert_array_equal(load[..., ids], without[path]["stats"]["load_E"])


BAD = {
    "layer 0: .*: its 2 groups keep [3, 1]": (tiny_moe(router=GROUPED), (0, 1, 2, 4)),
    "keep [2, 0] of them": (tiny_moe(experts=LATENT), (0, 1)),
    "Hash cannot choose among fewer": (tiny_moe(router=Hash(k=1)), (0, 1)),
    "prune it before they are merged": (tiny_moe(stored_experts=4), (0, 1)),
}


@pytest.mark.parametrize("told", BAD)
def test_a_layer_that_cannot_be_pruned_is_named(told):
    ffn, keep = BAD[told]
    model = tiny_lm(Segment(pattern=(ffn,)))
    pattern = told.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ConfigError, match=pattern):
        Applied.of(model, plan_for(model, keep))


def test_numbers_of_experts_are_checked_for_each_layer():
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=8), tiny_moe(router=GROUPED))),
        Segment(pattern=(tiny_moe(router=ExpertChoice(k=2)),)),
    )
    found = checked(model, (4, 8))
    assert {n: own[1:] for n, own in found.items()} == {1: (4, 2), 2: (8, 1)}
    for keep, told in {
        (0,): "--keep = 0: must be from 1 to 8, for layer 1",
        (9,): "--keep = 9: must be from 1 to 8, for layer 1",
        (3,): "--keep = 3: layer 1 has 2 groups of experts that must keep as many",
        (4, 4, 4): "--keep: has 3 numbers; the model has 2 MoE layers",
    }.items():
        with pytest.raises(ConfigError, match=told):
            checked(model, keep)
    with pytest.raises(ConfigError, match="has no MoE layer"):
        checked(tiny_lm(Segment(pattern=(Dense(hidden=8),))), (4,))


# A whole run.


@pytest.mark.thorough
def test_a_plan_is_written_edited_and_applied(moex, moe_run, tmp_path, monkeypatch):
    score = lambda *args, **kw: {"nll": 2.0, "tokens": 5}  # noqa: E731
    monkeypatch.setattr(apply, "score_run", score)
    plan, new = tmp_path / "plan.json", tmp_path / "new"
    to, by = ("convert", moe_run, "--to=pruned"), ("--score=peu", "--calibration=4")
    assert "a plan for 2 layers" in moex(*to, "--keep=2", *by, f"--write-plan={plan}")
    data = json.loads(plan.read_text())
    assert data["how"] == {"score": "peu", "domains": [], "tokens": 128, "pool": None}
    for layer in data["layers"]:
        best = np.argsort(layer["scores"])[-2:]
        assert sorted(best.tolist()) == layer["keep"]
    data["layers"][1]["keep"] = [3, 1, 2]  # a person edits it
    plan.write_text(json.dumps(data | {"base": "0"}))
    for flags in (("eval", moe_run, f"--steer={plan}"), (*to, f"--plan={plan}")):
        last = () if flags[0] == "eval" else (f"--workdir={new}",)
        assert f"{plan}: the plan is for another model" in moex(*flags, *last)
    plan.write_text(json.dumps(data))
    text = moex(*to, f"--plan={plan}", f"--workdir={new}")
    assert "layer 0: 2 of 4 experts stay\nlayer 1: 3 of 4 experts stay" in text
    kept = Plan.read(new / "plan.json", "keep")
    assert kept.layers[1].keep == (3, 1, 2)
    old, pruned = load_run(moe_run).params, load_run(new).params
    name = ("blocks", "0", "ffn", "experts", "w_out_EFD")
    for n, keep in enumerate((kept.layers[0].keep, (1, 2, 3))):
        was, now = old["segments"]["0"], pruned["segments"][str(n)]
        for key in name:
            was, now = was[key], now[key]
        np.testing.assert_array_equal(now[0], was[n][np.array(keep)])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--score=reap",), "--keep: missing; how many experts stay in a layer?"),
        (("--keep=some",), "--keep = 'some': must be a number of experts"),
        (("--keep=2", "--score=rep"), "--score = 'rep'"),
        (("--keep=2", "--sums=no.npz"), "no.npz: no such file"),
        (("--keep=2", "--group=2"), "--group: is for --to=latent"),
        (("--keep=2", "--plan=no.json"), "--keep: is for making a plan"),
        (("--keep=2", "--groups=2", "--store=s"), "--groups: is for --to=merged"),
        (("--keep=2", "--store=s"), "--store: is for --to=subset"),
        (("--keep=2", "--domains=a,a"), "--domains = 'a,a': must be each domain once"),
        (("--keep=2", "--score=random", "--domains=a"), "looks at no data"),
        (("--keep=2", "--seed=1"), "--seed: is for --score=random."),
        (("--keep=2", "--pool=1"), "--pool: is for --score=peu or tcess."),
        (("--keep=2", "--score=random", "--pool=1"), "--pool: is for --score=peu or"),
        (
            ("--keep=2", "--score=random", "--calibration=4"),
            "--calibration: --score=random looks at no data",
        ),
        (
            ("--keep=4", "--score=random"),
            "the plan: changes nothing: all experts of all layers stay as they are.",
        ),
        (("--plan=no.json",), "no.json"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(
    moex, moe_run, tmp_path, flags, told
):
    line = moex(
        "convert", moe_run, "--to=pruned", *flags, f"--workdir={tmp_path / 'new'}"
    )
    assert told in line
    assert not (tmp_path / "new").exists()


def test_random_plans_differ_between_layers_and_seeds_and_need_no_data(moe_run):
    plans = [
        apply.plan_run(moe_run, [Pruned(keep=(2,), score="random", seed=seed)])
        for seed in (0, 0, 1)
    ]
    keeps = [[own.keep for own in plan.layers] for plan in plans]
    assert keeps[0] == keeps[1] != keeps[2]
    assert keeps[0][0] != keeps[0][1] or keeps[2][0] != keeps[2][1]


def test_sums_of_another_model_and_a_domain_without_tokens_are_refused():
    model = tiny_lm(Segment(pattern=(tiny_moe(num_experts=3),)))
    source = types.SimpleNamespace(base="a", model=model)
    other = types.SimpleNamespace(base="b", run="runs/b")
    with pytest.raises(
        ConfigError, match=r"--sums: they are of another model \(runs/b"
    ):
        Pruned(keep=(2,), sums=other).ready(source)
    empty = {"000": layer_sums(tokens=0)}
    facts = {"run": "r", "step": 0, "digest": None, "base": "a", "data": {}}
    facts |= {"markers": (), "pool": 1, "layers": {"000": layer_sums()}}
    sums = Sums(domains=("code",), by_domain={"code": empty}, **facts)
    others = types.SimpleNamespace(base="a", model=tiny_lm())  # an edited file
    with pytest.raises(ConfigError, match=r"each router = {'000': \(3, 3\)}: must"):
        Pruned(keep=(2,), sums=sums).ready(others)
    for domain, told in (("code", "has no tokens"), ("cod", "Did you mean 'code'")):
        how = Pruned(keep=(2,), domains=(domain,), sums=sums)
        with pytest.raises(ConfigError, match=f"--domains: .*{told}"):
            how.ready(source)


@pytest.mark.thorough
def test_sums_of_another_checkpoint_are_told(moe_run):
    lines = []
    source = Source(RunDir(moe_run), lines.append)
    recorded = Pruned(keep=(2,), calibration=1).fitting(source)
    lines.clear()
    Pruned(keep=(2,), sums=recorded).fitting(source)
    assert lines == []
    other = dataclasses.replace(recorded, digest="0" * 64, step=7)
    Pruned(keep=(2,), sums=other).fitting(source)
    assert len(lines) == 1 and "at step 7, and not of the checkpoint" in lines[0]
