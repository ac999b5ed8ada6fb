"""`moex compare` on run directories that are written here, line by line."""

import csv
import html
import json
import math
import os
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from moex import cli
from moex.analysis.compare import estimate, grouped, make_groups, make_table, table
from moex.analysis.equality import Tolerance, same
from moex.analysis.plotting import loss_range, mean_curve, plot_lines
from moex.analysis.reading import FLOPS, curves, read_run, read_runs
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.moe.chain import Chain
from moex.moe.routers.topp import TopP
from moex.runs.directory import RunDir
from moex.terminal import printable
from tests import runs
from tests.report import pages

K = "model.layers[1].pattern[0].router.k"
TRAIN = {1: 4.0, 2: 3.0, 4: 2.0}
EVAL = {2: 3.5, 4: 3.75}
TOKENS = 128  # of a step


def line(kind, step, nll, **more):
    return {"kind": kind, "step": step, "nll": nll, "bits_per_byte": nll / 2} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def write(folder, tmp_path):
    """`write(name, *overrides)`: a run directory with the lines that are asked for."""

    def write(name, *overrides, train=TRAIN, evals=EVAL, change=None, **more):
        cfg = runs.config(folder, "model.vocab=257", *overrides)
        if change is not None:
            change(cfg)
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        RunDir(workdir).save_config(cfg)
        timed = {"perf/step_s": 0.5} | more
        lines = [
            line("train", step, nll, tokens_seen=step * TOKENS, **timed)
            for step, nll in train.items()
        ]
        lines += [line("eval", step, nll) for step, nll in evals.items()]
        lines = [line("compile", 0, 0.0), *sorted(lines, key=lambda e: e["step"])]
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        (workdir / "metrics.jsonl").write_text(text)
        return workdir

    return write


@pytest.fixture
def moex(capsys):
    """`moex compare` with arguments: what it prints."""

    def moex(*args):
        capsys.readouterr()
        cli.main(["compare", *map(str, args)])
        return capsys.readouterr().out

    return moex


