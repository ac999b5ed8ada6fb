"""`moex report` on run directories that are written here, line by line."""

import json
import os
import re

import numpy as np
import pytest

from moex import cli
from moex.config.base import ConfigError
from moex.moe import metrics
from moex.report import about, downsample, routing
from moex.report.page import label, token
from moex.runs import lines as log
from tests import runs
from tests.report import pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module", autouse=True)
def library():
    with pages.small_library():
        yield


@pytest.fixture(scope="module")
def good(folder):
    """A healthy run and its page."""
    run = pages.write_run(folder, folder / "good", samples=(pages.EVIL, "two\nlines"))
    return run, *pages.report(run)


# The page.


def test_a_healthy_run_has_no_warnings(good):
    run, said, page = good
    size = (run / "report.html").stat().st_size
    assert said == f"report: {run / 'report.html'} ({size / 1e6:.1f} MB)\nNo warnings"
    assert "No warnings Checked: NaN and infinities, " in page.text
    assert (
        "Not checked: balance of devices, for experts lie on one device." in page.text
    )


def test_summary(good):
    _, _, page = good
    assert (
        "moex report: good step 400 of 400; held out at step 400: 3.1000 " in page.text
    )
    assert "1.5000 bits per byte (1,000 tokens)." in page.text
    assert re.search(r"[\d.]+ k parameters, [\d.]+ k active per token", page.text)


@pytest.mark.thorough
def test_an_unhealthy_run_is_told_in_words(folder, tmp_path):
    run = pages.write_run(folder, tmp_path / "sick", load=pages.sick)
    said, page = pages.report(run)
    dead = "layer 1: expert 2 since step 210 (1 of 4; "
    assert dead in said and dead in page.text
    assert "Warnings: dead experts, collapse" in page.text
    assert "layer 2.1: expert 0 of 4 takes 97 % of the load" in page.text
    assert "layer 2.2" not in said


def test_plotly_is_inside_once(good):
    _, _, page = good
    assert page.source.count(pages.LIBRARY) == 1
    assert page.scripts[0] == pages.LIBRARY


def test_nothing_of_a_page_is_elsewhere(good):
    _, _, page = good
    local = [link for link in page.links if link.startswith(("#", "data:"))]
    assert page.links == local
    assert not {"iframe", "img"} & set(page.tags)
    assert "cdn." not in page.source
    assert "default-src 'none'" in page.source


@pytest.mark.thorough
def test_texts_of_a_corpus_do_no_harm(folder, good, tmp_path):
    _, _, page = good
    # As text of the samples, verbatim; nowhere as markup.
    assert pages.EVIL in page.text and "two lines" in page.text
    assert "<b onload" not in page.source
    assert "<script>window.evil" not in page.source
    assert not any("window.evil=1</" in script for script in page.scripts)
    # In a plot: as plotly's escapes of what is escaped for its labels.
    assert any("\\u0026lt;" in s or "&lt;" in s for s in page.scripts[1:])
    name = "<i>a b&c"
    _, page = pages.report(pages.write_run(folder, tmp_path / name))
    assert "i" not in page.tags
    assert f"moex report: {name}" in page.text


def test_every_plot_has_data(good):
    _, _, page = good
    plots = [s for s in page.scripts if "Plotly.newPlot(" in s]
    assert len(plots) > 12
    assert all('"type":"' in plot for plot in plots)


def test_sections_without_data_say_so(folder, tmp_path):
    run = tmp_path / "new"
    run.mkdir()
    from moex.runs.directory import RunDir

    RunDir(run).save_config(runs.config(folder, "model.vocab=257"))
    said, page = pages.report(run)
    assert "No warnings" in said
    for line in (
        "step 0 of 8; nothing was scored on held-out data.",
        "Not checked: training, for no step is logged; held-out loss, for there is no "
        "evaluation; routing, for there is no routing.jsonl, and no trace.",
        "No data: Loss (not logged); ",
        "No data: the run has no routing.jsonl",
        "No data: the run has written no samples.",
        "No data: the run has no environment.json",
    ):
        assert line in page.text, line


