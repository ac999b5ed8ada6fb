"""Logs: numbers of layers, lines that are dropped on resume, words for people."""

import json
import math

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.model.figures import by_layer, layer_rows, moe_summary
from moex.model.layers import shown
from moex.moe.chain import Chain
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.process import memory_bytes
from moex.runs.keys import Log
from moex.tasks import lm
from moex.terminal import clock
from moex.train.lines import load_lines, step_line, told_figures
from moex.train.log import RunLog
from moex.train.stopwatch import Stopwatch
from moex.train.tensorboard import load_figure, relative_load
from tests.helpers import TASK, tiny_lm, tiny_moe
from tests.test_run import run_config

# Layers 0 | 1 2 3 4 5 6 | 7 8: dense; (MoE of 8, dense, MoE of 4) twice; MoE of 2.
MODEL = tiny_lm(
    Segment(pattern=(Dense(hidden=8),)),
    Segment(pattern=(tiny_moe(8), Dense(hidden=8), tiny_moe(4)), repeat=2),
    Segment(pattern=(tiny_moe(2),), repeat=2),
)
PATHS = {
    "segments/1/blocks/0/ffn": (8, [1, 4]),
    "segments/1/blocks/2/ffn": (4, [3, 6]),
    "segments/2/blocks/0/ffn": (2, [7, 8]),
}


SCALARS = ("max_violation", "entropy", "dead_frac", "experts_per_token")


def layers():
    """Metrics whose value is the number of the layer, and a load of one expert each."""
    found = {}
    for path, (num_experts, numbers) in PATHS.items():
        load = np.zeros((2, num_experts), np.float32)
        load[:, 0] = 1.0
        figures = {name: np.array(numbers, np.float32) for name in SCALARS}
        slots = np.tile([0.25, 0.75], (2, 1))
        found[path] = figures | {"load_frac_E": load, "slots_hist_S": slots}
    return found


def test_layers_have_their_absolute_numbers():
    rows = layer_rows(MODEL, layers(), "entropy")
    assert rows == [(f"00{n}", n) for n in (1, 3, 4, 6, 7, 8)]
    loads = layer_rows(MODEL, layers(), "load_frac_E")
    assert [(int(n), len(v)) for n, v in loads] == [
        *((1, 8), (3, 4), (4, 8), (6, 4), (7, 2), (8, 2))
    ]


def test_the_order_of_paths_does_not_matter():
    backwards = dict(reversed(layers().items()))
    expected = layer_rows(MODEL, layers(), "entropy")
    assert layer_rows(MODEL, backwards, "entropy") == expected


def test_more_than_ten_segments():
    """Segment 10 is not segment 1."""
    model = tiny_lm(*[Segment(pattern=(tiny_moe(2),)) for _ in range(12)])
    found = {
        f"segments/{i}/blocks/0/ffn": {"entropy": np.array([float(i)])}
        for i in range(12)
    }
    assert layer_rows(model, found, "entropy") == [(f"{i:03d}", i) for i in range(12)]


def test_rounds_of_a_chain_are_layers_of_their_own():
    """Two copies of a chain of two rounds among 3 experts."""
    model = tiny_lm(
        Segment(pattern=(Dense(hidden=8),)),
        Segment(pattern=(Chain(moe=tiny_moe(3), iterations=2),), repeat=2),
    )
    found = {
        "segments/1/blocks/0/ffn": {
            "experts_per_token": np.array([[1.0, 2.0], [3.0, 4.0]]),
            "load_frac_E": np.zeros((2, 2, 3)),
        }
    }
    assert layer_rows(model, found, "experts_per_token") == [
        *(("001.1", 1), ("001.2", 2), ("002.1", 3), ("002.2", 4))
    ]
    ten = {"experts_per_token": np.zeros((1, 11)), "entropy": np.arange(11.0)[None]}
    long = tiny_lm(Segment(pattern=(Chain(moe=tiny_moe(3), iterations=11),)))
    rows = layer_rows(long, {"segments/0/blocks/0/ffn": ten}, "entropy")
    assert [value for _, value in rows] == list(range(11))
    assert "layer 2.1 |" in load_lines(model, found)
    assert [shown(label) for label in ("000", "010.2")] == ["0", "10.2"]


