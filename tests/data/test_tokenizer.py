"""Round trips, exact byte counts, and refusals of the three tokenizers."""

import json
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from moex.config import ConfigError, check
from moex.data import tokenizer as tokenizer_module
from moex.data.tokenizer import DOC_TOKEN, META, Bpe, Bytes, Tokenizer, TokenizerFile

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
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 5)
    assert [made.decode(i) for i in made.encode_batch(texts)] == texts
    assert tokenizer_module._pieces("ab\ncdefghij") == ["ab\n", "cdefg", "hij"]


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
