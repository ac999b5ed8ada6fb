"""The run directory: the names of all its files, its config and its tokenizer.

Only this file knows the names. A folder is a run when it has a `config.json`, which is
written last.
"""

import json
import os
import pathlib
import warnings
from typing import Any, Union

from moex.config import base as configs
from moex.config.base import ConfigError, ConfigWarning
from moex.data.files import atomic_write
from moex.data.tokenizer import Tokenizer
from moex.json_files import read_object
from moex.runs.keys import check_run

Place = Union[str, os.PathLike, "RunDir"]  # where a run directory is


class RunDir:
    """A run directory, which need not exist yet. It can be used as its path.

    Attributes:
      path: the folder, as it was given.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path = pathlib.Path(path)
        self._config: Any = None
        # These make the folder a run.
        self.config_file = path / "config.json"
        self.tokenizer_folder = path / "tokenizer"
        self.checkpoints = path / "checkpoints"  # a folder for each step
        self.record = path / "checkpoints.json"  # which checkpoints were saved
        self.corrupt = path / "corrupt"  # damaged checkpoints, which are never deleted
        self.data_file = path / "data.json"  # which files the run has read
        # Training logs to these.
        self.metrics = path / "metrics.jsonl"
        self.routing = path / "routing.jsonl"  # figures of each MoE layer
        self.environment = path / "environment.json"  # versions and machines
        self.tensorboard = path / "tb"
        self.profile = path / "profile"
        self.lock = path / "run.lock"  # who writes the run now
        # Other commands add these.
        self.config_script = path / "config.py"  # written by an import or conversion
        self.imported = path / "hf"  # files of the folder that was imported
        self.conversion = path / "convert.json"
        self.report = path / "report.html"
        self.harness = path / "harness.jsonl"  # results of tasks

    @classmethod
    def of(cls, place: Place) -> "RunDir":
        """Return a `RunDir` as it is; make one of a path."""
        return place if isinstance(place, RunDir) else cls(place)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def is_run(self) -> bool:
        """Whether the folder is a run."""
        return self.config_file.is_file()

    def config(self):
        """Return a copy of the run config. The file is read only once.

        Its task completes it, as the folder may have been moved.

        Raises:
          ConfigError: if it is not a run directory, or `check_run` refuses its
            config.json.
        """
        if self._config is None:
            self._config = self._read_config()
        return configs.from_dict(self._config)

    def _read_config(self) -> dict[str, Any]:
        if not self.is_run():
            raise ConfigError(
                f"{self}: not a run directory (there is no {self.config_file})."
            )
        data = read_object(self.config_file)
        try:
            cfg = configs.from_dict(data)
            with warnings.catch_warnings():  # they were shown when it was trained
                warnings.simplefilter("ignore", ConfigWarning)
                check_run(cfg, to_train=False)
        except ConfigError as e:
            raise ConfigError(f"{self.config_file}: {e}") from None
        cfg.task.opened(cfg, self)
        return configs.to_dict(cfg)

    def save_config(self, cfg) -> None:
        """Write the run config: from now on the folder is a run."""
        text = json.dumps(configs.to_dict(cfg), indent=1)
        atomic_write(self.config_file, text + "\n")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with."""
        return Tokenizer.load(self.tokenizer_folder)

    def saved_steps(self) -> list[int]:
        """The steps whose checkpoints are committed, ascending; nothing is restored."""
        names = [p.name for p in self.checkpoints.glob("*") if p.name.isdecimal()]
        return sorted(int(name) for name in names if name == str(int(name)))  # not "08"
