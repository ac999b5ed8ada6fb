"""Files of a command line become sources, all of which is held out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from moex.config.base import ConfigError
from moex.data.from_paths import given_sources
from moex.data.sources import ArrayRecord, Parquet, PromptResponse, Text


@pytest.fixture
def files(tmp_path):
    """A file of each kind, with what is read from it."""
    (tmp_path / "a.TXT").write_text("text")
    pair = {"prompt": "p", "response": "r"}
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(pair) + "\n")
    pq.write_table(pa.table({"text": ["row", "rows"]}), tmp_path / "c.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "d.arrayrecord"), "group_size:1")
    writer.write(b"record")
    writer.close()
    return {
        "a.TXT": (Text, ["text"]),
        "b.jsonl": (PromptResponse, [("p", "r")]),
        "c.parquet": (Parquet, ["row", "rows"]),
        "d.arrayrecord": (ArrayRecord, ["record"]),
    }


def test_the_suffix_says_what_reads_a_file(files, tmp_path):
    sources = given_sources([str(tmp_path / name) for name in files])
    assert [s.label() for s in sources] == ["a", "b", "c", "d"]
    for source, (kind, values) in zip(sources, files.values(), strict=True):
        assert type(source) is kind
        assert [d.value for d in source.documents("eval")] == values
        assert not list(source.documents("train"))


def test_names_are_as_short_as_they_can_be(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    paths = [f"{tmp_path}/x/a.txt", f"{tmp_path}/y/a.txt", f"{tmp_path}/*/*.txt"]
    assert [s.label() for s in given_sources(paths)] == paths
    paths = [f"{tmp_path}/x", f"{tmp_path}/y/a.txt"]
    assert [s.label() for s in given_sources(paths)] == ["x", "a"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "t"}', "prompt = 'prompt': {file}:1 has the fields text"),
        ("a.jsonl", "text", "PromptResponse.paths: {file}:1: is not JSON"),
        ("a.parquet", "text", "Parquet.paths: {file} is not a Parquet file"),
        ("a.arrayrecord", "text", "ArrayRecord.paths: {file} is not an ArrayRecord"),
        ("a.json", "{}", "{file} must end in one of .txt, "),
        ("a.jsnl", "{}", " Did you mean '.jsonl'? "),
        ("text", "text", "{file} must end in one of .txt, "),
    ],
)
def test_what_needs_settings_is_refused(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ConfigError) as e:
        given_sources([str(file)])
    assert str(e.value).startswith(f"--data = '{file}': ")
    assert words.format(file=file) in str(e.value)
    assert "by --config.data or --config=FILE" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_column_of_another_name(tmp_path):
    pq.write_table(pa.table({"body": ["row"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"Parquet.column = 'text'.*columns body"):
        given_sources([str(tmp_path / "a.parquet")])


def test_files_of_two_kinds(files, tmp_path):
    with pytest.raises(ConfigError, match=r"one kind.* \.txt and \.jsonl and \.parq"):
        given_sources([str(tmp_path)])
