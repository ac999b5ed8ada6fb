"""Checkpoint folders: what is refused, slices, and reading back what was written."""

import json
import os
import stat
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from moex.config.base import ConfigError
from moex.interop.folder import INDEX, SINGLE, Folder, extra_files
from moex.interop.writing import Tensor, write

DTYPES = ("float32", "bfloat16", "float16", "int64", "float8_e4m3fn", "bool", "uint8")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sample(dtype, shape=(6, 5, 4)):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * 8).astype(np.dtype(dtype))


def tensor(name, value):
    return Tensor(name, value.shape, value.dtype, lambda: value)


def checkpoint(root, name="model", shards=2):
    """A folder with tensors `a` and `b`, in `shards` files."""
    path = root / name
    tensors = [tensor("a", sample("float32")), tensor("b", sample("bfloat16"))]
    size = 1 << 30 if shards == 1 else 1
    write(path, tensors, max_shard_bytes=size, files={"config.json": "{}"})
    return path


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def refused(path, *words):
    """Opening fails in one line that has all the words."""
    with pytest.raises(ConfigError) as e:
        Folder.open(path)
    text = str(e.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("shards", [1, 2])
def test_round_trip(tmp_path, shards):
    values = {d: sample(d) for d in DTYPES}
    values |= {"scalar": np.array(3.0), "empty": np.zeros((3, 0), np.float32)}
    values["transposed"] = sample("float32").T  # strides of its own
    size = 1 << 30 if shards == 1 else 500
    path = tmp_path / "deep" / "model"
    tensors = [tensor(k, v) for k, v in values.items()]
    write(path, tensors, max_shard_bytes=size, files={"config.json": '{"x": 1}'})
    folder = Folder.open(path)
    assert folder.path == path and folder.config == {"x": 1}
    assert folder.names == set(values)
    for name, value in values.items():
        got = folder[name].read()
        assert folder[name].shape == got.shape == value.shape
        assert folder[name].dtype == got.dtype == value.dtype
        assert got.tobytes() == value.tobytes()
        assert got.flags.writeable and not isinstance(got, np.memmap)
        assert folder[name].file.parent == path
    files = sorted(p.name for p in path.glob("*.safetensors"))
    assert (path / INDEX).exists() == (shards > 1)
    if shards == 1:
        assert files == [SINGLE]
        return
    count = len(files)
    assert files == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    index = json.loads((path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(v.nbytes for v in values.values())}
    assert list(index["weight_map"]) == list(values)  # in the order given
    for file in files:
        with safe_open(path / file, framework="numpy") as f:
            assert f.metadata() == {"format": "pt"}
            names = list(f.keys())
            size = sum(values[n].nbytes for n in names)
            assert size <= 500 or len(names) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_equal_those_of_the_whole(tmp_path, dtype):
    value = sample(dtype)
    write(tmp_path / "m", [tensor("a", value)], files={"config.json": "{}"})
    folder = Folder.open(tmp_path / "m")
    full = slice(None)
    for index in [
        *((), (2,), (-1,), (slice(1, 3),), (full, 3), (full, full, slice(1, 3))),
        *((slice(4, 99),), (slice(3, 1),), (slice(None, None, 2), 1), (5, 4, 3)),
        (slice(None, None, -1), slice(0, 5, 3)),
    ]:
        got, want = folder["a"].read(index), np.asarray(value[index])
        assert got.shape == want.shape and got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()
    with pytest.raises(IndexError):
        folder["a"].read((6,))


def test_a_slice_does_not_load_the_tensor(tmp_path):
    # A sparse file: 64 MB that take no disk and no time to write.
    header = json.dumps(
        {"a": {"dtype": "BF16", "shape": [8192, 4096], "data_offsets": [0, 1 << 26]}}
    ).encode()
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / SINGLE, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + (1 << 26))
    tracemalloc.start()
    try:
        folder = Folder.open(tmp_path)
        assert folder["a"].read((slice(5, 7),)).shape == (2, 4096)
        assert folder["a"].read((slice(None), 17)).shape == (8192,)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_only_one_tensor_is_in_memory_when_writing(tmp_path):
    size = 1 << 20
    tensors = [
        Tensor(str(i), (size,), np.dtype(np.uint8), lambda: np.zeros(size, np.uint8))
        for i in range(6)
    ]
    tracemalloc.start()
    try:
        write(tmp_path / "m", tensors)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()


def test_files_are_those_of_an_index_with_the_same_tensors(tmp_path):
    names = {"a": "second.safetensors", "b": "first.safetensors"}
    index = {"metadata": {"by": "them", "total_size": 1}, "weight_map": names}
    tensors = [tensor(n, sample("float32")) for n in "ba"]
    write(tmp_path / "m", tensors, files={"config.json": "{}"}, index=index)
    got = json.loads((tmp_path / "m" / INDEX).read_text())
    assert got["weight_map"] == names and [*got["weight_map"]] == ["a", "b"]
    assert got["metadata"] == {"by": "them", "total_size": 960}
    folder = Folder.open(tmp_path / "m")
    assert {n: folder[n].file.name for n in names} == names
    more = [*tensors, tensor("c", sample("float32"))]
    write(tmp_path / "more", more, files={"config.json": "{}"}, index=index)
    assert Folder.open(tmp_path / "more")["a"].file.name == SINGLE


def test_no_folder(tmp_path):
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")


def test_config_json(tmp_path):
    path = checkpoint(tmp_path)
    for text, word in [
        *[("{", "not JSON"), ("[]", "a JSON object"), (b"\xff", "not JSON")],
        *[('{"a": ' * 100_000, "nested"), ('{"a": 1, "a": 2}', "twice")],
        *[('{"a": NaN}', "NaN"), (f'{{"a": {"9" * 5000}}}', "not JSON")],
    ]:
        (path / "config.json").write_bytes(text if text == b"\xff" else text.encode())
        refused(path, "config.json", word)
    (path / "config.json").unlink()
    refused(path, "no config.json")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickles(tmp_path, suffix):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "neither model.safetensors nor")
    (tmp_path / f"weights{suffix}").write_bytes(b"")
    refused(tmp_path, f"weights{suffix}", "runs code", "safe_serialization=True")


