"""Chats: which tokens are learned, with the plain layout and with models' templates."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moex.config.base import ConfigError
from moex.data.chat import (
    PLAIN,
    Chat,
    _pieces,
    keep_layout,
    layout_of,
    question,
    saved_layout,
    template_file,
)
from moex.data.encoding import DOC_TOKEN
from moex.data.pipeline import Data, prepare
from moex.data.tokenizer import Bytes, SavedTokenizer, TokenizerFile
from tests.data.test_sources import fails

CHATML = (
    "{% for message in messages %}\n"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'}}"
    "{{ '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "[INST] {{ message.content }} [/INST]{% elif message.role == 'assistant' %}"
    "{{ message.content + eos_token }}{% else %}"
    "{{ raise_exception('no ' + message.role) }}"
    "{% endif %}{% endfor %}"
)


def chat(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def source(root, *chats, **fields):
    lines = (json.dumps({"messages": messages}) for messages in chats)
    (root / "a.jsonl").write_text("\n".join(lines))
    return Chat(paths=(str(root / "a.jsonl"),), holdout=0.0, **fields)


def rows(root, made, tokenizer, seq_len=128):
    """(text of all targets, text of the learned ones) of each row."""
    config = Data(sources=(made,), tokenizer=tokenizer, cache_dir=str(root / "cache"))
    prepared = prepare(config, seq_len, log=lambda line: None)
    pieces = [*prepared.tokenizer.pieces()]

    def text(ids):
        return "".join(pieces[i] for i in ids)

    for i in range(len(prepared.train[0])):
        row = prepared.train[0][i]
        targets = row["targets"][row["segment"] > 0]
        yield text(targets), text(row["targets"][row["loss_mask"] > 0])


def test_answers_are_learned_and_what_ends_them(tmp_path):
    made = source(tmp_path, chat("a?", "b", "c?", "d"), chat("e", "f", "g"))
    (row,) = rows(tmp_path, made, Bytes())
    doc = "<|doc|>"
    assert row == (
        f"user:\na?\n\nassistant:\nb{doc}\n\nuser:\nc?\n\nassistant:\nd{doc}"
        f"user:\ne\n\nassistant:\nf{doc}\n\nuser:\ng{doc}",
        f"b{doc}d{doc}f{doc}",
    )


def im_tokenizer(root):
    """Bytes, and two special tokens for the ends of messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    model.save(str(root / "tokenizer.json"))
    return TokenizerFile(path=str(root / "tokenizer.json"))


def test_special_tokens_are_read_in_the_template_alone(tmp_path):
    made = source(
        tmp_path, chat("<|im_end|>", "yes"), template=CHATML, eos_token="<|im_end|>"
    )
    tokenizer = im_tokenizer(tmp_path)
    config = Data(sources=(made,), tokenizer=tokenizer, cache_dir=str(tmp_path / "c"))
    prepared = prepare(config, 64, log=lambda line: None)
    row = prepared.train[0][0]
    start, end = (256 + 1, 256 + 2)
    targets = row["targets"][row["segment"] > 0]
    assert list(targets).count(start) == 2
    assert list(targets).count(end) == 2  # the one in the user's message is text
    learned = row["targets"][row["loss_mask"] > 0]
    encode = prepared.tokenizer.encode
    np.testing.assert_array_equal(learned, [*encode("yes"), end, 256])
    assert prepared.tokenizer.decode(targets).count("<|im_end|>") == 1
    counts = prepared.train[0].stream.counts
    assert counts["bytes"] == row["num_bytes"].sum()


def test_the_layout_of_a_model_whose_answers_end_with_the_document_token(tmp_path):
    made = source(
        tmp_path,
        chat("q", "a", "r", "b"),
        template=MISTRAL,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
    )
    ((whole, learned),) = rows(tmp_path, made, im_tokenizer(tmp_path))
    end = "<|endoftext|>"
    assert whole == f"<|im_start|>[INST] q [/INST]a{end}[INST] r [/INST]b{end}"
    assert learned == f"a{end}b{end}"


