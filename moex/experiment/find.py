"""The experiments of a folder: their names, questions, arms and criteria."""

import dataclasses
import importlib
import pathlib
import sys
import types

from moex import project
from moex.config.base import ConfigError, nearest, require_choice
from moex.data.files import one_line
from moex.experiment.contract import SIZES, Experiment
from moex.experiment.results import File, Results

FOLDER = "experiments"
CONFIG, CRITERIA, EXTRA = "config", "criteria", "extra"


@dataclasses.dataclass(frozen=True)
class Found:
    """An experiment that was found."""

    name: str
    folder: pathlib.Path

    @property
    def file(self) -> File:
        """Its results.json."""
        return File(self.folder)

    @property
    def question(self) -> str:
        """The first line of the docstring of its config.py."""
        return (self._module(CONFIG).__doc__ or "").strip().split("\n")[0]

    def criteria(self) -> types.ModuleType:
        """Its criteria.py.

        Raises:
          ConfigError: if there is none, or it lacks `CLAIMS` or `MECHANISMS`.
        """
        module = self._module(CRITERIA)
        for name in ("CLAIMS", "MECHANISMS"):
            if not hasattr(module, name):
                raise ConfigError(f"{module.__file__}: has no {name}.")
        return module

    def extra_lines(self, results: Results, size: str) -> list[str]:
        """Further Markdown for the README, of an `extra.py` if there is one."""
        if not (self.folder / f"{EXTRA}.py").is_file():
            return []
        return self._module(EXTRA).markdown_lines(results, size)

    def draw_extra(self, results: Results, size: str) -> None:
        """Draw further pictures, if there is an `extra.py` that does."""
        if (self.folder / f"{EXTRA}.py").is_file():
            draw = getattr(self._module(EXTRA), "draw", None)
            if draw is not None:
                draw(results, size, self.folder)

    def at(self, size: str) -> Experiment:
        """The experiment at a size, checked.

        Raises:
          ConfigError: for a mistake in its config.py.
        """
        require_choice("--size", size, SIZES)
        module = self._module(CONFIG)
        where = f"{self.folder / CONFIG}.py"
        try:
            found = module.get_experiment(size)
        except Exception as e:
            at = project.where_in_own_code(e)
            text = str(e) if isinstance(e, ConfigError) else one_line(e)
            raise ConfigError(f"{where}: {text}{f' ({at})' if at else ''}") from e
        if not isinstance(found, Experiment):
            raise ConfigError(
                f"{where}: get_experiment must return an Experiment, not "
                f"{type(found).__name__}."
            )
        try:
            found.check()
        except ConfigError as e:
            raise ConfigError(f"{where}: {e}") from None
        return found

    def results(self, size: str) -> Results:
        """The results of the arms of a size."""
        return self.file.of(self.at(size), size)

    def _module(self, name: str) -> types.ModuleType:
        """Import a file of the experiment, as part of the package of its folder."""
        file = self.folder / f"{name}.py"
        if not file.is_file():
            raise ConfigError(f"{file}: an experiment needs this file.")
        root = str(self.folder.parent.parent.absolute())
        if root not in sys.path:
            sys.path.insert(0, root)
        module = f"{self.folder.parent.name}.{self.name}.{name}"
        try:
            return importlib.import_module(module)
        except Exception as e:
            at = project.where_in_own_code(e)
            raise ConfigError(
                f"{file}: cannot be imported: {one_line(e)}{f' ({at})' if at else ''}"
            ) from e


def find_all() -> list[Found]:
    """The experiments of the project folder, by name.

    Raises:
      ConfigError: if it has no folder of experiments.
    """
    root = project.folder() / FOLDER
    if not root.is_dir():
        raise ConfigError(
            f"{root}: there is no such folder; go to a checkout of moex, or to a "
            f"project whose {FOLDER}/NAME/{CONFIG}.py define your own."
        )
    files = sorted(root.glob(f"*/{CONFIG}.py"))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    folders = [file.parent for file in files if "get_experiment" in texts[file]]
    return [Found(folder.name, folder) for folder in folders]


def find(name: str) -> Found:
    """The experiment of a name.

    Raises:
      ConfigError: if there is none.
    """
    found = {each.name: each for each in find_all()}
    if name not in found:
        raise ConfigError(
            f"{name!r}: no such experiment.{nearest(name, found)} Experiments are "
            f"{', '.join(found)}."
        )
    return found[name]
