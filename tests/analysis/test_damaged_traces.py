"""Traces and analyses that other hands wrote or damaged: one line with the file."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moex.analysis import output, summary
from moex.analysis.header import Header
from moex.analysis.summary import analyse, compare
from moex.analysis.trace import KEY, SHARED, Trace
from moex.config.base import ConfigError
from tests.analysis import oracle


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A trace of 20 tokens, in one block, with the logits of all experts."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("traces") / "good.parquet"
    return oracle.write(path, [oracle.random_chunk(rng, 20, logits=True)], logits=True)


def rewritten(good, path, *, header=None, table=lambda table, group: table):
    """The trace again, with another header, and another table for each row group."""
    file = pq.ParquetFile(good)
    text = header or file.schema_arrow.metadata[KEY]
    writer = None
    for group in range(file.num_row_groups):
        made = table(file.read_row_group(group), group)
        made = made.replace_schema_metadata({KEY: text})
        writer = writer or pq.ParquetWriter(path, made.schema)
        writer.write_table(made.cast(writer.schema), row_group_size=max(len(made), 1))
    writer.close()
    return path


def refusal(path) -> str:
    """The one line that a trace is refused with, when it is opened or read."""
    with pytest.raises(ConfigError) as error, Trace.open(path) as trace:
        analyse(trace)
    said = str(error.value)
    assert said.startswith(str(path)), said
    assert "\n" not in said
    assert len(said) < len(str(path)) + 400
    return said


def test_a_trace_that_is_only_written_again_by_the_test_is_read(good, tmp_path):
    with Trace.open(rewritten(good, tmp_path / "t.parquet")) as trace:
        assert analyse(trace, min_count=1).num_tokens == 20
        with Trace.open(good) as other:
            assert set(compare(trace, other)) == {"001", "003.1", "003.2", "004"}


HEADERS = {
    "not JSON": ("{", "header: is not JSON"),
    "not UTF-8": (b'{"run": "\xff"}', "is not UTF-8"),
    "deep": ("[" * 100_000, "nested too deep"),
    "a list": ("[]", "header: must be a JSON object, not a list"),
    "nothing": ("{}", "of version None; this moex reads 1"),
    "a version": ({"version": [1]}, "of version [1]; this moex reads 1"),
    "no layers": ({"layers": []}, "layers = []: must be not empty"),
    "a number": ({"layers": 3}, "layers = 3: must be list of dict, not a number"),
    "numbers": ({"layers": [3]}, "layers = [3]: must be list of dict"),
    "empty layer": ({"layers": [{}]}, "layer 0: has no field 'layer'"),
    "step": ({"step": "7"}, "header: step = '7': must be int, not a string"),
    "steps": ({"step": -7}, "header: step = -7: must be 0 or more"),
    "run": ({"run": None}, "header: run = None: must be str, not null"),
    "vocabulary": ({"vocabulary": [1]}, "vocabulary = [1]: must be list of str"),
    "vocabularies": ({"vocabulary": {"a": 1}}, "must be list of str, not an object"),
    "domains": ({"domains": "ab"}, "domains = 'ab': must be list of str"),
    "many": (
        {"domains": [str(i) for i in range(10**5)]},
        "domains = 100000: must be at most 10,000 names",
    ),
    "tokenizer": ({"tokenizer": []}, "tokenizer = []: must be mapping of str to Any"),
    "data": ({"data": 1}, "data = 1: must be mapping of str to Any"),
    "logits": ({"logits": 1}, "logits = 1: must be bool"),
    "fewer tokens": ({"vocabulary": ["a"]}, "token 3 is not in [0, 1)"),
    "other domains": ({"domains": ["text"]}, "no domain is called 'code'"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(good, tmp_path, name):
    change, said = HEADERS[name]
    if isinstance(change, dict):
        text = json.dumps(json.loads(oracle.header(logits=True).to_json()) | change)
    else:
        text = change
    assert said in refusal(rewritten(good, tmp_path / "t.parquet", header=text))


LAYERS = {
    "num_experts": (2**63, "num_experts = 9223372036854775808: must be in 1 to"),
    "num_experts ": (-1, "num_experts = -1: must be in 1 to 1,048,576"),
    "num_experts  ": ("5", "num_experts = '5': must be int, not a string"),
    "num_choices": (1, "num_choices = 1: must be in 5 to"),
    "slots": (0, "slots = 0: must be in 1 to 6"),
    "slots ": (10**9, "slots = 1000000000: must be in 1 to 6"),
    "slots  ": (1, "number of slots 3 is not in [0, 2)"),
    "layer": (-1, "layer = -1: must be in 0 to 32,767"),
    "layer ": (2, "row group 0 is damaged: its layer is not that of 002"),
    "layer  ": (4, "layers = ['004', '003.1', '003.2', '004']: must be different"),
    "round": (200, "round = 200: must be in 0 to 127"),
    "round ": (1, "its round is not that of 001.1"),
    "router": (None, "router = None: must be str, not null"),
    "causal": ("yes", "causal = 'yes': must be bool"),
    "capacity_factor": ("a", "capacity_factor = 'a': must be float or None"),
    "color": ("red", "layer 0: no such field: 'color'"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(good, tmp_path, name):
    value, said = LAYERS[name]
    data = json.loads(oracle.header(logits=True).to_json())
    data["layers"][0][name.strip()] = value
    text = json.dumps(data)
    assert said in refusal(rewritten(good, tmp_path / "t.parquet", header=text))


def column(name, change):
    """A function for `rewritten` that changes the values of one column."""

    def table(table, group):
        at = table.schema.get_field_index(name)
        values = change(table.column(name).combine_chunks())
        return table.set_column(at, pa.field(name, values.type), values)

    return table


def first_of_list(value):
    def change(column):
        lists = column.to_pylist()
        at = next(i for i, values in enumerate(lists) if values)
        lists[at][0] = value
        return pa.array(lists, column.type)

    return change


def first(value):
    return lambda c: pa.array([value, *c.to_pylist()[1:]], c.type)


COLUMNS = {
    "token": (first(6), "token 6 is not in [0, 6)"),
    "token ": (first(-1), "token -1 is not in [0, 6)"),
    "token  ": (first(None), "column 'token' has nulls"),
    "token   ": (lambda c: c.cast(pa.int64()), "column 'token' is int64; a trace has"),
    "position": (first(-1), "position -1 is not in"),
    "position ": (lambda c: c.cast(pa.float32()), "column 'position' is float"),
    "domain": (lambda c: c.cast(pa.string()), "column 'domain' is string"),
    "expert": (first_of_list(6), "expert 6 is not in [0, 6)"),
    "expert ": (first_of_list(-1), "expert -1 is not in [0, 6)"),
    "expert  ": (first_of_list(None), "column 'expert' has nulls"),
    "expert   ": (lambda c: pa.array([1] * len(c)), "'expert' is int64; a trace has l"),
    "gate": (lambda c: pa.array([[]] * len(c), c.type), "'gate' has other lengths"),
    "gate ": (lambda c: pa.array([["a"]] * len(c)), "column 'gate' is list<"),
    "logits": (lambda c: pa.array([[1.0]] * len(c), c.type), "are not 6 a token"),
    "layer": (lambda c: pa.array([9] * len(c), c.type), "its layer is not that of 001"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(good, tmp_path, name):
    change, said = COLUMNS[name]
    table = column(name.strip(), change)
    assert said in refusal(rewritten(good, tmp_path / "t.parquet", table=table))


@pytest.mark.parametrize(
    "name", [*SHARED, "layer", "round", "expert", "gate", "logits"]
)
def test_a_column_that_is_missing(good, tmp_path, name):
    path = rewritten(
        good, tmp_path / "t.parquet", table=lambda table, group: table.drop([name])
    )
    assert f"column {name!r} is missing" in refusal(path)


def test_a_gate_that_is_no_number_is_counted_as_such(good, tmp_path):
    """A model that diverged has such gates; its load is still known."""
    table = column("gate", first_of_list(float("nan")))
    path = rewritten(good, tmp_path / "t.parquet", table=table)
    with Trace.open(path) as trace, Trace.open(good) as other:
        found, want = analyse(trace), analyse(other)
    for label, layer in found.layers.items():
        np.testing.assert_array_equal(layer.load_E, want.layers[label].load_E)
        assert np.isnan(layer.gate_E).sum() == 1
    assert output.table(output.figures(found))


@pytest.mark.parametrize("place", [0.2, 0.4, 0.6, 0.8])
def test_bytes_that_were_overwritten(good, tmp_path, place):
    data = bytearray(good.read_bytes())
    at = int(place * len(data))
    data[at : at + 40] = bytes(range(40))
    path = tmp_path / "t.parquet"
    path.write_bytes(data)
    try:
        with Trace.open(path) as trace:
            analyse(trace)
    except ConfigError as e:
        assert str(e).startswith(str(path))


def test_many_domains_are_read_in_little_time(tmp_path):
    names = tuple(f"domain {i}" for i in range(10_000))
    rng = np.random.default_rng(0)
    path = tmp_path / "t.parquet"
    oracle.write(path, [oracle.random_chunk(rng, 20)], domains=names)
    start = time.perf_counter()
    with Trace.open(path) as trace:
        assert len(analyse(trace).tokens_D) == 10_000
    assert time.perf_counter() - start < 5


def test_counts_that_need_too_much_memory_are_refused(good, monkeypatch):
    monkeypatch.setattr(summary, "MOST_COUNTS", 10_000)
    with (
        Trace.open(good) as trace,
        pytest.raises(ConfigError, match=r"good\.parquet: 3 domains and routers of"),
    ):
        analyse(trace)


# Analyses.


@pytest.fixture
def archive(good, tmp_path):
    """`write(change)`: an analysis whose arrays `change` has changed in place."""
    with Trace.open(good) as trace:
        output.save(analyse(trace), tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)

    def write(change):
        changed = dict(arrays)
        change(changed)
        np.savez(tmp_path / "bad.npz", **changed)
        return tmp_path / "bad.npz"

    return write


def about(**changes):
    def change(arrays):
        data = json.loads(arrays["about"].tobytes()) | changes
        arrays["about"] = np.frombuffer(json.dumps(data).encode(), np.uint8)

    return change


ARCHIVES = {
    "no about": (lambda a: a.pop("about"), "not an analysis of moex"),
    "other about": (lambda a: a.update(about=np.array([1.0])), "is not JSON"),
    "no counts": (lambda a: a.pop("tokens_D"), "has no array of numbers 'tokens_D'"),
    "no load": (lambda a: a.pop("layers/001/load_E"), "numbers 'layers/001/load_E'"),
    "texts": (
        lambda a: a.update({"layers/001/gate_E": np.array(["a"])}),
        "has no array of numbers 'layers/001/gate_E'",
    ),
    "no step": (lambda a: a.pop("steps/0/top_AB"), "numbers 'steps/0/top_AB'"),
    "layers": (about(layers={}), "layers = {}: must be list of dict"),
    "layer": (about(layers=[{"layer": 1}]), "layer 0: has no field 'round'"),
    "steps": (about(steps=[1]), "steps = [1]: must be list of dict"),
    "step": (about(step="a"), "step = 'a': must be int"),
    "domains": (about(domains=3), "domains = 3: must be tuple of str"),
    "objects": (
        lambda a: a.update(tokens_D=np.array([{}], dtype=object)),
        "not an analysis of moex",
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(archive, name):
    change, said = ARCHIVES[name]
    path = archive(change)
    with pytest.raises(ConfigError) as error:
        output.load(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x93NUMPY", b"[]"])
def test_a_file_that_is_no_archive(tmp_path, data):
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not an analysis of moex"):
        output.load(path)


def test_a_header_comes_back_as_it_was_written():
    header = oracle.header(logits=True)
    assert Header.from_json(header.to_json()) == header
