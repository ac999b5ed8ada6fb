"""The verbs of the command line: each file of this folder but `arguments.py` is one.

`moex import-hf` is `import_hf.py`. The file defines a class `Command`, a `Verb`;
nothing else names it. Shared arguments are in `arguments.py`.
"""

import abc
import argparse
import importlib
import inspect
import pkgutil

CONFIG_HELP = """\
Configuration:
  --config=FILE[:arg]     a Python file with get_config(arg), such as
                          configs/quickstart.py
  --config.a.b=value      override one field; layers and patterns are indexed:
                          --config.model.layers[0].pattern[0].router.k=4
                          `moex config --config=FILE` lists all fields
"""

# How `moex --help` lists the verbs; those that are not named here come last.
FIRST = (
    *("train", "config", "params", "plan", "compare", "report", "eval", "generate"),
    *("trace", "analyse", "convert", "import-hf", "export-hf", "data"),
)


class Verb(abc.ABC):
    """One verb of the command line.

    The docstring of a verb's class is its description for users; the first sentence is
    its line in `moex --help`. Files import what they compute with inside `run`, so that
    help is quick.

    Attributes:
      examples: the end of the help: commands, each to be copied as it is.
      usage: the arguments in the first line of the help; "": argparse writes it.
      refuses_config: completes "--config: VERB ..." if no `--config` is for this verb,
        such as "takes the config of the run"; "": it reads `config_args`.
    """

    examples = ""
    usage = ""
    refuses_config = ""

    @abc.abstractmethod
    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of this verb."""

    @abc.abstractmethod
    def run(self, args: argparse.Namespace, config_args: list[str]) -> None:
        """Do it, and print what came of it.

        Args:
          args: what `add` asked for.
          config_args: `--config...` as `flags.load_config` takes it.

        Raises:
          ConfigError: for a mistake of the user: one line, exit code 2.
        """

    def description(self) -> str:
        """The docstring as one line."""
        return " ".join((inspect.getdoc(self) or "").split())

    def epilog(self) -> str:
        """The end of the help."""
        config = "" if self.refuses_config else CONFIG_HELP
        examples = inspect.cleandoc(self.examples)
        return f"{config}\n{examples}\n" if examples else config


def names() -> list[str]:
    """The names of all verbs, as users write them."""
    files = {module.name for module in pkgutil.iter_modules(__path__)} - {"arguments"}
    found = sorted(name.replace("_", "-") for name in files)
    return [n for n in FIRST if n in found] + [n for n in found if n not in FIRST]


def find(name: str) -> Verb:
    """The verb of a name from `names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").Command()
