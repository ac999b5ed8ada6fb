"""Marks of parametrised tests."""

from collections.abc import Iterable

import pytest


def thorough(*values, id: str | None = None):
    """One set of parameters with which `make check` runs a test and `make test` not."""
    return pytest.param(*values, id=id, marks=pytest.mark.thorough)


def slow(*values, id: str | None = None):
    """One set of parameters with which only `make test-slow` runs a test."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def thorough_but_for(names: Iterable, *quick, later: Iterable = ()) -> list:
    """Values of one parameter.

    `make test` runs `quick`, `make check` all but `later`, `make test-slow` these.
    """
    names, later = list(names), list(later)
    assert set(quick) | set(later) <= set(names), {*quick, *later} - set(names)
    marked = {name: thorough(name) for name in names}
    marked |= {name: slow(name) for name in later} | {name: name for name in quick}
    return [marked[name] for name in names]
