"""Labels of runs side by side: their names, and the fields in which they differ."""

import os
from collections.abc import Sequence
from typing import Any

from moex.analysis.reading import Run
from moex.runs.fields import is_bookkeeping, named_fields, short_names

MANY = 4  # most fields in a label


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A label per group: the name of its run, and the fields in which groups differ.

    Several seeds have no name in common, and the folder of a sweep's run repeats the
    fields: there the fields are the label, if they tell all groups apart.
    """
    names, fields = run_names(groups), differences(groups)
    told = "" not in fields and len(set(fields)) == len(fields)
    found = []
    for group, name, text in zip(groups, names, fields, strict=True):
        if told and (len(group) > 1 or "=" in name):
            found.append(text)
        else:
            found.append(f"{name}: {text}" if text else name)
    return found


def run_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The folders of each group's runs, from the folder on that all runs are in."""
    paths = [[run.path.absolute() for run in group] for group in groups]
    parent = os.path.commonpath([p.parent for group in paths for p in group])
    found = []
    for group in paths:
        names = [os.path.relpath(path, parent) for path in group]
        many = len(names) > 2
        found.append(f"{names[0]} ... {names[-1]}" if many else ", ".join(names))
    return found


def differences(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The fields of each group that differ between groups, those of the model first.

    Fields of `BOOKKEEPING` are told where no other field differs, the seed never.
    """
    fields = [named_fields(group[0].cfg) for group in groups]
    every = list(dict.fromkeys(name for mine in fields for name in mine))
    differ = [n for n in every if n != "seed" and _differs(n, fields)]
    differ = [n for n in differ if not is_bookkeeping(n)] or differ
    short = dict(zip(differ, short_names(differ, every), strict=True))
    texts = []
    for mine in fields:
        told = [f"{short[name]}={mine[name]}" for name in differ if name in mine]
        more = [f"{len(told) - MANY} more"] if len(told) > MANY else []
        texts.append(", ".join(told[:MANY] + more))
    return texts


def _differs(name: str, fields: Sequence[dict[str, Any]]) -> bool:
    """Whether a field differs between parts of one kind, not only with their kind."""
    kind = name.rpartition(".")[0]
    found: dict[str, set[str]] = {}
    for mine in fields:
        if name in mine:
            found.setdefault(repr(mine.get(kind)), set()).add(repr(mine[name]))
    return any(len(values) > 1 for values in found.values())
