"""The sections of a trace, and a report on a checkpoint that was imported."""

import pathlib
import re

import numpy as np
import pytest

from moex import cli
from moex.analysis.scores import logit_similarity
from moex.analysis.summary import analyse
from moex.analysis.trace import LayerInfo, Trace
from moex.interop.hf import import_hf
from moex.report import by_layer, maps, tracing
from moex.report.tokens import table
from tests import runs
from tests.analysis import oracle
from tests.report import pages

MIXTRAL = pathlib.Path(__file__).parents[1] / "interop" / "fixtures" / "mixtral"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tracing")


@pytest.fixture(scope="module", autouse=True)
def library():
    with pages.small_library():
        yield


@pytest.fixture(scope="module")
def trace(folder):
    return pages.write_trace(folder / "trace.parquet")


@pytest.fixture(scope="module")
def found(trace):
    with Trace.open(trace) as opened:
        return analyse(opened, markers=[" t1"])


@pytest.fixture(scope="module")
def page(folder, trace):
    """Of a healthy run with a trace, and one more of another step."""
    other = pages.write_trace(folder / "other.parquet", seed=1, step=200)
    run = pages.write_run(folder, folder / "run", load=None)
    options = {"trace": trace, "compare_trace": other, "markers": [" t1"]}
    return pages.report(run, **options)


def test_all_sections_are_there(page):
    said, page = page
    for title in tracing.TITLES:
        heading = re.search(rf"<h2[^>]*>{title}</h2>(.*?)</section>", page.source, re.S)
        assert heading, title
        assert "No data" not in heading[1], title
    assert "trace.parquet: of <i>run</i> at step 400, beside <i>run</i> at" in page.text
    assert "i" not in page.tags  # nothing of the run's name is markup
    # A run without routing.jsonl is judged by its trace.
    assert "layer 1: expert 3 at all logged steps (1 of 4; " in page.text
    assert "layer 1: expert 3" in said


def test_tokens_of_a_trace_do_no_harm(page):
    _, page = page
    assert "<b onload" not in page.source
    assert "<script>window.evil" not in page.source
    start = pages.EVIL[:20]
    assert start in page.text  # as a token of the table
    inside = [s for s in page.scripts if "script\\u003e" in s and "newPlot" in s]
    assert inside == []  # in plots a name is escaped for plotly before that
    assert any("&lt;\\u002fscript&gt;" in s for s in page.scripts)


def test_the_table_of_tokens(found):
    made = table(found, "001", most=2)
    assert [len(row) for row in made.rows] == [4, 4]
    first, second = made.rows
    assert float(first[2]) >= float(second[2])  # the most specialised first
    # Two of four experts for a token, of which one is dead: a half if uniform.
    assert (
        made.title
        == "layer 1 (0.5 if routing were uniform; the 2 most specialised of 4)"
    )
    expert = int(first[0])
    layer = found.layers["001"]
    share = layer.share_ER[expert][0]
    assert first[3].split(" · ")[0].endswith(f"\u00a0{100 * share:.0f}\u00a0%")
    assert first[1] == f"{layer.load_E[expert] / layer.load_E.sum() * 4:.2f}"
    (*_, zero) = sorted(table(found, "002.1", most=9).rows)
    assert zero[0] == "4 (zero)"


def test_ratios_to_the_mean():
    log, ratio = maps.log_ratio(
        np.array([[0.0, 0.1, 0.4, 0.0]]), np.array([1, 0.2, 0.1, 0])
    )
    np.testing.assert_allclose(ratio, [[0, 0.5, 4, np.nan]])
    np.testing.assert_allclose(log, [[-3, -1, 2, np.nan]])
    tiny, _ = maps.log_ratio(np.array([[1e-6]]), np.array([1.0]))
    assert -3 < tiny[0, 0] < -2.9  # seldom, but not never


def test_as_many_maps_as_there_is_room_for():
    assert maps.affordable(list(range(24)), 100, 10_000) == list(range(24))
    assert maps.affordable(list(range(24)), 100, 300) == [0, 12, 23]
    assert maps.affordable([1, 2], 100, 3) == [1]


def test_labels_that_are_alike_are_told_apart():
    assert by_layer.unique(["a", "<b>", "a"]) == ["a (0)", "&lt;b&gt;", "a (2)"]


@pytest.mark.thorough
def test_one_domain_and_top_one(folder, tmp_path):
    run = pages.write_run(folder, tmp_path / "run", load=None)
    one = pages.write_trace(tmp_path / "one.parquet", domains=("prose",))
    _, page = pages.report(run, trace=one)
    assert "No data: the trace has tokens of one domain." in page.text
    assert "No data: give --compare-trace=FILE" in page.text
    assert "No data: give --token=TOKEN" in page.text


def test_mistakes(folder, trace, tmp_path, capsys):
    run = pages.write_run(folder, tmp_path / "run", load=None)

    def mistake(*args):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", str(run), *map(str, args)])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        return err

    assert "not a Parquet file" in mistake(f"--trace={run / 'config.json'}")
    assert "' t2': not one token of the vocab" in mistake(
        f"--trace={trace}", "--token= t2"
    )
    assert "--token: is beside --trace" in mistake("--token=x")
    short = pages.write_trace(tmp_path / "short.parquet", tokens=40)
    assert "400 tokens" in mistake(f"--trace={trace}", f"--compare-trace={short}")


@pytest.mark.thorough
def test_an_imported_checkpoint(tmp_path, capsys):
    run = tmp_path / "mixtral"
    with runs.one_device():
        import_hf(MIXTRAL, run, ["--config.seq_len=32"], say=lambda line: None)
    about = {"num_experts": 8, "num_choices": 8, "slots": 2, "router": "TopK"}
    layers = [LayerInfo(layer=i, round=0, **about) for i in range(2)]
    trace = pages.write_trace(tmp_path / "trace.parquet", layers=layers)
    cli.main(["report", str(run), f"--trace={trace}"])
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    page = pages.Page((run / "report.html").read_text())
    assert "2 layers of width" in page.text
    assert "Not checked: training, for no step is logged" in page.text
    assert "Checked: dead experts and collapse." in page.text
    assert "layer 1: expert 7 at all logged steps (1 of 8; " in page.text


def test_sums_have_a_section_of_their_own(folder):
    path = folder / "s.npz"
    sums = oracle.random_sums()
    sums.save(path)
    run = pages.write_run(folder, folder / "summed", load=None)
    _, page = pages.report(run, sums=path)
    assert re.search(r"<h2[^>]*>Sums</h2>", page.source)
    assert "s.npz: of runs/a at step 7. 50 tokens" in page.text
    gram_EE = sums.layers["001"].gram_EE
    gram_EE = gram_EE @ gram_EE.T
    for a in range(4):
        for b in range(4):
            cosine = gram_EE[a, b] / (gram_EE[a, a] * gram_EE[b, b]) ** 0.5
            got = logit_similarity(gram_EE)[a, b]
            assert got == pytest.approx((cosine + 1) / 2)
    assert logit_similarity(np.diag([1.0, 0.0])).tolist() == [[1, 0.5], [0.5, 0.5]]
