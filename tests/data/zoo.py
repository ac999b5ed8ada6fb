"""Tokenizers of every kind that people bring, small and made offline."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from moex.data.tokenizer import Tokenizer

SAMPLE = [
    "the cat sees the red house.\n\n",
    "def f(x):\n    return x + 1\n\n",
    "the cat's hat é\u4e2d\U0001f600 don't stop, ABC \ufb01ne ",
] * 20
SPECIAL = ["[DOC]", "[UNK]"]
QUIET = {"special_tokens": SPECIAL, "show_progress": False}
UNKNOWN = {"unk_token": "[UNK]"}


def fallback(prefix: bool):
    """BPE of raw text, with tokens of bytes: as Llama with a prefix, Gemma without."""
    model = tokenizers.Tokenizer(models.BPE(**UNKNOWN, byte_fallback=True))
    first = [normalizers.Prepend("\u2581")] * prefix
    model.normalizer = normalizers.Sequence(
        [*first, normalizers.Replace(" ", "\u2581")]
    )
    single = [f"<0x{b:02X}>" for b in range(256)]
    options = QUIET | {"special_tokens": SPECIAL + single}
    trainer = trainers.BpeTrainer(vocab_size=320, limit_alphabet=30, **options)
    model.train_from_iterator(SAMPLE[:2], trainer)
    spec = json.loads(model.to_str())
    added = [t for t in spec["added_tokens"] if t["content"] in SPECIAL]
    model = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
    last = [decoders.Strip(" ", 1, 0)] * prefix
    model.decoder = decoders.Sequence(
        [
            *(decoders.Replace("\u2581", " "), decoders.ByteFallback()),
            *(decoders.Fuse(), *last),
        ]
    )
    return model


def metaspace(scheme: str):
    model = tokenizers.Tokenizer(models.BPE(**UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.decoder = decoders.Metaspace(prepend_scheme=scheme)
    model.train_from_iterator(SAMPLE, trainers.BpeTrainer(vocab_size=200, **QUIET))
    return model


def unigram():
    model = tokenizers.Tokenizer(models.Unigram())
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, **UNKNOWN, **QUIET)
    model.train_from_iterator(SAMPLE, trainer)
    return model


def word_piece():
    model = tokenizers.Tokenizer(models.WordPiece(**UNKNOWN))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=60, **QUIET)
    model.train_from_iterator(SAMPLE, trainer)
    return model


def words():
    model = tokenizers.Tokenizer(models.WordLevel(**UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.train_from_iterator(SAMPLE, trainers.WordLevelTrainer(**QUIET))
    return model


def byte_level(normalizer=None, *, prefix=False):
    model = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, **QUIET)
    model.train_from_iterator(SAMPLE, trainer)
    return model


def with_template():
    model = byte_level()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[DOC] $A", special_tokens=[("[DOC]", 0)]
    )
    return model


def suffixes():
    """BPE that marks the ends of words, as the first GPT had it."""
    model = tokenizers.Tokenizer(models.BPE(**UNKNOWN, end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", **QUIET)
    model.train_from_iterator(SAMPLE, trainer)
    return model


def lower():
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


# Any text comes back from those of LOSSLESS as it was.
LOSSLESS = {
    "bytes": lambda: None,
    "byte level": byte_level,
    "byte level, template": with_template,
    "bytes as fallback": lambda: fallback(False),
    "bytes as fallback, prefix": lambda: fallback(True),
}
OTHERS = {
    "byte level, prefix": lambda: byte_level(prefix=True),
    "byte level, lower case": lambda: byte_level(lower()),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram": unigram,
    "word piece": word_piece,
    "words": words,
    "suffixes": suffixes,
}


def make_all() -> dict[str, Tokenizer]:
    """All of them, by name; the document token is 0, or 256 of bytes."""
    kinds = {name: make() for name, make in (LOSSLESS | OTHERS).items()}
    return {
        name: Tokenizer(model, doc_id=256 if model is None else 0)
        for name, model in kinds.items()
    }
