"""Checks that a run may go on in a directory, or start from another's parameters."""

from moex.config import base as configs
from moex.config.base import ConfigError
from moex.data.batches import Datasets
from moex.runs.directory import RunDir
from moex.runs.open import differences, saved_spec
from moex.train.job import Job

# Changing these would make a checkpoint of the old config unusable.
FIXED_ON_RESUME = ("model", "optim.rule", "optim.lr_factors")


def check_resume(cfg, run: RunDir, data: Datasets) -> list[str]:
    """Compare a config with the one that a run was started with.

    Returns:
      One line per changed field that may change.

    Raises:
      ConfigError: if the directory holds a run of another task, architecture,
        optimizer rule or vocabulary.
    """
    old = configs.to_dict(run.config())
    changed = list(differences(configs.to_dict(cfg), old))
    _require_equal(changed, ("task",), run)
    cfg.task.check_same(data, run, str(run), resume=True)
    _require_equal(changed, (*FIXED_ON_RESUME, *cfg.task.FIXED), run)
    return [f"config.{key}: {before!r} -> {new!r}" for key, new, before in changed]


def _require_equal(changed, fixed: tuple[str, ...], run: RunDir) -> None:
    for key, new, before in changed:
        if key.startswith(fixed):
            raise ConfigError(
                f"{run} holds a run with config.{key} = {before!r}, not {new!r}; use "
                f"another --workdir, or --config.init_from={run} to start a new run "
                "from its parameters."
            )


def check_init_from(job: Job, source: RunDir) -> None:
    """Check that the run named by `config.init_from` has parameters for this model.

    Raises:
      ConfigError: if it is no run, or one of another architecture or vocabulary.
    """
    where = f"config.init_from = {str(source)!r}"
    try:
        spec = saved_spec(source)
        own, task = type(source.config().task), job.cfg.task
        if own is not type(task):
            raise ConfigError(f"learned {own.__name__}, not {type(task).__name__}.")
        task.saved_identity(source)  # only to check that it can be read
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    task.check_same(job.data, source, where, resume=False)
    for name, here, there in differences(job.spec.shapes(), spec.shapes()):
        raise ConfigError(
            f"{where}: has another architecture: {name} has shape {there} there, "
            f"{here} here (None: there is none)."
        )
