"""Merged experts: of a whole model, of a whole run, and in folders of other programs.

R copies of a layer · E experts · G groups
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moex.analysis.header import LayerInfo
from moex.analysis.sums import LayerSums, Sums
from moex.config.base import ConfigError
from moex.convert.align import one_expert, reordered
from moex.convert.base import asked_for, kinds
from moex.convert.kinds.merged import CHOICES, NOT_IN_SUMS, Merged
from moex.convert.merge import Used, error_bound
from moex.convert.plans import Merge, Plan
from moex.convert.to_merged import (
    make_plan,
    mergeable,
    merged_arrays,
    merged_model,
    pairs_of,
    plan_layer,
    stored,
)
from moex.convert.used import Counter, used_of_sums
from moex.interop.arrays import tensor_of
from moex.interop.families import find_family
from moex.interop.names import pieces
from moex.interop.stored import Copies, written_out
from moex.model.accounting import num_bytes
from moex.model.paths import flat_paths, nested
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.experts.lowrank import LowRank
from moex.moe.narrow import Narrow
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.base import base_hash
from moex.runs.directory import RunDir
from moex.runs.open import load_run
from moex.train import training
from moex.train.job import make_job
from tests import runs
from tests.helpers import TASK, XLA, built, random_batch, tiny_lm, tiny_moe
from tests.interop import parity
from tests.marks import thorough_but_for
from tests.moe import oracle

E = 6
MOE = tiny_moe(E, shared=None)
MODEL = tiny_lm(
    Segment(pattern=(MOE, Dense(hidden=8)), repeat=3),
    Segment(pattern=(Chain(moe=MOE, iterations=2),)),
    Segment(pattern=(Narrow(latent=8, inner=MOE),)),
)
GROUPS = {
    0: ((0, 3), (1, 2, 5), (4,)),
    2: ((5, 4, 3, 2, 1, 0),),
    4: ((2,), (0, 1, 3, 4, 5)),
    6: ((1, 0), (3, 2), (5, 4)),
    7: ((0, 1), (2, 3), (4, 5)),
}


def plan_of(model, groups, weights=None):
    layers = tuple(
        Merge(
            layer=number,
            experts=sum(map(len, own)),
            groups=own,
            dominant=tuple(group[-1] for group in own),
            weights=weights or (1.0,) * sum(map(len, own)),
        )
        for number, own in groups.items()
    )
    return Plan(kind="merge", run="a", step=0, base=base_hash(model), layers=layers)


def logits(cfg, params, state):
    spec, batch = model_spec(cfg), random_batch(2, 16)

    @jax.jit
    def run(params, state):
        ctx = TASK.context(batch, mode="eval", compute=XLA)
        return spec.merge(params, state)(ctx)[0]

    return np.asarray(run(params, state))


def with_equal_groups(params, plan, rng):
    """Parameters in which the members of a group are one expert, in other orders."""
    flat = flat_paths(params)
    places = mergeable(MODEL, Merged(groups=1))
    for own in plan.layers:
        sparse, r = places[own.layer]
        start = f"{sparse.path}/experts/"
        for group in own.groups:
            weights = {
                name.removeprefix(start): np.asarray(value[r])
                for name, value in flat.items()
                if name.startswith(start)
            }
            for e in group[1:]:
                order_F = rng.permutation(weights["w_out_EFD"].shape[1])
                copy = reordered(one_expert(weights, group[0]), order_F)
                for name, value in copy.items():
                    path = start + name
                    flat[path] = jnp.asarray(flat[path]).at[r, e].set(value)
    return nested(flat)


@pytest.mark.thorough
def test_a_model_whose_groups_are_alike_computes_the_same_when_they_merge():
    """Layers of one segment get other numbers of groups; a chain and a narrow layer."""
    plan = plan_of(MODEL, GROUPS)
    _, params, state = built(MODEL)
    params = with_equal_groups(params, plan, np.random.default_rng(0))
    model = merged_model(MODEL, plan)
    assert [s.repeat for s in model.layers] == [1, 1, 1, 1, 1]
    new = merged_arrays(params, state, MODEL, plan, "dominant")
    spec = model_spec(model)
    for tree, abstract in zip(new, (spec.params, spec.state), strict=True):
        like = jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), tree) == like
    np.testing.assert_array_equal(
        flat_paths(new[1])["segments/0/blocks/0/ffn/stored_E"], [[0, 1, 1, 0, 2, 1]]
    )
    before = logits(MODEL, params, state)
    found = logits(model, *new)
    np.testing.assert_allclose(found, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_layers_without_a_merge_stay_as_they_are():
    alone = tuple((e,) for e in range(E))
    plan = plan_of(MODEL, {0: alone, 4: alone, 2: alone})
    assert merged_model(MODEL, plan) == dataclasses.replace(MODEL)
    even = {n: ((0, 1, 2), (3, 4, 5)) for n in (0, 2, 4)}
    model = merged_model(MODEL, plan_of(MODEL, even))
    assert [s.repeat for s in model.layers] == [3, 1, 1]
    assert model.layers[0].pattern[0].stored_experts == 2


def test_the_memory_of_16_experts_in_8_groups_falls_by_half():
    """All of the experts' numbers: parameters, their bytes, and those of AdamW."""
    model = tiny_lm(Segment(pattern=(tiny_moe(16, shared=None),), repeat=2))
    pairs = tuple((e, e + 8) for e in range(8))
    plan = plan_of(model, {0: pairs, 1: pairs})
    _, params, state = built(model)
    new, _ = merged_arrays(params, state, model, plan, "none")

    def experts(tree):
        return {n: a for n, a in flat_paths(tree).items() if "/experts/" in n}

    assert num_bytes(experts(new)) * 2 == num_bytes(experts(params))
    others = [num_bytes(tree) - num_bytes(experts(tree)) for tree in (new, params)]
    assert others[0] == others[1]
    spec = model_spec(merged_model(model, plan))
    assert num_bytes(experts(spec.params)) == num_bytes(experts(new))


