"""Labels of runs side by side: their names, and the fields in which they differ."""

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
    """The folders of each group's runs, with as many parents as tell all apart."""
    paths = [run.path.absolute() for group in groups for run in group]
    deepest = max(len(path.parts) for path in paths)
    for depth in range(1, deepest + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    found, rest = [], iter(names)
    for group in groups:
        own = [next(rest) for _ in group]
        found.append(f"{own[0]} ... {own[-1]}" if len(own) > 2 else ", ".join(own))
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
