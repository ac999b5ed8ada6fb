"""Sums of a model that runs are those of a loop over its tokens in float64.

T tokens · K slots · E experts · D width · R markers
"""

import math
import types

import jax
import numpy as np
import pytest

from moex.analysis.header import LayerInfo
from moex.analysis.markers import Marker
from moex.analysis.record import layer_infos
from moex.analysis.record_sums import Recorded, record_sums
from moex.config.base import ConfigError
from moex.model.losses import moe_layers
from moex.model.spec import shardings
from moex.model.steering import LayerSteering, Steering
from moex.moe.capacity import expert_capacity
from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.moe.narrow import Narrow
from moex.moe.routers.expert_choice import ExpertChoice
from moex.moe.routers.topk import TopK
from moex.moe.routers.topp import TopP
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.directory import RunDir
from moex.runs.open import LoadedRun
from tests import runs
from tests.helpers import TASK, XLA, built, mesh_of, random_batch, tiny_lm, tiny_moe
from tests.moe import oracle

DOMAINS = ("a", "b")
MARKERS = (Marker("#3"), Marker("#5", "#6"))


def model_of_all_kinds():
    """Capacity and zero experts, a narrow chain of two routers, expert choice."""
    plain = {"shared": None}
    first = tiny_moe(
        4, router=TopK(k=2), zero=Zero(copy=1, constant=1), capacity_factor=0.6, **plain
    )
    rounds = Chain(
        moe=tiny_moe(4, router=TopK(k=1), **plain),
        iterations=2,
        routers=(TopP(p=0.4, k_max=3), TopK(k=1)),
    )
    with pytest.warns(match="ExpertChoice"):
        chosen = tiny_moe(4, router=ExpertChoice(k=1.5), **plain)
        chosen.router.validate("router")
    return tiny_lm(
        Segment(pattern=(Dense(hidden=8), first), repeat=2),
        Segment(pattern=(Narrow(latent=8, inner=rounds), chosen)),
    )


def loaded(tmp_path, model, mesh=None) -> LoadedRun:
    """A run with the plain numbers of `built`, as if it had been read."""
    spec, params, state = built(model)
    mesh = mesh_of() if mesh is None else mesh
    params, state = jax.device_put((params, state), shardings(spec, mesh))
    cfg = runs.config(tmp_path)
    cfg.model = model
    run = LoadedRun(
        cfg=cfg,
        mesh=mesh,
        spec=spec,
        folder=RunDir(tmp_path / "run"),
        step=3,
        params=params,
        state=state,
    )
    pieces = [f"t{i}" for i in range(48)]
    run.__dict__["tokenizer"] = types.SimpleNamespace(pieces=lambda: pieces)
    return run


def recorded(run, batches, **options):
    return record_sums(run, lambda: iter(batches), domains=DOMAINS, data={}, **options)


# The definition: loops over tokens in float64.


def slow_sums(run, batches, pool=None) -> dict:
    """`{group: {label: sums}}` for all tokens (None) and each domain."""
    spec, infos = run.spec, layer_infos(run.cfg.model)

    @jax.jit
    def collect(params, state, batch):
        ctx = TASK.context(batch, mode="eval", collect=True, compute=XLA)
        return spec.merge(params, state)(ctx)[1]

    tokens: list[dict] = []
    for batch in batches:
        aux = jax.device_get(collect(run.params, run.state, batch))
        tokens += tokens_of(run, infos, aux, batch)
    groups = {None: tokens}
    groups |= {n: [t for t in tokens if t["domain"] == n] for n in DOMAINS}
    return {
        group: {
            info.label: of_tokens(info, own, infos[i + 1 :][:1], pool)
            for i, info in enumerate(infos)
        }
        for group, own in groups.items()
    }