@pytest.fixture
def mistake(capsys):
    """The one line of an error of `moex compare`."""

    def mistake(*args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", *map(str, args)])
        assert stop.value.code == code
        err = capsys.readouterr().err
        assert err.startswith("moex: error: "), err
        assert err.count("\n") == 1, err
        return err.removeprefix("moex: error: ").strip()

    return mistake


# Reading.


def test_what_a_run_had_spent_at_each_line(write):
    run = read_run(write("run", train={1: 4.0, 3: 2.0}, evals={2: 3.0}))
    first, last = run.lines["train"].values()
    first |= {FLOPS: 10.0, "perf/step_s": 0.5}
    last |= {FLOPS: 30.0, "perf/step_s": 0.25}
    found = curves(run, expected_flops=math.nan)
    train, held = found["train"], found["eval"]
    np.testing.assert_array_equal(train.step_S, [1, 3])
    np.testing.assert_array_equal(train.tokens_S, [128, 384])
    # 128 tokens at 10 each, then 256 at (10 + 30) / 2.
    np.testing.assert_array_equal(train.flops_S, [1280, 1280 + 5120])
    # One step of 0.5 s, then two of 0.25 s.
    np.testing.assert_array_equal(train.seconds_S, [0.5, 1.0])
    np.testing.assert_array_equal(train.loss_S, [4.0, 2.0])
    # Half way between the lines of steps 1 and 3.
    assert (held.step_S, held.tokens_S, held.seconds_S) == (2, 256, 0.75)
    assert held.flops_S == 1280 + 2560


def test_flops_that_were_not_measured_are_expected_ones(write):
    run = read_run(write("run"))
    cfg = run.cfg
    cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
    assert cost.train_flops > 0
    (group, _) = make_groups([run, read_run(write("other", "optim.lr=1.0"))])
    (flops,) = group.values("train_flops")
    assert flops == pytest.approx(4 * TOKENS * cost.train_flops)
    assert (group.params, group.active) == (cost.num_params, cost.num_active)


def test_a_last_line_that_is_half_written(write, mistake):
    run = write("run")
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"kind": "train", "step": 5, "nl')
    assert list(read_run(run).lines["train"]) == [1, 2, 4]
    log.write_text("{\n" + whole)
    assert f"{log}, line 1: is not JSON" in mistake(run, write("other"))


# Statistics and groups.


def test_the_interval_is_that_of_student():
    # Deviation 1 of three values; the 97.5 % quantile of t with 2 degrees of freedom
    # is 4.302653, over the root of 3.
    assert estimate(np.array([1.0, 2.0, 3.0])) == (2.0, pytest.approx(2.484138, 1e-6))
    # A mean of equal values may be rounded; they are equal all the same.
    assert estimate(np.array([0.1, 0.1, 0.1])).half_width == 0
    # Two values that are 1 apart: 12.70620 * sqrt(1/2) / sqrt(2).
    assert estimate(np.array([1.0, 2.0])) == (1.5, pytest.approx(6.353102, 1e-6))
    assert estimate(np.array([5.0])) == (5.0, None)
    mean_S, half_S = estimate(np.array([[1.0, 1.0], [2.0, 1.0]]))
    np.testing.assert_allclose(mean_S, [1.5, 1.0])
    np.testing.assert_allclose(half_S, [6.353102, 0.0], rtol=1e-6)


def test_seeds_are_a_group_and_a_label_says_what_differs(write):
    paths = [
        write(f"{k}-{seed}", f"{K}={k}", f"seed={seed}")
        for seed in (0, 1)
        for k in (1, 2)
    ]
    one, two = make_groups(read_runs(paths))
    assert (one.label, two.label) == ("k=1", "k=2")
    assert [run.path for run in one.runs] == [paths[0], paths[2]]
    assert one.params == two.params
    assert one.active < two.active


def labels_of(*paths):
    return [group.label for group in make_groups(read_runs(paths))]


def test_labels_of_other_kinds_of_layers(write):
    def topp(cfg):
        cfg.model.layers[1].pattern[0].router = TopP(p=0.5, k_max=2)

    # And nothing of the fields that only one of the two kinds has.
    a, b = write("a"), write("b", change=topp)
    assert labels_of(a, b) == ["a: router=TopK", "b: router=TopP"]


def test_a_kind_has_one_name_inside_a_chain_and_outside(write):
    def chain(cfg):
        (moe,) = cfg.model.layers[1].pattern
        moe.router.k = 1
        cfg.model.layers[1].pattern = (Chain(moe=moe, iterations=2),)

    a, b = write("a"), write("b", change=chain)
    assert labels_of(a, b) == [
        "a: ffn=Dense and MoE, k=2",
        "b: ffn=Dense and Chain, k=1",
    ]


def test_a_label_names_the_run_and_few_fields_those_of_the_model_first(write):
    many = ("steps=9", "batch_size=2", "seq_len=16", "optim.lr=0.5", f"{K}=1")
    a, b = write("a"), write("b", *many, "checkpoint.every=7", "eval.sequences=3")
    assert labels_of(a, b) == [
        "a: k=2, batch_size=4, lr=0.01, seq_len=32, 1 more",
        "b: k=1, batch_size=2, lr=0.5, seq_len=16, 1 more",
    ]


def test_bookkeeping_is_told_where_nothing_else_differs(write):
    a, b = write("a"), write("b", "checkpoint.every=7", "eval.every=3")
    first, second = labels_of(a, b)
    assert first.startswith("a: checkpoint.every=") and "eval.every=" in first
    assert second == "b: checkpoint.every=7, eval.every=3"
    c = write("c", "checkpoint.every=7", "optim.lr=0.5")
    assert labels_of(a, c) == ["a: lr=0.01", "c: lr=0.5"]


def test_a_run_of_a_sweep_is_named_by_its_fields_once(write):
    a, b = (write(f"optim.lr={lr}", f"optim.lr={lr}") for lr in (0.1, 0.2))
    assert labels_of(a, b) == ["lr=0.1", "lr=0.2"]


def test_names_begin_where_folders_differ(write):
    found = [write(name) for name in ("one/run", "two/run")]
    assert labels_of(*found) == ["one/run", "two/run"]


def test_a_seed_that_comes_again_is_no_further_evidence(write):
    a, b, c = (write(n, f"seed={s}") for n, s in (("a", 0), ("b", 1), ("c", 0)))
    parts = grouped(read_runs([a, b, c]))
    assert [[run.path for run in part] for part in parts] == [[a, b], [c]]
    assert labels_of(a, b, c) == ["a, b", "c"]


# What is printed.


@pytest.fixture
def four(write):
    """Two seeds each of two values of k."""
    last = {(1, 0): 2.0, (1, 1): 2.2, (2, 0): 1.0, (2, 1): 1.0}
    return [
        write(f"{k}-{seed}", f"{K}={k}", f"seed={seed}", train=TRAIN | {4: nll})
        for (k, seed), nll in last.items()
    ]


def test_json(moex, four):
    one, two = json.loads(moex(*four, "--json"))["groups"]
    assert one["label"] == "k=1"
    assert [run["seed"] for run in one["runs"]] == [0, 1]
    assert one["runs"][1]["run"] == str(four[1])
    assert one["runs"][1]["train_nll"] == 2.2
    figures = one["over_seeds"]
    assert figures["steps"] == {"mean": 4, "half_width": 0}
    assert figures["tokens"]["mean"] == 4 * TOKENS
    assert figures["train_s"] == {"mean": 2.0, "half_width": 0}
    # A fifth of the two values of `test_the_interval_is_that_of_student`.
    assert figures["train_nll"]["mean"] == pytest.approx(2.1)
    assert figures["train_nll"]["half_width"] == pytest.approx(6.353102 / 5, 1e-6)
    assert figures["best_eval_nll"]["mean"] == 3.5
    assert figures["last_eval_nll"]["mean"] == 3.75
    assert figures["best_eval_bits_per_byte"]["mean"] == 1.75
    assert figures["last_eval_bits_per_byte"]["mean"] == 1.875
    assert two["over_seeds"]["train_nll"] == {"mean": 1.0, "half_width": 0}


def test_the_table(moex, four):
    head, one, two, shared, *note = moex(*four).splitlines()
    assert head.split() == ["run", "active", "FLOPs", "train"]
    assert one.startswith("k=1  ") and two.startswith("k=2  ")
    assert one.endswith("  2.1000 ± 1.2706")
    assert two.endswith("  1.0000")  # equal seeds: no interval
    assert shared.startswith("In all rows: seeds 2, params ")
    for cell in (
        "steps 4",
        "tokens 512",
        "time 2.0 s",
        "best 3.5000",
        "last bpb 1.8750",
    ):
        assert f", {cell}" in shared, cell
    assert "Student" in note[1]
    assert note[2].startswith("~: FLOPs as expected before training")
    assert len(note) == 3


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_fits_the_terminal(write, width):
    def other(cfg):
        cfg.model.layers[1].pattern[0].router = TopP(p=0.5, k_max=2)

    paths = [
        *(write(f"a{s}", f"seed={s}", train=TRAIN | {4: s}) for s in (0, 1)),
        write("b-with-a-long-name", "steps=9", evals={2: 1.0, 4: 2.0}, change=other),
    ]
    groups = make_groups(read_runs(paths))
    whole, narrow = (table(groups, width=w) for w in (None, width))
    assert max(map(len, narrow.splitlines())) <= width
    heads, parts = make_table(groups).heads, narrow.split("\n\n")
    told = [part.splitlines()[0] for part in parts]
    assert whole.count("\n\n") == 0 and (len(parts) > 1) == (width < 100)
    for head in heads[1:]:
        assert sum(head in line for line in told) >= 1, head


def test_measured_flops_are_not_called_expected(moex, write):
    a, b = (write(n, f"seed={s}", **{FLOPS: 2.0}) for s, n in enumerate("ab"))
    (row,) = json.loads(moex(a, b, "--json"))["groups"]
    assert row["flops_measured"] is True
    assert row["over_seeds"]["train_flops"] == {"mean": 4 * TOKENS * 2, "half_width": 0}
    assert "~" not in moex(a, b)
    assert not any("expected" in line for line in moex(a, b).splitlines())


def test_runs_without_held_out_data(moex, write):
    a, b = write("a", evals={}), write("b", "optim.lr=1.0", train={1: 1.0})
    one, two = json.loads(moex(a, b, "--json"))["groups"]
    assert one["over_seeds"]["best_eval_nll"] is None
    assert two["over_seeds"]["best_eval_nll"] == {"mean": 3.5, "half_width": None}
    assert "  -  " in moex(a, b)


def test_seeds_at_different_steps(moex, write):
    a, b = write("a"), write("b", "seed=1", train={1: 4.0, 2: 3.0}, evals={})
    _, row, *note = moex(a, b).splitlines()
    assert row.startswith("a, b  ") and "  2-4  256-512  " in row
    assert note[-1].startswith("a, b: its seeds are not equally far")


# The plot.


def test_curves_over_seeds(four):
    lines = plot_lines(make_groups(read_runs(four)))
    assert [(each.kind, each.label) for each in lines] == [
        *(("train", "k=1"), ("train", "k=2")),
        *(("eval", "k=1"), ("eval", "k=2")),
    ]
    first = lines[0]
    np.testing.assert_array_equal(first.curve.step_S, [1, 2, 4])
    np.testing.assert_allclose(first.curve.loss_S, [4.0, 3.0, 2.1])
    np.testing.assert_allclose(first.half_S, [0, 0, 6.353102 / 5], rtol=1e-6)
    np.testing.assert_allclose(first.curve.seconds_S, [0.5, 1.0, 2.0])
    assert lines[0].colour == lines[2].colour != lines[1].colour


def test_a_mean_curve_has_the_steps_that_all_seeds_have(write):
    a = curves(read_run(write("a")), 1.0)["train"]
    b = curves(read_run(write("b", train={2: 5.0, 3: 5.0, 4: 5.0})), 1.0)["train"]
    mean, half_S = mean_curve([a, b])
    np.testing.assert_array_equal(mean.step_S, [2, 4])
    np.testing.assert_array_equal(mean.loss_S, [4.0, 3.5])
    assert half_S.shape == (2,)
    assert mean_curve([a])[1] is None


def test_the_loss_axis_shows_what_comes_after_the_first_losses(write):
    first = {1: 100.0, 2: 4.0, 10: 2.0}
    paths = [
        write("a", train=first),
        write("b", "optim.lr=0.5", train={1: 9.0, 10: 3.0}),
    ]
    low, high = loss_range(plot_lines(make_groups(read_runs(paths))))
    assert (low, high) == pytest.approx((2.0 - 0.1, 4.0 + 0.1))
    flat = [write(n, f"optim.lr={n}", train={1: 2.0}, evals={}) for n in ("1", "2")]
    assert loss_range(plot_lines(make_groups(read_runs(flat)))) is None


@pytest.mark.parametrize("ending", ["html", "png"])
def test_the_plot_is_one_file(moex, four, write, tmp_path, ending):
    file = tmp_path / "plot" / f"curves.{ending}"
    file.parent.mkdir()
    other = write("other", "optim.lr=0.5", evals={})
    assert f"written: {file}" in moex(*four, other, f"--out={file}")
    assert list(file.parent.iterdir()) == [file]
    if ending == "png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    text = file.read_text()
    assert "<script src=" not in text
    assert "training FLOPs, as expected before training" in text
    assert "95 % interval over seeds" in text
    for words in (
        "k=1",
        "<th>active</th>",
        "In all rows: ",
        "wall time of training, s",
        "tokens",
    ):
        assert words in text, words


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)<',
    "{{7*7}}<b>bold<b>",
    "%{x} &lt;b&gt;",
    "\x1b[31mred",
    r"$\frac{$",
)


