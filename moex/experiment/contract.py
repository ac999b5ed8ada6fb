"""The contract of an experiment: arms, each done with several seeds, and their tables.

An experiment is a folder `experiments/NAME` with these files:

  config.py    a docstring whose first line is the question, and
               `get_experiment(size) -> Experiment`
  criteria.py  `CLAIMS` and `MECHANISMS`: functions from `Results` to a `Finding`
  README.md    the question, the paper's claim; moex writes the part with the results

`moex experiment run` does the arms, and writes results.json and the plots.
"""

import abc
import dataclasses
import inspect
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moex.config.base import (
    Config,
    ConfigError,
    ConfigWarning,
    RunError,
    children,
    from_dict,
    require,
    require_choice,
    to_dict,
)
from moex.model.accounting import model_cost
from moex.model.spec import model_spec
from moex.project import TYPE_KEY
from moex.runs.directory import RunDir
from moex.runs.fields import is_bookkeeping

SIZES = ("cpu", "gpu")
Figures = dict[str, Any]  # plain data: numbers by name, and curves as lists of numbers


class Arm(abc.ABC):
    """One of the things that an experiment compares. It is done once for each seed."""

    needs: tuple[str, ...] = ()  # names of the arms whose folders it reads
    minutes: float = 1.0  # what one seed is expected to take, until some were done
    seeds: Sequence[int] | None = None  # None: those of the experiment

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `ConfigError` for a mistake, before any arm is begun."""

    @abc.abstractmethod
    def run(self, seed: int, folder: RunDir, others: Mapping[str, RunDir]) -> Figures:
        """Do the arm, or go on with what is left of it in `folder`.

        Args:
          seed: of parameters and of the order of the data.
          folder: of this arm and seed alone.
          others: the folders of the arms that it needs, of the same seed.
        """

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that the results depend on: they are void if it changes."""


@dataclasses.dataclass(frozen=True)
class Training(Arm):
    """A training run.

    Attributes:
      config: run config; the seed of the arm takes the place of its own.
      keep: names of figures of the last training line that are kept, such as
        "moe/experts_per_token". Those of the last evaluation are kept all.
    """

    config: Any
    keep: tuple[str, ...] = ()
    minutes: float = 1.0
    seeds: Sequence[int] | None = None

    def check(self) -> None:
        from moex.runs.keys import check_run

        with warnings.catch_warnings():  # its process shows them in its log
            warnings.simplefilter("ignore", ConfigWarning)
            check_run(self.config)

    def identity(self) -> dict[str, Any]:
        own = {k: v for k, v in self.config.items() if not is_bookkeeping(k)}
        return changed_fields({k: v for k, v in own.items() if k != "seed"})

    def run(self, seed: int, folder: RunDir, others: Mapping[str, RunDir]) -> Figures:
        from moex.train.training import train

        cfg = from_dict(to_dict(self.config) | {"seed": seed})
        train(cfg, folder)
        last = max(folder.saved_steps(), default=-1)
        if last < cfg.steps:
            raise RunError(f"{folder}: was stopped; its last checkpoint is of {last}.")
        return training_figures(folder, self.keep)


