"""What is watched while training: figures by layer, series, histograms, lines, copies.

E experts
"""

import json
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from moex.model.figures import (
    by_layer,
    device_violation,
    moe_summary,
    routing_record,
    slot_shares,
)
from moex.moe import metrics
from moex.moe.chain import Chain
from moex.moe.experts.zero import Zero
from moex.nn.mlp import Dense
from moex.nn.stack import Segment
from moex.runs.keys import Log
from moex.runs.score import domain_losses
from moex.sharding import MeshConfig
from moex.train import in_flight
from moex.train.charts import layout, series
from moex.train.in_flight import Flight
from moex.train.log import RunLog
from moex.train.stopwatch import Stopwatch
from moex.train.tensorboard import WATCHING
from tests.helpers import tiny_lm, tiny_moe
from tests.test_run import run_config

SCALARS = tuple(f.name for f in metrics.FIGURES if f.is_scalar and f.of)


def figures(shape, num_experts, seed=0):
    """Random metrics of one stacked layer; `shape` is [repeat] or [repeat, C]."""
    rng = np.random.default_rng(seed)
    load = rng.random((*shape, num_experts)).astype(np.float32)
    return {name: rng.random(shape).astype(np.float32) for name in SCALARS} | {
        "load_frac_E": load / load.sum(axis=-1, keepdims=True),
        "slots_hist_S": np.full((*shape, 3), 1 / 3, np.float32),
    }


def a_run(num_experts, num_layers):
    """(model, metrics) of a dense layer and so many MoE layers."""
    moe = Segment(pattern=(tiny_moe(num_experts),), repeat=num_layers)
    model = tiny_lm(Segment(pattern=(Dense(hidden=8),)), moe)
    return model, {"segments/1/blocks/0/ffn": figures((num_layers,), num_experts)}


def written(workdir, num_experts, num_layers, detail):
    """Tags of TensorBoard after one logged step."""
    model, metrics = a_run(num_experts, num_layers)
    workdir.mkdir()
    cfg = run_config(model=model, log=Log(detail=detail))
    log = RunLog(workdir, cfg, step=0, total_steps=10)
    rows = by_layer(model, metrics)
    log.record("train", 1, {f"moe/{k}": v for k, v in moe_summary(rows).items()})
    log.layers("train", 1, rows, image=True)
    log.close()
    events = EventAccumulator(str(workdir / "tb")).Reload()
    return {kind: events.Tags()[kind] for kind in ("scalars", "histograms", "images")}


@pytest.mark.thorough
@pytest.mark.parametrize("detail", ["brief", "detailed"])
def test_the_number_of_series_is_bounded(tmp_path, detail):
    """However many experts; in brief however many layers."""
    sizes = {"few": (4, 3), "experts": (64, 3), "layers": (4, 30)}
    found = {
        name: written(tmp_path / name, *size, detail) for name, size in sizes.items()
    }
    assert found["few"] == found["experts"]
    assert found["few"]["images"] == ["moe/expert_load"]
    count = len(found["few"]["scalars"])
    if detail == "brief":
        assert found["few"] == found["layers"]
        assert found["few"]["histograms"] == ["moe/load"]
        assert count < 60
    else:
        assert len(found["layers"]["scalars"]) - count == 27 * len(SCALARS)
        assert len(found["layers"]["histograms"]) == 1 + 2 * 30
        assert "moe_layers/entropy/layer_030" in found["layers"]["scalars"]