def test_summary_is_the_mean_and_the_worst():
    summary = moe_summary(by_layer(MODEL, layers()))
    assert summary["entropy"] == pytest.approx((1 + 3 + 4 + 6 + 7 + 8) / 6)
    assert summary["max_violation_worst"] == 8.0
    assert summary["entropy_worst"] == 1.0
    assert summary["entropy_worst_layer"] == "001"
    assert "load_frac_E" not in summary
    assert moe_summary(by_layer(MODEL, {})) == {}


def open_log(workdir, step=0, **log):
    cfg = run_config(model=MODEL)
    cfg.log.tensorboard = log.pop("tensorboard", False)
    return RunLog(workdir, cfg, step=step, total_steps=10)


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.record("train", step, {"loss": 1.0 / step})
        log.record("eval", step, {"nll": float("nan")})
    log.close()
    whole = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in whole[::2]] == [1, 2, 3, 4, 5]
    path.write_text("".join(whole) + '{"kind": "train", "st')
    log = open_log(tmp_path, step=3)
    assert path.read_text() == "".join(whole[:6])
    log.record("train", 4, {"loss": 0.0})
    log.close()
    assert [json.loads(s)["step"] for s in path.read_text().splitlines()][-2:] == [3, 4]


def strict(text):
    """JSON as other programs read it: NaN is none."""
    return json.loads(
        text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )


def test_figures_that_are_not_finite_are_null(tmp_path):
    log = open_log(tmp_path)
    log.record("train", 1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1})
    found = layers()
    found[next(iter(PATHS))]["entropy"][:] = np.nan
    log.layers("train", 1, by_layer(MODEL, found))
    log.close()
    entry = strict((tmp_path / "metrics.jsonl").read_text())
    assert entry["loss"] is None and entry["grad_norm"] is None and entry["lr"] == 0.1
    assert "null" in (tmp_path / "routing.jsonl").read_text()
    strict((tmp_path / "routing.jsonl").read_text())


def test_old_lines_with_nan_stay_and_damaged_ones_are_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "eval", "step": 1, "nll": NaN}\n'
    bad = ["{}", "null", '{"step": "1"}', "{", "[" * 10**5, '{"step": 1', "\x00"]
    whole = ("".join(f"{b}\n" for b in bad) + good).encode() + b"\xff\n" + b"{"
    path.write_bytes(whole)
    open_log(tmp_path, step=2).close()
    assert path.read_text() == good
    said = f"warning: {path}: 8 damaged lines were dropped; the file is kept as "
    assert capsys.readouterr().out == said + "metrics.jsonl.damaged\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == whole
    open_log(tmp_path, step=2).close()
    assert capsys.readouterr().out == ""


def test_a_last_line_without_its_end_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}')
    log = open_log(tmp_path, step=1)
    log.record("train", 2, {})
    log.close()
    assert [json.loads(s)["step"] for s in path.read_text().splitlines()] == [1, 2]


def test_lines_are_on_disk_at_once(tmp_path):
    log = open_log(tmp_path)
    log.record("train", 1, {"loss": 1.0})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"kind": "train", "step": 1, "loss": 1.0}
    log.close()


def test_without_tensorboard_there_is_no_folder(tmp_path):
    log = open_log(tmp_path)
    log.layers("train", 1, by_layer(MODEL, layers()), image=True)
    log.text("sample", 1, "text")
    log.close()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["metrics.jsonl", "routing.jsonl"]


def test_clock():
    assert clock(0) == "0:00"
    assert clock(59.6) == "1:00"
    assert clock(3599.4) == "59:59"
    assert clock(3723) == "1:02:03"
    assert clock(100 * 3600) == "100:00:00"
    assert clock(math.nan) == clock(math.inf) == "?"


VALUES = {
    "loss": 3.14159,
    "nll": 3.1,
    "bits_per_byte": 2.0,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "perf/tokens_per_s": 12345.6,
    "perf/memory_gib": 1.5,
    "skipped": 0,
}