@pytest.fixture
def hostile(write):
    """Runs whose labels are their folders, for their configs are equal."""
    return [write(name) for name in HOSTILE]


def names_of(folders):
    names = [printable(f.name) for f in folders]
    return {f"{name}{end}" for name in names for end in ("", " (train)")}


def drawn(file):
    """`(page, traces of plotly)` of a page without plotly itself."""
    page = pages.Page(file.read_text(encoding="utf-8"))
    (call,) = (s for s in page.scripts if "Plotly.newPlot(" in s)
    start = call.index("[", call.index("Plotly.newPlot("))
    return page, json.JSONDecoder().raw_decode(call[start:])[0]


@pytest.fixture
def without_plotly(monkeypatch):
    monkeypatch.setattr("plotly.io._html.get_plotlyjs", lambda: pages.LIBRARY)


def test_labels_are_text_in_a_page_that_may_fetch_nothing(
    moex, hostile, tmp_path, without_plotly
):
    file = tmp_path / "curves.html"
    moex(*hostile, f"--out={file}")
    page, traces = drawn(file)
    text = page.source
    assert text.index("Content-Security-Policy") < text.index("<script")
    assert "default-src 'none'" in text and "base-uri 'none'" in text
    assert {*page.tags} <= {
        "html",
        "head",
        "meta",
        "style",
        "body",
        "div",
        "script",
    } | {*("table", "tr", "th", "td", "p")}
    assert page.links == []
    # Plotly reads names as markup.
    assert not any(set(trace["name"]) & set("<>") for trace in traces)
    assert {html.unescape(trace["name"]) for trace in traces} == names_of(hostile)


