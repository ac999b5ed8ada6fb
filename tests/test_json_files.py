"""JSON that other hands changed: read whole, or refused in one line."""

import json
import math

import pytest

from moex.config.base import ConfigError
from moex.json_files import (
    dump_json,
    field,
    parse_json,
    read_json,
    read_json_lines,
    read_object,
)

BAD = {
    "empty": (b"", "Expecting value, line 1, column 1"),
    "cut": (b'{"a": 1', "line 1, column 8"),
    "second line": (b'{\n"a": }', "line 2, column 6"),
    "not UTF-8": (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "long number": (b"1" * 5000, "4300 digits"),
    "overflow": (b"[1e999]", "no float holds the number 1e999"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "repeated key": (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_json_is_one_line_with_the_file(name, tmp_path):
    data, reason = BAD[name]
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_json(file)
    text = str(error.value)
    assert text.startswith(f"{file}: is not JSON: ")
    assert reason in text
    assert "\n" not in text
    assert len(text) < len(str(file)) + 120


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file) == [1]


def test_a_file_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.json: cannot be read \(No such file"):
        read_json(tmp_path / "no.json")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("null", "null"), ("[]", "a list"), ("1", "a number"), ('"a"', "a string")],
)
def test_an_object_is_expected(text, kind, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"must be a JSON object, not {kind}"):
        read_object(file)


def test_lines_have_numbers_and_the_unfinished_last_one_is_left_out(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": NaN}\n{"a": ')
    found = list(read_json_lines(file, nan=True))
    assert found[0] == (1, {"a": 1})
    number, line = found[1]
    assert number == 3
    assert math.isnan(line["a"])
    assert len(found) == 2
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 3: is not JSON: NaN"):
        list(read_json_lines(file))
    file.write_bytes(b"{}\n[]\n")
    with pytest.raises(ConfigError, match=r"line 2: must be a JSON object, not a list"):
        list(read_json_lines(file))


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("64", int, "'64': must be int, not a string"),
        (True, int, "True: must be int, not true or false"),
        (1.5, int | None, "1.5: must be int or None, not a number"),
        ([1, "a"], list[int], r"\[1, 'a'\]: must be list of int, not a list"),
        ({"a": "b"}, dict[str, int], "must be mapping of str to int, not an object"),
    ],
)
def test_fields_have_types(value, kind, said):
    with pytest.raises(ConfigError, match=f"^f: x = .*{said}"):
        field({"x": value}, "x", kind, "f")


def test_fields_that_fit_and_fields_that_are_missing():
    data = {"step": 3, "rate": 1, "names": ["a"]}
    assert field(data, "step", int, "f") == 3
    assert field(data, "rate", float, "f") == 1
    assert field(data, "names", list[str], "f") == ["a"]
    assert field(data, "none", int, "f", default=7) == 7
    with pytest.raises(ConfigError, match=r"f: has no field 'steps'. Did you mean"):
        field(data, "steps", int, "f")


def test_what_is_written_is_json():
    data = {"a": float("nan"), "b": [1.5, float("-inf")], "c": (1, None)}
    text = dump_json(data)
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": [1, None]}
    assert parse_json(text, "x") == json.loads(text)
