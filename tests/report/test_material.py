"""The files of a run directory that a report reads, as other hands may leave them."""

import json
import math

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.runs.lines import read_routing

HEAD = '{"kind": "train", "step": 1, "layers": '
LINES = {
    "{}": "has no field 'kind'",
    "[]": "must be a JSON object, not a list",
    '{"kind": "train", "step": 1}': "has no field 'layers'",
    '{"kind": ["a"], "step": 1, "layers": {}}': "kind = ['a']: must be str",
    '{"kind": "train", "step": "1", "layers": {}}': "step = '1': must be int",
    '{"kind": "train", "step": -1, "layers": {}}': "step = -1: must be in 0 to",
    '{"kind": "train", "step": 1e300, "layers": {}}': "step = 1e+300: must be int",
    HEAD + "[]}": "layers = []: must be mapping of str to dict, not a list",
    HEAD + '{"001": [1]}}': "must be mapping of str to dict",
    HEAD + '{"001": {"entropy": "1.5"}}}': "001: entropy = '1.5': must be float",
    HEAD + '{"001": {"entropy": [1.5]}}}': "001: entropy = [1.5]: must be float",
    HEAD + '{"001": {"load_frac": 1.5}}}': "001: load_frac = 1.5: must be list of",
    HEAD + '{"001": {"load_frac": []}}}': "001: load_frac = []: must be not empty",
    HEAD + '{"001": {"load_frac": [[1], [1, 2]]}}}': "must be list of float or None",
    HEAD + '{"001": {"load_frac": [1, "a"]}}}': "must be list of float or None",
    HEAD + '{"001": {"entropy": 1' + "0" * 400 + "}}}": "a number that floats hold",
    HEAD + '{"001": {"entropy": 1}}': "is not JSON",
    HEAD + "[" * 100_000 + "}": "nested too deep",
    HEAD + '{"001": {"entropy": \xff}}}': "is not UTF-8",
}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_of_routing_that_is_none_of_moex(tmp_path, line):
    file = tmp_path / "routing.jsonl"
    file.write_bytes(b"%s\n" % line.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        read_routing(file)
    assert str(error.value).startswith(f"{file}, line 1: ")
    assert LINES[line] in str(error.value)
    assert len(str(error.value)) < len(str(file)) + 300


@pytest.mark.parametrize("label", ["", ".", ".1", "1.", "a", "-1", "\u0663", "1.1.1"])
def test_labels_are_numbers_of_layers(tmp_path, label):
    file = tmp_path / "routing.jsonl"
    layers = json.dumps({label: {"entropy": 1.0}})
    file.write_text(f"{HEAD}{layers}}}\n")
    with pytest.raises(ConfigError, match=r"is no layer, such as '003' or '003\.1'"):
        read_routing(file)


def test_null_and_the_nan_of_old_logs_are_nan_and_other_lengths_are_missing(tmp_path):
    file = tmp_path / "routing.jsonl"
    lines = [
        '{"kind": "train", "step": 1, "layers": {"001": {"entropy": null, '
        '"load_frac": [null, 1.0]}}}',
        '{"kind": "train", "step": 2, "layers": {"001": {"entropy": NaN, '
        '"load_frac": [0.5, 1e300]}}}',
        '{"kind": "train", "step": 3, "layers": {"001": {"entropy": 2, '
        '"load_frac": [0.5, 0.5, 0.0]}}}',
    ]
    file.write_text("\n".join(lines) + "\n" + '{"kind": "train", "st')
    figures = read_routing(file)["train"].layers["001"]
    np.testing.assert_array_equal(figures["entropy"], [math.nan, math.nan, 2])
    load = figures["load_frac"]
    assert load.shape == (3, 3)
    np.testing.assert_array_equal(load[2], [0.5, 0.5, 0.0])
    assert np.isnan(load[:2]).all()
