"""Streams and sequences: every target once, documents apart, responses only.

Expected values come from a plain loop over the documents (`expected_targets`).
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moex.config.base import ConfigError
from moex.data.packing import Rows, Windows, pack_rows
from moex.data.stream import Stream, StreamWriter, write_source
from moex.data.tokenizer import Tokenizer
from tests.marks import thorough_but_for

DOC = 256
BYTES = Tokenizer(None, doc_id=DOC, vocab_size=257)
INTS = ("tokens", "targets", "segment", "position", "num_bytes")
ANY = settings(derandomize=True, deadline=None, max_examples=80)
DOCUMENTS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=12), max_size=9)


def write(root, documents, prompts=None, vocab_size=257, with_bytes=False):
    root.mkdir(parents=True, exist_ok=True)
    writer = StreamWriter(root, vocab_size, DOC, with_bytes)
    for i, ids in enumerate(documents):
        ids = np.array(ids, np.int64)
        prompt = prompts[i] if prompts else 0
        writer.add(ids, np.ones(len(ids), int), len(ids), prompt)
    writer.close()
    return Stream(root, BYTES.token_bytes)


def expected_targets(documents):
    """(input, target, position in its document) over all documents, by a loop."""
    rows = []
    for ids in documents:
        whole = [DOC, *ids, DOC]
        rows += [(a, b, i) for i, (a, b) in enumerate(zip(whole, whole[1:]))]  # noqa: B905
    return rows


def check_form(example, seq_len):
    assert set(example) == {*INTS, "loss_mask", "domain", "example_id"}
    for name in INTS:
        assert example[name].shape == (seq_len,) and example[name].dtype == np.int32
    assert example["loss_mask"].shape == (seq_len,)
    assert example["loss_mask"].dtype == np.float32
    assert example["domain"].dtype == example["example_id"].dtype == np.int32
    padding = example["segment"] == 0
    for name in (*INTS, "loss_mask"):
        assert not example[name][padding].any()


def check_segments(example):
    """Segments count up from 1, change at document tokens only; positions restart."""
    segment, position = example["segment"], example["position"]
    live = int((segment > 0).sum())
    assert (segment[:live] > 0).all() and (live == 0 or segment[0] == 1)
    for j in range(1, live):
        new = example["tokens"][j] == DOC
        assert segment[j] == segment[j - 1] + new
        assert position[j] == (0 if new else position[j - 1] + 1)
    assert live == 0 or position[0] == 0


@pytest.mark.parametrize("overlap", thorough_but_for([0, 1, 3, 4], 1))
@given(documents=DOCUMENTS)
@ANY
def test_windows_score_each_target_once(overlap, documents, tmp_path_factory):
    seq_len = 5
    stream = write(tmp_path_factory.mktemp("s"), documents)
    windows = Windows(stream, seq_len, overlap=overlap, domain=3, partial=True)
    scored = []
    for i in range(len(windows)):
        example = windows[i]
        check_form(example, seq_len)
        check_segments(example)
        assert example["domain"] == 3 and example["example_id"] == i
        on = np.flatnonzero(example["loss_mask"])
        assert len(on)
        assert i == 0 or on[0] == overlap
        scored += [(int(example["tokens"][j]), int(example["targets"][j])) for j in on]
    assert scored == [(a, b) for a, b, _ in expected_targets(documents)]


@given(documents=DOCUMENTS)
@ANY
def test_training_windows_are_full_and_adjoin(documents, tmp_path_factory):
    windows = Windows(write(tmp_path_factory.mktemp("s"), documents), 5)
    expected = expected_targets(documents)
    assert len(windows) == len(expected) // 5
    for i, example in enumerate(windows):
        assert example["loss_mask"].all() and example["segment"].all()
        want = [b for _, b, _ in expected[5 * i : 5 * i + 5]]
        assert example["targets"].tolist() == want


def test_windows_by_hand(tmp_path):
    # Stream D a b D c d e D: with 4 inputs and an overlap of 1 the second sequence
    # starts at input 3 and its first target (c) was scored before.
    windows = Windows(write(tmp_path, [[1, 2], [3, 4, 5]]), 4, overlap=1, partial=True)
    assert len(windows) == 2
    one, two = windows
    assert one["tokens"].tolist() == [DOC, 1, 2, DOC]
    assert one["targets"].tolist() == [1, 2, DOC, 3]
    assert one["segment"].tolist() == [1, 1, 1, 2]
    assert one["position"].tolist() == [0, 1, 2, 0]
    assert one["num_bytes"].tolist() == [1, 1, 0, 1]
    assert one["loss_mask"].tolist() == [1, 1, 1, 1]
    assert two["tokens"].tolist() == [DOC, 3, 4, 5]
    assert two["targets"].tolist() == [3, 4, 5, DOC]
    assert two["loss_mask"].tolist() == [0, 1, 1, 1]
    with pytest.raises(IndexError):
        windows[2]


def test_large_vocabularies_and_stored_bytes(tmp_path):
    root = tmp_path / "s"
    root.mkdir()
    writer = StreamWriter(root, 70_000, DOC, with_bytes=True)
    writer.add(np.array([69_999, 5]), np.array([7, 300]), 307)
    writer.add(np.array([], int), np.array([], int), 0)
    writer.skip()
    counts = writer.close()
    assert counts["documents"] == counts["empty_documents"] == 1
    assert counts["unreadable_documents"] == 1 and counts["bytes"] == 307
    (example,) = Windows(Stream(root, np.zeros(70_000, np.int32)), 3)
    assert example["targets"].tolist() == [69_999, 5, DOC]
    assert example["num_bytes"].tolist() == [7, 300, 0]


def test_an_empty_stream_has_no_sequence(tmp_path):
    stream = write(tmp_path, [])
    assert len(Windows(stream, 4)) == len(Windows(stream, 4, partial=True)) == 0
    pack_rows(tmp_path, 4, False, "s")
    assert len(Rows(stream, 4)) == 0


@given(
    examples=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any), max_size=20
    )
)
@ANY
def test_rows_hold_whole_examples_and_learn_responses(examples, tmp_path_factory):
    seq_len = 9
    documents, learned = [], []
    for i, (prompt, response) in enumerate(examples):
        documents.append([10 * i % 250] * prompt + [(10 * i + 1) % 250] * response)
        learned.append([*documents[-1][prompt:], DOC])
    root = tmp_path_factory.mktemp("s")
    stream = write(root, documents, prompts=[p for p, _ in examples])
    pack_rows(root, seq_len, False, "s")
    found = []
    for i, row in enumerate(Rows(stream, seq_len)):
        check_form(row, seq_len)
        check_segments(row)
        assert row["example_id"] == i
        for segment in range(1, row["segment"].max() + 1):
            inside = row["segment"] == segment
            on = inside & (row["loss_mask"] == 1)
            whole = [*row["tokens"][inside].tolist(), DOC]
            assert whole[1:] == row["targets"][inside].tolist()
            found.append((whole[1:-1], row["targets"][on].tolist()))
    key = str
    assert sorted(found, key=key) == sorted(
        zip(documents, learned, strict=True), key=key
    )


def test_first_fit(tmp_path):
    # Examples take 1 + their tokens: 4, 3, 2, 1 + ... in rows of 6 give [4, 2], [3, 3].
    stream = write(tmp_path, [[1] * 3, [2] * 2, [3], [4] * 2], prompts=[1, 1, 0, 1])
    pack_rows(tmp_path, 6, False, "s")
    first, second = Rows(stream, 6)
    assert first["tokens"].tolist() == [DOC, 1, 1, 1, DOC, 3]
    assert second["segment"].tolist() == [1, 1, 1, 2, 2, 2]
    assert first["loss_mask"].tolist() == [0, 1, 1, 1, 1, 1]


def test_long_examples(tmp_path):
    stream = write(tmp_path, [[1] * 3, [2] * 9, [3] * 7], prompts=[1, 2, 1])
    with pytest.raises(ConfigError, match="2 of 3 .*seq_len=6 .*longest has 10"):
        pack_rows(tmp_path, 6, False, "data.sources[0]")
    pack_rows(tmp_path, 6, True, "s")
    rows = list(Rows(stream, 6))
    assert len(rows) == 3
    assert rows[1]["targets"].tolist() == [2] * 6
    assert rows[1]["loss_mask"].tolist() == [0, 0, 1, 1, 1, 1]


class Ids:
    """A stand-in for a source of token ids, all in the training split."""

    def __init__(self, *documents):
        self.documents = documents

    def content(self):
        return "tokens"

    def split(self, key):
        return "train"

    def read(self, where):
        from moex.data.contract import Document

        return (Document("k", np.array(d, np.int64)) for d in self.documents)


def test_token_ids_are_checked_and_stripped(tmp_path):
    made = write_source(Ids([DOC, 1, 2, DOC], [3], []), BYTES, tmp_path / "a", "s")
    assert made["splits"]["train"]["documents"] == 2
    assert made["splits"]["train"]["empty_documents"] == 1
    assert made["splits"]["train"]["bytes"] == 3
    stream = Stream(tmp_path / "a" / "train", BYTES.token_bytes)
    assert stream.tokens.tolist() == [DOC, 1, 2, DOC, 3, DOC]
    for bad, out in ((257, "b"), (-1, "c")):
        with pytest.raises(ConfigError, match=f"sources.*token id {bad} .*257"):
            write_source(Ids([1, bad]), BYTES, tmp_path / out, "data.sources[0]")


def test_meta_is_plain_json(tmp_path):
    write(tmp_path, [[1, 2]])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["tokens"] == 4 and meta["dtype"] == "<u2"