def test_a_run_in_progress(folder, tmp_path):
    run = pages.write_run(folder, tmp_path / "going", load=pages.sick)
    for name in ("metrics.jsonl", "routing.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"kind": "train", "step": 410, "lay')
    assert "layer 1: expert 2 since step 210" in pages.report(run)[0]


def test_config_and_environment(folder, tmp_path):
    run = pages.write_run(folder, tmp_path / "run", load=None)
    start = {
        "started": "2026-01-01",
        "command": ["moex", "a b"],
        "packages": {"jax": "1"},
    }
    (run / "environment.json").write_text(json.dumps([start, start | {"step": 5}]))
    _, page = pages.report(run)
    assert "model.layers[1].pattern[0].router.bias_rate 0.01 0.0" in page.text
    assert "checkpoint.every 2 1000" in page.text
    assert "moex 'a b' moex 'a b'" in page.text
    assert "jax 1 1" in page.text


def test_changed_fields(folder):
    found = {p: (v, d) for p, v, d in about.changes(runs.config(folder))}
    assert found["steps"] == (8, about.NONE)  # a run key has no default
    assert found["optim.lr"][0] == 0.01
    assert found["eval.every"] == (4, 500)
    assert "eval.overlap" not in found  # as by default
    assert type(found["model.layers[1].pattern[0]"][0]).__name__ == "MoE"


# Reading.


def test_routing_is_read_by_kind_and_the_last_line_of_a_step_counts(tmp_path):
    file = tmp_path / "routing.jsonl"
    even, odd = {"000": [0.5, 0.5]}, {"000": [0.75, 0.25]}
    pages.write_lines(
        file,
        [
            pages.routing_line(10, odd),
            pages.routing_line(20, odd, kind="eval"),
            pages.routing_line(10, even),
            pages.routing_line(20, odd),
        ],
    )
    found = log.read_routing(file)
    assert set(found) == {"train", "eval"}
    train = found["train"]
    np.testing.assert_array_equal(train.step_S, [10, 20])
    np.testing.assert_array_equal(
        train.layers["000"]["load_frac"], [[0.5, 0.5], [0.75, 0.25]]
    )
    assert (train.read, train.there) == (2, 2)


def test_figures_that_some_lines_lack(tmp_path):
    file = tmp_path / "routing.jsonl"
    lines = [pages.routing_line(s, {"000": [1.0]}) for s in (1, 2)]
    lines[1]["layers"]["000"]["new"] = 3.0
    del lines[1]["layers"]["000"]["entropy"]
    pages.write_lines(file, lines)
    figures = log.read_routing(file)["train"].layers["000"]
    np.testing.assert_array_equal(figures["new"], [np.nan, 3])
    np.testing.assert_array_equal(figures["entropy"], np.float32([1.2, np.nan]))


def test_a_long_file_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MOST_LINES", 5)
    file = tmp_path / "routing.jsonl"
    even = {"000": [0.5, 0.5]}
    pages.write_lines(file, [pages.routing_line(s, even) for s in range(1, 102)])
    train = log.read_routing(file)["train"]
    np.testing.assert_array_equal(train.step_S, [1, 26, 51, 76, 101])
    assert (train.read, train.there) == (5, 101)
    assert "(5 evenly spaced ones of 101)" in routing._thinned(train)


def test_thin_curves_keep_their_spikes():
    step = np.arange(100_000)
    value = np.sin(step / 1000)
    value[[777, 50_001]] = 9, -9
    few, kept = downsample.curve(step, value, most=100)
    assert len(few) <= 100
    assert {0, 777, 50_001, 99_999} <= set(few)
    np.testing.assert_array_equal(kept, value[few])
    same, _ = downsample.curve(step[:100], value[:100], most=100)
    np.testing.assert_array_equal(same, step[:100])


def test_a_page_has_a_bound():
    # 48 layers of 128 experts, logged 300 times.
    layers = {
        f"{i:03d}": {
            "load_frac": np.full((300, 128), 1 / 128, np.float32),
            "entropy": np.ones(300, np.float32),
        }
        for i in range(48)
    }
    steps = np.arange(1, 301)
    large = log.Routing(step_S=steps, layers=layers, read=300, there=300)
    frames = routing.load_maps(large).data
    assert len(frames) == 40  # of 65 that there would be room for
    assert sum(frame.z.size for frame in frames) <= routing.FRAME_NUMBERS
    assert frames[-1].visible and not frames[0].visible
    histories = routing.load_histories(large).data
    assert len(histories) == 48
    assert sum(history.z.size for history in histories) <= routing.HISTORY_NUMBERS
    entropy = next(f for f in metrics.FIGURES if f.name == "entropy")
    lines = routing.curves(large, entropy).figure.data
    points = sum(len(line.y) for line in lines)
    assert points * len(metrics.FIGURES) <= routing.CURVE_NUMBERS


def test_labels():
    assert token("a b\n\x00") == "a␣b⏎\\u0000"
    assert token("x" * 50, most=3) == "xxx…"
    assert token("\n" + " " * 30 + "x", most=12) == "⏎␣×30x"
    assert token("\n" + " " * 300 + "x", most=6) == "⏎␣×23…"
    assert label("<b>&") == "&lt;b&gt;&amp;"


# The command.


@pytest.fixture
def mistake(capsys):
    """The one line of an error of `moex report`."""

    def mistake(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, args)])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("moex: error: ") and err.count("\n") == 1, err
        return err.removeprefix("moex: error: ").strip()

    return mistake


def test_the_command(good, capsys, tmp_path):
    run, _, page = good
    out = tmp_path / "page.html"
    cli.main(["report", str(run), f"--out={out}"])
    assert capsys.readouterr().out.startswith(f"report: {out} (")
    assert out.read_text() == page.source  # equal runs, equal pages


def test_mistakes(good, mistake, folder, tmp_path):
    run, *_ = good
    assert "not a run directory" in mistake(tmp_path)
    assert "must end in .html" in mistake(run, "--out=x.pdf")
    assert "there is no folder" in mistake(run, f"--out={tmp_path}/no/x.html")
    assert "--trace=none: no such file" in mistake(run, "--trace=none")
    assert "is beside --trace" in mistake(run, "--compare-trace=none")
    assert "takes the config of the run" in mistake(run, "--config.steps=3")
    broken = pages.write_run(folder, tmp_path / "broken")
    text = (broken / "routing.jsonl").read_text()
    (broken / "routing.jsonl").write_text("{}\n" + text)
    assert "routing.jsonl, line 1: has no field 'kind'" in mistake(broken)
    (broken / "routing.jsonl").write_text(text.replace('"001"', '"first"'))
    assert "routing.jsonl: 'first' is no layer" in mistake(broken)


def test_damage_is_a_config_error(folder, tmp_path):
    run = pages.write_run(folder, tmp_path / "run", load=None)
    (run / "environment.json").write_text("{")
    with pytest.raises(ConfigError, match=r"environment\.json: is not JSON"):
        pages.report(run)


def test_a_name_that_no_text_can_hold_is_shown_as_escapes(folder, tmp_path):
    run = tmp_path / os.fsdecode(b"a\xff")
    pages.write_run(folder, run)
    start = {"started": "\ud800", "packages": {}, "command": ["\ud801"]}
    pages.write_lines(run / "environment.json", [[start]])
    _, page = pages.report(run)
    for escape in (r"a\udcff", r"\ud800"):
        assert escape in page.text
