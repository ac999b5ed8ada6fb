"""What a run was started in is written at each start."""

import json

import jax
import pytest

from moex.train.environment import FILE, save_environment


def test_each_start_is_one_entry(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["moex", "train", "--workdir=a b"])
    save_environment(tmp_path, 0)
    save_environment(tmp_path, 40)
    starts = json.loads((tmp_path / FILE).read_text())
    assert [start["step"] for start in starts] == [0, 40]
    first = starts[0]
    assert first["command"] == ["moex", "train", "--workdir=a b"]
    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"].startswith(f"{jax.device_count()} x ")
    assert len(first["code"]) == 16


def test_a_damaged_file_is_begun_again(tmp_path):
    (tmp_path / FILE).write_text("[{")
    save_environment(tmp_path, 3)
    assert [s["step"] for s in json.loads((tmp_path / FILE).read_text())] == [3]