# How experts are used.


def used(E=4, seed=0, **changes):
    rng = np.random.default_rng(seed)
    logits_TE, y_ED = rng.normal(size=(30, E)), rng.normal(size=(E, 5))
    values = {
        "tokens": 30,
        "count_E": np.arange(1.0, E + 1),
        "gram_EE": logits_TE.T @ logits_TE,
        "gate_norm_E": np.ones(E),
        "gate_gram_EE": np.eye(E),
        "output_gram_EE": y_ED @ y_ED.T,
        "input_gram_EE": y_ED @ y_ED.T,
        "gradient_gram_EE": y_ED @ y_ED.T,
        "merge_error_EE": np.abs(y_ED @ y_ED.T),
    }
    return Used(**values | changes)


def options(**changes):
    given = {"groups": 2, "similarity": "logits"} | changes
    return Merged.from_flags(given)


WEIGHTS = {
    "w_in_ED2F": np.random.default_rng(1).normal(size=(4, 3, 2, 5)),
    "w_out_EFD": np.random.default_rng(2).normal(size=(4, 5, 3)),
}
ROUTER = np.random.default_rng(3).normal(size=(3, 4))


@pytest.mark.parametrize("similarity", CHOICES["similarity"])
def test_each_similarity_groups_the_rest_around_the_most_used(similarity):
    how = options(similarity=similarity)
    found = plan_layer(0, used(), WEIGHTS, [ROUTER], 2, how)
    assert found.dominant == (3, 2)  # counts rise
    assert sorted(e for group in found.groups for e in group) == [0, 1, 2, 3]
    assert found.weights == (0.1, 0.2, 0.3, 0.4)
    assert found == plan_layer(0, used(), WEIGHTS, [ROUTER], 2, how)
    found.check("here")