def tokens_of(run, infos, aux, batch) -> list[dict]:
    """Every valid token of a batch: by label its logits, slots and answers."""
    params = jax.tree.map(np.asarray, run.params)
    segment_BL = batch["segment"]
    L = segment_BL.shape[1]
    flat = np.flatnonzero(segment_BL.reshape(-1))
    marked_TR = marked(batch)
    found = [
        {"domain": DOMAINS[batch["domain"][t // L]], "marked": marked_TR[t]}
        for t in flat
    ]
    layers = {tuple(path): layer for path, layer in moe_layers(aux)}
    for info in infos:
        path, copy, cfg = {
            1: (("segments", "0", "blocks", "1", "ffn"), 0, moe_of(run, 0, 1)),
            3: (("segments", "0", "blocks", "1", "ffn"), 1, moe_of(run, 0, 1)),
            4: (("segments", "1", "blocks", "0", "ffn", "inner"), 0, None),
            5: (("segments", "1", "blocks", "1", "ffn"), 0, moe_of(run, 1, 1)),
        }[info.layer]
        cfg = run.cfg.model.layers[1].pattern[0].inner.moe if cfg is None else cfg
        layer, own = layers[path], params
        for name in path:
            own = own[name]
        own = jax.tree.map(lambda a, c=copy: np.float64(a[c]), own)
        trace, scores, x = layer["trace"], layer["scores"], layer["inputs"][copy]
        if info.round:
            trace = trace[str(info.round - 1)]
            scores = {k: v[:, info.round - 1] for k, v in scores.items()}
            x = x[info.round - 1]
        logits_TE = np.float64(scores["logits"][copy])
        chosen = chosen_of({k: v[copy] for k, v in trace.items()}, len(logits_TE))
        kept = chosen
        if cfg.capacity_factor is not None:
            slots = trace["expert"][copy].size
            room = expert_capacity(cfg.capacity_factor, slots, info.num_choices)
            kept = oracle.keep_within(room, chosen, cfg.num_experts)
        x_TD = np.float64(x).reshape(len(logits_TE), -1)
        for token, t in zip(found, flat, strict=True):
            token[info.label] = {
                "logit_E": logits_TE[t],
                "chosen": len(chosen[t]),
                "gates": kept[t],
                "answers": {e: answer(cfg, x_TD[t], own, e) for e in kept[t]},
            }
    return found


def moe_of(run, segment, place):
    return run.cfg.model.layers[segment].pattern[place]


def chosen_of(trace, T) -> list[dict]:
    """{expert: gate} of each token, in the order of the router."""
    chosen: list[dict] = [{} for _ in range(T)]
    if "token" in trace:
        for e, c in zip(*np.nonzero(trace["keep"]), strict=True):
            chosen[trace["token"][e, c]][int(e)] = float(trace["gate"][e, c])
        return chosen
    for t, k in zip(*np.nonzero(trace["keep"]), strict=True):
        chosen[t][int(trace["expert"][t, k])] = float(trace["gate"][t, k])
    return chosen


def answer(cfg, x_D, params, e):
    if e < cfg.num_experts:
        return oracle.glu_expert(cfg.experts, x_D, params["experts"], e)
    w = params.get("zero", {})
    return oracle.zero_expert(cfg.zero, x_D, w, e - cfg.num_experts)


def marked(batch) -> np.ndarray:
    """bool[T, R]: token 3; and what stands between tokens 5 and 6 of a document."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment"], strict=True):
        inside, before = False, 0
        for token, segment in zip(tokens, segments, strict=True):
            if segment != before or token == 6:
                inside = False
            found.append([token == 3, inside and token != 5])
            inside, before = inside or token == 5, segment
    return np.array(found)


def of_tokens(info: LayerInfo, tokens, after, pool) -> dict:
    """The sums of one router over some tokens."""
    E = info.num_choices
    names = ("count", "gate", "norm", "gate_norm", "logit", "tcess", "peu")
    s = {f"{name}_E": np.zeros(E) for name in names}
    s |= {"marker_count_RE": np.zeros((2, E)), "marker_total_R": np.zeros(2)}
    s |= {"gram_EE": np.zeros((E, E)), "tokens": len(tokens), "output_ED": 0.0}
    if after:
        s["transitions_AB"] = np.zeros((E, after[0].num_choices))
    pools = [pool_of(token[info.label], pool) for token in tokens]
    s["threshold"] = np.mean([max(p.values(), default=0.0) for p in pools])
    for token, probs in zip(tokens, pools, strict=True):
        own = token[info.label]
        z_E, gates = own["logit_E"], own["gates"]
        s["logit_E"] += z_E
        s["gram_EE"] += np.outer(z_E, z_E)
        s["marker_total_R"] += token["marked"]
        for e, gate in gates.items():
            share, norm = gate / sum(gates.values()), math.hypot(*own["answers"][e])
            s["count_E"][e] += 1
            s["gate_E"][e] += share
            s["norm_E"][e] += norm
            s["gate_norm_E"][e] += share * norm
            s["marker_count_RE"][:, e] += token["marked"]
            of_e = np.arange(E)[:, None] == e
            s["output_ED"] = s["output_ED"] + of_e * own["answers"][e][None]
        for e, p in probs.items():
            s["tcess_E"][e] += z_E[e]
            if p >= s["threshold"] * (1 - 1e-6):
                s["peu_E"][e] += max(z_E[e], 1 / (1 + math.exp(-z_E[e])))
        if after:
            here, there = top(own), top(token[after[0].label])
            if here is not None and there is not None:
                s["transitions_AB"][here, there] += 1
    return s


def pool_of(own, pool) -> dict:
    """{expert: probability} of the experts with the greatest logits."""
    z_E = own["logit_E"]
    best = oracle.best(z_E, own["chosen"] if pool is None else pool)
    if not best:
        return {}
    return dict(zip(best, oracle.softmax(z_E[best]), strict=True))


def top(own):
    gates = own["gates"]
    return min(gates, key=lambda e: (-gates[e], e)) if gates else None


def assert_sums(found, wanted, label):
    for name, value in wanted.items():
        own = getattr(found, name)
        if own is None:  # of all tokens alone
            assert name in ("gram_EE", "transitions_AB", "output_ED")
            continue
        where = f"{label} {name}"
        np.testing.assert_allclose(own, value, rtol=2e-4, atol=2e-4, err_msg=where)


def batches_of(rows=4, count=2):
    return [random_batch(rows, 16, seed=seed) for seed in range(count)]


@pytest.mark.thorough
def test_sums_are_those_of_a_loop_over_tokens(tmp_path):
    """All kinds of layers; padding, dropped slots, two domains, markers."""
    run, batches = loaded(tmp_path, model_of_all_kinds()), batches_of()
    options = Recorded(markers=MARKERS, by_domain=True)
    found, wanted = recorded(run, batches, recorded=options), slow_sums(run, batches)
    assert list(found.layers) == ["001", "003", "004.1", "004.2", "005"]
    assert found.tokens == sum((b["segment"] > 0).sum() for b in batches)
    for label, own in found.layers.items():
        assert own.count_E.dtype == own.marker_count_RE.dtype == np.int64
        assert_sums(own, wanted[None][label], label)
        for domain in DOMAINS:
            assert_sums(found.of(domain)[label], wanted[domain][label], label)
    first = found.layers["001"]
    assert 0 < first.slots < 2 * first.tokens  # slots over the capacity are dropped
    assert found.layers["005"].transitions_AB is None
    assert found.layers["001"].transitions_AB.shape == (6, 6)


@pytest.mark.slow
def test_a_mesh_gives_the_same_sums(tmp_path):
    """On 8 devices that split tokens, parameters and experts."""
    chain = Chain(moe=tiny_moe(4, router=TopK(k=1), shared=None), iterations=2)
    moe = tiny_moe(8, capacity_factor=1.0)
    model = tiny_lm(Segment(pattern=(moe, chain)))
    batches, options = batches_of(8), Recorded(markers=MARKERS, by_domain=True)
    meshes = mesh_of(), mesh_of(8, data=2, fsdp=2, expert=2)
    one, two = (
        recorded(loaded(tmp_path, model, mesh), batches, recorded=options)
        for mesh in meshes
    )
    for domain in (None, *DOMAINS):
        for label, own in one.of(domain).items():
            there = {k: v for k, v in vars(own).items() if v is not None}
            del there["info"]
            assert_sums(two.of(domain)[label], there, label)


@pytest.mark.slow
def test_a_pool_a_limit_and_steering_are_heeded(tmp_path):
    run, batches = loaded(tmp_path, model_of_all_kinds()), batches_of()
    cut = [dict(batches[0]), dict(batches[1])]
    places = np.cumsum(cut[1]["segment"].reshape(-1) > 0).reshape(4, 16)
    left = places <= 70 - (cut[0]["segment"] > 0).sum()
    cut[1]["segment"] = np.where(left, cut[1]["segment"], 0)
    found = recorded(run, batches, tokens=70, recorded=Recorded(pool=3))
    wanted = slow_sums(run, cut, pool=3)[None]
    assert found.tokens == 70
    for label, own in found.layers.items():
        assert_sums(own, {"peu_E": wanted[label]["peu_E"]}, label)
        assert_sums(own, {"output_ED": wanted[label]["output_ED"]}, label)
    ban = Steering(layers=(LayerSteering(layer=1, ban=(0, 2)),))
    steered = recorded(run, batches, steer=ban.arrays(run.cfg.model))
    assert np.flatnonzero(steered.layers["001"].count_E == 0).tolist() == [0, 2]


def test_mistakes_are_one_line(tmp_path):
    run = loaded(tmp_path, tiny_lm())
    for options, said in (
        ({"recorded": Recorded(pool=9)}, "pool = 9: layer 001 allows 1 to 8"),
        ({"recorded": Recorded(markers=(Marker("x"),))}, "'x': not one token of the"),
    ):
        with pytest.raises(ConfigError, match=said):
            recorded(run, batches_of(), **options)
    batch = batches_of()[0]
    none = batch | {"tokens": np.where(batch["tokens"] == 7, 8, batch["tokens"])}
    with pytest.raises(ConfigError, match="'t7': does not occur in the text"):
        recorded(run, [none], recorded=Recorded(markers=(Marker("t7"),)))
    with pytest.raises(ConfigError, match="no tokens to count"):
        recorded(run, [batch | {"segment": 0 * batch["segment"]}])