def test_the_line_of_a_step():
    assert step_line(5, 10, VALUES, TASK.brief(VALUES), 10.0) == (
        "step 5/10 | loss 3.1416 | bpb 2.000 | grad 0.5 | lr 1.00e-03 | 12,346 tok/s\n"
        "    | mem 1.50 GiB | eta 0:10"
    )
    more = {"perf/mfu": 0.4, "moe/max_violation": 0.5, "moe/dropped_frac": 0.1}
    line = step_line(5, 10, VALUES | more | {"skipped": 2}, "no target", math.nan)
    for part in ("mfu 40.0%", "imbalance 0.50", "dropped 10.0%", "skipped 2", "eta ?"):
        assert f"| {part}" in line
    assert max(map(len, line.splitlines())) <= 80


def test_the_figures_of_a_complete_run_are_words():
    assert told_figures({"eval_nll": 1.25, "eval_mse": 2}) == (
        " (eval_nll 1.2500, eval_mse 2.0000)"
    )
    assert told_figures({}) == ""


def test_loads_as_text():
    lines = load_lines(MODEL, layers()).splitlines()[1:]
    assert lines[0] == "  layer   1 | 100.0" + "  0.0" * 7 + " %"
    wide = {"segments/2/blocks/0/ffn": {"load_frac_E": np.full((2, 64), 1 / 64)}}
    (_, first, _) = load_lines(MODEL, wide).splitlines()
    assert first == "  layer   7 | " + " ".join([" 1.6"] * 16) + " ... (64 experts) %"


def test_the_heat_map_has_a_row_per_layer():
    rows = layer_rows(MODEL, layers(), "load_frac_E")
    figure = load_figure({k: relative_load(v) for k, v in rows}, step=3)
    axes = figure.axes[0]
    grid = axes.images[0].get_array()
    assert grid.shape == (6, 8)
    assert [t.get_text() for t in axes.get_yticklabels()] == list("134678")
    # Load over its mean: all slots at one of E experts is E times the mean.
    assert [row[0] for row in grid] == [8, 4, 8, 4, 2, 2]
    assert np.ma.getmaskarray(grid).sum() + np.isnan(grid.data).sum() >= 4 + 4 + 6 + 6


def test_the_stopwatch_leaves_out_what_is_between(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moex.train.stopwatch.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    now[0] = 5.0
    watch.start()  # compiling does not count
    now[0] = 7.0
    watch.stop()
    now[0] = 100.0
    watch.start()
    now[0] = 101.0
    assert watch.read() == 3.0


def test_memory_is_known():
    assert memory_bytes() > 1 << 20


def test_a_full_disk_names_the_file(tmp_path):
    log = RunLog(tmp_path, run_config(), step=0, total_steps=8)
    log.record("train", 1, {"loss": 1.0})
    log.jsonl._out = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        log.record("train", 2, {"loss": 1.0})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()  # and says nothing more
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_under_tensorboard_names_the_file(tmp_path, capfd):
    cfg = run_config()
    cfg.log.tensorboard = True
    log = RunLog(tmp_path, cfg, step=0, total_steps=8)
    events = log.tb.file_writer.event_writer._ev_writer._py_recordio_writer._writer
    events._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        for step in range(1, 5000):  # more than the queue takes
            log.record("train", step, {"loss": 1.0})
    (file,) = (tmp_path / "tb").iterdir()
    assert error.value.filename == str(file)
    log.close()
    assert capfd.readouterr().err == ""  # no traceback of the thread that writes


def test_a_complete_run_does_not_fail_for_its_comparison(tmp_path, monkeypatch):
    """The corpus was moved away meanwhile, or holds out no text."""
    log, cfg = open_log(tmp_path), run_config(log=Log(compressors=True))
    scored = {"bits_per_byte": 2.0, "bytes": 7}
    said = []
    monkeypatch.setattr(log, "line", said.append)

    def concluded(reached):
        monkeypatch.setattr(lm, "compressor_bits_per_byte", reached)
        return TASK.conclusion(cfg, None, scored, 3, log)

    for error in (OSError(2, "No such file", "a.txt"), ConfigError("no text")):

        def fails(data, where, error=error):
            raise error

        assert concluded(fails) == "held-out bits per byte: 2.000"
        assert str(error) in said[-1] and "warning" in said[-1]
    assert concluded(lambda data, where: {"gzip": 1.5}) == (
        "held-out bits per byte: 2.000 beside gzip 1.500 on the same 7 bytes"
    )