def test_a_value_of_a_config_ends_no_script(moex, write, tmp_path, without_plotly):
    def change(cfg):
        cfg.init_from = pages.EVIL

    file = tmp_path / "curves.html"
    moex(write("a"), write("b", change=change), f"--out={file}")
    page, traces = drawn(file)
    assert "<b onload" not in page.source and "evil=1</" not in page.source
    names = {html.unescape(trace["name"]) for trace in traces}
    assert f"b: init_from={pages.EVIL}" in names


def test_names_that_no_text_can_hold_are_written_as_escapes(
    moex, write, tmp_path, without_plotly
):
    names = [write(os.fsdecode(b"a\xff")), write("b")]
    for ending in ("html", "csv"):
        file = tmp_path / f"curves.{ending}"
        moex(*names, f"--out={file}")
        text = file.read_text(encoding="utf-8").replace("\\\\", "\\")
        assert r"a\udcff" in text


@pytest.mark.thorough
def test_a_picture_takes_any_label(moex, hostile, tmp_path):
    file = tmp_path / "curves.png"
    hidden = hostile[0].with_name("_hidden")
    shutil.copytree(hostile[0], hidden)
    legends = []

    def watch(self, *args, **options):
        legends.append(legend(self, *args, **options))
        return legends[-1]

    with pytest.MonkeyPatch.context() as patch:
        legend = Figure.legend
        patch.setattr(Figure, "legend", watch)
        patch.chdir(tmp_path)
        # The label of a path that begins so is left out by matplotlib itself.
        moex(hidden.name, *hostile, f"--out={file}")
    assert file.read_bytes().startswith(b"\x89PNG")
    texts = {text.get_text() for text in legends[0].get_texts()}
    assert texts == names_of([hidden, *hostile])