def test_a_copy_is_more_alike_than_others_by_each_similarity():
    own = used(
        gram_EE=np.array([[2.0, 2, 0, 0], [2, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    )
    grams = {f"{name}_gram_EE": own.gram_EE for name in ("output", "input", "gradient")}
    own = dataclasses.replace(own, **grams, merge_error_EE=4 - own.gram_EE)
    weights = {name: value.copy() for name, value in WEIGHTS.items()}
    copy = reordered(one_expert(weights, 1), [4, 2, 0, 1, 3])
    for name in weights:
        weights[name][0] = copy[name]
    router = ROUTER.copy()
    router[:, 0] = router[:, 1]
    own = dataclasses.replace(own, count_E=np.array([1.0, 3, 9, 1]))
    for similarity in set(CHOICES["similarity"]) - {"random"}:
        found = plan_layer(0, own, weights, [router], 2, options(similarity=similarity))
        assert found.dominant == (2, 1)
        assert 0 in found.groups[1], similarity


def test_ream_takes_the_best_scores_and_weighs_by_them():
    own = used(gate_norm_E=np.array([8.0, 2, 9, 4]), count_E=np.array([1.0, 2, 9, 4]))
    found = plan_layer(0, own, WEIGHTS, [ROUTER], 2, options(method="ream"))
    assert found.dominant == (0, 1) and found.groups[1] == (1,)
    assert found.weights == (8.0, 1.0, 1.0, 1.0)
    uniform = options(method="ream", average="uniform", largest=2)
    found = plan_layer(0, own, WEIGHTS, [ROUTER], 2, uniform)
    assert [len(group) for group in found.groups] == [2, 2]
    assert found.weights == (1.0,) * 4


MISTAKES = {
    "--groups: missing": {},
    "--groups = 0: must be at least 1": {"groups": 0},
    "--groups = 6: must be below the 6 experts": {"groups": 6},
    "--budget = 'even': must be one of": {"groups": 2, "budget": "even"},
    "--similarity = 'logit': must be one of .* Did you mean 'logits'": {
        "groups": 2,
        "similarity": "logit",
    },
    "--align = 'all': must be one of": {"groups": 2, "align": "all"},
    "--method = 'reap': must be one of": {"groups": 2, "method": "reap"},
    "--budget = 'adaptive': must be uniform with --method=ream": {
        "groups": 2,
        "method": "ream",
        "budget": "adaptive",
    },
    "--largest = 2: must be at least 3: layer 0 has 6 experts in 2 groups": {
        "groups": 2,
        "largest": 2,
        "budget": "uniform",
    },
    "--layers = 1: must be among the MoE layers, 0, 2": {"groups": 2, "layers": "1"},
    "--groups: is for making a plan": {"groups": 2, "plan": "p.json"},
    "--seed: is for --similarity=random": {"groups": 2, "seed": 1},
}


@dataclasses.dataclass
class Run:
    cfg: object
    params: dict
    folder: str = "runs/a"
    step: int = 3


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_line(told):
    flags = dict.fromkeys(Merged.flags) | MISTAKES[told]
    every = {name: None for kind in kinds().values() for name in kind.flags}
    model = tiny_lm(Segment(pattern=(MOE, Dense(hidden=8)), repeat=2))
    with pytest.raises(ConfigError, match=told):
        (how,) = asked_for("merged", every | flags)
        how.check()
        _, params, _ = built(model)
        run = Run(type("Cfg", (), {"model": model}), params)
        make_plan(run, None, {n: used(E) for n in (0, 2)}, how)


@pytest.mark.parametrize("similarity", NOT_IN_SUMS)
def test_sums_do_not_tell_every_similarity(similarity):
    how = Merged(groups=2, similarity=similarity, sums=object())
    with pytest.raises(ConfigError, match="sums do not tell it; leave out --sums"):
        how.check()


def test_experts_that_cannot_be_merged_are_named():
    how = options()
    with pytest.raises(ConfigError, match="has no MoE layer"):
        mergeable(tiny_lm(Segment(pattern=(Dense(hidden=8),))), how)
    other = tiny_moe(4, experts=LowRank(rank=2))
    with pytest.raises(ConfigError, match="experts = LowRank: must be Glu"):
        mergeable(tiny_lm(Segment(pattern=(other,))), how)
    again = tiny_moe(4, stored_experts=2)
    with pytest.raises(ConfigError, match="are merged already"):
        mergeable(tiny_lm(Segment(pattern=(again,))), how)


def test_a_plan_has_all_layers_and_how_it_was_made():
    model = tiny_lm(Segment(pattern=(MOE, Dense(hidden=8)), repeat=2))
    _, params, _ = built(model)
    run = Run(type("Cfg", (), {"model": model}), params)
    even = {n: used(E, count_E=np.ones(E)) for n in (0, 2)}
    plan = make_plan(run, None, even, options(groups=3))
    assert [len(own.groups) for own in plan.layers] == [3, 3]
    assert plan.how["groups"] == 3 and plan.how["budget"] == "adaptive"
    plan.check(model)
    found = plan.how["pairs"]
    assert len(found) == 2 * 3
    row = found[0]
    sums = (even[0].gate_gram_EE, even[0].output_gram_EE, 30)
    bound = error_bound(row["dominant"], row["expert"], *sums)
    assert row["bound"] == pytest.approx(bound, rel=1e-5)
    edited = dataclasses.replace(plan, layers=plan.layers[:1])
    assert pairs_of(edited) == [row for row in found if row["layer"] == 0]
    alone = dataclasses.replace(plan.layers[0], groups=((0, 1, 2, 3, 4, 5),))
    alone = dataclasses.replace(alone, dominant=(row["dominant"],))
    told = pairs_of(dataclasses.replace(plan, layers=(alone,)))
    assert {row["dominant"] for row in told} == {row["dominant"]}
    del found[0]["bound"]
    with pytest.raises(ConfigError, match="the plan: how.pairs: has no field 'bound'"):
        pairs_of(plan)
    blind = {n: dataclasses.replace(u, gate_gram_EE=None) for n, u in even.items()}
    assert make_plan(run, None, blind, options(groups=3)).how["pairs"] == []


def test_recorded_sums_tell_the_same_for_all_rounds_of_a_chain():
    model = tiny_lm(Segment(pattern=(Chain(moe=MOE, iterations=2),)))
    rng = np.random.default_rng(0)
    rounds = {}
    for t in (1, 2):
        info = LayerInfo(
            layer=0, round=t, num_experts=E, num_choices=E, slots=2, router="TopK"
        )
        zeros = dict.fromkeys(("gate_E", "norm_E", "logit_E", "tcess_E", "peu_E"))
        sums = {name: np.zeros(E) for name in zeros} | {
            "count_E": rng.integers(1, 9, E),
            "gate_norm_E": rng.uniform(size=E),
            "gram_EE": rng.normal(size=(E, E)),
            "output_ED": rng.normal(size=(E, 3)),
            "marker_count_RE": np.zeros((0, E)),
            "marker_total_R": np.zeros(0),
        }
        rounds[info.label] = LayerSums(info=info, tokens=20, threshold=0.5, **sums)
    facts = {"run": "a", "step": 1, "digest": None, "data": {}, "domains": ()}
    facts |= {"markers": (), "pool": None, "by_domain": {}, "layers": rounds}
    sums = Sums(base=base_hash(model), **facts)
    own = used_of_sums(sums)[0]
    one, two = rounds.values()
    np.testing.assert_array_equal(own.count_E, one.count_E + two.count_E)
    np.testing.assert_array_equal(own.gram_EE, one.gram_EE + two.gram_EE)
    mean_ED = (one.output_ED + two.output_ED) / own.count_E[:, None]
    np.testing.assert_allclose(own.output_gram_EE, mean_ED @ mean_ED.T)
    assert own.gate_gram_EE is None
    one.gram_EE[0, 0] = np.nan
    with pytest.raises(ConfigError, match="layer 0: gram_EE is not finite"):
        used_of_sums(sums)


@pytest.mark.thorough
def test_usage_is_counted_as_its_definition(tmp_path):
    """Against a loop over tokens and the experts of the oracle; some slots drop."""
    capacity = "model.layers.1.pattern.0.capacity_factor=0.8"
    cfg = runs.config(tmp_path, "batch_size=8", capacity)
    with runs.one_device():
        job = make_job(cfg, log=lambda line: None)
        _, params, state = built(cfg.model)
        arrays = {"params": params, "state": state}
        runs.write(job, arrays, tmp_path / "run")
        run = load_run(tmp_path / "run")
        found = Counter(run, job, 16).used(run.params)[1]
        batches = [batch for batch, _ in zip(job.batches(0), range(2), strict=False)]
    sparse = cfg.model.layers[1].pattern[0]
    path = "segments/1/blocks/0/ffn"
    own = {
        name.removeprefix(f"{path}/experts/"): np.float64(value[0])
        for name, value in flat_paths(params).items()
        if f"{path}/experts" in name
    }
    N = sparse.num_experts
    count_E, gram_EE, norm_E = np.zeros(N), np.zeros((N, N)), np.zeros(N)
    gates_EE, outputs_EE, tokens = np.zeros((N, N)), np.zeros((N, N)), 0
    for batch in batches:
        ctx = TASK.context(batch, mode="eval", collect=True, compute=XLA)
        aux = run.spec.merge(run.params, run.state)(ctx)[1]
        layer = jax.tree.map(
            lambda a: np.asarray(a[0]), aux["segments"]["1"]["blocks"]["0"]["ffn"]
        )
        x_TD = np.float64(layer["inputs"].reshape(-1, 32))
        valid_T = (batch["segment"] > 0).reshape(-1)
        trace = layer["trace"]
        slots = zip(trace["expert"], trace["gate"], trace["keep"], strict=True)
        gates = [
            {int(e): gate for e, gate, keep in zip(*slot, strict=True) if keep}
            for slot in slots
        ]
        kept = oracle.keep_within(math.ceil(0.8 * 2 * len(gates) / N), gates, N)
        assert sum(map(len, kept)) < sum(map(len, gates))
        for t in np.flatnonzero(valid_T):
            z_E = layer["scores"]["logits"][t]
            y_ED = np.array(
                [oracle.glu_expert(sparse.experts, x_TD[t], own, e) for e in range(N)]
            )
            gate_E = np.zeros(N)
            for e, gate in kept[t].items():
                gate_E[e] = gate
            tokens += 1
            count_E += gate_E > 0
            gram_EE += np.outer(z_E, z_E)
            share_E = gate_E / max(gate_E.sum(), 1e-30)
            norm_E += share_E * np.linalg.norm(y_ED, axis=1)
            gates_EE += np.outer(gate_E, gate_E)
            outputs_EE += y_ED @ y_ED.T
    assert found.tokens == tokens
    np.testing.assert_array_equal(found.count_E, count_E)
    np.testing.assert_allclose(found.gram_EE, gram_EE, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.gate_norm_E, norm_E, rtol=1e-4)
    np.testing.assert_allclose(found.gate_gram_EE, gates_EE, rtol=1e-4)
    np.testing.assert_allclose(
        found.output_gram_EE, outputs_EE / tokens, rtol=1e-3, atol=1e-6
    )


# A whole run.


@pytest.mark.slow
def test_a_merged_run_is_an_ordinary_run(tmp_path, moex):
    """It is half as large, and its groups stay one tensor in training and resuming."""
    moe = "MoE(num_experts=4, router=TopK(k=2, bias_rate=0.01), experts=Glu(hidden=32))"
    text = runs.write_config(tmp_path).read_text()
    assert moe in text
    wide = moe.replace("=4", "=16").replace("=32", "=64")
    (tmp_path / "tiny.py").write_text(text.replace(moe, wide))
    run, new = tmp_path / "run", tmp_path / "new"
    with runs.one_device():
        runs.train(tmp_path, run, "steps=2")
        said = moex("convert", run, "--to=merged", "--groups=8", f"--workdir={new}")
    assert "parameters of the experts: 98,304 -> 49,152 (0.500)" in said
    assert "error >=" in said and "held-out loss" in said
    plan = Plan.read(new / "plan.json", "merge")
    report = json.loads((new / "convert.json").read_text())
    assert report["layer_groups"] == {"1": 8} and len(report["pairs"]) == 8
    lost = 8 * 32 * 64 * 3  # numbers of eight experts
    assert report["params"]["before"] - report["params"]["after"] == lost
    for steps in (2, 4):
        with runs.one_device():
            cfg = RunDir(new).config()
            cfg.steps = steps
            training.train(cfg, new, say=lambda line: None)
            after = load_run(new)
        assert after.step == steps
        where = "segments/1/blocks/0/ffn/"
        state, params = flat_paths(after.state), flat_paths(after.params)
        expected = [stored(plan.by_layer()[1])]
        np.testing.assert_array_equal(state[f"{where}stored_E"], expected)
        assert params[f"{where}experts/w_out_EFD"].shape == (1, 8, 64, 32)
    sizes = [
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in (run / "checkpoints" / "2", new / "checkpoints" / "4")
    ]
    # Weights and both moments of AdamW, less what compression makes of some.
    assert sizes[0] - sizes[1] == pytest.approx(3 * 4 * lost, rel=0.15)
    file = tmp_path / "plan.json"
    dataclasses.replace(plan, how={"align": "none"}).save(file)
    merged = ("--to=merged", f"--workdir={tmp_path / 'again'}")
    with runs.one_device():
        assert "(0.500)" in moex("convert", run, *merged, f"--plan={file}")
        assert "the" in moex("generate", new, "--prompt=the", "--max-new-tokens=4")
        again = moex("convert", new, "--to=merged", "--groups=2", f"--workdir={run}2")
    assert "experts are merged already" in again


# Folders of other programs.


@pytest.mark.parametrize(
    "name", thorough_but_for(["mixtral", "deepseek_v3", "gpt_oss"], "mixtral")
)
def test_a_folder_has_the_weights_of_each_choice(name):
    model, _, arrays, wanted = parity.load(name)
    sizes = {
        n: place[0].moe.num_experts for n, place in mergeable(model, options()).items()
    }
    groups = {
        n: (tuple(range(0, size, 2)), tuple(range(1, size, 2)))
        for n, size in sizes.items()
    }
    plan = plan_of(model, groups)
    params, state = arrays["params"], arrays["state"]
    new = merged_arrays(params, state, model, plan, "none")
    made = merged_model(model, plan)
    flat = {n: jnp.asarray(a) for tree in new for n, a in flat_paths(tree).items()}
    copies = Copies(made, flat)
    assert copies and not Copies(model, flat_paths(params))
    whole = written_out(made)
    names = find_family("config.json", parity.config_of(name)).names
    found = {p.name: (p, copies.of(p)) for p in pieces(whole, names)}
    assert found.keys() == {p.name for p in wanted}
    places = mergeable(model, options())
    params = flat_paths(params)
    for piece, own in found.values():
        tensor = tensor_of(*own, np.dtype("float32"))
        assert tensor.shape == piece.shape
        if "/experts/w_out" in piece.path:
            number = int(piece.name.split(".")[2])
            stored_E = stored(plan.by_layer()[number])
            before_EFD = np.asarray(params[piece.path][places[number][1]])
            mean_EFD = np.stack(
                [before_EFD[stored_E == g].mean(axis=0) for g in stored_E]
            )
            e = piece.index[1]
            expected = mean_EFD[e].T if isinstance(e, int) else mean_EFD
            np.testing.assert_allclose(tensor, expected, rtol=0, atol=1e-6)