def test_the_load_histogram_tells_dead_experts_apart(tmp_path):
    """Two layers of four experts: loads 0, 0, 0, 4 and 1, 1, 1, 1 of the mean."""
    model, metrics = a_run(4, 2)
    load = np.array([[0, 0, 0, 1], [0.25] * 4])
    metrics["segments/1/blocks/0/ffn"]["load_frac_E"] = load
    cfg = run_config(model=model, log=Log())
    log = RunLog(tmp_path, cfg, step=0, total_steps=10)
    log.layers("train", 5, by_layer(model, metrics))
    log.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    (event,) = events.Histograms("moe/load")
    value = event.histogram_value
    assert (event.step, value.min, value.max, value.num, value.sum) == (5, 0, 4, 8, 8)
    assert value.sum_squares == 16 + 4
    buckets = dict(zip(value.bucket_limit, value.bucket, strict=True))
    full = {limit: n for limit, n in buckets.items() if n}
    assert full == {0: 3, 1: 4, 4: 1}
    assert max(buckets) == 4


def test_the_layout_has_the_losses_first_and_then_the_moe():
    cfg = run_config(model=tiny_lm())
    pages = layout(cfg, num_domains=1)
    moe = ["MoE: balance", "MoE: faults", "MoE: routers", "MoE: experts per token"]
    first, last = "loss and learning rate", ["other scores", "training", "speed"]
    assert list(pages) == [first, *moe, *last]
    assert list(pages[first]) == [
        *("training loss, nats per token", "held-out loss, nats per token"),
        "learning rate",
    ]
    titles = {title for charts in pages.values() for title in charts}
    assert not any("devices" in title or "domain" in title for title in titles)
    cfg.mesh = MeshConfig(expert=2)
    more = layout(cfg, num_domains=2)
    more = {title for charts in more.values() for title in charts} - titles
    assert sorted(more) == [
        "Balance of devices, mean of layers (max load / mean load − 1)",
        "Balance of devices, worst layer (max load / mean load − 1)",
        "held-out loss by domain, nats per token",
        "training loss by domain, nats per token",
    ]
    dense = layout(run_config(model=tiny_lm(Segment(pattern=(Dense(hidden=8),)))), 1)
    assert list(dense) == [first, *last]


def test_no_chart_mixes_the_mean_the_worst_layer_and_held_out_data():
    pages = layout(run_config(model=tiny_lm()), num_domains=2)
    names = ("moe/max_violation_mean", "moe/max_violation_worst", "basics/loss")
    names += ("moe/max_violation_mean_held_out", "basics/loss_held_out", "basics/lr")
    names += ("scores/bits_per_byte", "scores/bits_per_byte_held_out")
    names += ("scores/nll/a", "scores/nll_held_out/a")
    for charts in pages.values():
        for title, (_, patterns) in charts.items():
            found = [n for n in names if any(re.match(p, n) for p in patterns)]
            assert len(found) <= 1, title


TAGS = {
    ("train", "nll"): "basics/loss",
    ("eval", "nll"): "basics/loss_held_out",
    ("train", "lr"): "basics/lr",
    ("train", "moe/max_violation"): "moe/max_violation_mean",
    ("train", "moe/max_violation_worst"): "moe/max_violation_worst",
    ("train", "moe/max_violation_worst_layer"): None,
    ("eval", "max_violation"): "moe/max_violation_mean_held_out",
    ("train", "moe/dead_frac"): "moe_faults/dead_frac_mean",
    ("train", "moe/experts_per_token"): "moe_experts_per_token/experts_per_token_mean",
    ("train", "moe/own_loss"): "moe_routers/own_loss_mean",
    ("train", "bits_per_byte"): "scores/bits_per_byte",
    ("eval", "bits_per_byte"): "scores/bits_per_byte_held_out",
    ("eval", "nll/code"): "scores/nll_held_out/code",
    ("train", "loss"): "train/loss_in_all",
    ("train", "loss/router_z"): "train/weighted_loss/router_z",
    ("train", "grad_norm/router"): "train/grad_norm/router",
    ("train", "perf/step_s"): "perf/step_s",
    ("eval", "bytes"): None,
    ("compile", "seconds"): None,
    ("compressors", "gzip"): None,
}


@pytest.mark.parametrize("figure", TAGS, ids=" ".join)
def test_a_figure_has_a_series_in_the_group_it_belongs_to(figure):
    assert series(run_config().task, *figure) == TAGS[figure]