def test_points_and_figures_as_files(moex, four, tmp_path):
    file = tmp_path / "points.csv"
    assert f"written: {file}" in moex(*four, f"--out={file}")
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == 4 * (len(TRAIN) + len(EVAL))
    row = next(r for r in rows if r["run"] == str(four[1]) and r["step"] == "4")
    assert (row["group"], row["seed"], row["kind"]) == ("k=1", "1", "train")
    spent = (float(row["tokens"]), float(row["train_s"]), float(row["nll"]))
    assert spent == (4 * TOKENS, 2.0, 2.2)
    figures = tmp_path / "figures.json"
    assert json.loads(moex(*four, f"--out={figures}", "--json"))["groups"]
    assert figures.read_text() == moex(*four, "--json")


def test_the_folder_of_a_sweep_stands_for_its_runs(write, tmp_path):
    runs = [write("sweep/seed=0"), write("sweep/seed=1", "seed=1")]
    other = write("other", "optim.lr=0.5")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "sweep" / "notes").mkdir()
    found = read_runs([tmp_path / "sweep", other])
    assert [run.path for run in found] == [*runs, other]


# Mistakes.


def test_what_cannot_be_compared(mistake, write, tmp_path):
    a, b = write("first"), write("second", train={})
    assert mistake(a) == "compare: needs two runs or more; got 1."
    again = tmp_path / "." / "first"
    assert mistake(a, f"{tmp_path}/second/../first").endswith("give it once.")
    assert mistake(a, again).endswith("give it once.")
    assert mistake(a, b).startswith(f"{b}: no training step is logged in ")
    near = tmp_path / "frist"
    assert mistake(a, near) == (
        f"{near}: not a run directory (there is no {near / 'config.json'}). "
        "Did you mean 'first'?"
    )
    (b / "metrics.jsonl").unlink()
    assert mistake(a, b).startswith(f"{b}: no training step is logged in ")
    c = write("third")
    told = mistake(a, c, "--out=a.svg")
    assert told == (
        "--out = 'a.svg': must be a name that ends in .html, .png, .csv, .json."
    )
    told = mistake(a, c, f"--out={tmp_path / 'none' / 'a.html'}")
    assert told.endswith("must be in a folder that exists.")
    assert "compare takes the configs of the runs" in mistake(a, c, "--config.seed=1")
    (c / "config.json").write_text("{")
    assert mistake(a, c).startswith(f"{c / 'config.json'}: is not JSON: Expect")


def _line(text: str) -> str:
    return '{"kind": "train", "step": 1, ' + text + "}"


