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
from moex.config.flags import load_config
from moex.data.files import atomic_write
from moex.data.tokenizer import Tokenizer
from moex.json_files import read_object
from moex.runs.keys import check_run

Place = Union[str, os.PathLike, "RunDir"]  # where a run directory is
# Up to version 0.3 imports and conversions wrote a config.py that begins with this.
OLD_SCRIPT = b'"""The config of this run: moex train --config=THIS_FILE'


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
        self.adapters = path / "adapters.jsonl"  # figures of each adapted matrix
        self.environment = path / "environment.json"  # versions and machines
        self.tensorboard = path / "tb"
        self.profile = path / "profile"
        self.lock = path / "run.lock"  # who writes the run now
        self.base = path / "base.json"  # the run whose parameters adapters change
        self.teacher = path / "teacher.json"  # the run that a distillation learns from
        # Other commands add these.
        self.imported = path / "hf"  # files of the folder that was imported
        self.conversion = path / "convert.json"
        self.plan = path / "plan.json"  # which experts a conversion merged or kept
        self.report = path / "report.html"
        self.harness = path / "harness.jsonl"  # results of tasks
        self.predictor = path / "predictor.safetensors"  # of experts, from a text

    @classmethod
    def of(cls, place: Place) -> "RunDir":
        """Return a `RunDir` as it is; make one of a path."""
        return place if isinstance(place, RunDir) else cls(place)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.absolute().name

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


def given_config(args: list[str], base=None):
    """Make the run config of `--config...` arguments, as `flags.load_config` does.

    `--config` may also name a run directory, which stands for its saved config. So does
    the config.py that older versions wrote there; it is not run.

    Args:
      args, base: as for `flags.load_config`.

    Raises:
      ConfigError: as there, and for a run whose config cannot be read.
    """
    files = [a for a in args if a.startswith("--config=")]
    run = _named_run(files[0].removeprefix("--config=")) if len(files) == 1 else None
    if run is not None:
        args, base = [a for a in args if a not in files], run.config()
    return load_config(args, base=base)


def _named_run(name: str) -> RunDir | None:
    """The run directory that `--config` names; None if it names something else."""
    path = pathlib.Path(name)
    try:
        if path.name == "config.py" and path.read_bytes().startswith(OLD_SCRIPT):
            path = path.parent
        return RunDir(path) if RunDir(path).is_run() else None
    except (OSError, ValueError):  # there is no such file, or no file can have the name
        return None
