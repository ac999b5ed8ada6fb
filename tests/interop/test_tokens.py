"""How texts begin, by the tokenizer files of a folder."""

import json

import pytest
import tokenizers

from moex.config.base import ConfigError
from moex.data.tokenizer import DOC_TOKEN, Bytes, Tokenizer, TokenizerFile
from moex.interop.tokens import end_ids, end_token, generation, set_ends, written
from tests.interop import parity

END = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": DOC_TOKEN}
BOS = {"bos_token": "<s>"}
SPELLED = {"bos_token": {"__type": "AddedToken", "content": "<s>"}}
# (whether the template puts "<s>" before a text, fields of tokenizer_config.json,
# the token before a prompt, the token before a text that is scored whole)
CASES = [
    (True, BOS, "<s>", "<s>"),
    (True, {}, "<s>", "<s>"),
    (True, BOS | {"add_bos_token": False}, "<s>", "<s>"),
    (False, BOS, None, "<s>"),
    (False, SPELLED, None, "<s>"),
    (False, BOS | {"add_bos_token": False}, None, "<s>"),
    (False, {"bos_token": None, "add_bos_token": True}, None, DOC_TOKEN),
    (False, {}, None, DOC_TOKEN),
]
OLD = (False, SPELLED | {"add_bos_token": True}, "<s>", "<s>")


def write_files(folder, template, fields):
    """The two files; (the `Tokenizer` before `set_ends`, id of a token)."""
    file = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(
        str(parity.FIXTURES / "mixtral" / "tokenizer.json")
    )
    model.add_special_tokens(["<s>"])
    if template:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))]
        )
    model.save(str(file))
    (folder / "tokenizer_config.json").write_text(json.dumps(END | fields))
    made = TokenizerFile(path=str(file), doc_token=DOC_TOKEN)
    return made.make("t", (lambda limit: [], ""), folder), model.token_to_id


@pytest.mark.parametrize(("template", "fields", "begin", "scored"), [*CASES, OLD])
def test_the_first_token(tmp_path, template, fields, begin, scored):
    tokenizer, id_of = write_files(tmp_path, template, fields)
    set_ends(tokenizer, tmp_path, tmp_path / "tokenizer.json", [])
    assert tokenizer.begin_id == (None if begin is None else id_of(begin))
    assert tokenizer.prefix_id == id_of(scored)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, None, {5}),
        ({"eos_token_id": [5, 7]}, None, {5, 7}),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 9]}, {7, 9}),
        ({"eos_token_id": [5]}, {"eos_token_id": None}, {5}),
        ({"eos_token_id": None}, {}, set()),
        ({"eos_token_id": [-1, 3, 10**9]}, {}, {3}),  # the others cannot be written
        ({}, None, set()),
    ],
)
def test_texts_end_at_every_token_of_the_folder(tmp_path, config, generation, ends):
    tokenizer, _ = write_files(tmp_path, False, {})
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    file, found = tmp_path / "tokenizer.json", end_ids(tmp_path, config)
    set_ends(tokenizer, tmp_path, file, found)
    assert set(tokenizer.stop_ids) == {tokenizer.doc_id} | ends
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").stop_ids == tokenizer.stop_ids


TEXTS = ["the cat", "", "  a <|doc|> b\n", "caf\u00e9 \U0001f600\x00"]


@pytest.mark.parametrize("kind", ["bytes", "document token", "none", "other"])
def test_exported_files_begin_texts_as_the_run_does(tmp_path, kind):
    """By the tokenizers library, which transformers reads the files with."""
    if kind == "bytes":
        own = Bytes().make("t", (lambda limit: [], ""), tmp_path)
    else:
        own, id_of = write_files(tmp_path, kind == "document token", BOS)
        begin = {"none": None, "other": id_of("<s>")}.get(kind, own.doc_id)
        own.begin(begin, own.doc_id if begin is None else begin)
    own.save(tmp_path / "saved")
    files = written(Tokenizer.load(tmp_path / "saved"), tmp_path / "saved")
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    model.encode_special_tokens = True  # as split_special_tokens has it
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["split_special_tokens"] is True
    assert settings["eos_token"] == DOC_TOKEN
    assert (settings["pad_token"], settings["padding_side"]) == (DOC_TOKEN, "left")
    first = {"none": None, "other": "<s>"}.get(kind, DOC_TOKEN)
    assert settings.get("bos_token") == first
    ids = {"eos_token_id": own.doc_id, "pad_token_id": own.doc_id}
    if first is not None:
        ids["bos_token_id"] = model.token_to_id(first)
    assert json.loads(files["generation_config.json"]) == ids
    for text in TEXTS:
        ids = model.encode(text).ids
        assert ids == (own.prompt(text) if text or first else [])
        assert model.decode(ids) == own.decode(ids) == text


