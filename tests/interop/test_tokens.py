"""How texts begin, by the tokenizer files of a folder."""

import json

import pytest
import tokenizers

from moex.data.tokenizer import DOC_TOKEN, TokenizerFile
from moex.interop.tokens import set_begin
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
    """The two files; (the `Tokenizer` before `set_begin`, id of a token)."""
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
    set_begin(tokenizer, tmp_path, tmp_path / "tokenizer.json")
    assert tokenizer.begin_id == (None if begin is None else id_of(begin))
    assert tokenizer.prefix_id == id_of(scored)


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("template", "fields", "begin", "scored"), CASES)
def test_texts_begin_as_in_transformers(tmp_path, template, fields, begin, scored):
    transformers = pytest.importorskip("transformers", "5.23", reason="needs >= 5.23")
    tokenizer, _ = write_files(tmp_path, template, fields)
    set_begin(tokenizer, tmp_path, tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.prompt("the cat") == theirs("the cat").input_ids
    prefix = theirs.bos_token_id if "bos_token" in fields else None
    if prefix is not None:  # as HFLM of the harness has it; else its eos
        assert tokenizer.prefix_id == prefix
