"""Conversions of trained models: the contract of a kind, and the list of the kinds.

A kind is a file of `kinds/` with a class that is a `Conversion`; nothing else names it.
It imports JAX inside its methods, so that `moex convert --help` is quick.
"""

import abc
import dataclasses
import importlib
import pkgutil
from typing import Any, ClassVar, Self

from moex.config.arguments import integer, positive
from moex.config.base import ConfigError
from moex.convert import kinds as folder

# Flags that several kinds have: a flag of one name is the same for all of them.
SHARED: dict[str, dict[str, Any]] = {
    "layers": dict(
        help="all, every:N, last:N or numbers such as 0,3, of the layers that can be "
        "converted; default: all"
    ),
    "seed": dict(type=integer, help="of random numbers; default: 0"),
    "calibration": dict(
        type=positive,
        metavar="SEQUENCES",
        help="training sequences to look at, with --whiten or where a plan is made "
        "without --sums; default: 256",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(abc.ABC):
    """One change of a trained model; its options are the fields."""

    kind: ClassVar[str]  # the name for `moex convert --to=KIND`
    about: ClassVar[str]  # what it does, for the help, from "KIND: " on
    # {name: keywords of `add_argument`} of its options; see `SHARED`.
    flags: ClassVar[dict[str, dict[str, Any]]] = {}
    needed: ClassVar[dict[str, str]] = {}  # {flag that must be given: why}
    # Kinds that one command may apply before this one: those of which it gives a flag,
    # in this order.
    may_follow: ClassVar[tuple[str, ...]] = ()
    # Whether it takes runs with adapters, and leaves a model as their base is.
    of_adapters: ClassVar[bool] = False
    # Whether an imported model stays one of its family.
    keeps_family: ClassVar[bool] = False

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> Self:
        """The conversion of the flags that a command line gives."""
        return cls(**given)

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `ConfigError` if an option is out of range, whatever the model."""

    def ready(self, source) -> Self:
        """The conversion with all that it has to know of the run; called after `check`.

        Args:
          source: `moex.convert.source.Source`: the run as it is.

        Raises:
          ConfigError: if an option does not fit the run.
        """
        return self

    def options(self) -> dict[str, Any]:
        """The options, for `convert.json`."""
        return dataclasses.asdict(self)

    def write(self, run) -> None:
        """Write files of its own to the `RunDir` of the new run."""
        return

    @abc.abstractmethod
    def model(self, model):
        """A copy of an `LM` config as the conversion leaves it.

        Raises:
          ConfigError: if this model cannot be converted.
        """

    def read(self, source) -> tuple[Any, dict] | None:
        """Read the converted model alone, without the rest of the run.

        Args:
          source: as for `ready`.

        Returns:
          `(run, found)`: a `LoadedRun`, and what `convert.json` reports, "bytes_read"
          among it; None: all is needed, and `arrays` makes the model.
        """
        return None

    @abc.abstractmethod
    def arrays(self, run, job, say) -> tuple[dict, dict, dict]:
        """The parameters and state of the converted model.

        Args:
          run: `LoadedRun` as it is before this conversion; it is not changed.
          job: `Job` of the new run, for training batches and how to compute.
          say: called with each line of news.

        Returns:
          `(params, state, found)`; `found` is what `convert.json` reports.
        """

    def lines(self, report: dict) -> list[str]:
        """Lines for people of what was found; `report` is all of `convert.json`."""
        return []


def option(flag: str) -> str:
    """The name of a flag as users write it."""
    return f"--{flag.replace('_', '-')}"


def kinds() -> dict[str, type[Conversion]]:
    """All kinds by name."""
    found = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
        module = importlib.import_module(f"{folder.__name__}.{name}")
        for value in vars(module).values():
            own = getattr(value, "__module__", None) == module.__name__
            if own and isinstance(value, type) and issubclass(value, Conversion):
                found[value.kind] = value
    return found


def asked_for(to: str, flags: dict[str, Any]) -> list[Conversion]:
    """The conversions of a command line, in the order in which they apply.

    Args:
      to: the kind of the last one.
      flags: the flags of all kinds by name; None: not given.

    Raises:
      ConfigError: if a flag is missing, or is for another kind.
    """
    every = kinds()
    given = {
        name: {flag: flags[flag] for flag in kind.flags if flags[flag] is not None}
        for name, kind in every.items()
    }
    order = (*every[to].may_follow, to)
    known = {flag for name in order for flag in every[name].flags}
    for name in sorted(every.keys() - set(order)):
        for flag in sorted(given[name].keys() - known):
            owners = [f"--to={own}" for own in sorted(every) if flag in given[own]]
            raise ConfigError(f"{option(flag)}: is for {' and '.join(owners)}.")
    made = []
    for name in order:
        if name != to and not given[name]:
            continue
        for flag, why in every[name].needed.items():
            if flag not in given[name]:
                raise ConfigError(f"{option(flag)}: missing; {why}")
        made.append(every[name].from_flags(given[name]))
    return made
