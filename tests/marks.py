"""Marks of parametrised tests."""

from collections.abc import Iterable

import pytest


def thorough(*values, id: str | None = None):
    """One set of parameters with which `make check` runs a test and `make test` not."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)


def thorough_but_for(names: Iterable, *quick) -> list:
    """Values of one parameter: `make test` runs `quick`, `make check` all."""
    names = list(names)
    assert set(quick) <= set(names), set(quick) - set(names)
    return [name if name in quick else thorough(name) for name in names]
