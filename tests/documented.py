"""The examples of docs/extending.md, for the tests that use them as a user would."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[1] / "docs/extending.md"


def blocks() -> list[str]:
    """All code of the page, in order."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def files() -> dict[str, str]:
    """The blocks that are files, by the name in their first line."""
    named = {}
    for block in blocks():
        if head := re.match(r"# (\S+\.py)\n", block):
            named[head[1]] = block
    return named
