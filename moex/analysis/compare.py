"""Runs side by side: groups over seeds, what differs between them, a table.

R runs of a group
"""

import collections
import dataclasses
import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit  # SciPy comes with JAX

from moex.analysis.labels import labels
from moex.analysis.reading import Curve, Run, curves
from moex.config.base import ConfigError, to_dict
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.numbers import scaled
from moex.tasks.base import Task
from moex.terminal import aligned, clock

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over seeds and the half width of its interval, None for one seed."""

    mean: Any
    half_width: Any

    def to_dict(self) -> dict[str, float | None]:
        """The numbers as plain data; those of one figure, not of a curve."""
        return {k: None if v is None else float(v) for k, v in self._asdict().items()}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str  # the fields that distinguish it from the other groups
    runs: tuple[Run, ...]  # one per seed
    # params, active: the model's parameters: all, and those that a token uses.
    params: int
    active: int
    curves: tuple[dict[str, Curve], ...]  # the curves of each run, by kind

    def values(self, name: str) -> list:
        """A figure of `figure_names` of each run."""
        return [figures(*pair)[name] for pair in self._pairs()]

    def estimate(self, name: str) -> Estimate | None:
        """A figure over seeds; None if a run lacks it."""
        values = self.values(name)
        return None if None in values else estimate(np.array(values, dtype=float))

    def to_dict(self) -> dict:
        """Everything but the curves, as plain data."""
        over = {name: self.estimate(name) for name in figure_names(self.task)}
        return {
            "label": self.label,
            "params": self.params,
            "active_params": self.active,
            "runs": [
                {"run": str(run.path), "seed": run.cfg.seed} | figures(run, curve)
                for run, curve in self._pairs()
            ],
            "flops_measured": self.has_flops,
            "over_seeds": {name: e and e.to_dict() for name, e in over.items()},
        }

    @property
    def has_flops(self) -> bool:
        """Whether its FLOPs count the experts that were used, not the expected ones."""
        return all(run.has_flops for run in self.runs)

    @property
    def task(self) -> Task:
        """The task that its runs learn."""
        return self.runs[0].cfg.task

    def _pairs(self):
        return zip(self.runs, self.curves, strict=True)


SPENT = ("steps", "tokens", "train_flops", "train_s")
BEST_AND_LAST = ("best", "last")


def figure_names(task: Task) -> list[str]:
    """The figures of a run: `SPENT`, the last training loss, held-out scores."""
    held_out = [
        f"{which}_eval_{name}" for name, *_ in task.FIGURES for which in BEST_AND_LAST
    ]
    return [*SPENT, f"train_{task.score}", *held_out]


def figures(run: Run, curve: dict[str, Curve]) -> dict[str, Any]:
    """The figures of `figure_names` of one run; None for what was not held out."""
    train = curve["train"]
    found: list[float | None] = [
        int(train.step_S[-1]),
        int(train.tokens_S[-1]),
        *map(float, (train.flops_S[-1], train.seconds_S[-1], train.loss_S[-1])),
    ]
    task = run.cfg.task
    for name, *_ in task.FIGURES:
        values = [line[name] for line in run.lines["eval"].values()]
        best = min(values, key=lambda v: (math.isnan(v), v), default=None)  # NaN: worst
        found += [best, values[-1] if values else None]
    return dict(zip(figure_names(task), found, strict=True))


def estimate(values_R: np.ndarray) -> Estimate:
    """Mean over runs and half width of its 95 % interval, by Student's t.

    Args:
      values_R: float[R] or float[R, ...], one entry or more.
    """
    count = len(values_R)
    mean = np.mean(values_R, axis=0)
    if count == 1:
        return Estimate(mean, None)
    with np.errstate(invalid="ignore"):  # infinite losses
        # Subtract the first value, so that equal values have a deviation of exactly 0.
        deviation = np.std(values_R - values_R[0], axis=0, ddof=1)
    t = stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return Estimate(mean, t * deviation / math.sqrt(count))


def make_groups(runs: Sequence[Run]) -> list[Group]:
    """The groups of some runs, in the order of their first runs.

    Raises:
      ConfigError: if they are of several tasks, or a config leaves the size of its
        vocabulary open.
    """
    first = runs[0]
    for run in runs:
        kinds = [type(each.cfg.task).__name__ for each in (first, run)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"{run.path}: learns {kinds[1]}, and {first.path} {kinds[0]}; compare "
                "runs of one task."
            )
    parts = grouped(runs)
    made = []
    for label, part in zip(labels(parts), parts, strict=True):
        cfg = part[0].cfg
        cfg.task.fill(cfg)
        cost = model_cost(cfg.model, model_spec(cfg.model), cfg.seq_len)
        own = tuple(curves(run, cost.train_flops) for run in part)
        made.append(Group(label, tuple(part), cost.num_params, cost.num_active, own))
    return made


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs whose configs differ in the seed alone.

    A seed that comes again begins another group: it is no further evidence.
    """
    found: dict[tuple, list[Run]] = {}
    times: collections.Counter = collections.Counter()
    for run in runs:
        same = json.dumps(to_dict(run.cfg) | {"seed": None}, sort_keys=True)
        times[same, run.cfg.seed] += 1
        found.setdefault((same, times[same, run.cfg.seed]), []).append(run)
    return list(found.values())


