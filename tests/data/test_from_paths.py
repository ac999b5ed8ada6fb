"""Files of a command line become sources, all of which is held out."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from moex.config.base import ConfigError
from moex.data.chat import Chat
from moex.data.contract import texts_of
from moex.data.from_paths import given_sources
from moex.data.sources import ArrayRecord, Parquet, PromptResponse, Text, TextRecords


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
        (
            "a.jsonl",
            '{"txt": "t"}',
            "{file}: records must have messages, or prompt and",
        ),
        ("a.jsonl", '{"txt": "t"}', "or text, not txt. Did you mean 'text'?"),
        ("a.jsonl", "text", "{file}:1: is not JSON"),
        ("a.jsonl", '{"messages": "q"}', "{file}:1 must have a list of messages"),
        ("a.parquet", "text", "{file} is not a Parquet file"),
        ("a.arrow", "text", "{file} is damaged ("),
        ("a.txt.gz", "text", "a.txt.gz is damaged (Not a gzipped file"),
        ("a.txt.zst", "text", "a.txt.zst is damaged (ZSTD"),
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
    with pytest.raises(ConfigError, match=r"or text, not body\."):
        given_sources([str(tmp_path / "a.parquet")])
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"Parquet.column = 'text'.* int64"):
        given_sources([str(tmp_path / "b.parquet")])


MESSAGES = [
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "because"},
]
RECORDS = {
    TextRecords: {"text": "t é"},
    PromptResponse: {"prompt": "p", "response": "r", "text": "p r"},
    Chat: {"messages": MESSAGES, "prompt": "p", "text": "p r", "response": "r"},
}


def written(file, records):
    """Write records to a file of the kind that its name says."""
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = pa.Table.from_pylist(records)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines))
    elif file.suffix == ".zst":
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines)
    elif file.suffix == ".parquet":
        pq.write_table(table, file)
    elif file.suffix == ".arrow":
        with pa.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    else:
        file.write_bytes(b"\n" + lines)
    return str(file)


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".arrow", ".parquet"]
)
@pytest.mark.parametrize("kind", RECORDS)
def test_the_first_record_says_what_reads_records(kind, suffix, tmp_path):
    path = written(tmp_path / f"a{suffix}", [RECORDS[kind]] * 5)
    (source,) = given_sources([path])
    if kind is TextRecords and suffix == ".parquet":
        assert type(source) is Parquet
    else:
        assert type(source) is kind
    assert source.label() == "a"
    documents = list(source.documents("eval"))
    assert len(documents) == 5
    expected = {
        TextRecords: ("t é",),
        PromptResponse: ("p", "r"),
        Chat: ("why?", "because"),
    }
    assert texts_of(documents[-1].value) == expected[kind]


def test_a_later_record_without_its_field_is_named_by_its_line(tmp_path):
    path = written(tmp_path / "a.jsonl.gz", [{"text": "a"}, {"txt": "b"}])
    (source,) = given_sources([path])
    with pytest.raises(ConfigError, match=r"s\.field = 'text': .*a\.jsonl\.gz:2 has"):
        list(source.read("s"))


def saved_as_datasets_does(folder, records, shards=2):
    """Write the files of `datasets.save_to_disk`, version 5.2, for these records."""
    folder.mkdir(parents=True)
    size = -(-len(records) // shards)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        written(folder / name, records[i * size : (i + 1) * size])
    state = {"_data_files": [{"filename": n} for n in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return str(folder)


def test_a_folder_that_datasets_saved(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(7)]
    path = saved_as_datasets_does(tmp_path / "d" / "train", rows)
    (source,) = given_sources([path], train=True)
    assert type(source) is TextRecords and source.label() == "train"
    assert [d.value for d in source.read("s")] == [row["text"] for row in rows]
    assert len(source.files("s")) == 2  # and not the files with the metadata
    whole = tmp_path / "d" / "dataset_dict.json"
    whole.write_text('{"splits": ["train"]}')
    (source,) = given_sources([str(tmp_path / "d")])
    assert len(list(source.read("s"))) == 7
    whole.write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"splits train, test; give the folder .*in"):
        given_sources([str(tmp_path / "d")])
    (tmp_path / "d" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"state.json names data-00001-.* not there"):
        given_sources([path])


def test_files_to_train_on_hold_out_a_share(files, tmp_path):
    sources = given_sources([str(tmp_path / name) for name in files], train=True)
    assert [source.holdout for source in sources] == [0.05] * 4
    assert sources[0].holdout_ends
    for i in range(100):
        (tmp_path / f"{i}.md").write_text("a")
    (many,) = given_sources([str(tmp_path / "*.md")], train=True)
    assert not many.holdout_ends


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("line", ["é1 \n", "\u4e2d\U0001f600"])
def test_the_end_of_a_text_is_held_out(line, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("moex.data.sources.PART_BYTES", 900)
    monkeypatch.setattr("moex.data.files.LONG_LINE", 90)
    text = "\ufeff" + line * 2000
    file = tmp_path / f"a.txt{suffix}"
    if suffix == ".zst":
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(text.encode())
    else:
        file.write_bytes((gzip.compress if suffix else bytes)(text.encode()))
    (source,) = given_sources([str(file)], train=True)
    train, held_out = (list(source.documents(s)) for s in ("train", "eval"))
    parts = [document.value for document in train + held_out]
    assert "".join(parts) == text[1:]  # without the byte-order mark
    assert max(map(len, parts)) <= 1000
    assert sum(len(d.value) for d in held_out) == pytest.approx(0.05 * len(text), 0.15)
    assert len({d.key for d in train + held_out}) == len(parts)
    plain = Text(paths=(str(file),), holdout_ends=True)
    assert [d.key for d in plain.read("s")] == [d.key for d in source.read("s")]


def test_empty_files_are_left_out_while_some_text_remains(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl").write_text("\n \n")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl")]
    sources = given_sources(paths)
    assert [len(list(source.read("s"))) for source in sources] == [0, 1, 0]
    with pytest.raises(ConfigError, match=r"--data: the file .*a.txt is empty"):
        given_sources(paths[:1])


def test_files_of_two_kinds(files, tmp_path):
    with pytest.raises(ConfigError, match=r"one kind.* \.txt and \.jsonl and \.parq"):
        given_sources([str(tmp_path)])