NO_LINES = {
    "3": "must be a JSON object, not a number",
    "[]": "must be a JSON object, not a list",
    "{}": "has no field 'kind'",
    b'{"kind": "\xff"}\n': "is not JSON: byte 10 is not UTF-8",
    "[" * 100_000: "is not JSON: it is nested too deep",
    '{"kind": "train"}': "has no field 'step'",
    '{"kind": 3, "step": 1}': "kind = 3: must be str, not a number",
    '{"kind": ["train"], "step": 1}': "kind = ['train']: must be str, not a list",
    '{"kind": "train", "step": "5"}': "step = '5': must be int, not a string",
    '{"kind": "train", "step": true}': "step = True: must be int",
    '{"kind": "train", "step": 1.5}': "step = 1.5: must be int, not a number",
    '{"kind": "train", "step": null}': "step = None: must be int, not null",
    '{"kind": "train", "step": NaN}': "step = nan: must be int",
    '{"kind": "train", "step": 1e300}': "step = 1e+300: must be int",
    '{"kind": "train", "step": -1}': "step = -1: must be in 0 to 2,147,483,647",
    '{"kind": "train", "step": 4294967296}': "step = 4294967296: must be in 0 to",
    '{"kind": "sample", "step": 1}': "has no field 'texts'",
    '{"kind": "sample", "step": 1, "texts": "a"}': "texts = 'a': must be list of str",
    _line('"nll": "x"'): "nll = 'x': must be float or None, not a string",
    _line('"nll": [1]'): "nll = [1]: must be float or None, not a list",
    _line('"nll": {}'): "nll = {}: must be float or None, not an object",
    _line('"nll": true'): "nll = True: must be float or None",
    _line('"nll": 1' + "0" * 400): "nll = 1000",
    _line('"tokens_seen": NaN'): "tokens_seen = nan: must be int",
    _line('"tokens_seen": -5'): "tokens_seen = -5: must be >= 0",
    _line('"moe/entropy_worst_layer": 3'): "moe/entropy_worst_layer = 3: must be str",
}


@pytest.mark.parametrize("value", ["null", "NaN", "Infinity"])
def test_a_loss_that_is_no_number_is_nan_in_old_logs_and_null_in_new(write, value):
    run = write("run")
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    (i,) = [i for i, text in enumerate(lines) if '"step": 4' in text and "trai" in text]
    values = json.loads(lines[i])
    text = json.dumps(values | {"nll": "here"}).replace('"here"', value)
    lines[i] = text + "\n"
    log.write_text("".join(lines))
    nll = read_run(run).lines["train"][values["step"]]["nll"]
    assert not math.isfinite(nll)
    group = make_groups([read_run(run), read_run(write("other", "seed=5"))])[0]
    assert group.to_dict()["runs"]


def test_a_line_that_is_none_of_moex(mistake, write):
    a, b = write("a"), write("b")
    log = b / "metrics.jsonl"
    log.write_text(log.read_text() + '{"kind": "eval", "step": 5, "nll": 1.0}\n')
    assert "the eval line of step 5 has no bits_per_byte." in mistake(a, b)
    log.write_text('{"kind": "train", "step": 1, "nll": 1.0}\n')
    assert "the train line of step 1 has no tokens_seen." in mistake(a, b)
    for text, said in NO_LINES.items():
        log.write_bytes(text if isinstance(text, bytes) else text.encode() + b"\n")
        assert mistake(a, b).startswith(f"{log}, line 1: {said}"), text


# Equality.


def test_equal_runs(moex, write):
    mine = {"perf/tokens_per_s": 1.0, "moe/device_violation": 0.5}
    theirs = {"perf/tokens_per_s": 2.0, "perf/step_s": 9}  # and one device
    a = write("a", grad_norm=math.nan, **mine)
    b = write("b", grad_norm=math.nan, **theirs)
    # Of train: nll, bits_per_byte, tokens_seen, grad_norm; of eval: the first two.
    assert moex(a, b, "--assert-equal") == (
        f"{a} and {b} are equal exactly: 6 quantities compared at 3 steps\n"
    )
    within = "are equal, numbers within 0.1 of the larger: 6 q"
    assert within in moex(a, b, "--assert-equal=0.1")


