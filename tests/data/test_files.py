"""Which files a path leads to, as people's folders are: links, hidden, empty, twice."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moex.config.base import ConfigError
from moex.data import cache
from moex.data.files import find_files
from moex.data.sources import ArrayRecord, Parquet, PromptResponse, Text
from tests.data.test_sources import fails, write_records


def write(root, *names, text="text of {}"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.format(name))


def names(*paths, say=None):
    return [f.name for f in find_files(tuple(map(str, paths)), "p", say)]


def test_hidden_files_and_folders_are_left_out_unless_named(tmp_path):
    write(tmp_path, "a.txt", "b/c.txt", ".git/config", "b/.ipynb_checkpoints/c.txt")
    write(tmp_path, ".DS_Store", ".hidden/own.txt")
    assert names(tmp_path) == ["a.txt", "b/c.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "c.txt"]
    assert names(tmp_path / ".hidden") == ["own.txt"]
    assert names(tmp_path / ".DS_Store") == [".DS_Store"]
    assert names(tmp_path / ".git" / "*") == ["config"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "**/**/*.txt"])
def test_a_linked_folder_is_read_in_a_folder_and_by_a_glob(tmp_path, pattern):
    write(tmp_path / "elsewhere", "x.txt", "deep/y.txt")
    write(tmp_path / "data", "a.txt")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    found = find_files((str(tmp_path / "data" / pattern),), "p")
    at = [f.path.relative_to(tmp_path / "data").as_posix() for f in found]
    assert sorted(at) == ["a.txt", "more/deep/y.txt", "more/x.txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_in_circles_end(tmp_path, pattern):
    """Followed one after the other, these would make 2^40 paths."""
    write(tmp_path, "a/1.txt", "b/2.txt")
    for folder in ("a", "b"):
        for other in ("a", "b", "."):
            (tmp_path / folder / f"to_{other[0].replace('.', 'root')}").symlink_to(
                tmp_path / other
            )
    (tmp_path / "a" / "up").symlink_to("../..")  # all that lies beside the data
    (tmp_path / "a" / "self").symlink_to("self")
    write(tmp_path.parent, f"{tmp_path.name}_beside.txt")
    found = find_files((str(tmp_path / pattern),), "p")
    assert [f.path.name for f in found] == ["1.txt", "2.txt"]
    assert "to_" not in "".join(str(f.path.relative_to(tmp_path)) for f in found)


def test_a_file_that_two_paths_lead_to_is_read_once(tmp_path):
    write(tmp_path, "z.txt", "other.txt")
    (tmp_path / "a_link.txt").symlink_to("z.txt")
    said = []
    assert names(tmp_path, say=said.append) == ["other.txt", "z.txt"]  # not the link
    (line,) = said
    assert line == f"data: p: {tmp_path / 'a_link.txt'}: named twice and read once"
    said.clear()
    paths = (tmp_path, tmp_path / "z.txt", f"{tmp_path}/./o*", tmp_path / "a_link.txt")
    assert names(*paths, say=said.append) == ["other.txt", "z.txt"]
    assert len(said) == 1 and "and 3 more" in said[0]
    assert names(tmp_path / "a_link.txt", say=said.append) == ["a_link.txt"]
    assert len(said) == 1


def test_empty_files_and_broken_links_are_left_out_and_said(tmp_path):
    write(tmp_path, "a.txt")
    for name in ("__init__.py", "b.txt"):
        (tmp_path / name).touch()
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    said = []
    assert names(tmp_path, say=said.append) == ["a.txt"]
    assert said == [
        f"data: p: {tmp_path / '__init__.py'} and 1 more: empty and left out",
        f"data: p: {tmp_path / 'gone'} and 1 more: no file to read",
    ]
    with pytest.raises(ConfigError, match=r"p: all 2 files are empty \(.*b.txt, ..."):
        names(tmp_path / "b.txt", tmp_path / "__init__.py")


def test_a_scan_says_it_once(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "b.txt").touch()
    said = []
    made = cache.scan(Text(paths=(str(tmp_path),)), "s", said.append)
    assert [name for name, *_ in made["files"]] == ["a.txt"]
    assert len(said) == 1 and "b.txt: empty" in said[0]


def test_a_name_that_is_no_unicode_is_a_name(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w", encoding="utf-8") as f:
        f.write("text")
    source = Text(paths=(str(tmp_path),))
    assert [d.value for d in source.read("s")] == ["text"]
    assert len([*source.documents("train"), *source.documents("eval")]) == 1
    cache.scan(source, "s")


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + "é\ufeff".encode())
    assert [d.value for d in Text(paths=(str(tmp_path),)).read("s")] == ["é\ufeff"]
    line = b'{"prompt": "a", "response": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(BOM + line + line)
    source = PromptResponse(paths=(str(tmp_path / "a.jsonl"),))
    assert [d.value for d in source.read("s")] == [("a", "b")] * 2
    (tmp_path / "a.txt").write_bytes(BOM + b"ab\xff")
    fails(Text(paths=(str(tmp_path / "a.txt"),)), "a.txt", "0xff at offset 5")
    (tmp_path / "a.txt").write_bytes("a".encode("utf-16"))
    fails(Text(paths=(str(tmp_path / "a.txt"),)), "a.txt", "0xff at offset 0")


TEXTS = ["one", None, "two é", "one", ""]


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view()),
        *(
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int32(), pa.large_string()),
        ),
    ],
    ids=str,
)
def test_every_kind_of_text_column(kind, tmp_path):
    array = pa.array(TEXTS, pa.string())
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array
    pq.write_table(pa.table({"text": array.cast(kind)}), tmp_path / "a.parquet")
    source = Parquet(paths=(str(tmp_path),))
    cache.scan(source, "s")
    found = pq.ParquetFile(tmp_path / "a.parquet").schema_arrow.field(0).type
    assert pa.types.is_dictionary(found) == pa.types.is_dictionary(kind)
    assert [d.value for d in source.read("s")] == TEXTS


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64(), 2)),
    ],
    ids=str,
)
def test_every_kind_of_id_column(kind, tmp_path):
    rows = [[1, 2], None, [7, 300]]
    pq.write_table(pa.table({"ids": pa.array(rows, kind)}), tmp_path / "a.parquet")
    source = Parquet(paths=(str(tmp_path),), column="ids", kind="tokens")
    cache.scan(source, "s")
    values = [
        d.value if d.value is None else d.value.tolist() for d in source.read("s")
    ]
    assert values == rows


def test_a_null_among_token_ids_names_its_row(tmp_path):
    rows = [[1, 2], [3, None, 4]]
    pq.write_table(pa.table({"ids": rows}), tmp_path / "a.parquet")
    source = Parquet(paths=(str(tmp_path),), column="ids", kind="tokens")
    fails(source, ".column = 'ids'", "row 1 of", "a.parquet", "has a null")


def test_two_columns_of_one_name(tmp_path):
    file = tmp_path / "a.parquet"
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, names=["text", "text", "own"]), file)
    fails(Parquet(paths=(str(file),)), ".column = 'text'", "a.parquet has 2 columns")
    fails(Parquet(paths=(str(file),), column="txt"), "Did you mean 'text'")
    own = Parquet(paths=(str(file),), column="own")
    assert [d.value for d in own.read("s")] == ["c"]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_parquet_file_is_named(tmp_path, compression):
    file = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 40))) for _ in range(200)]
    pq.write_table(pa.table({"text": texts}), file, compression=compression)
    whole = file.read_bytes()
    refused = 0
    for at in range(4, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        source = Parquet(paths=(str(file),))
        try:
            source.check_file(find_files(source.paths, "s")[0], "s")
            for _ in source.read("s"):
                pass
        except ConfigError as e:
            refused += 1
            assert "a.parquet" in str(e) and "\n" not in str(e)
    assert refused > 3  # the text itself has no checksum
    for size in (3, 8, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        fails(Parquet(paths=(str(file),)), "a.parquet is not a Parquet file")


def test_a_damaged_array_record_file_is_named(tmp_path):
    file = tmp_path / "a.arrayrecord"
    records = [f"record {i} ".encode() * 30 for i in range(200)]
    write_records(file, records)
    whole = file.read_bytes()
    refused = 0
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        source = ArrayRecord(paths=(str(file),))
        try:
            source.check_file(find_files(source.paths, "s")[0], "s")
            values = [d.value.encode() for d in source.read("s")]
            assert values == records  # a byte of padding
        except ConfigError as e:
            refused += 1
            assert "a.arrayrecord" in str(e) and "\n" not in str(e)
    assert refused > 3
