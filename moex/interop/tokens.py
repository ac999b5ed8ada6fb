"""A folder's tokenizer files: what they say of how texts begin and end, and ours.

The tokenizer itself is in `moex/data/tokenizer.py`.
"""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from moex.config.base import ConfigError, short
from moex.data.chat import FILES as CHAT_FILES
from moex.data.chat import template_file
from moex.data.encoding import DOC_TOKEN, MODEL, Tokenizer, read_model, template_begin
from moex.data.token_text import BYTE_OF
from moex.json_files import field, read_object

(SETTINGS, TEMPLATE), SPECIAL = CHAT_FILES, "special_tokens_map.json"
GENERATION = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokenizer_file(folder: pathlib.Path, given) -> pathlib.Path:
    """The `tokenizer.json` of a folder, or the one that is given."""
    file = pathlib.Path(given) if given else folder / "tokenizer.json"
    if not file.is_file():
        advice = (
            " Give another with --tokenizer, or make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
        missing = f"{file}: there is no such tokenizer file."
        raise ConfigError(missing if given else missing + advice)
    return file


def check_tokens(file: pathlib.Path, vocab: int) -> None:
    """Check that the model has a row for every token.

    Raises:
      ConfigError: naming the first token beyond `vocab`, or if the file is broken.
    """
    ids = read_model(file, str(file)).get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in ids.items() if i >= vocab)
    if beyond:
        number, token = beyond[0]
        raise ConfigError(
            f"{file}: the token {short(token)} has id {number}, but config.json has "
            f"vocab_size = {vocab}: the model has no row for it. Remove it from "
            "added_tokens if no text has it, or give another file with --tokenizer."
        )


def end_token(folder: pathlib.Path, config, file: pathlib.Path) -> str:
    """The token that ends a document, by the folder's own files."""
    if token := _named(folder, "eos_token"):
        return token
    ends = end_ids(folder, config)
    added = field(read_object(file), "added_tokens", list[dict], str(file), [])
    names = {}
    for entry in added:
        number = field(entry, "id", int, f"{file}: added_tokens")
        names[number] = field(entry, "content", str, f"{file}: added_tokens")
    if ends and ends[0] in names:
        return names[ends[0]]
    raise ConfigError(
        f"{folder}: names no end-of-text token; give it with --doc-token, one of "
        f"{[*names.values()]}."
    )


def end_ids(folder: pathlib.Path, config) -> list[int]:
    """The tokens that end a text in transformers, of which there may be several.

    `generation_config.json` is asked first, as transformers does.

    Raises:
      ConfigError: if `eos_token_id` is neither a number nor a list of numbers.
    """
    generation = _fields(folder, GENERATION)
    for name, fields in ((GENERATION, generation), ("config.json", config)):
        where = str(folder / name)
        found = field(fields, "eos_token_id", int | list[int] | None, where, None)
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def set_ends(
    tokenizer: Tokenizer, folder: pathlib.Path, file: pathlib.Path, ends: list[int]
) -> None:
    """Make texts begin and end as in transformers, and in the harness that uses it.

    Args:
      tokenizer: the run's tokenizer; it is changed.
      folder: with `tokenizer_config.json`.
      file: the `tokenizer.json` that the tokenizer was made of.
      ends: tokens that end a text, from `end_ids`.
    """
    model = read_model(file, str(file))
    own = _named(folder, "bos_token")
    named = model.token_to_id(own) if own else None
    # The template comes first, as in transformers 5. Version 4 wrote one of these two
    # fields for the classes of Llama, whose files still have them.
    begin = template_begin(model)
    settings = _fields(folder, SETTINGS)
    if begin is None and field(settings, "add_bos_token", bool | None, SETTINGS, None):
        begin = named
    scored = (i for i in (named, begin, tokenizer.doc_id) if i is not None)
    tokenizer.begin(begin, next(scored))
    tokenizer.stop_at(i for i in ends if 0 <= i < tokenizer.vocab_size)