def test_the_first_difference_is_named(moex, mistake, write):
    a = write("a", train={1: 4.0, 2: 3.0, 4: 2.0})
    b = write("b", train={1: 4.0, 2: 3.5, 4: 9.0})
    told = mistake(a, b, "--assert-equal", code=1)
    assert told == f"step 2, train nll: 3.0 in {a}, 3.5 in {b}; difference 0.5."
    assert "step 4, train nll: " in mistake(a, b, "--assert-equal=0.2", code=1)
    assert "within 0.9 of the larger: " in moex(a, b, "--assert-equal=0.9")
    assert "step 4, train nll: " in mistake(a, b, "--assert-equal=0,0.5", code=1)
    assert "within 0 of the larger or 7: " in moex(a, b, "--assert-equal=0,7")
    c = write("c", evals=EVAL | {2: math.nan})
    told = mistake(a, c, "--assert-equal", code=1)
    assert told.startswith(f"step 2, eval nll: 3.5 in {a}, nan in {c}; ")


def test_what_only_one_run_has_is_a_difference(mistake, write):
    a = write("a")
    b = write("b", train={1: 4.0, 2: 3.0})
    assert mistake(a, b, "--assert-equal", code=1) == f"step 4: {b} has no train line."
    c = write("c", evals={4: 3.75})
    assert mistake(c, a, "--assert-equal", code=1) == f"step 2: {c} has no eval line."
    d = write("d", grad_norm=1.0)
    assert mistake(a, d, "--assert-equal", code=1) == (
        f"step 1, train grad_norm: {a} does not have it."
    )


def test_which_layer_is_worst_may_differ_where_figures_nearly_do_not(
    moex, mistake, write
):
    names = ("moe/entropy_worst", "moe/entropy_worst_layer")
    a = write("a", **dict(zip(names, (1.0, "001"), strict=True)))
    b = write("b", **dict(zip(names, (1.0000001, "002"), strict=True)))
    assert "are equal, numbers within" in moex(a, b, "--assert-equal=1e-3")
    told = mistake(a, b, "--assert-equal", code=1)
    assert told.startswith("step 1, train moe/entropy_worst: 1.0 in ")


def test_the_order_of_lines_does_not_matter(moex, write, tmp_path):
    a, b = write("a"), tmp_path / "b"
    shutil.copytree(a, b)
    log = b / "metrics.jsonl"
    log.write_text("\n".join(reversed(log.read_text().splitlines())) + "\n")
    assert "are equal exactly" in moex(a, b, "--assert-equal")


@pytest.mark.parametrize(
    ("x", "y", "tolerance", "expected"),
    [
        (1.0, 1, 0, True),
        (1.0, math.nextafter(1.0, 2.0), 0, False),
        (100.0, 101.0, 0.01, True),
        (100.0, 102.0, 0.01, False),
        (math.nan, math.nan, 0, True),
        (math.nan, 1.0, 0.9, False),
        (math.inf, math.inf, 0, True),
        (math.inf, 1e300, 0.9, False),
        (0.0, 1e-300, 0.5, False),
        ("a", "a", 0, True),
        (None, 0.0, 0.5, False),
        (True, 1.1, 0.5, False),
        (2**60, 2**60 + 1, 0, False),
        (0.0, 1e-9, (0, 1e-9), True),
        (0.0, 1.1e-9, (0, 1e-9), False),
        (100.0, 101.0, (0.01, 1e-9), True),
        (1.0, 1.5, (0.01, 0.5), True),
        (math.inf, 1.0, (0, 5.0), False),
        (math.nan, 1.0, (0.5, 5.0), False),
    ],
)
def test_when_values_are_the_same(x, y, tolerance, expected):
    pair = Tolerance(*(tolerance if isinstance(tolerance, tuple) else (tolerance,)))
    assert same(x, y, pair) is same(y, x, pair) is expected


def test_mistakes_of_assert_equal(mistake, write):
    a, b, c = (write(name, "optim.lr=1.0") for name in "abc")
    assert "compares two runs; got 3." in mistake(a, b, c, "--assert-equal")
    told = mistake(a, b, "--json", "--assert-equal")
    assert told == "--json: --assert-equal says one line; leave it out."
    for tolerance in ("-1", "1", "0,-1", "0,inf", "nan", "1e-3,", "0,0,0"):
        told = mistake(a, b, f"--assert-equal={tolerance}")
        assert f"with RTOL in [0, 1) and ATOL at least 0, not {tolerance!r}" in told
    assert f"not '{a}'; runs come before it" in mistake("--assert-equal", a, b)