def test_a_run_of_chats_leaves_with_its_template(tmp_path):
    own, _ = write_files(tmp_path, False, BOS)
    layout = {"template": "{{ messages[0].content }}", "bos_token": ""}
    files = written(own, tmp_path, layout | {"eos_token": DOC_TOKEN})
    assert "split_special_tokens" not in json.loads(files["tokenizer_config.json"])
    assert files["chat_template.jinja"].endswith(layout["template"])


def test_a_run_that_ends_at_several_tokens_says_all_of_them(tmp_path):
    own, id_of = write_files(tmp_path, False, BOS)
    own.stop_at([id_of("<s>")])
    files = written(own, tmp_path)
    listed = sorted([own.doc_id, id_of("<s>")])
    assert json.loads(files["generation_config.json"])["eos_token_id"] == listed


@pytest.mark.parametrize(
    ("config", "came", "made"),
    [
        ({}, None, {"eos_token_id": [5, 9]}),
        ({"eos_token_id": [5, 9]}, None, None),
        ({"eos_token_id": 5}, {"eos_token_id": [5, 9]}, None),
        (
            {"eos_token_id": 5, "bos_token_id": 1, "pad_token_id": None},
            None,
            {"bos_token_id": 1, "eos_token_id": [5, 9]},
        ),
        (
            {"eos_token_id": 5},
            {"eos_token_id": 5, "temperature": 0.6},
            {"eos_token_id": [5, 9], "temperature": 0.6},
        ),
    ],
)
def test_an_import_that_was_trained_ends_at_the_token_between_documents(
    tmp_path, config, came, made
):
    """Which is token 9, whatever the folder says."""
    own, _ = write_files(tmp_path, False, BOS)
    own.doc_id = 9
    own.stop_at([5])
    if came is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(came))
    files = generation(own, tmp_path, config)
    want = {} if made is None else {"generation_config.json": made}
    assert {name: json.loads(text) for name, text in files.items()} == want


@pytest.mark.parametrize("value", ["</s>", [1, "2"], [[1]], 1.5, {"id": 1}, True])
def test_a_token_that_ends_texts_is_a_number(tmp_path, value):
    for file in ("config.json", "generation_config.json"):
        where = tmp_path if file != "config.json" else tmp_path / "none"
        if file != "config.json":
            (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ConfigError, match=rf"{file}: eos_token_id = .*must be int"):
            end_ids(where, {"eos_token_id": value})


def test_a_special_token_may_stand_in_a_file_of_its_own(tmp_path):
    file = tmp_path / "special_tokens_map.json"
    file.write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert end_token(tmp_path, {}, tmp_path / "tokenizer.json") == "<end>"
    file.write_text(json.dumps({"eos_token": ["<end>"]}))
    with pytest.raises(ConfigError, match="special_tokens_map.json: eos_token = "):
        end_token(tmp_path, {}, tmp_path / "tokenizer.json")


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("template", "fields", "begin", "scored"), CASES)
def test_texts_begin_as_in_transformers(tmp_path, template, fields, begin, scored):
    transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
    tokenizer, _ = write_files(tmp_path, template, fields)
    set_ends(tokenizer, tmp_path, tmp_path / "tokenizer.json", [])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.prompt("the cat") == theirs("the cat").input_ids
    prefix = theirs.bos_token_id if "bos_token" in fields else None
    if prefix is not None:  # as HFLM of the harness has it; else its eos
        assert tokenizer.prefix_id == prefix