def test_index(tmp_path):
    path = checkpoint(tmp_path)
    good = (path / INDEX).read_text()
    for text, word in [
        *[("nope", "not JSON"), ("[]", "a JSON object"), ("{}", "no weight_map")],
        *[('{"metadata": [], "weight_map": {}}', "metadata = []: must be")],
        *[('{"weight_map": {}}', "no weight_map")],
        *[('{"weight_map": ["a"]}', "no weight_map")],
    ]:
        (path / INDEX).write_text(text)
        refused(path, INDEX, word)
    (path / INDEX).write_text(good)
    (path / SINGLE).write_bytes((path / SHARDS[0]).read_bytes())
    refused(path, "has both")


def test_file_names_that_lead_out_of_the_folder(tmp_path):
    path = checkpoint(tmp_path)
    (tmp_path / "out.safetensors").write_bytes((path / SHARDS[0]).read_bytes())
    for file in [
        *("../out.safetensors", str(tmp_path / "out.safetensors"), "..", ".", ""),
        *("..\\out.safetensors", "sub/out.safetensors", "C:out.safetensors"),
        *("a\0.safetensors", "weights.bin", 3, None),
    ]:
        edit_index(path, lambda m, file=file: m.update(a=file))
        refused(path, INDEX, "'a'", "plain name")


def test_shards(tmp_path):
    path = checkpoint(tmp_path, "absent")
    (path / SHARDS[1]).unlink()
    refused(path, SHARDS[1], "'b'", "missing")

    path = checkpoint(tmp_path, "short")
    data = (path / SHARDS[0]).read_bytes()
    for part in (data + b"0", data[:20], b"", b"\xff" * 64, data[:8] + b"[" * 99):
        (path / SHARDS[0]).write_bytes(part)
        refused(path, SHARDS[0], "truncated or")
    (path / SHARDS[0]).write_bytes(data[:-1])
    end = f"the tensor 'a' ends at byte {len(data):,}, the file at {len(data) - 1:,}"
    refused(path, SHARDS[0], "truncated:", end)

    path = checkpoint(tmp_path, "one", shards=1)
    data = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(data[: -sample("bfloat16").nbytes])  # 'a' is whole
    refused(path, SINGLE, "truncated:", "the tensor 'b' ends")

    path = checkpoint(tmp_path, "both")
    save_file({"a": sample("int64"), "b": sample("int64")}, path / SHARDS[1])
    refused(path, "'a'", "in two shards", *SHARDS)

    path = checkpoint(tmp_path, "unlisted")
    save_file({"b": sample("int64"), "c": sample("int64")}, path / SHARDS[1])
    refused(path, SHARDS[1], "'c'", "not in")

    path = checkpoint(tmp_path, "elsewhere")
    edit_index(path, lambda m: m.update(c=SHARDS[0]))
    refused(path, SHARDS[0], "no tensor 'c'")

    path = checkpoint(tmp_path, "swapped")
    edit_index(path, lambda m: m.update(a=SHARDS[1], b=SHARDS[0]))
    refused(path, SHARDS[1], "no tensor 'a'")


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = [
    *({"a": F32 | {"shape": [-2]}}, {"a": F32 | {"shape": [2**63]}}),
    *(
        {"a": F32 | {"shape": [[2]]}},
        {"a": F32 | {"shape": "2"}},
        {"a": F32 | {"x": 1}},
    ),
    *({"a": F32 | {"data_offsets": [8, 0]}}, {"a": F32 | {"data_offsets": [-8, 8]}}),
    *({"a": F32 | {"data_offsets": [0, 2**70]}}, {"a": F32 | {"data_offsets": [0]}}),
    *({"a": F32, "b": F32}, {"a": F32, "b": F32 | {"data_offsets": [4, 12]}}),
    *({"a": F32 | {"dtype": "F33"}}, {"a": F32 | {"dtype": ["F32"]}}, {"a": {}}),
    *({"a": None}, {"a": [F32]}, [], None, 3, {"__metadata__": 3, "a": F32}),
    *("[" * 50_000, '{"a":' * 50_000, '{"a": 1, "a": 2}', '{"a": NaN}'),
]