def ends(own: Tokenizer) -> int | list[int]:
    """The `eos_token_id` of an exported run."""
    return list(own.stop_ids) if own.stop_ids[1:] else own.doc_id


def first_token(own: Tokenizer) -> int | None:
    """The `bos_token_id` of an exported run, if its texts begin with any token."""
    if own.begin_id is None and own.prefix_id == own.doc_id:
        return None
    return own.prefix_id if own.begin_id is None else own.begin_id


def written(own: Tokenizer, folder: pathlib.Path, chat=None) -> dict[str, str]:
    """The tokenizer files of an exported run: texts begin with them as they do here.

    Args:
      own: tokenizer of the run.
      folder: the folder that it was read from.
      chat: the fields of `Chat` by which the run lays out chats, if it does.

    Returns:
      {file name: text}.
    """
    file = folder / MODEL
    model = read_model(file, str(file)) if file.is_file() else _bytes()
    name = None if own.begin_id is None else model.id_to_token(own.begin_id)
    if template_begin(model) != own.begin_id:
        front = "" if name is None else f"{name}:0 "
        model.post_processor = processors.TemplateProcessing(
            single=f"{front}$A:0",
            pair=f"{front}$A:0 {front}$B:0",
            special_tokens=[] if name is None else [(name, own.begin_id)],
        )
    first = first_token(own)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if first is None else model.id_to_token(first),
        "eos_token": model.id_to_token(own.doc_id),
        # A batch of prompts is padded in front, where the mask hides what stands there.
        "pad_token": model.id_to_token(own.doc_id),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens written in a text are plain text
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    ids = dict(zip(IDS, (first, ends(own), own.doc_id), strict=True))
    return {
        MODEL: model.to_str(pretty=True) + "\n",
        SETTINGS: _text(settings),
        **chat_files(own, settings, chat),
        GENERATION: _text({name: i for name, i in ids.items() if i is not None}),
    }


def chat_files(own: Tokenizer, settings: dict, chat) -> dict[str, str]:
    """The files of an export that lay out chats, {file name: text}; {} for no chats.

    Args:
      own: tokenizer of the run.
      settings: the fields of its `tokenizer_config.json`.
      chat: the fields of `Chat`, or {}.
    """
    if not chat:
        return {}
    # transformers reads special tokens in messages too, or else not in templates.
    kept = {k: v for k, v in settings.items() if k != "split_special_tokens"}
    return {TEMPLATE: template_file(own, chat, settings), SETTINGS: _text(kept)}


def generation(own: Tokenizer, folder: pathlib.Path, config) -> dict[str, str]:
    """The generation config of an imported run that was trained here.

    It has learned to end texts with the token between documents, which may be none of
    the ends that it came with.

    Args:
      own: tokenizer of the run.
      folder: the files that were imported.
      config: the fields of its `config.json`.

    Returns:
      {file name: text}; {} where the file that came holds.
    """
    if set(own.stop_ids) <= set(end_ids(folder, config)):
        return {}
    fields = _fields(folder, GENERATION)
    if not fields:  # transformers then takes them from config.json
        fields = {name: config[name] for name in IDS if config.get(name) is not None}
    return {GENERATION: _text(fields | {"eos_token_id": ends(own)})}


def _text(fields: dict) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _bytes() -> tokenizers.Tokenizer:
    """The byte tokenizer of moex in the form of the library, with the same ids."""
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([DOC_TOKEN])
    return model


def _fields(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """The fields of a file that a folder need not have."""
    file = folder / name
    return read_object(file) if file.is_file() else {}


def _named(folder: pathlib.Path, name: str) -> str | None:
    """A special token by the first file that names it, written in either form."""
    for file in (SETTINGS, SPECIAL):
        where = str(folder / file)
        token = field(_fields(folder, file), name, str | dict | None, where, None)
        if isinstance(token, dict):
            token = field(token, "content", str, f"{where}: {name}")
        if token:
            return token
    return None
