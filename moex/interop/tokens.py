"""What a folder's tokenizer files say: where they are, how texts begin and end."""

import pathlib
from typing import Any

import tokenizers

from moex.config import ConfigError
from moex.data.encoding import Tokenizer, template_begin
from moex.json_files import field, read_object

SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
GENERATION = "generation_config.json"


def tokenizer_file(folder: pathlib.Path, given) -> pathlib.Path:
    """The `tokenizer.json` of a folder, or the one that is given."""
    file = pathlib.Path(given) if given else folder / "tokenizer.json"
    if not file.is_file():
        hint = (
            ""
            if given
            else (
                " Give another with --tokenizer, or make it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
        )
        raise ConfigError(f"{file}: there is no such tokenizer file.{hint}")
    return file


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


def set_ends(tokenizer: Tokenizer, folder: pathlib.Path, config, file) -> None:
    """Let texts begin and end as in transformers and in the harness with it.

    Args:
      tokenizer: of the run; is changed.
      folder: with `tokenizer_config.json` and `generation_config.json`.
      config: its `config.json`.
      file: the `tokenizer.json` that the tokenizer was made of.
    """
    model = tokenizers.Tokenizer.from_file(str(file))
    own = _named(folder, "bos_token")
    named = model.token_to_id(own) if own else None
    # The template comes first, as in transformers 5. Version 4 made one of these two
    # fields for the classes of Llama, whose files still have them.
    begin = template_begin(model)
    settings = _fields(folder, SETTINGS)
    if begin is None and field(settings, "add_bos_token", bool | None, SETTINGS, None):
        begin = named
    scored = begin if named is None else named
    tokenizer.begin(begin, tokenizer.doc_id if scored is None else scored)
    tokenizer.stop_at(end_ids(folder, config))


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
