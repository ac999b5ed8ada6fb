"""The contract of all sources, then what each refuses. Adding to SOURCES registers."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from moex.config.base import ConfigError, check, from_dict, to_dict
from moex.data import cache, sources
from moex.data.sources import (
    ArrayRecord,
    Parquet,
    PromptResponse,
    PythonStdlib,
    Source,
    Text,
)

TEXTS = [f"document {i}: é\u4e2d\U0001f600\n" for i in range(60)]
IDS = [np.arange(i, i + 3) for i in range(60)]


def text_files(root):
    for i, text in enumerate(TEXTS):
        (root / f"{i:02}.txt").write_text(text)
    return Text(paths=(str(root),))


def text_delimited(root):
    (root / "all.txt").write_text("<|>".join(TEXTS))
    return Text(paths=(str(root / "*.txt"),), delimiter="<|>")


def parquet_text(root):
    pq.write_table(pa.table({"text": TEXTS}), root / "a.parquet")
    return Parquet(paths=(str(root / "a.parquet"),))


def parquet_tokens(root):
    pq.write_table(pa.table({"ids": [i.tolist() for i in IDS]}), root / "a.parquet")
    return Parquet(paths=(str(root / "a.parquet"),), column="ids", kind="tokens")


def write_records(file, records):
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def array_record_text(root):
    write_records(root / "a.arrayrecord", [t.encode() for t in TEXTS])
    return ArrayRecord(paths=(str(root),))


def array_record_tokens(root):
    write_records(root / "a.arrayrecord", [i.astype("<u4").tobytes() for i in IDS])
    return ArrayRecord(paths=(str(root),), kind="tokens", token_dtype="uint32")


def prompt_response(root):
    rows = [{"prompt": f"q{i} ", "response": t} for i, t in enumerate(TEXTS)]
    (root / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    return PromptResponse(paths=(str(root / "a.jsonl"),))


SOURCES = [
    text_files,
    text_delimited,
    parquet_text,
    parquet_tokens,
    array_record_text,
    array_record_tokens,
    prompt_response,
]


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("make", SOURCES)
def test_contract(make, tmp_path):
    source = make(tmp_path)
    source.holdout = 0.3
    check(source)
    assert isinstance(source, Source)
    assert from_dict(json.loads(json.dumps(to_dict(source)))) == source
    values = [plain(d.value) for d in source.read("s")]
    expected = {
        "text": TEXTS,
        "tokens": [i.tolist() for i in IDS],
        "pairs": [(f"q{i} ", t) for i, t in enumerate(TEXTS)],
    }[source.content()]
    assert values == expected
    train, held_out = ([d.key for d in source.documents(s)] for s in ("train", "eval"))
    assert len(train) + len(held_out) == len(values)
    assert not set(train) & set(held_out)
    assert 5 <= len(held_out) <= 35
    assert [d.key for d in source.documents("eval")] == held_out


@pytest.mark.parametrize("make", SOURCES)
def test_more_holdout_never_moves_a_document_back(make, tmp_path):
    source = make(tmp_path)
    kept = []
    for source.holdout in (0.0, 0.1, 0.5, 0.9, 1.0):
        kept.append({d.key for d in source.documents("eval")})
    assert not kept[0]
    assert kept[0] <= kept[1] <= kept[2] <= kept[3] <= kept[4]
    assert kept[4] == {d.key for d in source.read("s")}


@pytest.mark.parametrize("delimiter", ["<|>", "\n\n", "b\n\nb", "aaa", "\u00e9"])
def test_a_delimited_file_is_read_in_pieces(delimiter, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    file = tmp_path / "a.txt"
    for size in (1, 2, 7, 30):
        monkeypatch.setattr(sources, "PART_BYTES", size)
        letters = [*"ab\n\u00e9<|>", delimiter]
        text = "".join(rng.choice(letters, 300))
        file.write_text("\ufeff" + text, encoding="utf-8")
        found = Text(paths=(str(file),), delimiter=delimiter).read("s")
        whole = [part for part in text.split(delimiter) if part]
        assert [document.value for document in found] == whole
    file.write_text("a<|>" * 1000 + "\n")
    documents = Text(paths=(str(file),), delimiter="<|>").read("s")
    monkeypatch.setattr(sources, "read_lines", lambda stream, size: stream.read(4))
    monkeypatch.setattr(sources, "decode_utf8", lambda raw, *at: next(pieces))
    pieces = iter(["a<|>"])  # a second piece would be an error
    assert next(documents).value == "a"


def test_adding_a_document_moves_no_other(tmp_path):
    source = text_delimited(tmp_path)
    source.holdout = 0.3
    before = [d.value for d in source.documents("eval")]
    (tmp_path / "all.txt").write_text("<|>".join(["first of all", *TEXTS]))
    after = [d.value for d in source.documents("eval")]
    assert [t for t in after if t != "first of all"] == before


def test_keys_do_not_depend_on_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.txt").write_text("x")
    keys = [next(Text(paths=(str(tmp_path / n),)).read("s")).key for n in ("a", "b")]
    assert keys == ["sub/x.txt", "sub/x.txt"]


def test_labels():
    assert PythonStdlib().label() == "python_stdlib"
    assert Text(paths=("a/web.txt",)).label() == "web"
    assert Text(paths=("a/*.txt",)).label() == "text"
    assert Text(paths=("a/web.txt",), name="w").label() == "w"


def test_stdlib_is_source_text_without_tests():
    source = PythonStdlib()
    names = [f.name for f in source.files("s")]
    assert names == sorted(names) and len(names) > 300
    assert "argparse.py" in names and "asyncio/events.py" in names
    assert not any("test" in n.split("/")[:-1] for n in names)
    assert not any(n.startswith("site-packages") for n in names)
    held_out = [n for n in names if source.split(n) == "eval"]
    assert 0.03 < len(held_out) / len(names) < 0.07


def fails(source, *words):
    """Scanning or reading `source` stops with one line that has all `words`."""
    with pytest.raises(ConfigError) as e:
        check(source, "data.sources[0]")
        cache.scan(source, "data.sources[0]")
        list(source.read("data.sources[0]"))
    message = str(e.value)
    assert "\n" not in message
    for word in ("data.sources[0]", *words):
        assert word in message


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    fails(Text(paths=()), "paths", "at least one")
    for name in ("none.txt", "*.none", "folder"):
        fails(Text(paths=(str(tmp_path / name),)), "paths[0]", name, "no such file")
    assert Text(paths=(str(tmp_path / "empty.txt"),)).files("s") == []
    for path in ("", " ", "~nobody/x"):
        fails(Text(paths=(path,)), "paths[0]")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xffd")
    fails(Text(paths=(str(tmp_path),)), ".paths", "a.txt", "0xff at offset 3")


def test_ranges(tmp_path):
    fails(PythonStdlib(weight=0), "weight = 0", "> 0")
    for weight in (1e308, 5e-324):
        fails(PythonStdlib(weight=weight), f"weight = {weight}: must be")
    for weight in (1.1e6, 9e-7, -1.0):  # Grain mixes by whole numbers
        fails(PythonStdlib(weight=weight), f"weight = {weight}", "in [1e-6, 1e6]")
    fails(PythonStdlib(holdout=1.1), "holdout = 1.1", "in [0, 1]")
    fails(Parquet(paths=("a",), kind="txt"), "kind", "Did you mean 'text'")
    fails(ArrayRecord(paths=("a",), token_dtype="uint61"), "Did you mean 'uint16'")


def test_parquet_refusals(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "ids": [[1]], "x": [[0.5]]}), file)
    fails(Parquet(paths=(str(file),), column="txt"), "column", "Did you mean 'text'")
    fails(Parquet(paths=(str(file),), column="ids"), "list<", "needs strings")
    for column in ("text", "x"):
        source = Parquet(paths=(str(file),), column=column, kind="tokens")
        fails(source, column, "needs lists of integers")
    file.write_text("no parquet at all")
    fails(Parquet(paths=(str(file),)), "a.parquet is not a Parquet file")


def test_parquet_null_rows_are_counted(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    source = Parquet(paths=(str(tmp_path),))
    assert [d.value for d in source.read("s")] == ["a", None]


def test_array_record_refusals(tmp_path):
    file = tmp_path / "a.arrayrecord"
    write_records(file, [b"ok", b"\xff", b"abc"])
    fails(ArrayRecord(paths=(str(file),)), "record 1 of", "offset 0")
    tokens = ArrayRecord(paths=(str(file),), kind="tokens", token_dtype="uint16")
    fails(tokens, "token_dtype", "record 1 of", "1 bytes")
    file.write_bytes(b"no records" * 10_000)
    fails(ArrayRecord(paths=(str(file),)), "not an ArrayRecord file")


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"prompt": "a", "response"', ("a.jsonl:2", "not JSON")),
        (b'["a"]', ("a.jsonl:2", "object")),
        (b"[" * 100_000, ("a.jsonl:2", "not JSON")),
        (b'{"prompt": ' + b"9" * 5000 + b"}", ("a.jsonl:2", "not JSON")),
        (b'{"prompt": "a", "prompt": "b"}', ("a.jsonl:2", "twice")),
        (b'{"prompt": "a", "respnse": "b"}', ("a.jsonl:2", "Did you mean 'respnse'")),
        (b'{"prompt": 1, "response": "b"}', ("a.jsonl:2", ".prompt", "string")),
        (b'{"prompt": "\\ud800", "response": ""}', ("a.jsonl:2", "Unicode")),
        (b'{"prompt": "\xff", "response": ""}', ("a.jsonl", "offset 45")),
    ],
)
def test_prompt_response_refusals(line, words, tmp_path):
    good = b'{"prompt": "a", "response": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + line)
    fails(PromptResponse(paths=(str(tmp_path / "a.jsonl"),)), *words)
