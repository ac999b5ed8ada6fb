"""Printing texts of unknown origin: their control characters are shown as escapes.

A corpus, a file name, a tokenizer or another host may have sequences that move the
cursor of a terminal, hide lines or set the title of its window.
"""

import math
import re
import shutil
import sys
from collections.abc import Callable, Collection, Sequence

# All control characters except tab and newline, all that change the direction of
# writing or break lines, and halves of surrogate pairs, which no encoding can write.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Write control characters of a text as escapes: ESC is written as ``\\x1b``."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table of text; columns are aligned to the right, but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if i in left else str.rjust for i in range(len(widths))]
    return "\n".join(
        "  ".join(
            pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def clock(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )


def line_width() -> int | None:
    """The characters of a line of the terminal; None: the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def wrapped(fields: Sequence[str], columns: int) -> str:
    """Join fields to `a | b | c`, with a new line before a field that does not fit."""
    lines = [fields[0]]
    for field in fields[1:]:
        if len(lines[-1]) + len(field) + 3 > columns:
            lines.append("   ")
        lines[-1] += f" | {field}"
    return "\n".join(lines)


class Terminal:
    """A stream to a terminal that makes all text `printable`.

    Args:
      stream: the terminal.
      before: called before text is written, with whether a line is left unfinished.
    """

    def __init__(self, stream, before: Callable[[bool], None]):
        self._stream, self._before = stream, before

    def write(self, text: str) -> int:
        """Write all of the text; returns its length, as streams do."""
        self._before(not text.endswith("\n"))
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name):
        return getattr(self._stream, name)
