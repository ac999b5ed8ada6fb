"""What a folder's tokenizer files say: where they are, how texts begin and end."""

import pathlib

import tokenizers

from moex.config import ConfigError
from moex.data.tokenizer import Tokenizer, template_begin
from moex.interop.folder import read_json

SETTINGS = "tokenizer_config.json"


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
    token = _named(folder, "eos_token")
    if token:
        return token
    number = config.get("eos_token_id")
    number = number[0] if isinstance(number, list) else number
    added = read_json(file).get("added_tokens", [])
    for entry in added:
        if number is not None and entry.get("id") == number:
            return entry["content"]
    raise ConfigError(
        f"{folder}: names no end-of-text token; give it with --doc-token, one of "
        f"{[entry['content'] for entry in added]}."
    )


def set_begin(tokenizer: Tokenizer, folder: pathlib.Path, file: pathlib.Path) -> None:
    """Let texts begin as they do in transformers and in the harness with it.

    Args:
      tokenizer: of the run; is changed.
      folder: with `tokenizer_config.json`.
      file: the `tokenizer.json` that the tokenizer was made of.
    """
    model = tokenizers.Tokenizer.from_file(str(file))
    own = _named(folder, "bos_token")
    named = model.token_to_id(own) if own else None
    # The template comes first, as in transformers 5. Version 4 made one of these two
    # fields for the classes of Llama, whose files still have them.
    begin = template_begin(model)
    if begin is None and _settings(folder).get("add_bos_token"):
        begin = named
    scored = begin if named is None else named
    tokenizer.begin(begin, tokenizer.doc_id if scored is None else scored)


def _settings(folder: pathlib.Path) -> dict:
    file = folder / SETTINGS
    return read_json(file) if file.is_file() else {}


def _named(folder: pathlib.Path, field: str) -> str | None:
    """A special token of `tokenizer_config.json`, written in either form."""
    token = _settings(folder).get(field)
    return token.get("content") if isinstance(token, dict) else token
