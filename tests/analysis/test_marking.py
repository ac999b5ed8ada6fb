"""Experts that go with markers: counted by loops, ranked, and written to be steered.

N tokens · E experts · R markers
"""

import json

import numpy as np
import pytest

from moex import cli
from moex.analysis import marking, scores
from moex.analysis.markers import Marker
from moex.config.base import ConfigError
from moex.model.steering import Steering
from tests.analysis import oracle

TOKEN, SPAN = Marker("<think>"), Marker("a", " c")


@pytest.fixture
def trace(tmp_path):
    """(path, tokens, slots by label) of a trace of 50 random tokens."""
    tokens, layers = oracle.random_chunk(np.random.default_rng(5), 50)
    return oracle.write(tmp_path / "t.parquet", [(tokens, layers)]), tokens, layers


def texts(tokens) -> list[str]:
    return [oracle.VOCABULARY[i] for i in tokens.token_N]


def loops(tokens, layers, markers, start=None) -> dict:
    """{layer: (tokens, load_E, hits_RE, total_R)} by loops over the tokens."""
    text, document_N = texts(tokens), tokens.document_N
    counted, marked = [], [[] for _ in markers]
    for n, piece in enumerate(text):
        begins = [i for i in range(n + 1) if document_N[i] == document_N[n]]
        before = [text[i] for i in begins]
        ok = start is None or start in before
        counted.append(ok)
        for row, marker in zip(marked, markers, strict=True):
            if marker.end is None:
                row.append(ok and piece == marker.begin)
                continue
            inside = False
            for other in before:
                if other == marker.begin:
                    inside = True
                elif other == marker.end:
                    inside = False
            row.append(ok and inside and piece != marker.begin)
    found = {}
    for info in oracle.INFOS:
        E, rows = info.num_choices, oracle.experts(layers[info.label])
        load_E, hits_RE = np.zeros(E, int), np.zeros((len(markers), E), int)
        for n, row in enumerate(rows):
            for e in row:
                load_E[e] += counted[n]
                for r in range(len(markers)):
                    hits_RE[r, e] += marked[r][n]
        own = [sum(counted), load_E, hits_RE, np.array([sum(m) for m in marked])]
        before = found.get(info.layer, [0, 0, 0, 0])
        found[info.layer] = [a + b for a, b in zip(before, own, strict=True)]
    return found


@pytest.mark.parametrize("start", [None, "b"])
def test_counts_are_those_of_loops(trace, start):
    """Rounds of a chain are added up; a token may have any number of experts."""
    path, tokens, layers = trace
    found = marking.read_counts(path, (TOKEN, SPAN), start)
    wanted = loops(tokens, layers, (TOKEN, SPAN), start)
    assert list(found) == list(wanted) == [1, 3, 4]
    for layer, (count, *arrays) in wanted.items():
        own = found[layer]
        assert own.tokens == count
        names = ("load_E", "hits_RE", "total_R")
        for name, array in zip(names, arrays, strict=True):
            np.testing.assert_array_equal(getattr(own, name), array, err_msg=name)
    if start is None:
        assert found[3].tokens == 100 and found[1].tokens == 50


def test_combined_scores_are_weighted_sums_with_a_least_support(trace):
    path, tokens, layers = trace
    markers = (TOKEN, SPAN)
    counts = marking.read_counts(path, markers, None)
    got = marking.marker_scores(counts, markers, (1.0, -1.0), 0.25)[1]
    own, slots = loops(tokens, layers, markers)[1], layers["001"]
    np.testing.assert_allclose(
        scores.npmi(own[2], own[3], own[1], 50)[0],
        oracle.npmi(tokens.token_N, slots, 2, 6),
    )
    for e, value in enumerate(got):
        each = scores.npmi(own[2], own[3], own[1], 50)[:, e]
        if own[2][0, e] < 0.25 * own[3][0]:
            assert value == -np.inf
        else:
            np.testing.assert_allclose(value, each[0] - each[1])
    assert np.isfinite(got).any() and not np.isfinite(got).all()
    # A marker that counts against an expert needs no support.
    alone = marking.marker_scores(counts, markers, (-1.0, -1.0), 1.0)[1]
    assert np.isfinite(alone).all()


def test_the_best_experts_of_all_layers_are_chosen_first_ones_of_equals():
    score = {2: np.array([0.5, 1.0, -np.inf]), 1: np.array([1.0, np.nan, 0.5])}
    found = [(one.layer, one.expert) for one in scores.best(score, 4)]
    assert found == [(1, 0), (2, 1), (1, 2), (2, 0)]
    with pytest.raises(ConfigError, match="5 experts are asked for, and 4 have a sc"):
        scores.best(score, 5)


def test_scaling_and_switching():
    score = {1: np.array([0.5, -0.9, 0.1]), 3: np.array([0.7, -0.2, 0.0])}
    (one, two) = marking.scaled(score, 2, 3.0).layers
    assert (one.layer, one.scale, two.layer, two.scale) == (1, {0: 3.0}, 3, {0: 3.0})
    (one, two) = marking.switched(score, 4).layers
    assert (one.force, one.ban, two.force, two.ban) == ((0,), (1,), (0,), (1,))
    (one, two) = marking.switched(score, 6).layers  # 0 neither forces nor bans
    assert (one.force, one.ban, two.force, two.ban) == ((0, 2), (1,), (0,), (1,))


