"""Round trips, exact byte counts, and refusals of the three tokenizers."""

import json
import os
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from moex.config.base import ConfigError, check
from moex.data import encoding
from moex.data import tokenizer as tokenizer_module
from moex.data.encoding import META
from moex.data.library import one_line_errors
from moex.data.tokenizer import DOC_TOKEN, Bpe, Bytes, Tokenizer, TokenizerFile

SAMPLE = ["def f(x):\n    return x + 1\n\n", "the cat's hat é\u4e2d\U0001f600 "] * 20
ANY = settings(derandomize=True, deadline=None, max_examples=60)
QUIET = {"log": lambda line: None}


def bpe(cache, vocab=300):
    return Bpe(vocab=vocab).make("t", (lambda limit: SAMPLE, "d"), cache, **QUIET)


def from_file(model, path, doc_token="[DOC]"):
    model.save(str(path))
    config = TokenizerFile(path=str(path), doc_token=doc_token)
    return config.make("t", (lambda limit: [], ""), path.parent, **QUIET)


def word_level(path):
    model = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[DOC]", "[UNK]"]
    model.train_from_iterator(SAMPLE, trainers.WordLevelTrainer(special_tokens=special))
    return from_file(model, path)


def unigram(path):
    model = tokenizers.Tokenizer(models.Unigram())
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["[DOC]", "[UNK]"], unk_token="[UNK]"
    )
    model.train_from_iterator(SAMPLE, trainer)
    return from_file(model, path)


def gpt2_like(path):
    return from_file(tokenizer_module.train_bpe(SAMPLE, 300), path, DOC_TOKEN)


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    none = (lambda limit: [], "")
    return {
        "bytes": Bytes().make("t", none, root, **QUIET),
        "bpe": bpe(root),
        "file": gpt2_like(root / "gpt2.json"),
        "words": word_level(root / "words.json"),
        "unigram": unigram(root / "unigram.json"),
    }


def with_template(file):
    """A tokenizer whose template puts "<s>" before a text, in `file`; id of "<s>"."""
    gpt2_like(file)
    model = tokenizers.Tokenizer.from_file(str(file))
    model.add_special_tokens(["<s>"])
    begin = model.token_to_id("<s>")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return from_file(model, file, DOC_TOKEN), begin


def test_a_prompt_begins_with_the_document_token_as_in_training(tmp_path):
    made, begin = with_template(tmp_path / "template.json")
    assert made.begin_id == made.prefix_id == made.doc_id != begin
    assert made.prompt("a") == [made.doc_id, *made.encode("a")]
    made.save(tmp_path)
    meta = json.loads((tmp_path / META).read_text())
    # Before they were kept, the template's; the file had no hash of its own.
    del meta["begin_id"], meta["prefix_id"], meta["sha256"]
    (tmp_path / META).write_text(json.dumps(meta))
    assert Tokenizer.load(tmp_path).begin_id == begin


