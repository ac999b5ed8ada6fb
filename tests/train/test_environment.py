"""What a run was started in is written at each start."""

import json

import jax
import pytest

from moex.config.base import ConfigError
from moex.runs.directory import RunDir
from moex.runs.environment import read_environment, save_environment


def test_each_start_is_one_entry(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["moex", "train", "--workdir=a b"])
    save_environment(RunDir(tmp_path), 0)
    save_environment(RunDir(tmp_path), 40)
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 40]
    first = starts[0]
    assert first["command"] == ["moex", "train", "--workdir=a b"]
    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"].startswith(f"{jax.device_count()} x ")
    assert len(first["code"]) == 16


def test_a_damaged_file_is_begun_again(tmp_path):
    file, kept = tmp_path / "environment.json", tmp_path / "environment.json.damaged"
    for text in ("[{", "{}", "[1]", "[" * 100_000, "\udcff"):
        file.write_text(text, errors="surrogateescape")
        save_environment(RunDir(tmp_path), 3)
        assert [s["step"] for s in json.loads(file.read_text())] == [3]
        assert kept.read_text(errors="surrogateescape") == text


STARTS = {
    "{}": "must be a list, not an object",
    "[1]": "entry 0: must be a JSON object, not a number",
    '[{}, {"packages": ["jax"]}]': "entry 1: packages = ['jax']: must be mapping",
    '[{"packages": {"jax": 1}}]': "must be mapping of str to str",
    '[{"command": "moex"}]': "command = 'moex': must be list of str",
    '[{"command": [1]}]': "command = [1]: must be list of str",
    "[" * 100_000: "nested too deep",
    '[{"step": "3"}]': "step = '3': must be int",
    "[NaN]": "NaN is no JSON number",
}


@pytest.mark.parametrize("text", STARTS, ids=range(len(STARTS)))
def test_an_environment_that_is_none_of_moex(tmp_path, text):
    run = RunDir(tmp_path)
    run.environment.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_environment(run)
    assert str(error.value).startswith(str(run.environment))
    assert STARTS[text] in str(error.value)