def test_the_first_groups_are_losses_and_the_balance():
    groups = {tag.partition("/")[0] for tag in TAGS.values() if tag}
    assert sorted(groups)[:2] == ["basics", "moe"]
    basics = sorted(tag for tag in TAGS.values() if tag and tag.startswith("basics"))
    assert basics == ["basics/loss", "basics/loss_held_out", "basics/lr"]


def test_hparams_has_what_is_learned_and_the_name_of_the_run(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        cfg = run_config(model=tiny_lm(), seed=seed, log=Log())
        (tmp_path / name).mkdir()
        RunLog(tmp_path / name, cfg, step=0, total_steps=10).close()
    rows = {}
    for name in ("a", "b"):
        events = EventAccumulator(str(tmp_path / name / "tb")).Reload()
        tags = events.summary_metadata
        assert "_hparams_/experiment" not in tags  # one run's list would hide columns
        data = tags["_hparams_/session_start_info"].plugin_data.content
        rows[name] = metadata.parse_session_start_info_plugin_data(data).hparams
    assert [rows[name]["run"].string_value for name in rows] == ["a", "b"]
    assert [rows[name]["seed"].number_value for name in rows] == [1, 2]
    assert rows["a"]["router"].string_value == "TopK"
    assert rows["a"]["router.k"].number_value == 2
    shown = rows["a"].keys()
    assert {"num_experts", "experts", "model.layers", "optim.lr", "kernels"} <= shown
    assert not [name for name in shown if name.startswith(WATCHING)]


def test_a_domain_without_tokens_has_no_loss():
    """Its sum over its tokens is 0 / 1: no loss of a model."""
    metrics = {"domain_score": np.array([2.0, 0.0]), "domain_tokens": np.array([9, 0])}
    assert domain_losses(("code", "prose"), metrics) == {"code": 2.0}


def test_balance_of_devices_by_hand():
    """Loads 0.5, 0.1 on one device and 0.2, 0.2 on the other: 0.6 over 0.5."""
    assert device_violation([0.5, 0.1, 0.2, 0.2], 2) == pytest.approx(0.2)
    assert device_violation([0.5, 0.1, 0.2, 0.2], 4) == pytest.approx(1.0)
    assert device_violation([0.5, 0.1, 0.2, 0.2], 1) == 0.0
    assert device_violation([0.0, 0.0], 2) == 0.0
    # Experts that cost nothing are on every device: their 0.4 is left out.
    model = tiny_lm(Segment(pattern=(tiny_moe(2, zero=Zero(null=1)),)))
    metrics = figures((1,), 3)
    metrics["load_frac_E"] = np.array([[0.4, 0.2, 0.4]])
    rows = by_layer(model, {"segments/0/blocks/0/ffn": metrics}, expert_devices=2)
    assert rows["000"]["device_violation"] == pytest.approx(0.4 / 0.3 - 1)
    assert moe_summary(rows)["device_violation_worst"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_balance_of_devices_is_that_of_a_loop_over_slots(devices):
    rng = np.random.default_rng(devices)
    slots = rng.integers(0, 6, 50)
    rows = [0] * devices
    for expert in slots:
        rows[expert // (6 // devices)] += 1
    want = max(rows) / (sum(rows) / devices) - 1
    share_E = np.bincount(slots, minlength=6) / len(slots)
    assert device_violation(share_E, devices) == pytest.approx(want)


def test_rounds_of_a_chain_have_figures_of_their_own():
    chain = Chain(moe=tiny_moe(4), iterations=2)
    model = tiny_lm(Segment(pattern=(Dense(hidden=8), chain), repeat=2))
    metrics = figures((2, 2), 4)
    rows = by_layer(model, {"segments/0/blocks/1/ffn": metrics}, expert_devices=2)
    assert list(rows) == ["001.1", "001.2", "003.1", "003.2"]
    for name, value in metrics.items():
        np.testing.assert_array_equal(rows["003.1"][name], value[1, 0], err_msg=name)
    worst = moe_summary(rows)
    r, c = np.unravel_index(np.argmin(metrics["entropy"]), (2, 2))
    assert worst["entropy_worst_layer"] == f"{(1, 3)[r]:03d}.{c + 1}"
    assert worst["entropy"] == pytest.approx(metrics["entropy"].mean())


def test_shares_of_tokens_by_experts():
    """One layer with up to 4 experts a token, one with up to 1: their mean."""
    rows = {
        "000": {"slots_hist_S": [0.1, 0.2, 0.3, 0.2, 0.2]},
        "001": {"slots_hist_S": [0.5, 0.5]},
    }
    expected = {"0": 0.3, "1": 0.35, "2": 0.15, "3-4": 0.2}
    assert slot_shares(rows) == pytest.approx(expected)
    wide = slot_shares({"000": {"slots_hist_S": np.full(33, 1 / 33)}})
    assert wide["17+"] == pytest.approx(16 / 33)
    assert sum(wide.values()) == pytest.approx(1)


def test_lines_of_routing_are_short_and_trimmed(tmp_path):
    model, metrics = a_run(4, 1)
    rows = by_layer(model, metrics)
    record = routing_record(rows)["001"]
    expected = metrics["segments/1/blocks/0/ffn"]
    assert record.keys() == {*SCALARS, "load_frac", "slots_hist"}
    assert record["slots_hist"] == [0.333333] * 3
    assert record["load_frac"] == pytest.approx(expected["load_frac_E"][0], rel=1e-5)
    cfg = run_config(model=model, log=Log(tensorboard=False))
    log = RunLog(tmp_path, cfg, step=0, total_steps=10)
    for step in (1, 2, 3):
        log.layers("train", step, rows)
    log.layers("eval", 3, rows)
    log.close()
    path = tmp_path / "routing.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 4, "lay')
    RunLog(tmp_path, cfg, step=2, total_steps=10).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"kind": "train", "step": step, "layers": {"001": record}} for step in (1, 2)
    ]


class OnDevice:
    """An array of a step that writes down who asked for it."""

    def __init__(self, step, told):
        self.step, self.told = step, told

    def copy_to_host_async(self):
        self.told.append(("copy", self.step))


def test_copies_start_at_once_and_nobody_waits_for_a_step_that_is_not_due():
    told = []
    steps = Flight(
        lambda step, metrics, due: told.append(("look", step, due)),
        due=lambda step: step % 8 == 0,
    )
    for step in range(1, 10):
        steps.add(step, {"loss": OnDevice(step, told)})
        told.append(("added", step))
    assert in_flight.AHEAD == 4
    assert told == [
        *(("added", step) for step in range(1, 5)),
        *(("look", 1, False), ("added", 5), ("look", 2, False), ("added", 6)),
        *(("look", 3, False), ("added", 7)),
        *(("copy", 8), ("look", 4, False), ("added", 8)),
        # Step 8 is due, and step 9 keeps the device busy meanwhile.
        *(("look", step, False) for step in (5, 6, 7)),
        *(("look", 8, True), ("added", 9)),
    ]
    steps.land()
    assert told[-1] == ("look", 9, False)


def test_laps_and_their_parts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moex.train.stopwatch.time.perf_counter", lambda: now[0])
    watch = Stopwatch()

    def work(part, seconds):
        with watch.part(part):
            now[0] += seconds

    work("data", 1.0)
    work("wait", 2.0)
    now[0] += 0.5
    expected = {"step": 3.5, "data": 1.0, "dispatch": 0.0, "wait": 2.0, "other": 0.5}
    assert watch.lap() == expected
    watch.stop()
    now[0] += 100.0  # an evaluation
    watch.start()
    work("dispatch", 3.0)
    work("dispatch", 1.0)
    expected = {"step": 4.0, "data": 0.0, "dispatch": 4.0, "wait": 0.0, "other": 0.0}
    assert watch.lap() == expected
