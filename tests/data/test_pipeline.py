"""Prepared data: the cache, the order of training, held-out batches, the report."""

import dataclasses
import gzip
import itertools
import json
import multiprocessing

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moex.config.base import ConfigError, check, from_dict, to_dict
from moex.data import cache
from moex.data import tokenizer as tokenizer_module
from moex.data.batches import eval_batches, train_iterator
from moex.data.changes import changed_data, save_data
from moex.data.files import unit_hash
from moex.data.pipeline import Data, prepare
from moex.data.report import compressor_bits_per_byte, inspect
from moex.data.sources import PromptResponse, PythonStdlib, Text, TextRecords
from moex.data.tokenizer import Bpe, Bytes, TokenizerFile
from moex.json_files import digest
from tests.marks import thorough_but_for

L = 16


def quiet(line):
    """Drop a progress line."""


def corpus(root, name, count=60):
    """A delimited file of `count` different documents with multi-byte characters."""
    parts = [f"{name} {i} é\u4e2d\U0001f600 " * (1 + i % 4) for i in range(count)]
    (root / f"{name}.txt").write_text("<|>".join(parts))
    return Text(paths=(str(root / f"{name}.txt"),), delimiter="<|>", holdout=0.3)


def data(root, *sources, tokenizer=None):
    return Data(
        sources=sources or (corpus(root, "a"),),
        tokenizer=tokenizer or Bytes(),
        cache_dir=str(root / "cache"),
    )


def words(root):
    """A tokenizer that is not byte-level and drops spaces."""
    model = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[DOC]", "[UNK]"])
    model.train_from_iterator(["a 0 1 2 é"], trainer)
    model.save(str(root / "words.json"))
    return TokenizerFile(path=str(root / "words.json"), doc_token="[DOC]")


def take(prepared, count, **kwargs):
    """Some batches; `ids` per sequence: (domain, example_id)."""
    return list(itertools.islice(train_iterator(prepared, **kwargs), count))


def ids(batches):
    return [
        (int(d), int(e))
        for b in batches
        for d, e in zip(b["domain"], b["example_id"], strict=True)
    ]


def test_default_config_is_valid_and_serialises():
    config = Data()
    check(config, "data")
    assert isinstance(config.sources[0], PythonStdlib)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("overlap", [0, 5, L - 1])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "words"])
def test_held_out_bytes_are_exact(kind, overlap, tmp_path):
    tokenizer = {"bytes": Bytes, "bpe": lambda: Bpe(vocab=300)}.get(kind)
    config = data(tmp_path, tokenizer=tokenizer() if tokenizer else words(tmp_path))
    prepared = prepare(config, L, overlap=overlap, log=quiet)
    held_out = [d.value for d in config.sources[0].documents("eval")]
    batches = list(eval_batches(prepared, batch_size=4))
    total = sum((b["num_bytes"] * b["loss_mask"]).sum() for b in batches)
    assert total == sum(len(t.encode()) for t in held_out) > 0
    scored = sum(b["loss_mask"].sum() for b in batches)
    coded = [prepared.tokenizer.encode(t) for t in held_out]
    assert scored == sum(len(c) + 1 for c in coded)
    counts = prepared.manifest["a"]["splits"]["eval"]
    assert counts["bytes"] == total and counts["documents"] == len(held_out)


def test_batch_form(tmp_path):
    (batch,) = take(prepare(data(tmp_path), L, log=quiet), 1, batch_size=3, seed=0)
    for name in ("tokens", "targets", "segment", "position", "num_bytes"):
        assert batch[name].shape == (3, L) and batch[name].dtype == np.int32
    assert batch["loss_mask"].shape == (3, L)
    assert batch["loss_mask"].dtype == np.float32
    for name in ("domain", "example_id"):
        assert batch[name].shape == (3,) and batch[name].dtype == np.int32


# Which rows of a batch of 8 each process reads: in runs, in turn, some twice.
PARTS = [
    (range(8),),
    (range(4), range(4, 8)),
    ((0, 1, 4, 5), (2, 3, 6, 7)),
    ((0, 1), (2, 3), (4, 5), (6, 7), (6, 7)),
]


