"""Marks of parametrised tests."""

from collections.abc import Iterable

import pytest


def thorough_but_for(names: Iterable[str], *quick: str) -> list:
    """All names as parameters; `make test` runs `quick`, `make check` all of them."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    mark = pytest.mark.thorough
    return [name if name in quick else pytest.param(name, marks=mark) for name in names]
