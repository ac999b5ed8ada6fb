"""The texts and bytes of single tokens, from the JSON of a Hugging Face tokenizer.

A text is not just the texts of its tokens in a row: SentencePiece's tokenizers drop the
space before the first word, WordPiece writes spaces between words that no token has,
and a character may be several tokens of one byte each.

Not here: encoding and decoding (`encoding.py`).
"""

import itertools
import json
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

SPACE = "\u2581"  # how SentencePiece writes a space


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    Printable characters of Latin-1 stand for themselves; the characters from U+0100 on
    stand for the other bytes, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    own = {chr(b): b for b in printable}
    return own | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _bytes_of_characters()
FALLBACK = {f"<0x{b:02X}>": b for b in range(256)}  # tokens of one byte


def kinds(part) -> set[str]:
    """The `type` of a part of a tokenizer's JSON, and of all parts inside it."""
    if isinstance(part, list):
        return set().union(*map(kinds, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(kinds, part.values()))


def is_byte_level(spec: dict) -> bool:
    """Whether every byte of a text ends up in exactly one token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return (
        spec.get("normalizer") is None
        and "ByteLevel" in kinds(spec.get("pre_tokenizer"))
        and kinds(spec.get("pre_tokenizer")) <= {"ByteLevel", "Sequence", "Split"}
        and '"add_prefix_space": true' not in json.dumps(spec["pre_tokenizer"])
        and '"Removed"' not in json.dumps(spec["pre_tokenizer"])
        and spec["model"].get("type") == "BPE"
        and set(alphabet) <= spec["model"]["vocab"].keys()
        and not any(t["lstrip"] or t["rstrip"] for t in spec["added_tokens"])
    )


def has_gpt2_words(spec: dict) -> bool:
    """Whether the tokenizer splits text into the words of `fast_bpe.py`."""
    how = spec["pre_tokenizer"]
    special = all(t["special"] for t in spec["added_tokens"])
    return special and how["type"] == "ByteLevel" and how.get("use_regex", True)


def inside_a_text(spec: dict) -> dict:
    """Change a tokenizer so that it puts no space before the first word."""
    parts = {part: _no_prefix(spec[part]) for part in ("normalizer", "pre_tokenizer")}
    return spec | parts


def _no_prefix(part):
    if isinstance(part, list):
        return [p for p in map(_no_prefix, part) if p is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = {key: _no_prefix(value) for key, value in part.items()}
    if part.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def special_ids(spec: dict) -> set[int]:
    """The tokens that decoding leaves out."""
    return {token["id"] for token in spec["added_tokens"] if token["special"]}


def fallback_bytes(spec: dict, vocab: dict[str, int]) -> dict[int, int]:
    """Map {token id: byte} for the tokens that the decoder joins to characters."""
    if "ByteFallback" not in kinds(spec["decoder"]):
        return {}
    return {i: FALLBACK[token] for token, i in vocab.items() if token in FALLBACK}


def broken_runs(ids: list[int], byte_of: dict[int, int]) -> list[int | str]:
    """Replace runs of byte tokens that are not valid UTF-8 by texts.

    If one byte of a run is invalid, the library makes the whole run unreadable: text
    that was printed already would change when the next token comes.
    """
    found: list[int | str] = []
    for is_byte, run in itertools.groupby(ids, byte_of.__contains__):
        group = list(run)
        raw = bytes(byte_of[i] for i in group) if is_byte else b""
        text = raw.decode("utf-8", errors="replace")
        found += [text] if text.encode("utf-8") != raw else group
    return found


def token_bytes(model: Any, spec: dict, vocab_size: int, doc_id: int) -> np.ndarray:
    """The UTF-8 bytes that each token adds to a text, int32[V]; special ones add 0."""
    table = np.zeros(vocab_size, np.int32)
    vocab = model.get_vocab(with_added_tokens=True)
    if "ByteLevel" in kinds([spec["pre_tokenizer"], spec["decoder"]]):
        # One character of the byte-level alphabet stands for one byte.
        added = {t["id"]: len(t["content"].encode()) for t in spec["added_tokens"]}
        for token, i in vocab.items():
            table[i] = added.get(i, len(token))
    else:
        ids = list(vocab.values())
        table[ids] = _added_bytes(model, ids)
        table[[i for token, i in vocab.items() if token in FALLBACK]] = 1
    table[[*special_ids(spec), doc_id]] = 0
    return table


def _added_bytes(model, ids: list[int]) -> np.ndarray:
    """Measure how much longer a text of one word becomes with each id after it."""
    alone = [len(text.encode()) for text in model.decode_batch([[i] for i in ids])]
    word = ids[int(np.argmax(alone))]
    both = model.decode_batch([[word, i] for i in ids])
    added = np.array([len(text.encode()) for text in both]) - max(alone)
    return np.maximum(added, 0)


def bytes_from_offsets(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """The bytes from the end of each token's predecessor to its own end, int32[n].

    The last token gets the rest, so that they sum to the size of the text.
    """
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    size = 1 + (code >= 0x80) + (code >= 0x800).astype(int) + (code >= 0x10000)
    byte_at = np.r_[0, np.cumsum(size)]
    ends = np.maximum.accumulate(np.array([e for _, e in offsets], np.int64))
    ends[-1] = len(text)
    return np.diff(byte_at[ends], prepend=0).astype(np.int32)


def bytes_with_sum(sizes: np.ndarray, total: int) -> np.ndarray:
    """Change the first of `sizes`, int32[n >= 1], so that they sum to `total`."""
    sizes = sizes.copy()
    missing = total - int(sizes.sum())
    if missing >= 0:
        sizes[0] += missing
        return sizes
    before = np.cumsum(sizes) - sizes
    return sizes - np.clip(-missing - before, 0, sizes).astype(np.int32)


def pieces(spec: dict, vocab: dict[str, int], vocab_size: int) -> list[str]:
    """The text of each id, for people; "" for ids that are not used.

    Args:
      spec: the JSON of the tokenizer.
      vocab: {token: id} without added tokens.
      vocab_size: V.
    """
    found = [""] * vocab_size
    byte_level = "ByteLevel" in kinds([spec["pre_tokenizer"], spec["decoder"]])
    for token, i in vocab.items():
        if byte_level and all(c in BYTE_OF for c in token):
            found[i] = spelled(bytes(BYTE_OF[c] for c in token))
        elif token in FALLBACK:
            found[i] = spelled(bytes([FALLBACK[token]]))
        else:
            found[i] = token.replace(SPACE, " ")
    for token in spec["added_tokens"]:
        found[token["id"]] = token["content"]
    return found


def spelled(piece: bytes) -> str:
    r"""Decode bytes to text; write those that are not a whole character as \xNN."""
    return piece.decode("utf-8", errors="backslashreplace")