@pytest.mark.parametrize("begin", [None, 5])
def test_how_texts_of_an_imported_model_begin_is_kept(tmp_path, begin):
    made, _ = with_template(tmp_path / "template.json")
    before = made.fingerprint
    made.begin(begin, 7).save(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert (read.begin_id, read.prefix_id) == (begin, 7)
    assert read.fingerprint == before
    first = [] if begin is None else [begin]
    assert read.prompt("a") == [*first, *made.encode("a")]
    assert read.prompt("") == (first or [7])  # no model continues no token


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
@given(text=st.text())
@ANY
def test_byte_level_round_trip_and_table(name, text, all_tokenizers):
    made = all_tokenizers[name]
    ids = made.encode(text)
    assert made.exact
    assert made.decode(ids) == text
    assert made.doc_id not in ids
    assert made.token_bytes[ids].sum() == len(text.encode())
    assert made.token_bytes.dtype == np.int32
    assert len(made.token_bytes) == made.vocab_size


@pytest.mark.parametrize("name", ["words", "unigram"])
@given(text=st.text() | st.sampled_from(SAMPLE) | st.text("é\u4e2d\ufb01 a\n"))
@ANY
def test_bytes_are_exact_in_sum_for_any_tokenizer(name, text, all_tokenizers):
    made = all_tokenizers[name]
    assert not made.exact
    ((ids, sizes),) = made.encode_with_bytes([text])
    assert ids.tolist() == made.encode(text)
    assert len(ids) == len(sizes) and (sizes >= 0).all()
    if len(ids):
        assert sizes.sum() == len(text.encode())


def test_bytes_from_offsets_by_hand(tmp_path):
    # "é hat  \u4e2dx": words é (2), " hat" (1 + 3), "  \u4e2dx" (2 + 3 + 1) and a
    # trailing newline that the last word gets.
    made = word_level(tmp_path / "w.json")
    ((_, sizes),) = made.encode_with_bytes(["é hat  \u4e2dx\n"])
    assert sizes.tolist() == [2, 4, 7]


CODE = st.text("abz'sdmtlvre019_.(\"=\n\t\r\f\v \x1c\x85\u00e9")


@pytest.mark.parametrize("name", ["bpe", "file"])
@given(texts=st.lists(CODE | st.text(st.characters(max_codepoint=127))))
@ANY
def test_the_fast_way_gives_the_same_ids(name, texts, all_tokenizers):
    made = all_tokenizers[name]
    assert made._gpt2_words
    slow = [i.tolist() for i in made._model_ids(texts)]
    for cores in (1, 64):
        with mock.patch("os.cpu_count", return_value=cores):
            assert [i.tolist() for i in made.encode_batch(texts)] == slow


def test_special_token_spelled_in_a_text_stays_text(all_tokenizers):
    made = all_tokenizers["bpe"]
    ids = made.encode(f"a{DOC_TOKEN}b")
    assert made.doc_id == 0 and 0 not in ids
    assert made.decode([0, *ids, 0]) == f"a{DOC_TOKEN}b"


def test_batch_equals_single_and_long_texts_are_cut(all_tokenizers, monkeypatch):
    made = all_tokenizers["bpe"]
    texts = ["one\ntwo\nthree", "", "no newline at all"]
    whole = [made.encode(t) for t in texts]
    assert [i.tolist() for i in made.encode_batch(texts)] == whole
    monkeypatch.setattr(encoding, "PIECE_CHARS", 5)
    assert [made.decode(i) for i in made.encode_batch(texts)] == texts
    assert encoding._pieces("ab\ncdefghij") == ["ab\n", "cdefg", "hij"]


def test_training_is_deterministic_and_cached(tmp_path):
    first, second = bpe(tmp_path / "a"), bpe(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 300  # as asked, also where the text has fewer pairs
    corpus = (lambda limit: pytest.fail("read the text again"), "d")
    again = Bpe(vocab=300).make("t", corpus, tmp_path / "a", **QUIET)
    assert again.fingerprint == first.fingerprint
    assert bpe(tmp_path / "a", vocab=301).fingerprint != first.fingerprint


def test_vocab_size_is_kept_when_text_is_tiny(tmp_path):
    made = Bpe(vocab=900).make("t", (lambda n: ["ab"], "d"), tmp_path, **QUIET)
    assert made.vocab_size == len(made.token_bytes) == 900
    assert made.decode([899]) == ""


@pytest.mark.parametrize("name", ["bytes", "bpe", "file", "words", "unigram"])
def test_save_and_load(name, all_tokenizers, tmp_path):
    made = all_tokenizers[name]
    made.save(tmp_path / "tokenizer")
    back = Tokenizer.load(tmp_path / "tokenizer")
    assert back.fingerprint == made.fingerprint
    assert back.vocab_size == made.vocab_size and back.doc_id == made.doc_id
    assert back.encode(SAMPLE[0]) == made.encode(SAMPLE[0])
    np.testing.assert_array_equal(back.token_bytes, made.token_bytes)


def test_load_refusals(all_tokenizers, tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    all_tokenizers["bpe"].save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="fingerprint"):
        Tokenizer.load(tmp_path)


def damaged(folder, **fields):
    """What `load` says of a tokenizer whose metadata someone changed by hand."""
    meta = json.loads((folder / META).read_text())
    changed = {k: v for k, v in (meta | fields).items() if v != "dropped"}
    (folder / META).write_text(json.dumps(changed))
    with pytest.raises(ConfigError) as e:
        Tokenizer.load(folder)
    (folder / META).write_text(json.dumps(meta))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_metadata_of_other_hands_is_refused(all_tokenizers, tmp_path):
    made = all_tokenizers["file"]
    made.save(tmp_path)
    assert "has no field 'kind'" in damaged(tmp_path, kind="dropped")
    assert "must be one of 'bytes', 'tokenizers'" in damaged(tmp_path, kind="byte")
    assert "must be int, not a string" in damaged(tmp_path, doc_id="0")
    assert "doc_id = 300: must be in [0, 290)" in damaged(tmp_path, doc_id=300)
    assert "in [1, 16,777,216]" in damaged(tmp_path, vocab_size=4 * 10**9)
    for field in ("begin_id", "prefix_id", "doc_id", "vocab_size"):
        value = json.loads((tmp_path / META).read_text())[field]
        assert "was changed" in damaged(tmp_path, **{field: value + 1}), field
    assert "stop_ids" in damaged(tmp_path, sha256="dropped", stop_ids=[-1])
    assert "begin_id = 400" in damaged(tmp_path, sha256="dropped", begin_id=400)
    for text in ("", "{", "[]", "null", '{"a": 1, "a": 2}', "[" * 10**5):
        whole = (tmp_path / META).read_text()
        (tmp_path / META).write_text(text)
        with pytest.raises(ConfigError, match=META):
            Tokenizer.load(tmp_path)
        (tmp_path / META).write_text(whole)
    for text in ("", "{", "null", '{"model": 3}', "\xff"):
        (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_of_the_cache_is_trained_again(tmp_path):
    first = bpe(tmp_path)
    (file,) = tmp_path.glob("bpe-*.json")
    whole = file.read_text()
    other = json.loads(whole)
    other["tokenizer"] = other["tokenizer"].replace("<|doc|>", "<|dog|>")
    for text in ("", "{}", whole[:-40], json.dumps(other), "null"):
        file.write_text(text)
        assert bpe(tmp_path).fingerprint == first.fingerprint
        assert file.read_text() == whole


def test_a_text_that_cannot_be_encoded_is_one_line(tmp_path, capfd):
    model = tokenizers.Tokenizer(models.WordLevel({"[DOC]": 0, "the": 1}))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    made = from_file(model, tmp_path / "no_unk.json")
    assert made.encode("the the") == [1, 1]
    with pytest.raises(ConfigError, match=r"t\.path = .*no_unk.*Missing \[UNK\]"):
        made.encode("the cat")
    for tokenizer in (made, gpt2_like(tmp_path / "a"), Tokenizer(None, doc_id=256)):
        with pytest.raises(ConfigError, match="cannot encode a text"):
            tokenizer.encode("a\udcff")
    assert capfd.readouterr().err == ""


@pytest.mark.thorough
def test_a_regular_expression_that_gives_up_is_one_line(tmp_path, capfd):
    model = tokenizers.Tokenizer(models.WordLevel({"[DOC]": 0, "[UNK]": 1}, "[UNK]"))
    slow = tokenizers.Regex(r"(a+)+$|(x+x+)+y")
    model.pre_tokenizer = pre_tokenizers.Split(slow, "isolated")
    made = from_file(model, tmp_path / "slow.json")
    os.write(2, b"before\n")
    with pytest.raises(ConfigError, match=r"slow\.json.*retry-limit-in-match") as e:
        made.encode_batch(["a" * 40 + "b"] * 2)
    assert "\n" not in str(e.value)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_what_others_write_to_standard_error_meanwhile_is_kept(capfd):
    with one_line_errors("t", may_panic=True):
        os.write(2, b"of another thread\n")
    with pytest.raises(KeyboardInterrupt), one_line_errors("t", may_panic=True):
        os.write(2, b"too\n")
        raise KeyboardInterrupt
    assert capfd.readouterr().err == "of another thread\ntoo\n"


def test_sizes_that_no_machine_has(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.vocab = 1000000000000: must be"):
        check(Bpe(vocab=10**12))
    for vocab in (2**24 + 1, 0, -1):
        with pytest.raises(
            ConfigError, match=rf"config\.vocab = {vocab}: .*16,777,216"
        ):
            check(Bpe(vocab=vocab))
    check(Bpe(vocab=2**24))
    file = tmp_path / "far.json"
    model = tokenizers.Tokenizer(models.WordLevel({"[DOC]": 0, "far": 1}))
    # The library takes minutes to write such a file.
    file.write_text(model.to_str().replace('"far":1', '"far":4000000000'))
    with pytest.raises(ConfigError, match=r"t\.path = .*4000000000: must be below"):
        TokenizerFile(path=str(file), doc_token="[DOC]").make("t", None, tmp_path)
    file.write_text(model.to_str().replace('"far":1', '"far":0'))
    with pytest.raises(ConfigError, match=r"ids of their own, not both 0"):
        TokenizerFile(path=str(file), doc_token="[DOC]").make("t", None, tmp_path)
    empty = tokenizers.Tokenizer(models.WordLevel({}))
    with pytest.raises(ConfigError, match="one token at least"):
        from_file(empty, tmp_path / "empty.json")


def test_config_refusals(tmp_path):
    def make(config):
        config.make("data.tokenizer", (lambda limit: [], ""), tmp_path, **QUIET)

    with pytest.raises(ConfigError, match=r"config\.vocab = 256.*> 256"):
        check(Bpe(vocab=256))
    with pytest.raises(ConfigError, match="needs text to train on"):
        make(Bpe())
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.path.*no such file"):
        make(TokenizerFile(path=str(tmp_path / "none.json")))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizers JSON file"):
        make(TokenizerFile(path=str(tmp_path / "bad.json")))
    word_level(tmp_path / "w.json")
    with pytest.raises(ConfigError, match=r"'\[DOCS\]'.*Did you mean '\[DOC\]'"):
        make(TokenizerFile(path=str(tmp_path / "w.json"), doc_token="[DOCS]"))