def test_risk_differences_are_differences_of_rates():
    one = marking.Counts(
        tokens=10, load_E=np.array([5, 0]), hits_RE=np.empty((0, 2)), total_R=[]
    )
    two = marking.Counts(
        tokens=4, load_E=np.array([1, 4]), hits_RE=np.empty((0, 2)), total_R=[]
    )
    np.testing.assert_allclose(marking.risk_scores({1: one}, {1: two})[1], [0.25, -1])
    with pytest.raises(ConfigError, match="models of other experts"):
        marking.risk_scores({1: one}, {2: two})


def test_scores_of_sums_by_hand():
    own = oracle.random_sums().layers["001"]
    score = {name: of(own) for name, of in scores.SCORES.items()}
    for e in range(4):
        count = own.count_E[e]
        assert score["frequency"][e] == pytest.approx(count / sum(own.count_E))
        assert score["reap"][e] == pytest.approx(own.gate_norm_E[e] / max(count, 1))
        assert score["tcess"][e] == pytest.approx(own.tcess_E[e] / 50)
        assert score["peu"][e] == pytest.approx(own.peu_E[e] / 50)
        assert score["all_logits"][e] == pytest.approx(own.logit_E[e] / 50)


# The verb.


def ranked(capsys, *args) -> list[dict]:
    cli.main(["analyse", *map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)["experts"]


def test_the_verb_ranks_experts_and_writes_a_steering_file(trace, tmp_path, capsys):
    path, out = trace[0], tmp_path / "steer.json"
    flags = ["--npmi=<think>", "--against-span", "a", " c", "--min-support=0"]
    rows = ranked(capsys, path, *flags, "--top=3", f"--steer-out={out}", "--scale=0.5")
    counts = marking.read_counts(path, (TOKEN, SPAN), None)
    score = marking.marker_scores(counts, (TOKEN, SPAN), (1, -1), 0)
    want = [(one.layer, one.expert) for one in scores.best(score, 3)]
    assert [(row["layer"], row["expert"]) for row in rows] == want
    read = Steering.read(out)
    found = [(own.layer, e, v) for own in read.layers for e, v in own.scale.items()]
    assert sorted(found) == sorted((*pair, 0.5) for pair in want)
    assert read.how["against"] == ["a ...  c"]
    with pytest.raises(SystemExit):
        cli.main(["analyse", str(path), *flags, f"--steer-out={out}"])
    assert "exists" in capsys.readouterr().err


def test_the_verb_ranks_by_risk_difference(trace, tmp_path, capsys):
    chunk = oracle.random_chunk(np.random.default_rng(6), 40)
    other = oracle.write(tmp_path / "other.parquet", [chunk])
    out = tmp_path / "steer.json"
    args = [f"--risk-difference={other}", "--top=1", f"--steer-out={out}"]
    (row,) = ranked(capsys, trace[0], *args)
    (own,) = Steering.read(out).layers
    sign = row["risk difference"] > 0
    assert (own.force if sign else own.ban) == (row["expert"],)


def test_the_verb_takes_sums(tmp_path, capsys):
    path = tmp_path / "s.npz"
    oracle.random_sums().save(path)
    rows = ranked(capsys, path, "--npmi=<think>", "--min-support=0")
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{trace}", "--npmi=x"], "'x': not one token of the vocabulary"),
        (["{trace}", "--npmi=d"], "'d': does not occur"),
        (["{trace}", "--npmi=a", "--from=d"], "the trace has no token 'd'"),
        (["{trace}", "--npmi-span", "a", "a"], "begin and end with different tokens"),
        (["{trace}", "--npmi=a", "--min-support=2"], "must be in [0, 1]"),
        (["{trace}", "--npmi=a", "--scale=-1"], "--scale = -1.0: must be in [0,"),
        (["{trace}", "--npmi=a", "--scale=nan"], "--scale = nan: must be in [0,"),
        (["{trace}", "--npmi=a", "--top=99"], "99 experts are asked for"),
        (["{trace}", "--npmi=a", "--scale=1e39"], "--scale = 1e+39: must be in [0,"),
        (["{trace}", "--against=a"], "--against: is for --npmi"),
        (["{trace}", "--min-support=0"], "--min-support: is for --npmi"),
        (["{trace}", "--scale=2"], "--scale: is for --npmi"),
        (["{trace}", "--npmi=a", "--out=x.npz"], "--out: is for figures of a trace"),
        (["{trace}", "--npmi=a", "--token=a"], "--token: is for figures of a trace"),
        (["{trace}", "--risk-difference={trace}", "--scale=2"], "--scale: is for --np"),
        (
            ["{trace}", "--risk-difference={trace}", "--steer-out={new}"],
            "every risk difference is 0",
        ),
        (["{sums}"], "is no trace; sums are for --npmi"),
        (["{trace}", "--npmi=a", "--risk-difference={trace}"], "without markers"),
        (["{trace}", "--npmi=a", "--steer-out=/no/x.json"], "a folder that exists"),
        (["{sums}", "--npmi=a"], "the sums do not count 'a'"),
        (["{sums}", "--npmi=<think>", "--from=a"], "--from is for traces"),
    ],
)
def test_mistakes_are_one_line(trace, tmp_path, capsys, args, said):
    oracle.random_sums().save(tmp_path / "s.npz")
    names = {"trace": trace[0], "sums": tmp_path / "s.npz", "new": tmp_path / "n"}
    with pytest.raises(SystemExit) as stop:
        cli.main(["analyse", *(arg.format(**names) for arg in args)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
