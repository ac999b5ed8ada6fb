"""Chats: records with a list of messages, laid out by the template of a model.

The template is one of Hugging Face transformers (Jinja). It is rendered with marks in
place of the messages' contents, so that no content is ever taken for markup, and once
for all chats with the same roles.
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moex.config.base import ConfigError
from moex.data.contract import Document, Part
from moex.data.encoding import DOC_TOKEN
from moex.data.files import content_key, one_line
from moex.data.records import text_at
from moex.data.sources import Records
from moex.data.tokenizer import SavedTokenizer
from moex.json_files import read_object

# A line with the role, the content on lines below; an answer ends with the document
# token, as a text does. It names no special token, so any tokenizer has it.
PLAIN = (
    "{% for message in messages %}{{ message.role + ':\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
FILES = ("tokenizer_config.json", "chat_template.jinja")  # of an imported model
TOKENS = ("bos_token", "eos_token")  # variables of a template
FIRST, LAST = "\ue000", "\ue001"  # private characters around the number of a message
MARK = re.compile(f"{FIRST}([0-9]+){LAST}")
BEGIN, END = "\ue002", "\ue003"  # private characters around a block of {% generation %}


class Content(NamedTuple):
    """The place of a message's content in the layout of a chat."""

    message: int
    is_learned: bool


class Generation(Extension):
    """The tag {% generation %}, with which a template says what a model answers."""

    tags = {"generation"}

    def parse(self, parser):
        """Write marks around the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def mark(text):
            return nodes.Output([nodes.TemplateData(text)], lineno=line)

        return [mark(BEGIN), *body, mark(END)]


@dataclasses.dataclass(kw_only=True, slots=True)
class Chat(Records):
    """Records with a list of messages, each with a role and a content.

    The messages of one role are learned: their contents, and the markup that ends them
    up to its last character that is not white space, such as <|im_end|>. Where the
    template has {% generation %}, what is inside of that is learned instead. A chat
    that ends with such a message also learns the document token after it. Chats are
    packed whole. The messages before the first one that is learned decide the split.
    """

    messages: str = "messages"  # name of the field with the messages
    learned_role: str = "assistant"  # the role whose messages are learned
    template: str = PLAIN  # a chat template: the Jinja text itself
    bos_token: str = ""  # the template's variable of this name
    eos_token: str = DOC_TOKEN  # the template's variable of this name
    truncate: bool = False  # cut chats that are longer than a sequence

    def content(self) -> str:
        """The kind of content of the documents: `chats`."""
        return "chats"

    def fields(self) -> dict[str, str]:
        """The field of the messages."""
        return {"messages": self.messages}

    def document(self, record, at, where) -> Document:
        """Make a document of the parts of a chat."""
        here = f"{where}.messages = {self.messages!r}"
        said = [
            _message(message, f"{at}, message {i}", here)
            for i, message in enumerate(_list(record[self.messages], at, here), start=1)
        ]
        roles = tuple(role for role, _ in said)
        if self.learned_role not in roles:
            raise ConfigError(
                f"{where}.learned_role = {self.learned_role!r}: {at} has no message of "
                f"that role, but of {', '.join(dict.fromkeys(roles))}: nothing would "
                "be learned."
            )
        try:
            parts = layout(
                self.template, self.bos_token, self.eos_token, roles, self.learned_role
            )
        except ConfigError as e:
            raise ConfigError(f"{where}.template: {at}: {e}") from None
        asked = said[: roles.index(self.learned_role)]
        key = content_key("\0".join(text for _, text in asked).encode())
        return Document(
            key,
            tuple(
                Part(said[part.message][1], part.is_learned, False)
                if isinstance(part, Content)
                else part
                for part in parts
            ),
        )


def _list(messages: Any, at: str, where: str) -> list:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(
            f"{where}: {at} must have a list of messages there, not {messages!r:.40}."
        )
    return messages


def _message(message: Any, at: str, where: str) -> tuple[str, str]:
    """Read (role, content) of a message."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ConfigError(f"{where}: {at} must have a role and a content.")
    if message.get("tool_calls"):
        raise ConfigError(f"{where}: {at} has tool calls, which are not read.")
    role, content = (text_at(message[n], at, where) for n in ("role", "content"))
    return role, content


@functools.lru_cache(maxsize=4096)
def layout(
    template: str, bos: str, eos: str, roles: tuple[str, ...], learned: str
) -> tuple[Part | Content, ...]:
    """Lay out a chat of these roles: markup, and the places of the contents.

    Raises:
      ConfigError: if the template cannot be rendered, or has not each content once.
    """

    pieces = _pieces(template, bos, eos, roles)
    if BEGIN in "".join(pieces):
        return tuple(_marked(pieces))
    parts: list[Part | Content] = [Part(pieces[0], False, True)]
    for i, role in enumerate(roles):
        parts.append(Content(i, role == learned))
        after, end = pieces[2 * i + 2], 0
        if role == learned:  # a chat that ends here shows which markup ends a message
            ends = _pieces(template, bos, eos, roles[: i + 1])[-1]
            end = len(ends) if after.startswith(ends) else 0
        parts += [Part(after[:end], True, True), Part(after[end:], False, True)]
    return tuple(part for part in parts if isinstance(part, Content) or part.text)


