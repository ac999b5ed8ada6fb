"""The predictor of experts: what it reads, finds, keeps and refuses."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moex.analysis.trace import LayerInfo, Slots, Tokens, Trace
from moex.config.base import ConfigError
from moex.offload import fit as fitting
from moex.offload.fit import Training, fit, recalls, split, table
from moex.offload.predictor import KEY, About, Predictor, windows
from moex.offload.routes import read_routes
from tests.analysis.oracle import header, write
from tests.offload.routes import routes_of

E = 8
INFOS = tuple(
    LayerInfo(
        layer=n, round=0, num_experts=E - n, num_choices=E, slots=2 - n, router="TopK"
    )  # fmt: skip
    for n in range(2)
)
VOCABULARY = tuple("abcdefgh")
QUICK = Training(steps=300, batch=64)


def foretold(path, examples=60, length=8, seed=0):
    """A trace whose experts follow from a token and from the one before it."""
    rng = np.random.default_rng(seed)
    count = examples * length
    token_N = rng.integers(0, E, count)
    example_N = np.arange(count) // length
    before_N = np.where(np.arange(count) % length, np.roll(token_N, 1), 0)
    one_NK = np.stack([token_N, (token_N + 3) % E], 1)
    layers = {"000": one_NK, "001": (before_N % (E - 1))[:, None]}
    slots = {
        label: Slots(
            expert_NK=ids.astype(np.int32),
            keep_NK=np.ones(ids.shape, bool),
            **{
                n: np.full(ids.shape, 0.5, np.float32)
                for n in ("gate_NK", "logit_NK", "prob_NK")
            },  # fmt: skip
        )
        for label, ids in layers.items()
    }
    columns = {
        "example": example_N,
        "position": np.arange(count) % length,
        "document": example_N,
        "token": token_N,
        "domain": np.zeros(count),
    }
    tokens = Tokens(**{f"{k}_N": v.astype(np.int32) for k, v in columns.items()})
    write(path, [(tokens, slots)], layers=INFOS, vocabulary=VOCABULARY)
    return Trace.open(path)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    with foretold(tmp_path_factory.mktemp("trace") / "t.parquet") as trace:
        yield trace


@pytest.fixture(scope="module")
def trained(trace):
    return fit(trace, QUICK, last=2, width=8, hidden=32)


def test_what_can_be_foretold_is_learned(trained):
    rows = trained.recall["by_layer"]
    assert trained.recall["held_out_tokens"] == 48
    for label in ("000", "001"):
        assert rows[label]["predicted"] > 0.95
        assert rows[label]["popular"] < 0.6
        assert rows[label]["previous"] < 0.6
    told = table(trained.recall)
    assert len(told) == 2 + 2 + 1
    assert told[2].split()[:3] == ["000", "2", f"{rows['000']['predicted']:.1%}"]
    mean = (rows["000"]["predicted"] + rows["001"]["predicted"]) / 2
    assert told[-1].split()[:2] == ["mean", f"{mean:.1%}"]


def test_recalls_are_loops_over_tokens(trace, trained):
    profile, held_out = split(read_routes(trace))
    assert (len(profile), len(held_out)) == (54 * 8, 6 * 8)
    assert not set(profile.document_N) & set(held_out.document_N)
    named = trained.experts(windows(held_out, trained.about))
    found = recalls(trained, profile, held_out)
    for r, slots in enumerate((2, 1)):
        popular = sorted(range(E), key=lambda e: (-profile.counts()[r, e], e))[:slots]
        hits, total = dict.fromkeys(fitting.NAMES, 0), 0
        for n in range(len(held_out)):
            needed = {int(e) for e in held_out.expert_NRK[n, r] if e >= 0}
            total += len(needed)
            hits["predicted"] += len(needed & set(named[n, r].tolist()))
            hits["popular"] += len(needed & set(popular))
            if held_out.index_N[n]:
                before = set(held_out.expert_NRK[n - 1, r].tolist())
                hits["previous"] += len(needed & before)
        for name, count in hits.items():
            assert found[r][name] == pytest.approx(count / total), name


def test_each_router_gets_as_many_experts_as_it_has_slots(trace, trained):
    named_NRK = trained.experts(windows(read_routes(trace), trained.about))
    assert named_NRK.shape == (480, 2, 2)
    assert (named_NRK[:, 1, 1] == -1).all()
    assert (named_NRK[:, 0] >= 0).all()
    assert (named_NRK[:, 1] < E - 1).all()  # an expert that the layer does not have


def test_windows_end_where_documents_begin():
    routes = dataclasses.replace(
        routes_of([[[0]]] * 6),
        document_N=np.array([0, 0, 0, 1, 1, 2]),
        token_N=np.array([5, 6, 7, 1, 2, 4]),
    )
    about = About(tokenizer="", vocab=9, experts=(4,), slots=(1,), last=2)
    assert windows(routes, about).tolist() == [
        [5, 5, 9],
        [5, 6, 5],
        [5, 7, 6],
        [1, 1, 9],
        [1, 2, 1],
        [4, 4, 9],
    ]
    own = Predictor.fresh(about).window([[5], [5, 6], [5, 6, 7], []])
    assert own.tolist() == [[5, 5, 9], [5, 6, 5], [5, 7, 6], [9, 9, 9]]


def test_training_again_gives_the_same_predictor(trace, trained):
    again = fit(trace, QUICK, last=2, width=8, hidden=32)
    for name, array in trained.params.items():
        np.testing.assert_array_equal(array, again.params[name])


def test_a_file_gives_what_was_saved(trace, trained, tmp_path):
    trained.save(tmp_path / "p.safetensors")
    read = Predictor.read(tmp_path / "p.safetensors")
    assert read.about == trained.about
    assert read.recall == trained.recall
    token_NH = windows(read_routes(trace), read.about)
    np.testing.assert_array_equal(read.experts(token_NH), trained.experts(token_NH))
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
    read.about.check(trace.header, "p")


def test_another_model_is_refused(trained):
    others = {
        "another vocabulary": {"layers": INFOS, "vocabulary": (*"abcdefgz",)},
        "routers of .8, 7. experts": {"layers": INFOS[:1], "vocabulary": VOCABULARY},
        "no ids to predict from": {"layers": INFOS, "tokenizer": None},
    }
    for told, fields in others.items():
        with pytest.raises(ConfigError, match=told):
            trained.about.check(header(**fields), "p.safetensors")


def changed(arrays, about):
    arrays["bias_in_F"][3] = np.nan


def missing(arrays, about):
    del arrays["w_in_MF"]


def further(arrays, about):
    arrays["w_inn_MF"] = arrays["w_in_MF"]


def narrow(arrays, about):
    arrays["bias_in_F"] = arrays["bias_in_F"][:5]


def sizes(arrays, about):
    about["hidden"] = 0


def version(arrays, about):
    about["version"] = 2


def unnamed(arrays, about):
    about["hiden"] = about.pop("hidden")


@pytest.mark.parametrize(
    "change, told",
    [
        (changed, "bias_in_F has numbers that are not finite"),
        (missing, "has no tensor 'w_in_MF'"),
        (further, "no such field: 'w_inn_MF'. Did you mean 'w_in_MF'"),
        (narrow, r"bias_in_F = \(5,\): must be \(32,\)"),
        (sizes, "hidden = 0: must be from 1 to"),
        (version, "version = 2: must be 1"),
        (unnamed, "no such field: 'hiden'. Did you mean 'hidden'"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(trained, tmp_path, change, told):
    file = tmp_path / "p.safetensors"
    trained.save(file)
    arrays = load_file(file)
    about = {"version": 1, **dataclasses.asdict(trained.about), "recall": {}}
    change(arrays, about)
    save_file(arrays, file, {KEY: json.dumps(about)})
    with pytest.raises(ConfigError, match=told) as error:
        Predictor.read(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_predictors_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        Predictor.read(tmp_path / "none")
    (tmp_path / "text").write_text("hello", encoding="utf-8")
    with pytest.raises(ConfigError, match="is truncated or is not a safetensors file"):
        Predictor.read(tmp_path / "text")
    save_file({"a": np.zeros(2)}, tmp_path / "other")
    with pytest.raises(ConfigError, match="a safetensors file, but not a predictor"):
        Predictor.read(tmp_path / "other")


def test_training_that_cannot_be_is_refused(trace, tmp_path):
    few = pytest.raises(ConfigError, match="one example is too few")
    with foretold(tmp_path / "t", examples=1) as short, few:
        fit(short, QUICK)
    with pytest.raises(ConfigError, match="the loss became .*; lower lr, 1e.30"):
        fit(trace, Training(steps=3, lr=1e30), last=2, width=8, hidden=32)
    with pytest.raises(ConfigError, match="steps = 0: must be 1 or more"):
        Training(steps=0)
    with pytest.raises(ConfigError, match="last = 0: must be from 1 to 1,024"):
        fit(trace, QUICK, last=0)
