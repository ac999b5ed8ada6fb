"""Gates of adapters by type: from logs and traces into tables and reports."""

import json
import math

import numpy as np
import pytest

from moex import cli
from moex.analysis.gates import Gates, by_type, gates_of, read_gates, table
from moex.analysis.trace import Trace
from moex.config.base import ConfigError
from moex.json_files import dump_json
from moex.report import gates as report_gates
from moex.report.material import read as read_material
from moex.runs.directory import RunDir
from tests import runs

# Of two types and four experts, of which one uses the first alone, the other all.
RECORD = {
    "tokens_by_type": [4.0, 8.0],
    "load_frac_by_type": [[[1.0, 0.0, 0.0, 0.0]], [[0.25] * 4]],
    "entropy_by_type": [[0.0], [math.log(4)]],
    "dead_frac_by_type": [[0.75], [0.0]],
    "entropy": [0.9],
}
UNSEEN = RECORD | {
    "tokens_by_type": [0.0, 8.0],
    "load_frac_by_type": [[[None] * 4], [[0.25] * 4]],
    "entropy_by_type": [[None], [1.0]],
    "dead_frac_by_type": [[None], [0.5]],
}


def test_figures_of_a_type_are_means_over_matrices_that_saw_it():
    found = by_type(gates_of({"a": RECORD, "b": UNSEEN}, "file"))
    assert found["tokens"].tolist() == [2, 8]
    np.testing.assert_allclose(found["entropy"], [0, (math.log(4) + 1) / 2])
    assert found["dead_frac"].tolist() == [0.75, 0.25]
    assert found["max_load"].tolist() == [4, 1]
    text = table(gates_of({"a": UNSEEN}, "file")).splitlines()
    assert text[2].split() == ["0", "0"]
    assert text[3].split() == ["1", "8", "1.0000", "0.5000", "1.0000"]


def test_a_log_is_read_by_kind_and_a_last_half_line_is_left_out(tmp_path):
    file = tmp_path / "adapters.jsonl"
    lines = [
        {"kind": kind, "step": step, "matrices": {"a": RECORD}}
        for kind, step in (("train", 2), ("train", 1), ("eval", 2), ("train", 2))
    ]
    file.write_text("\n".join(map(dump_json, lines)) + '\n{"kind": "tr')
    found = read_gates(file)
    assert found["train"].step_S.tolist() == [1, 2]
    assert found["eval"].by_type["max_load"].tolist() == [[4, 1]]
    assert isinstance(found["train"].last["a"], Gates)
    assert read_gates(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"load_frac_by_type": None}, "line 1: a: load_frac_by_type"),
        ({"load_frac_by_type": [[[1.0], [1.0, 2.0]]]}, "that fit together"),
        ({"tokens_by_type": [1.0]}, "that fit together"),
        ({"entropy_by_type": "x"}, "line 1: a: entropy_by_type"),
    ],
)
def test_a_damaged_record_is_one_clear_line(tmp_path, change, told):
    file = tmp_path / "adapters.jsonl"
    line = {"kind": "train", "step": 1, "matrices": {"a": RECORD | change}}
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=told) as error:
        read_gates(file)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "types"),
    [
        (
            "LoRAMoE(experts=2, rank=2, alpha=4.0, targets=('attention', 'experts'), "
            "types=(1,), beta=0.1)",
            2,
        ),
        ("MoRAM(rank=4, k=2, alpha=4.0, targets=('w_kv', 'experts'))", 1),
    ],
)
def test_a_run_a_trace_and_a_report_tell_of_gates(tmp_path, capsys, adapter, types):
    run, file = tmp_path / "run", tmp_path / "trace.parquet"
    with runs.one_device():
        own = ("steps=2", f"model.adapter={adapter}", "eval.every=2")
        runs.train(tmp_path, run, *own)
        cli.main(["trace", str(run), f"--out={file}", "--tokens=100"])
    logged = read_gates(RunDir(run).adapters)
    with Trace.open(file) as trace:
        gates, tokens = trace.gates, trace.num_tokens
    assert gates.keys() == logged["eval"].last.keys()
    seen = {
        name: own.tokens_Y.sum() for name, own in gates.items() if "attention" in name
    }
    assert all(count > 0 for count in seen.values()) and tokens == 100
    for own in gates.values():
        assert len(own.tokens_Y) == types
        load = own.load_YNE[own.tokens_Y > 0]
        np.testing.assert_allclose(load.sum(axis=-1), 1, rtol=1e-5)
    capsys.readouterr()
    cli.main(["analyse", str(file)])
    assert f"gates of {len(gates)} adapted matrices" in capsys.readouterr().out
    cli.main(["analyse", str(file), "--json"])
    told = json.loads(capsys.readouterr().out)["adapters_by_type"]
    assert len(told["entropy"]) == types
    (section,) = report_gates.sections(read_material(RunDir(run)))
    assert "type" in section.about.lower()

    assert len(section.parts[0].plots) == 3