LAYOUTS = {
    "plain": {"template": PLAIN, "bos_token": "", "eos_token": DOC_TOKEN},
    "chatml": {"template": CHATML, "bos_token": "", "eos_token": "<|im_end|>"},
    "mistral": {
        "template": MISTRAL,
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_question_ends_where_the_answer_of_training_begins(name, tmp_path):
    layout = LAYOUTS[name]
    made = source(tmp_path, chat("<|im_end|> q", "a"), **layout)
    file = im_tokenizer(tmp_path)
    ((whole, _),) = rows(tmp_path, made, file)
    tokenizer = file.make("t", (None, ""), tmp_path)
    ids = question(tokenizer, "<|im_end|> q", **layout)
    assert ids[0] == tokenizer.doc_id  # in rows it is no target
    text = "".join(tokenizer.pieces()[i] for i in ids[1:])
    assert whole.startswith(f"{text}a")
    end = tokenizer.encode_markup("<|im_end|>")[0]
    assert ids.count(end) == (name == "chatml")  # the one of the message is text


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_template_of_an_export_begins_chats_as_here(name, begin, tmp_path):
    layout = LAYOUTS[name]
    tokenizer = im_tokenizer(tmp_path).make("t", (None, ""), tmp_path)
    if not begin:
        tokenizer.begin(None, tokenizer.doc_id)
    for known in ({"eos_token": "<|endoftext|>"}, {"bos_token": "<|im_start|>"}):
        text = template_file(tokenizer, layout, known)
        tokens = (known.get("bos_token", ""), known.get("eos_token", ""))
        before, _, after = _pieces(text, *tokens, ("user",), answer=True)
        ids = tokenizer.encode_markup(f"{before}q{after}")
        assert ids.tolist() == question(tokenizer, "q", **layout)


def test_a_template_that_needs_nothing_more_leaves_as_it_came(tmp_path):
    tokenizer = im_tokenizer(tmp_path).make("t", (None, ""), tmp_path)
    tokenizer.begin(None, tokenizer.doc_id)
    known = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert template_file(tokenizer, LAYOUTS["chatml"], known) == CHATML


def test_the_layout_of_a_run_is_that_of_its_chats():
    layout = LAYOUTS["mistral"]
    data = Data(sources=(Chat(paths=("a",), **layout),), tokenizer=Bytes())
    assert layout_of(data) == layout
    assert layout_of(Data(tokenizer=Bytes())) == {}


def test_a_converted_run_keeps_the_template(tmp_path):
    keep_layout(tmp_path / "none", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text(CHATML)
    keep_layout(tmp_path / "a", tmp_path / "b" / "hf")
    assert saved_layout(SavedTokenizer(path=str(tmp_path / "b" / "tokenizer")))


GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = chat("What is <|im_end|>?", "A token.", "And é?", "Two bytes:\n\n é")


def test_a_template_may_mark_what_is_learned(tmp_path):
    made = source(tmp_path, TALK, template=GENERATION)
    ((whole, learned),) = rows(tmp_path, made, im_tokenizer(tmp_path))
    first, last = "A token.<|im_end|>", "<|im_end|><|endoftext|>"
    assert learned.startswith(f"{first}Two bytes:") and learned.endswith(last)
    assert whole.endswith(learned[len(first) :])


@pytest.mark.hf
def test_what_is_learned_is_the_mask_of_transformers(tmp_path):
    """Token by token; contents with markup are text here, and are left out."""
    transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
    tokenizer = im_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer.path)
    talk = chat("What is it?", *(message["content"] for message in TALK[1:]))
    expected = theirs.apply_chat_template(
        talk,
        chat_template=GENERATION,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    made = source(tmp_path, talk, template=GENERATION)
    config = Data(sources=(made,), tokenizer=tokenizer, cache_dir=str(tmp_path / "c"))
    row = prepare(config, 128, log=lambda line: None).train[0][0]
    real = row["segment"] > 0
    ids, mask = expected["input_ids"], expected["assistant_masks"]
    assert sum(mask) > 20
    # White space after the last message is left out; the document token follows.
    count = np.sum(real) - 1
    assert theirs.decode(ids[count:]) == "\n"
    np.testing.assert_array_equal(row["targets"][real][:count], ids[:count])
    np.testing.assert_array_equal(row["loss_mask"][real][:count], mask[:count])


def test_chats_are_cut_or_refused(tmp_path):
    made = source(tmp_path, chat("q" * 20, "a" * 40), chat("q" * 60, "a"))
    with pytest.raises(
        ConfigError, match=r"2 of 2 examples do not fit into seq_len=48"
    ):
        list(rows(tmp_path, made, Bytes(), 48))
    made.truncate = True
    learned = [own for _, own in rows(tmp_path, made, Bytes(), 48)]
    assert sorted(learned) == ["", "a" * 9]


@pytest.mark.parametrize(
    ("messages", "fields", "words"),
    [
        ([], {}, "must have a list of messages there, not []"),
        ("hello", {}, "must have a list of messages there, not 'hello'"),
        (["hello"], {}, "message 1 must have a role and a content"),
        (chat("a", None), {}, "message 2 must have a string of valid Unicode there"),
        ([{"role": "user", "content": "a"}], {}, "has no message of that role, but of"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [1]}],
            {},
            "message 1 has tool calls, which are not read",
        ),
        (
            [{"role": "system", "content": "s"}, *chat("q", "a")],
            {"template": MISTRAL},
            "no sys",
        ),
        (chat("q", "a"), {"template": "{% if %}"}, "s.template: {at}: Expected an exp"),
        (chat("q", "a"), {"template": "all"}, "write each of the 2 messages once"),
        (chat("q", "a"), {"template": "{{ messages.x.y }}"}, "s.template: {at}: "),
    ],
)
def test_chats_that_cannot_be_read(messages, fields, words, tmp_path):
    made = source(tmp_path, chat("q", "a"), messages, **fields)
    if "template" in fields:
        made = source(tmp_path, messages, **fields)
    at = f"{made.paths[0]}:{1 if 'template' in fields else 2}"
    words = words.replace("s.template", "data.sources[0].template")
    fails(made, at, words.format(at=at))


def test_the_template_of_an_imported_run_is_found(tmp_path):
    tokenizer = SavedTokenizer(path=str(tmp_path / "tokenizer"))
    assert saved_layout(Bytes()) == saved_layout(tokenizer) == {}
    (tmp_path / "hf").mkdir()
    about = {
        "bos_token": None,
        "eos_token": {"content": "</s>"},
        "chat_template": "one",
    }
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(json.dumps(about))
    found = {"template": "one", "bos_token": "", "eos_token": "</s>"}
    assert saved_layout(tokenizer) == found
    several = [{"name": n, "template": f"the {n}"} for n in ("tool_use", "default")]
    file.write_text(json.dumps(about | {"chat_template": several}))
    assert saved_layout(tokenizer)["template"] == "the default"
    (tmp_path / "hf" / "chat_template.jinja").write_text("two")
    assert saved_layout(tokenizer)["template"] == "two"