@pytest.mark.parametrize("threads", thorough_but_for([0, 1, 3], 3))
@pytest.mark.parametrize("parts", PARTS)
def test_any_parts_of_the_rows_make_the_same_batches(parts, threads, tmp_path):
    config = data(tmp_path, corpus(tmp_path, "a"), corpus(tmp_path, "b"))
    prepared = prepare(config, L, log=quiet)
    whole = take(prepared, 20, batch_size=8, seed=1)
    config.threads = prepared.config.threads = threads
    read = [take(prepared, 20, batch_size=8, seed=1, rows=rows) for rows in parts]
    for expected, *got in zip(whole, *read, strict=True):
        for name, value in expected.items():
            for rows, batch in zip(parts, got, strict=True):
                np.testing.assert_array_equal(batch[name], value[list(rows)])


@pytest.mark.parametrize("start", [1, 8, 1000])
def test_start_continues_the_same_order(start, tmp_path):
    config = data(tmp_path, corpus(tmp_path, "a"), corpus(tmp_path, "b"))
    prepared = prepare(config, L, log=quiet)
    whole = ids(take(prepared, start + 12, batch_size=1, seed=1))
    tail = take(prepared, 3, batch_size=4, seed=1, start=start)
    assert ids(tail) == whole[start:]


def test_epochs_cover_all_and_reshuffle(tmp_path):
    prepared = prepare(data(tmp_path), L, log=quiet)
    n = len(prepared.train[0])
    seen = ids(take(prepared, 3 * n, batch_size=1, seed=0))
    epochs = [seen[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(n)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = ids(take(prepared, n, batch_size=1, seed=1))
    assert sorted(other) == sorted(epochs[0]) and other != epochs[0]


def test_mixture_follows_the_weights(tmp_path):
    a, b = corpus(tmp_path, "a"), corpus(tmp_path, "b", 20)
    a.weight, b.weight = 1.0, 3.0
    prepared = prepare(data(tmp_path, a, b), L, log=quiet)
    assert prepared.domains == ("a", "b")
    domains = [d for d, _ in ids(take(prepared, 50, batch_size=8, seed=0))]
    assert domains.count(1) == 300


def test_an_error_in_the_reading_thread_surfaces(tmp_path, monkeypatch):
    prepared = prepare(data(tmp_path), L, log=quiet)

    def broken(self, index):
        raise OSError("disk is gone")

    monkeypatch.setattr(type(prepared.train[0]), "__getitem__", broken)
    with pytest.raises(OSError, match="disk is gone"):
        take(prepared, 1, batch_size=2, seed=0)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_eval_covers_each_sequence_once(count, tmp_path):
    config = data(tmp_path, corpus(tmp_path, "a"), corpus(tmp_path, "b", 30))
    prepared = prepare(config, L, log=quiet)
    parts = [
        list(eval_batches(prepared, batch_size=8, rows=rows))
        for rows in np.split(np.arange(8), count)
    ]
    assert len({len(p) for p in parts}) == 1
    order = [i for step in zip(*parts, strict=True) for i in ids(step)]
    real = [(d, e) for d, e in order if e >= 0]
    sizes = [len(e) for e in prepared.eval]
    assert real == [(d, e) for d in (0, 1) for e in range(sizes[d])]
    padding = [b for p in parts for b in p]
    for batch in padding:
        blank = batch["example_id"] < 0
        assert not batch["segment"][blank].any()
        assert not batch["loss_mask"][blank].any()
    assert len(order) % 8 == 0


def test_eval_limit_spreads_over_all_sources(tmp_path):
    config = data(tmp_path, corpus(tmp_path, "a", 300), corpus(tmp_path, "b", 20))
    prepared = prepare(config, L, log=quiet)
    for limit in (2, 7, 30):
        picked = ids(eval_batches(prepared, batch_size=1, limit=limit))
        assert len(picked) == len(set(picked)) == limit
        assert {d for d, _ in picked} == {0, 1}
    everything = sum(len(e) for e in prepared.eval)
    picked = ids(eval_batches(prepared, batch_size=1, limit=10**6))
    assert len(picked) == everything


def test_bad_batches(tmp_path):
    prepared = prepare(data(tmp_path), L, log=quiet)
    for rows in ((), (1, 0), (2, 3), (-1, 0)):
        with pytest.raises(ConfigError, match="rows = .*rising, in .0, batch_size=3"):
            take(prepared, 1, batch_size=3, seed=0, rows=rows)
    with pytest.raises(ConfigError, match="start = -1"):
        take(prepared, 1, batch_size=4, seed=0, start=-1)


def test_prompt_response(tmp_path):
    rows = [{"prompt": f"q{i}? ", "response": f"r{i}"} for i in range(30)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = PromptResponse(paths=(str(tmp_path / "qa.jsonl"),), holdout=0.3)
    prepared = prepare(data(tmp_path, source), 32, log=quiet)
    learned = []
    for batch in eval_batches(prepared, batch_size=2):
        targets = batch["targets"][batch["loss_mask"] == 1]
        learned += prepared.tokenizer.decode(targets).replace("r", " r").split()
    held_out = [d.value[1] for d in source.documents("eval")]
    assert sorted(learned) == sorted(held_out)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\].*truncate=True"):
        prepare(data(tmp_path, source), 4, log=quiet)


def test_prompts_that_leave_no_response_are_counted_and_said(tmp_path):
    """Of prompts of 3 bytes and of 16 and more the first only have targets."""
    prompts = ["ab "] * 3 + ["c" * 16, "d" * 15, "e" * 40]
    rows = [{"prompt": p + str(i), "response": "yes"} for i, p in enumerate(prompts)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = PromptResponse(
        paths=(str(tmp_path / "qa.jsonl"),), holdout=0.0, truncate=True
    )
    said = []
    prepared = prepare(data(tmp_path, source), 16, log=said.append)
    warning = (
        "data: warning: 3 of 6 examples for train in 'qa' have a prompt that fills a "
        "sequence, seq_len=16: nothing of their responses is left; raise seq_len or "
        "shorten the prompts"
    )
    assert warning in said
    (train,) = prepared.train
    masks = [np.sum(train[i]["loss_mask"]) for i in range(len(train))]
    # Three responses of 3 bytes and their ends; the 17 tokens of the others are cut.
    assert sum(masks) == 3 * 4 and 0 in masks
    said.clear()
    prepare(data(tmp_path, source), 64, log=said.append)
    assert not any("fills a sequence" in line for line in said)


@pytest.mark.parametrize("holdout", [0.0, 1.0])
def test_nothing_but_prompts_is_refused(tmp_path, holdout):
    """For training where the source is trained on, for scoring where it is given."""
    rows = [{"prompt": "x" * 20 + str(i), "response": "yes"} for i in range(5)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = PromptResponse(
        paths=(str(tmp_path / "qa.jsonl"),), holdout=holdout, truncate=True
    )
    split = "eval" if holdout else "train"
    message = (
        rf"data.sources\[0\] \('qa'\): 5 of 5 examples for {split} have a prompt that "
        "fills a sequence, seq_len=16: no target is left. Raise seq_len, or shorten "
        "the prompts."
    )
    with pytest.raises(ConfigError, match=message):
        prepare(data(tmp_path, source), 16, scoring=holdout == 1, log=quiet)
    # At 32 all have their targets.
    prepare(data(tmp_path, source), 32, scoring=holdout == 1, log=quiet)


def test_prepare_refusals(tmp_path):
    config = data(tmp_path)
    with pytest.raises(ConfigError, match=r"seq_len=100000 is longer.*tokens"):
        prepare(config, 100_000, log=quiet)
    with pytest.raises(ConfigError, match="overlap = 16"):
        prepare(config, L, overlap=L, log=quiet)
    twice = data(tmp_path, corpus(tmp_path, "a"), corpus(tmp_path, "a"))
    with pytest.raises(ConfigError, match=r"sources\[1\]\.name = 'a'.*sources\[0\]"):
        prepare(twice, L, log=quiet)
    with pytest.raises(ConfigError, match="sources"):
        check(Data(sources=()), "data")
    with pytest.raises(
        ConfigError, match=r"sources\[0\] = 'Bytes': must be a kind of source"
    ):
        check(Data(sources=(Bytes(),)), "data")
    with pytest.raises(ConfigError, match="tokenizer.*a tokenizer"):
        check(Data(tokenizer=PythonStdlib()), "data")


def test_nothing_held_out_is_a_warning(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 100)
    name = next(n for n in "abcdefgh" if unit_hash(f"{n}.txt", "moex.holdout") > 0.05)
    (tmp_path / "one.txt").rename(tmp_path / f"{name}.txt")
    lines = []
    source = Text(paths=(str(tmp_path / f"{name}.txt"),))
    prepared = prepare(data(tmp_path, source), L, log=lines.append)
    assert any("warning" in line and "held out" in line for line in lines)
    assert list(eval_batches(prepared, batch_size=2)) == []
    with pytest.raises(ConfigError, match="no text is held out"):
        compressor_bits_per_byte(prepared)


def test_a_source_that_is_only_scored(tmp_path):
    """Training batches are as if it were not there; held-out ones have all of it."""
    own, other = corpus(tmp_path, "a"), corpus(tmp_path, "b", count=3)
    other.holdout = 1.0
    prepared = prepare(data(tmp_path, own, other), L, log=quiet)
    alone = prepare(data(tmp_path, own), L, log=quiet)
    options = {"batch_size": 4, "seed": 0}
    assert ids(take(prepared, 30, **options)) == ids(take(alone, 30, **options))
    scored = [
        int(target)
        for batch in eval_batches(prepared, batch_size=1)
        for target in batch["targets"][batch["loss_mask"] == 1]
        if batch["domain"] == 1
    ]
    text = b"".join(d.value.encode() + b"\0" for d in other.read("s"))
    assert bytes(t if t < 256 else 0 for t in scored) == text
    assert "b, training sequence" not in inspect(prepared)
    assert "a, training sequence 0" in inspect(prepared)


def test_nothing_to_train_on(tmp_path):
    source = corpus(tmp_path, "a", count=1)
    source.holdout = 1.0
    config = data(tmp_path, source)
    with pytest.raises(ConfigError, match=r"holdout = 1\.0: must be below 1 .*train"):
        prepare(config, L, log=quiet)
    assert not (tmp_path / "cache").exists()
    prepared = prepare(config, 1000, scoring=True, log=quiet)
    assert len(list(eval_batches(prepared, batch_size=1))) == 1
    # Too short to train on, and all the same a sequence to score.
    some = data(tmp_path, corpus(tmp_path, "c"))
    assert prepare(some, 100_000, scoring=True, log=quiet).eval[0][0]["segment"].any()


def test_a_source_without_text_cannot_be_scored(tmp_path):
    (tmp_path / "a.txt").write_text("<|>")
    source = Text(paths=(str(tmp_path / "a.txt"),), delimiter="<|>", holdout=1.0)
    with pytest.raises(ConfigError, match=r"sources\[0\] \('a'\): there is no text"):
        prepare(data(tmp_path, source), L, scoring=True, log=quiet)


def test_a_source_without_text_is_left_out_while_others_have_some(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n")
    empty = Text(paths=(str(tmp_path / "empty.txt"),))
    blank = PromptResponse(paths=(str(tmp_path / "blank.jsonl"),))
    own, said = corpus(tmp_path, "a"), []
    prepared = prepare(data(tmp_path, empty, own, blank), L, log=said.append)
    assert prepared.domains == ("empty", "a", "blank")
    assert prepared.weights == (0, 1, 0)
    where = "data: data.sources[0].paths"
    assert f"{where}: {tmp_path / 'empty.txt'}: empty and left out" in said
    for name in ("empty", "blank"):
        assert f"data: warning: {name!r} has no text and is left out" in said
    alone = take(prepare(data(tmp_path, own), L, log=quiet), 5, batch_size=2, seed=1)
    both = take(prepared, 5, batch_size=2, seed=0)  # each source has a seed of its own
    for a, b in zip(alone, both, strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    with pytest.raises(ConfigError, match=r"paths: the file .*empty.txt is empty"):
        prepare(data(tmp_path, empty), L, log=quiet)
    own.holdout = 1.0
    with pytest.raises(ConfigError, match="no source to train on has any text"):
        prepare(data(tmp_path, empty, own), L, log=quiet)


def test_what_was_cached_before_a_field_came_is_valid(tmp_path):
    """The hash of a source is that of version 0.3, in which Text had five fields."""
    source = corpus(tmp_path, "a", 3)
    files = [["a.txt", *cache.size_and_hash(tmp_path / "a.txt")]]
    made = cache.scan(source, "s")
    assert made["sha256"] == digest([{"holdout": 0.3, "delimiter": "<|>"}, files])
    source.delimiter, source.holdout_ends = "", True
    assert cache.scan(source, "s")["settings"]["holdout_ends"]


@pytest.mark.parametrize(
    ("vocab", "amount"),
    [(300, 4_000_000), (4096, 4_000_000), (32_768, 32_000_000), (2**24, 256_000_000)],
)
def test_a_larger_vocabulary_is_trained_on_more_text(vocab, amount, tmp_path):
    asked, said = [], []
    corpus_of = (lambda size: asked.append(size) or ["some words"], "digest")
    Bpe(vocab=vocab).make("t", corpus_of, tmp_path, said.append)
    assert asked == [amount]
    assert said == [
        f"tokenizer: training BPE with {vocab} tokens on 0.0 MB, all that there is; "
        f"{amount / 1e6:.1f} MB would fit its size"
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_sample_is_drawn_from_all_of_compressed_text(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "BPE_LEAST_BYTES", 20_000)
    rows = "".join(
        json.dumps({"text": f"{i:04} " + "ab " * 60}) + "\n" for i in range(4000)
    )
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes((gzip.compress if suffix else bytes)(rows.encode()))
    source = TextRecords(paths=(str(file),), holdout=0.0)
    seen = []
    monkeypatch.setattr(
        tokenizer_module, "train_bpe", lambda texts, _: seen.extend(texts) or stop()
    )
    stop = Bytes  # its `to_str` does not exist: nothing is trained
    with pytest.raises(AttributeError):
        prepare(data(tmp_path, source, tokenizer=Bpe(vocab=300)), L, log=quiet)
    assert 10_000 <= sum(map(len, seen)) <= 40_000
    first = [int(text[:4]) for text in seen]
    assert max(first) > 3500 and 1500 < np.mean(first) < 2500


@pytest.mark.parametrize("delimiter", ["", " "])
def test_bpe_learns_from_a_sample(delimiter, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "BPE_LEAST_BYTES", 1000)
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(5000)))
    path = str(tmp_path / "a.txt")
    source = Text(paths=(path,), delimiter=delimiter, holdout=0.0)
    seen = []
    train = tokenizer_module.train_bpe
    monkeypatch.setattr(
        tokenizer_module,
        "train_bpe",
        lambda texts, vocab: seen.extend(texts) or train(texts, vocab),
    )
    prepared = prepare(data(tmp_path, source, tokenizer=Bpe(vocab=300)), L, log=quiet)
    assert 500 <= sum(map(len, seen)) <= 2000
    assert prepared.tokenizer.token_bytes.max() >= 4


def entries(root):
    return sorted(p for p in (root / "cache").iterdir() if p.is_dir())


def test_cache_is_used_and_follows_content(tmp_path):
    config, lines = data(tmp_path), []
    first = prepare(config, L, log=lines.append)
    assert lines
    lines.clear()
    again = prepare(config, L, log=lines.append)
    assert not lines and again.manifest == first.manifest
    prepare(config, 2 * L, overlap=3, log=lines.append)
    assert not lines  # windows are cut when read, so their length costs nothing
    corpus(tmp_path, "a", 61)
    prepare(config, L, log=lines.append)
    assert lines and len(entries(tmp_path)) == 2
    manifest = json.loads((entries(tmp_path)[0] / "manifest.json").read_text())
    assert {"files", "splits", "held_out_sha256", "sha256", "seconds"} <= set(manifest)


def test_a_failed_prepare_leaves_nothing(tmp_path, monkeypatch):
    config = data(tmp_path)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_source", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, L, log=quiet)
    assert entries(tmp_path) == []
    monkeypatch.undo()
    assert len(prepare(config, L, log=quiet).train[0])


def test_a_damaged_entry_is_made_again(tmp_path):
    config, lines = data(tmp_path), []
    before = take(prepare(config, L, log=quiet), 3, batch_size=2, seed=0)
    (entry,) = entries(tmp_path)
    with open(entry / "train" / "tokens.bin", "r+b") as f:
        f.truncate(10)
    after = take(prepare(config, L, log=lines.append), 3, batch_size=2, seed=0)
    assert lines
    np.testing.assert_array_equal(before[2]["tokens"], after[2]["tokens"])


def test_a_whole_entry_is_read_while_others_hold_its_lock(tmp_path, monkeypatch):
    """The processes of a host would wait for each other, each reading all of it."""
    config = data(tmp_path)
    first = take(prepare(config, L, log=quiet), 2, batch_size=2, seed=0)
    monkeypatch.setattr("moex.data.cache.locked", None)
    again = take(prepare(config, L, log=quiet), 2, batch_size=2, seed=0)
    np.testing.assert_array_equal(first[1]["tokens"], again[1]["tokens"])


def hostile(meta):
    """Texts in place of a JSON file of the cache."""
    yield from ("", "{", "{}", "null", "[]", "[" * 10**5, '{"a": 1, "a": 2}')
    yield json.dumps({name: "x" for name in meta})
    yield json.dumps({name: -1 for name in meta})
    for name in meta:
        yield json.dumps({k: v for k, v in meta.items() if k != name})


@pytest.mark.parametrize("file", ["manifest.json", "train/meta.json"])
def test_metadata_of_other_hands_is_made_again(file, tmp_path):
    config = data(tmp_path)
    first = prepare(config, L, log=quiet)
    (entry,) = entries(tmp_path)
    whole = json.loads((entry / file).read_text())
    expected = take(first, 2, batch_size=2, seed=0)
    for text in hostile(whole):
        (entry / file).write_text(text)
        lines = []
        again = prepare(config, L, log=lines.append)
        assert "is damaged and made again" in lines[0], text[:80]
        for a, b in zip(take(again, 2, batch_size=2, seed=0), expected, strict=True):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
        assert json.loads((entry / file).read_text()).keys() == whole.keys()
    lines = []
    prepare(config, L, log=lines.append)
    assert not lines


@pytest.mark.thorough
def test_any_changed_byte_of_the_cache_is_seen(tmp_path):
    rows = [{"prompt": f"q{i} ", "response": f"é {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = PromptResponse(paths=(str(tmp_path / "a.jsonl"),), holdout=0.3)
    config = data(tmp_path, pairs, tokenizer=words(tmp_path))
    prepare(config, 40, log=quiet)
    (entry,) = entries(tmp_path)
    files = sorted(p for p in entry.rglob("*") if p.is_file())
    names = {p.name for p in files}
    assert {"tokens.bin", "bytes.bin", "starts.npy", "order.npy", "rows.npy"} < names
    for file in files:
        whole = file.read_bytes()
        for changed in (
            whole[:-1] + bytes([whole[-1] ^ 1]),
            bytes([whole[0] ^ 0x40]) + whole[1:],
            whole + b"\0",
            b"",
        ):
            file.write_bytes(changed)
            lines = []
            prepare(config, 40, log=lines.append)
            assert "made again" in lines[0], file
            # The manifest says how many seconds were taken, in one digit or two.
            slack = 2 if file.name == "manifest.json" else 0
            assert abs(len(file.read_bytes()) - len(whole)) <= slack


def test_a_file_that_two_sources_read(tmp_path):
    """Refused where one trains on what the other holds out, else said."""
    source = corpus(tmp_path, "a")

    def said(scoring=False, **fields):
        other = dataclasses.replace(source, **({"name": "b"} | fields))
        lines = []
        prepare(data(tmp_path, source, other), L, log=lines.append, scoring=scoring)
        return [line for line in lines if "both" in line]

    (line,) = said(weight=2.0)
    assert line.endswith("a.txt: read by both data.sources[0] and data.sources[1]")
    folder = str(tmp_path / "*.txt")
    (tmp_path / "link.txt").symlink_to("a.txt")
    for fields in (
        *({"holdout": 1.0}, {"holdout": 0.0}, {"paths": (folder,), "holdout": 0.1}),
        {"delimiter": ""},
        {"paths": (str(tmp_path / "link.txt"),), "holdout": 0.2},
    ):
        with pytest.raises(ConfigError, match=r"sources\[1\]: .*also in .*\[0\]"):
            said(**fields)
        assert said(scoring=True, **fields) == []


def test_a_changed_file_is_named_on_resume(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcde":
        (texts / f"{name}.txt").write_text(f"text of {name} " * 40)
    config = data(tmp_path, Text(paths=(str(texts),), name="mine", holdout=0))

    def manifest():
        return prepare(config, L, log=quiet).manifest

    file = tmp_path / "data.json"
    assert changed_data(file, manifest()) == []  # a run of before it was kept
    save_data(file, manifest())
    assert changed_data(file, manifest()) == []
    (texts / "a.txt").write_text("text of A " * 40)
    (texts / "b.txt").unlink()
    for name in "vwxyz":
        (texts / f"{name}.txt").write_text(f"text of {name} " * 40)
    (line,) = changed_data(file, manifest())
    assert line.startswith(
        "resuming with changed data: files of 'mine': 1 changed (a.txt), "
        "5 new (v.txt, w.txt, x.txt, ...), 1 gone (b.txt); "
    )
    for text in (
        "",
        "{",
        "[]",
        '{"mine": 3}',
        '{"mine": [3]}',
        '{"mine": [["a", {}, 1]]}',
    ):
        (tmp_path / "data.json").write_text(text)
        (line,) = changed_data(file, manifest())
        assert "is not known" in line and "data.json" in line
    (tmp_path / "data.json").write_text('{"other": []}')
    assert changed_data(file, manifest()) == []


def _prepare_quietly(config):
    prepare(config, L, log=quiet)


@pytest.mark.thorough
def test_processes_may_prepare_at_the_same_time(tmp_path):
    config = data(tmp_path, tokenizer=Bpe(vocab=300))
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_prepare_quietly, args=(config,)) for _ in "ab"]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert len(entries(tmp_path)) == 1
    assert len(prepare(config, L, log=pytest.fail).train[0])


def test_report(tmp_path):
    prepared = prepare(data(tmp_path), L, log=quiet)
    text = inspect(prepared, tokens=4)
    assert "B/token" in text and "segment  position  learn" in text
    counts = prepared.manifest["a"]["splits"]
    assert f"{counts['train']['bytes']:,}" in text
    rates = compressor_bits_per_byte(prepared)
    assert set(rates) == {"gzip", "bz2", "lzma"}
    assert all(0 < r < 8 for r in rates.values())


def test_standard_library_with_bytes(tmp_path):
    prepared = prepare(data(tmp_path, PythonStdlib()), 256, log=quiet)
    counts = prepared.manifest["python_stdlib"]["splits"]
    assert counts["train"]["bytes"] > 5e6
    share = counts["eval"]["bytes"] / counts["train"]["bytes"]
    assert 0.02 < share < 0.1
    (batch,) = take(prepared, 1, batch_size=4, seed=0)
    assert batch["loss_mask"].all()