HEADS = ("seeds", "params", "active", "steps", "tokens", "FLOPs", "time", "train")
LABEL = 36  # the most characters of a line of a label in a table


class Table(NamedTuple):
    """The figures of groups as texts: a column of labels first, and what all share."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    shared: str  # the columns that have one value in all rows; "" if there are none
    notes: list[str]


def make_table(groups: Sequence[Group]) -> Table:
    """The groups as a table. Columns without a difference are a line below it."""
    score, *others = groups[0].task.FIGURES
    more = tuple(f"{which} {f.column}" for f in others for which in BEST_AND_LAST)
    heads = (*HEADS, *BEST_AND_LAST, *more)
    columns = list(zip(*map(_cells, groups), strict=True))
    same = [len(groups) > 1 and len(set(column)) == 1 for column in columns]
    kept = [i for i in range(len(heads)) if not same[i]]
    rows = [
        (group.label, *(columns[i][r] for i in kept)) for r, group in enumerate(groups)
    ]
    shared = ", ".join(
        f"{head} {column[0]}"
        for head, column, is_same in zip(heads, columns, same, strict=True)
        if is_same
    )
    about = "".join(f"; {f.column}: {f.unit}" for f in others)
    text = [
        f"train, best, last: {score.unit} of the last training line, of the best and "
        f"the last evaluation{about}; time: of training steps alone.",
        *notes(groups),
    ]
    return Table(("run", *(heads[i] for i in kept)), rows, shared, text)


def table(groups: Sequence[Group], width: int | None = None) -> str:
    """The groups as text for people.

    Args:
      width: the most characters of a line. Columns that find no room follow below, with
        the labels again. None: no limit.
    """
    made = make_table(groups)
    labels = [textwrap.wrap(row[0], LABEL) or [""] for row in made.rows]
    first = max(len(line) for lines in (["run"], *labels) for line in lines)
    parts, used = [[0]], first
    for i, column in enumerate(zip(made.heads, *made.rows, strict=True)):
        room = 2 + max(map(len, column))
        if i and width is not None and used + room > width and len(parts[-1]) > 1:
            parts.append([0])
            used = first
        if i:
            parts[-1].append(i)
            used += room
    names = [row[0].partition(": ")[0] for row in made.rows]
    if len(set(names)) == len(names):  # the fields need to be told only once
        again = [[name] for name in names]
    else:
        again = labels
    texts = [
        _aligned(made, again if i else labels, part) for i, part in enumerate(parts)
    ]
    if made.shared:
        texts[-1] += "\n" + _wrapped(f"In all rows: {made.shared}.", width)
    texts[-1] += "".join(f"\n{_wrapped(note, width)}" for note in made.notes)
    return "\n\n".join(texts)


def _aligned(made: Table, labels: list[list[str]], part: list[int]) -> str:
    """Some columns of a table; a long label goes on in lines of its own."""
    lines = [[made.heads[i] for i in part]]
    for row, (label, *more) in zip(made.rows, labels, strict=True):
        lines.append([label, *(row[i] for i in part[1:])])
        lines += [[f"  {text}", *([""] * (len(part) - 1))] for text in more]
    return aligned(lines)


def _wrapped(text: str, width: int | None) -> str:
    return text if width is None else textwrap.fill(text, width)


def notes(groups: Sequence[Group]) -> list[str]:
    """Remarks that a reader of the table needs and that its rows do not show."""
    found = []
    if any(len(group.runs) > 1 for group in groups):
        found.append("± is half the 95 % interval over seeds (Student's t).")
    if not all(group.has_flops for group in groups):
        found.append(
            "~: FLOPs as expected before training; the log does not say what they were."
        )
    for group in groups:
        if len(set(group.values("steps"))) > 1:
            found.append(
                f"{group.label}: its seeds are not equally far, so that the mean is of "
                "losses at different steps, and curves end at the last common one."
            )
    return found


def _cells(group: Group) -> tuple[str, ...]:
    return (
        *(str(len(group.runs)), scaled(group.params), scaled(group.active)),
        *(_range(group.values(name)) for name in ("steps", "tokens")),
        ("" if group.has_flops else "~")
        + _cell(group.estimate("train_flops"), "{:.3g}".format),
        _cell(group.estimate("train_s"), _time),
        *(
            _cell(group.estimate(name), "{:.4f}".format)
            for name in figure_names(group.task)[len(SPENT) :]
        ),
    )


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _cell(found: Estimate | None, shown) -> str:
    if found is None:
        return "-"
    # Where routing is not dynamic, seeds do not change FLOPs: add no note.
    about = f" ± {shown(found.half_width)}" if found.half_width else ""
    return shown(found.mean) + about
