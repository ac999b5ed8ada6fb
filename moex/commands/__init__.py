"""The verbs of the command line, one in each file except for `arguments.py`.

`moex import-hf` is `import_hf.py`. The file defines a class `Command`, a `Verb`; it
is listed nowhere else. Shared arguments are in `arguments.py`.
"""

import abc
import argparse
import importlib
import inspect
import pathlib
import pkgutil

CONFIG_HELP = """\
Configuration:
  --config=FILE[:arg]     a Python file with get_config(arg); or the name of a
                          config that comes with moex, such as quickstart:
                          `moex config --list`; or a run directory: its config
  --config.a.b=value      override one field; layers and patterns are numbered:
                          --config.model.layers.0.pattern.0.router.k=4
                          `moex config --config=FILE` prints all fields
"""

# The order of the verbs in `moex --help`; verbs that are not named here come last.
FIRST = (
    *("train", "init", "config", "params", "plan", "compare", "report", "eval"),
    *("generate", "trace", "analyse", "place", "convert", "import-hf", "export-hf"),
    *("experiment", "data"),
)


class Verb(abc.ABC):
    """One verb of the command line.

    The docstring of a verb's class is its description for users; the first sentence is
    its line in `moex --help`. Files import what they compute with inside `run`, so that
    help is quick.

    Attributes:
      examples: the end of the help: commands that users can copy as they are.
      usage: the arguments in the first line of the help; "": argparse writes it.
      refuses_config: if the verb takes no `--config`, the end of the error message
        "--config: VERB ...", such as "takes the config of the run"; otherwise "".
      talks: whether the verb itself shows at any time what it does.
      left: what a verb without `output` says after Ctrl-C.
    """

    talks = False
    left = "nothing was written"
    examples = ""
    usage = ""
    refuses_config = ""

    @abc.abstractmethod
    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of this verb."""

    @abc.abstractmethod
    def run(self, args: argparse.Namespace, config_args: list[str]) -> None:
        """Run the verb and print its result.

        Args:
          args: values of the arguments that `add` declared.
          config_args: `--config...` arguments, for `given_config`.

        Raises:
          ConfigError: for a mistake of the user: one line, exit code 2.
          RunError: if a run cannot go on: one line, exit code 1.
        """

    def output(self, args: argparse.Namespace) -> pathlib.Path | None:
        """The file or folder that the verb writes; None: there is none."""
        return getattr(args, "out", None)

    def description(self) -> str:
        """The docstring of the class as one line."""
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
    """Load the verb of a name from `names`."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").Command()
