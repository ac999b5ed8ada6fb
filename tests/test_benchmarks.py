"""The benchmarks run: small shapes, one repeat, kernels interpreted where need be."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import (
    attention,
    common,
    decode,
    decode_weights,
    grouped_matmul,
    moe_layer,
    monitoring,
    sharded_step,
    tune,
)
from kernels_pallas import tuned
from moex.model import spec as states
from moex.model.accounting import num_bytes
from moex.model.paths import flat_paths
from moex.sharding import MeshConfig
from tests import runs

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(module, *args):
        path = tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", [module.__name__, *args, f"--json={path}"])
        module.main()
        return json.loads(path.read_text())

    return call


def test_ratios_are_of_neighbours():
    """Twice as slow each time, whatever the machine does meanwhile."""
    off = [1.0, 5.0, 2.0, 9.0]
    found = monitoring.interval([2 * s for s in off], off)
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0}
    spread = monitoring.interval([1.0, 1.1, 1.2], [1.0, 1.0, 1.0])
    assert spread["median"] == 1.1
    assert spread["low"] < 1.1 < spread["high"]


def test_the_cost_of_watching(run, tmp_path):
    config = runs.write_config(tmp_path)
    with runs.one_device():
        figures = run(monitoring, f"--config={config}", "--repeats=1")
    assert figures["counts"]["on"]["flops"] >= figures["counts"]["off"]["flops"] > 0
    assert figures["host_s"].keys() == {"brief", "detailed"}
    for row in figures["host_s"].values():
        assert 0 < row["line"] < row["image"]


def test_whole_layers_under_every_load(run, capsys):
    loads = ",".join(common.LOADS)
    figures = run(moe_layer, "--shape=32,2,8,16,8", f"--loads={loads}", "--repeats=1")
    assert f"moex cpu, {loads.split(',')[-1]}" in figures["rows"]
    assert figures["rows"]["limit"]["fwd"]["ratio"] == 1
    assert figures["memory"]["temp_bytes"] > 0
    assert figures["environment"]["device"] == "cpu"
    assert "router out" in capsys.readouterr().out


def test_published_figures_stand_beside_ours():
    assert moe_layer.peers.published("H1")["ScatterMoE"] == [205, 211]
    assert moe_layer.peers.published("cpu") == {}


def test_grouped_matmuls(run):
    args = ("--shape=32,2,8,16,4", "--loads=zipf", "--repeats=1")
    rows = run(grouped_matmul, *args)["rows"]
    assert set(rows) == {"first", "second"}
    assert set(rows["first"]["moex cpu"]["zipf"]) == {"fwd", "dx", "dw"}
    assert "ragged_dot" in rows["second"]


def test_attention(run):
    rows = run(attention, "--shape=1,128,4,2,8", "--repeats=1")["rows"]
    assert rows["einsum"]["ratio"] == 1 and rows["blocks"]["min_s"] > 0
    with pytest.raises(SystemExit):
        run(attention, "--shape=1,128")
    with pytest.raises(SystemExit):
        run(attention, "--implementations=block")


def test_decode_alone(run, monkeypatch, capsys):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    for key, value in small.items():
        monkeypatch.setitem(decode.COMMON, key, value)
    monkeypatch.setattr(decode, "SIZES", ((4, 1, 8),))
    sizes = ("--batches=2", "--prompt=4", "--new=3", "--repeats=1")
    figures = run(decode, "--alone", "--models=mixtral,experts", *sizes)
    rows = figures["models"]["mixtral"]["2"]["rows"]
    assert rows.keys() == {"moex"} and rows["moex"]["same"] == 2
    assert figures["experts_cost"][0]["experts_used"] == 4 * (1 - 0.75**2)
    assert "experts cost" in capsys.readouterr().out
    for wrong in ("--models=mixtrol", "--batches=0", "--new=1"):
        with pytest.raises(SystemExit):
            run(decode, "--alone", wrong)


def test_weights_in_fewer_bytes_are_decoded(run, monkeypatch, capsys):
    small = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    for key, value in small.items():
        monkeypatch.setitem(decode_weights.SHAPE, key, value)
    monkeypatch.setitem(decode_weights.COMMON, "vocab_size", 64)
    read_rate = decode_weights.bandwidth.read_rate
    monkeypatch.setattr(
        decode_weights.bandwidth,
        "read_rate",
        lambda gigabytes, large_pages: read_rate(1e-3, 1, 2, large_pages),
    )
    rows = run(decode_weights, "--new=3", "--repeats=1", "--batches=1")["rows"]
    sizes = {row["weights"]: row["memory_bytes"] for row in rows}
    assert sorted(sizes, key=sizes.get) == ["int4", "int8", "bfloat16", "float32"]
    for row in rows:
        assert 0 < row["read_bytes"] < row["memory_bytes"] and row["rate"] > 0
    assert "of the rate (quickest " in capsys.readouterr().out


def test_decode_says_what_is_missing(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        run(decode)
    assert "torch is missing" in capsys.readouterr().err


PROGRAM = """
  %a = f32[64,16]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dims={0}
  %b = (f32[8]{0}, bf16[2,4]{1,0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}
  %c = (s32[3,2]{1,0}, s32[3,2]{1,0}) all-to-all(%u, %v), replica_groups={{0,1}}
  %d = f32[] all-reduce-start(%s), replica_groups={{0,1,2,3}}, to_apply=%add
  %e = pred[5]{0} collective-permute(%m), source_target_pairs={{0,1},{1,0}}
  %f = f32[100]{0} all-reduce(%alone), replica_groups={{0},{1}}, to_apply=%add
  %g = f32[100]{0} all-gather(%alone), replica_groups=[8,1]<=[8], dimensions={0}
  %h = f32[100]{0} add(%all-reduce, %all-gather)
"""


def test_bytes_of_collectives_are_those_of_their_results():
    assert sharded_step.collective_bytes(PROGRAM) == {
        **{"all-gather": 64 * 16 * 4, "all-reduce": 8 * 4 + 8 * 2 + 4},
        **{"all-to-all": 2 * 6 * 4, "collective-permute": 5},
    }


def test_rows_of_meshes_are_over_one_baseline():
    seconds = {
        name: {"wall": [wall] * 3, "cpu": [1.0] * 3}
        for name, wall in ((sharded_step.ONE, 2.0), ("a", 3.0), ("b", 4.0))
    }
    rows = sharded_step.rows_of(seconds, {"a": {"compile_s": 7}, "b": {}})
    assert {name: row["ratio"] for name, row in rows.items()} == {"a": 1.5, "b": 2.0}
    assert rows["a"]["compile_s"] == 7


def test_bytes_of_a_small_step_are_pinned(tmp_path):
    """A dense and an expert layer of width 32; 4 rows of 32 tokens on 2 devices.

    There and back, and again in the backward pass: room for the 64 rows of each device
    in float32. Beside them 8 bytes of id and gate for k = 2 slots, and their gradients.
    """
    cfg = runs.config(tmp_path, "model.vocab=264", "scan_layers=False")
    mesh = MeshConfig(data=1, expert=2, exchange="all_to_all")
    _, text = sharded_step.compiled_step(cfg, mesh, jax.devices()[:2])
    found = sharded_step.collective_bytes(text)
    assert found.pop("all-to-all") == 4 * (2 * 64 * 32 * 4) + 2 * (2 * 64 * 2 * 8)
    params = flat_paths(states.model_spec(cfg.model).params)
    copied = num_bytes([p for path, p in params.items() if "experts" not in path])
    # Gradients of what both devices hold, and a few figures.
    assert copied <= found.pop("all-reduce") < copied + 500
    assert not found


def test_the_tuner_without_a_device_compares_and_writes_nothing(monkeypatch, capsys):
    before = tuned.PATH.read_text()
    args = ["tune", "--dry-run", "--implementations=tpu", "--operations=product"]
    monkeypatch.setattr("sys.argv", args)
    tune.main()
    assert "product" in capsys.readouterr().out
    assert tuned.PATH.read_text() == before


def test_the_tuner_refuses_wrong_results():
    good = [np.ones((2, 2), np.float32)]
    tune.check(good, good, 1e-3)
    with pytest.raises(AssertionError):
        tune.check([good[0] + 0.1], good, 1e-3)


@pytest.mark.parametrize("module", [moe_layer, grouped_matmul])
@pytest.mark.parametrize("wrong", ["--loads=zip", "--shape=1,2", "--others=mega"])
def test_typos_are_one_line(monkeypatch, capsys, module, wrong):
    monkeypatch.setattr("sys.argv", ["x", wrong])
    with pytest.raises(SystemExit):
        module.main()
    assert "one of" in (error := capsys.readouterr().err) or "none of" in error


@pytest.mark.parametrize("load", common.LOADS)
def test_loads_have_no_repeats_and_the_skew_they_say(load):
    T, K, E = 512, 2, 16
    expert_TK = common.experts_of(load, T, K, E)
    assert expert_TK.shape == (T, K) and expert_TK.min() >= 0 and expert_TK.max() < E
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()
    share = np.bincount(expert_TK.ravel(), minlength=E).max() / T
    low, high = {
        "balanced": (0.125, 0.125),
        "half": (0.5, 0.75),
        "one": (1.0, 1.0),
        "two": (1.0, 1.0),
        "empty": (1.0, 1.0),
    }.get(load, (0.125, 0.8))
    assert low <= share <= high
