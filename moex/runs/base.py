"""The base of a run with adapters: the run whose parameters it keeps as they are.

Checkpoints of such a run hold the parameters that it trains, and `base.json` names the
base with the step and the digest of its checkpoint. So a run with adapters takes
megabytes, and opens only with the base that it was trained on.
"""

import dataclasses
import os
import pathlib
from typing import ClassVar, Self

from moex.config.base import ConfigError
from moex.data.files import atomic_write
from moex.json_files import digest, dump_json, field, read_object
from moex.model.spec import model_spec
from moex.nn.projection import of_adapter
from moex.runs.directory import RunDir
from moex.runs.record import read_record


@dataclasses.dataclass(frozen=True)
class Base:
    """The base of a run: its folder, and the checkpoint that was used."""

    TOLD: ClassVar[str] = "has adapters on"

    folder: RunDir
    step: int
    digest: str | None  # of the checkpoint; None: from moex before version 0.2

    @staticmethod
    def file(run: RunDir) -> pathlib.Path:
        """The file of the run directory `run` that names its base."""
        return run.base

    @classmethod
    def of(cls, folder: RunDir, step: int) -> Self:
        """The base that is the checkpoint of `step` of a run."""
        return cls(folder, step, (read_record(folder) or {}).get(step))

    def save(self, run: RunDir) -> None:
        """Write it to the directory of the run that is trained on it."""
        path = os.path.relpath(self.folder.path.absolute(), run.path.absolute())
        facts = {"run": path, "step": self.step, "digest": self.digest}
        atomic_write(self.file(run), dump_json(facts, indent=1) + "\n")

    @classmethod
    def read(cls, run: RunDir) -> Self:
        """Read it again, and check that the checkpoint is still the same.

        Raises:
          ConfigError: if the base is not where it was, or has changed.
        """
        data, where = read_object(cls.file(run)), str(cls.file(run))
        path = field(data, "run", str, where)
        folder = RunDir(os.path.normpath(run.path.absolute() / path))
        step = field(data, "step", int, where)
        told = f"{run}: the run {cls.TOLD} step {step} of {folder}"
        if not folder.is_run():
            raise ConfigError(
                f"{told}, which is not there; put it back, or write its place into "
                f"{where}, field 'run'."
            )
        now, then = cls.of(folder, step), field(data, "digest", str | None, where)
        if step not in folder.saved_steps():
            raise ConfigError(f"{told}, which has no such checkpoint any more.")
        if now.digest != then:
            raise ConfigError(f"{told}, whose parameters are not the same any more.")
        return now


class Teacher(Base):
    """The run that a distillation learns from, in the same words and the same way."""

    TOLD = "learns from"

    @staticmethod
    def file(run: RunDir) -> pathlib.Path:
        return run.teacher


def base_hash(model) -> str:
    """The hash of names and shapes of a model config without its adapters.

    Adapter files have it: they are for any base of these parameters.
    """
    shapes = model_spec(dataclasses.replace(model, adapter=None)).shapes()
    return digest(shapes)


def check_no_adapters(run: RunDir, where: str, also: str = "") -> None:
    """Refuse a run with adapters, for what would overlook them.

    Args:
      run: the run directory.
      where: begins the message.
      also: what else could be done, in the message.

    Raises:
      ConfigError: if the run has adapters, with the command that folds them in.
    """
    if run.config().model.adapter is not None:
        raise ConfigError(
            f"{where}: {run} has adapters{also}; fold them into the base first: moex "
            f"convert {run} --to=folded --workdir=RUN"
        )


def has_base(cfg) -> bool:
    """Whether a run keeps only what it trains, and takes the rest from its base."""
    return cfg.model.adapter is not None and bool(cfg.init_from)


def without_base(spec, params: dict) -> dict:
    """The nested dicts of the parameters that the base has not, or not so.

    They are those of adapters, frozen or not, and those that are trained.
    """

    def kept(tree, path):
        found = {}
        for name, value in tree.items():
            here = f"{path}{name}"
            if isinstance(value, dict):
                value = kept(value, f"{here}/")
                if value:
                    found[name] = value
            elif of_adapter(here) or not spec.info[here].frozen:
                found[name] = value
        return found

    return kept(params, "")


def with_base(own: dict, base: dict) -> dict:
    """All arrays of both nested dicts; where both have one, that of `own`."""
    both = dict(base)
    for name, value in own.items():
        inner = base.get(name)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = with_base(value, inner)
        both[name] = value
    return both
