"""A report on prepared data: how much there is, what it looks like, and how well
general-purpose compressors do on its held-out text.

Not here: making the data (`pipeline.py`).
"""

import bz2
import gzip
import lzma

import numpy as np

from moex.config.base import ConfigError, require
from moex.data.pipeline import Prepared
from moex.progress import counted
from moex.terminal import aligned

COMPRESSORS = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}


def compressor_bits_per_byte(
    prepared: Prepared, *, max_bytes: int = 32_000_000, where: str = "data"
) -> dict[str, float]:
    """Measure bits per byte of `gzip`, `bz2` and `lzma` on the held-out documents.

    The documents of all text sources are concatenated in reading order and compressed
    as one, at each program's best level: a model should have fewer bits per byte on the
    same documents. Sources of token ids and of pairs are left out.

    Args:
      prepared: the result of `prepare`.
      max_bytes: use only the first bytes of the held-out text, at most this many.
      where: the path of the data config, for error messages.

    Raises:
      ConfigError: if no text is held out.
    """
    parts, size = [], 0
    for i, source in enumerate(prepared.config.sources):
        if source.content() != "text":
            continue
        for document in source.documents("eval", f"{where}.sources[{i}]"):
            if isinstance(document.value, str) and size < max_bytes:
                parts.append(document.value.encode())
                size += len(parts[-1])
    data = b"".join(parts)[:max_bytes]
    if not data:
        raise ConfigError(f"{where}.sources: no text is held out; raise holdout.")
    each = counted(COMPRESSORS, "compressing text", len(COMPRESSORS), "programs")
    return {name: 8 * len(COMPRESSORS[name](data)) / len(data) for name in each}


def inspect(prepared: Prepared, *, example: int = 0, tokens: int = 64) -> str:
    """Write the text of `moex data inspect`: a table of all sources and an example.

    Args:
      prepared: the result of `prepare`.
      example: index of the training sequence of each source to show, modulo their
        number.
      tokens: how many tokens of that sequence to show.
    """
    most = max(map(len, prepared.train))
    ok = 0 <= example < max(most, 1)
    require(ok, "--example", example, f"in 0 to {max(most, 1) - 1:,}")
    head = ("source", "split", "documents", "bytes", "tokens", "sequences", "B/token")
    rows: list[tuple[str, ...]] = [head]
    for name, train, held_out in zip(
        prepared.domains, prepared.train, prepared.eval, strict=True
    ):
        for split, data in (("train", train), ("eval", held_out)):
            c = data.stream.counts
            counts = (c["documents"], c["bytes"], c["tokens"], len(data))
            rate = f"{c['bytes'] / c['tokens']:.3f}" if c["tokens"] else "-"
            rows.append((name, split, *(f"{n:,}" for n in counts), rate))
    tokenizer = prepared.tokenizer
    about = f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint[:12]}"
    lines = [aligned(rows, left=(0, 1)), "", f"tokenizer: {about}"]
    for name, data in zip(prepared.domains, prepared.train, strict=True):
        if len(data) > 0:  # a source may be only scored
            lines += ["", *_example(prepared, name, data, example % len(data), tokens)]
    return "\n".join(lines)


def _example(prepared: Prepared, name: str, data, index: int, tokens: int) -> list[str]:
    """Show one sequence as a table, one token a line."""
    shown, tokenizer = data[index], prepared.tokenizer
    texts = [repr(piece) for piece in tokenizer.pieces()]
    texts[tokenizer.doc_id] = "<doc>"
    learned = int(shown["loss_mask"].sum())
    padding = int(np.sum(shown["segment"] == 0))
    head = ("segment", "position", "learn", "bytes", "token -> target")
    rows: list[tuple[str, ...]] = [head]
    for i in range(min(tokens, prepared.seq_len)):
        names = ("segment", "position", "loss_mask", "num_bytes")
        token, target = (texts[shown[name][i]] for name in ("tokens", "targets"))
        rows.append((*(f"{shown[n][i]:.0f}" for n in names), f"{token} -> {target}"))
    return [
        f"{name}, training sequence {index}: {shown['segment'].max()} segments, "
        f"{learned} targets learned, {padding} positions of padding",
        aligned(rows, left=(4,)),
    ]