@pytest.mark.parametrize("header", HEADERS, ids=[str(h)[:60] for h in HEADERS])
def test_headers_of_any_content(tmp_path, header):
    """Refused, or read as it says: a field that nobody knows changes nothing."""
    (tmp_path / "config.json").write_text("{}")
    text = header if isinstance(header, str) else json.dumps(header)
    whole = len(text).to_bytes(8, "little") + text.encode() + bytes(8)
    (tmp_path / SINGLE).write_bytes(whole)
    if header == {"a": F32 | {"x": 1}}:
        assert not Folder.open(tmp_path)["a"].read().any()
    else:
        refused(tmp_path, SINGLE)


@pytest.mark.parametrize("size", [0, 9, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_headers_of_any_length(tmp_path, size):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / SINGLE).write_bytes(size.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        refused(tmp_path, SINGLE, "truncated or")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_types_that_numpy_does_not_have(tmp_path):
    path = checkpoint(tmp_path, shards=1)
    save_file({"a": np.zeros(2, ml_dtypes.float8_e5m2fnuz)}, path / SINGLE)
    refused(path, SINGLE, "'a'", "F8_E5M2FNUZ")


def test_unknown_tensor(tmp_path):
    folder = Folder.open(checkpoint(tmp_path))
    with pytest.raises(ConfigError, match="no tensor 'aa'. Did you mean 'a'"):
        folder["aa"]


def test_symbolic_links_as_in_the_hub_cache(tmp_path):
    blobs = checkpoint(tmp_path, "blobs")
    path = tmp_path / "snapshots" / "abc"
    path.mkdir(parents=True)
    for file in blobs.iterdir():
        (path / file.name).symlink_to(os.path.join("../../blobs", file.name))
    np.testing.assert_array_equal(Folder.open(path)["a"].read(), sample("float32"))
    (blobs / SHARDS[0]).unlink()
    refused(path, SHARDS[0], "missing")


def test_extra_files(tmp_path):
    path = checkpoint(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (path / name).write_text("x")
    names = ["config.json", "tokenizer.json", "chat_template.jinja"]
    assert [p.name for p in extra_files(path)] == names
    copies = {p.name: p for p in extra_files(path)}
    write(tmp_path / "copy", [], files=copies)
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "x"
    assert Folder.open(tmp_path / "copy").names == set()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path, error):
    def fail():
        raise error

    bad = Tensor("b", (2,), np.dtype(np.float32), fail)
    with pytest.raises(error):
        write(tmp_path / "m", [tensor("a", sample("int64")), bad], max_shard_bytes=1)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "m", [], files={"config.json": tmp_path / "absent"})
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses(tmp_path):
    path = checkpoint(tmp_path)
    (tmp_path / "file").write_text("")
    for taken in (path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already; must be new"):
            write(taken, [tensor("a", sample("float32"))])
    assert Folder.open(path).names == {"a", "b"}

    value = sample("float32")
    new = tmp_path / "new"
    other = Tensor("w", value.shape, np.dtype(np.float16), lambda: value)
    with pytest.raises(ValueError, match="'w' was to be float16"):
        write(new, [other])
    with pytest.raises(ValueError, match=r"'w' was to be .*\(5,\).*\(6, 5, 4\)"):
        write(new, [Tensor("w", (5,), value.dtype, lambda: value)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_writing_into_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    write(
        tmp_path / "link", [tensor("a", sample("int64"))], files={"config.json": "{}"}
    )
    assert Folder.open(tmp_path / "model").names == {"a"}
    # As readable by others as any file that this user makes.
    plain = tmp_path / "plain"
    plain.write_text("")
    for file in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