@dataclasses.dataclass(frozen=True)
class Work(Arm):
    """Anything else: a function of a seed.

    Attributes:
      function: called with `seed`, `folder` (a `RunDir`), `others` (those of `needs`
        by name) and the arguments of `args`; returns figures.
      args: plain data.
      needs: see `Arm`.
      version: to be raised when the function changes what it measures.
    """

    function: Callable[..., Figures]
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    version: int = 1
    minutes: float = 1.0
    seeds: Sequence[int] | None = None

    def check(self) -> None:
        given = {"seed": 0, "folder": None, "others": {}, **self.args}
        try:
            inspect.signature(self.function).bind(**given)
        except TypeError as e:
            name = self.function.__qualname__
            raise ConfigError(f"{name} cannot be called: {e}.") from None

    def identity(self) -> dict[str, Any]:
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        return {"function": name, "args": dict(self.args), "version": self.version}

    def run(self, seed: int, folder: RunDir, others: Mapping[str, RunDir]) -> Figures:
        return self.function(seed=seed, folder=folder, others=others, **self.args)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: a figure, its head, and how a number of it is written."""

    figure: str
    head: str
    form: str = "{:.3f}"
    scale: float = 1.0  # numbers are multiplied by this


@dataclasses.dataclass(frozen=True)
class Table:
    """Arms side by side; the first column is what the plot shows.

    Attributes:
      title: a line above it.
      arms: names of the rows.
      columns: of figures.
      against: the arm whose difference is shown, seed by seed, in the first column.
    """

    title: str
    arms: tuple[str, ...]
    columns: tuple[Column, ...]
    against: str | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The arms of an experiment at one size, its seeds and its tables."""

    arms: Mapping[str, Arm]
    tables: Sequence[Table]
    seeds: Sequence[int] = (0, 1, 2)

    def check(self) -> None:
        """Check everything that shows before any arm is begun.

        Raises:
          ConfigError: that names the arm or the table.
        """
        require(len(self.seeds) > 0, "seeds", self.seeds, "one seed or more")
        for name, arm in self.arms.items():
            _known(arm.needs, self.arms, f"arm {name}: needs")
            try:
                arm.check()
            except ConfigError as e:
                raise ConfigError(f"arm {name}: {e}") from None
        for table in self.tables:
            where = f"table {table.title!r}"
            _known(table.arms, self.arms, where)
            _known((table.against,) if table.against else (), table.arms, where)
        self.order()

    def seeds_of(self, arm: str) -> Sequence[int]:
        """The seeds of an arm."""
        own = self.arms[arm].seeds
        return self.seeds if own is None else own

    def order(self) -> list[str]:
        """The names of the arms, each behind those that it needs.

        Raises:
          ConfigError: if arms need each other.
        """
        found: list[str] = []
        while len(found) < len(self.arms):
            ready = [
                name
                for name, arm in self.arms.items()
                if name not in found and set(arm.needs) <= set(found)
            ]
            if not ready:
                left = ", ".join(sorted(set(self.arms) - set(found)))
                raise ConfigError(f"arms {left}: need each other.")
            found += ready
        return found


def _known(names: Sequence[str], allowed, where: str) -> None:
    for name in names:
        require_choice(where, name, allowed)


def changed_fields(value: Any) -> Any:
    """A config as plain data, with only those fields that differ from their default.

    A field that a later version of moex adds changes nothing here.
    """
    if isinstance(value, Config):
        kept = {TYPE_KEY: type(value).__name__}
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            made = field.default_factory
            usual = field.default if made is dataclasses.MISSING else made()
            if usual is dataclasses.MISSING or own != usual:
                kept[field.name] = changed_fields(own)
        return kept
    if isinstance(value, (tuple, list)):
        return [changed_fields(each) for each in value]
    named = children(value)
    return {name: changed_fields(each) for name, each in named} if named else value


def training_figures(folder: RunDir, keep: Sequence[str] = ()) -> Figures:
    """The figures of a finished run.

    Args:
      folder: of the run.
      keep: names of further figures of the last training line; one that is missing
        there is left out.

    Returns:
      All figures of the last evaluation; "params" and "active" (of a token); "steps",
      "tokens", "train_flops" and "train_s", spent in training; "step_ms", the median of
      logged steps; "memory_gib", the peak of the process; "curve", the pairs
      [step, held-out loss].
    """
    from moex.analysis.reading import curves, read_run

    run = read_run(folder.path)
    run.cfg.task.fill(run.cfg)
    cost = model_cost(run.cfg.model, model_spec(run.cfg.model), run.cfg.seq_len)
    spent = curves(run, cost.train_flops)["train"]
    train, scored = list(run.lines["train"].values()), list(run.lines["eval"].items())
    found = {k: v for k, v in scored[-1][1].items() if isinstance(v, float)}
    score = run.cfg.task.score
    return found | {
        "params": cost.num_params,
        "active": cost.num_active,
        "steps": int(spent.step_S[-1]),
        "tokens": int(spent.tokens_S[-1]),
        "train_flops": float(spent.flops_S[-1]),
        "train_s": float(spent.seconds_S[-1]),
        "step_ms": 1e3 * statistics.median(line["perf/step_s"] for line in train),
        "memory_gib": max(line["perf/memory_gib"] for line in train),
        "curve": [[step, line[score]] for step, line in scored],
        **{name: train[-1][name] for name in keep if name in train[-1]},
    }