def _marked(pieces: list[str]) -> Iterator[Part | Content]:
    """The layout of a template that marks by itself what is learned."""
    is_learned = False
    for i, piece in enumerate(pieces):
        if i % 2:
            yield Content(int(piece), is_learned)
            continue
        for text in re.split(f"([{BEGIN}{END}])", piece):
            if text in (BEGIN, END):
                is_learned = text == BEGIN
            elif text:
                yield Part(text, is_learned, True)


def _pieces(
    template: str, bos: str, eos: str, roles: tuple[str, ...], answer: bool = False
) -> list[str]:
    """The markup around and between the messages of a chat, with their numbers.

    Args:
      answer: whether the chat goes on with an answer, whose beginning is written.

    Raises:
      ConfigError: as for `layout`.
    """
    said = [
        {"role": role, "content": f"{FIRST}{i}{LAST}"} for i, role in enumerate(roles)
    ]
    try:
        text = _compiled(template).render(
            messages=said,
            add_generation_prompt=answer,
            bos_token=bos,
            eos_token=eos,
            raise_exception=_refuse,
        )
    except jinja2.TemplateError as e:
        raise ConfigError(f"{one_line(e)}.") from None
    if answer:
        text = re.sub(f"[{BEGIN}{END}]", "", text)
    pieces = MARK.split(text if answer else text.rstrip())
    if list(map(int, pieces[1::2])) != list(range(len(roles))):
        raise ConfigError(
            f"the template must write each of the {len(roles)} messages once, in order."
        )
    return pieces


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    options: Any = {"trim_blocks": True, "lstrip_blocks": True}  # as in transformers
    own = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(extensions=own, **options)
    return environment.from_string(template)


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def question(tokenizer, text: str, *, template, bos_token, eos_token) -> list[int]:
    """Encode a user's message, and the markup up to the first token of the answer.

    As in training, the document token is in front where texts begin with it.

    Args:
      tokenizer: `data.encoding.Tokenizer`.
      template, bos_token, eos_token: fields of `Chat`.

    Raises:
      ConfigError: if the template cannot be rendered.
    """
    before, _, after = _pieces(template, bos_token, eos_token, ("user",), answer=True)
    begin, end = map(tokenizer.encode_markup, (before, after))
    (own,) = tokenizer.encode_batch([text], inside=True)
    front = [tokenizer.doc_id] if _lacks_begin(tokenizer, begin) else []
    return [*front, *begin.tolist(), *own.tolist(), *end.tolist()]


def _lacks_begin(tokenizer, begin_ids) -> bool:
    """Tell whether texts begin with the document token where chats do not."""
    doc = tokenizer.doc_id
    return tokenizer.begin_id == doc and list(begin_ids[:1]) != [doc]


def template_file(tokenizer, layout: dict[str, str], settings: dict) -> str:
    """Write a template as a file of transformers, with which chats begin as here.

    Args:
      tokenizer: `data.encoding.Tokenizer`.
      layout: the fields of `Chat`.
      settings: the fields of the `tokenizer_config.json` beside it.
    """
    template, bos, eos = (layout[name] for name in ("template", *TOKENS))
    begin = tokenizer.encode_markup(_pieces(template, bos, eos, ("user",))[0])
    doc, lacks = tokenizer.doc_token, _lacks_begin(tokenizer, begin)
    template = template.replace(DOC_TOKEN, doc)
    own = {name: layout[name].replace(DOC_TOKEN, doc) for name in TOKENS}
    if not lacks and own == _tokens(settings):
        return template
    front = f"{{{{ {json.dumps(doc)} }}}}" if lacks else ""
    sets = "".join(f"{{% set {n} = {json.dumps(v)} %}}" for n, v in own.items())
    return f"{front}{sets}\n{template}"  # a newline after a block is no text


def keep_layout(source: Path, target: Path) -> None:
    """Copy the chat template of an imported run, if it has one.

    Args:
      source, target: `RunDir.imported` of two runs.
    """
    for name in FILES:
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def layout_of(data) -> dict[str, str]:
    """The fields of `Chat` that lay out the chats of a run; {}: it knows no chats.

    They are those of its data, or else of the model that was imported.

    Args:
      data: the run's `Data`.
    """
    for source in data.sources:
        if isinstance(source, Chat):
            return {name: getattr(source, name) for name in ("template", *TOKENS)}
    return saved_layout(data.tokenizer)


def saved_layout(tokenizer) -> dict[str, str]:
    """The fields of `Chat` for the tokenizer of an imported run; {} for any other."""
    if not isinstance(tokenizer, SavedTokenizer):
        return {}
    folder = Path(tokenizer.path).parent / "hf"  # `RunDir.imported`
    file, own = (folder / name for name in FILES)
    about = read_object(file) if file.is_file() else {}
    template = about.get("chat_template")
    if own.is_file():
        template = own.read_text(encoding="utf-8")
    if isinstance(template, list):  # several, by name
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    if not isinstance(template, str):
        return {}
    return {"template": template} | _tokens(about)


def _tokens(settings: dict) -> dict[str, str]:
    """The values of `TOKENS` in a `tokenizer_config.json`, written in either form."""
    found = {}
    for name in TOKENS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        found[name] = token if isinstance(token, str) else ""
    return found
