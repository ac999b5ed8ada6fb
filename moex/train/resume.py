"""Where a training begins: checks that it may go on, and its first state."""

import jax

from moex.config import base as configs
from moex.config.base import ConfigError
from moex.data.batches import Datasets
from moex.model.paths import path_name
from moex.runs.base import Base, has_base, with_base
from moex.runs.checkpoint import Checkpointer
from moex.runs.consumed import Consumed
from moex.runs.directory import RunDir
from moex.runs.open import (
    base_params,
    check_base,
    continued,
    differences,
    load_run,
    saved_spec,
    saved_with,
)
from moex.runs.record import check_may_begin
from moex.train.job import Job

# Changing these would make a checkpoint of the old config unusable.
FIXED_ON_RESUME = ("model", "optim.rule", "optim.lr_factors")


def check_resume(cfg, run: RunDir, data: Datasets) -> list[str]:
    """Compare a config with the one that a run was started with.

    Returns:
      One line per changed field that may change; where a kind changes, its fields
      have none.

    Raises:
      ConfigError: if the directory holds a run of another task, architecture,
        optimizer rule or vocabulary.
    """
    old = configs.to_dict(run.config())
    changed = list(differences(configs.to_dict(cfg), old))
    _require_equal(changed, ("task",), run)
    cfg.task.check_same(data, run, str(run), resume=True)
    _require_equal(changed, (*FIXED_ON_RESUME, *cfg.task.FIXED), run)
    inside = tuple(f"{key}." for key, *_ in changed)
    return [
        f"config.{key}: {before!r} -> {new!r}"
        for key, new, before in changed
        if not key.startswith(inside)
    ]


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
        # A task that builds on another has its model and data, as `Distillation`.
        alike = issubclass(own, type(task)) or issubclass(type(task), own)
        if not alike:
            raise ConfigError(f"learned {own.__name__}, not {type(task).__name__}.")
        task.saved_identity(source)  # only to check that it can be read
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    task.check_same(job.data, source, where, resume=False)
    check_base(job, source.config(), spec, f"{where}:", begins=True)


def check_starts_alone(job: Job) -> None:
    """Check that a run whose parameters are all fresh needs none of another run.

    Raises:
      ConfigError: if its adapters go on from others.
    """
    if job.cfg.model.adapter is not None:
        job.cfg.model.adapter.continued(None, {}, "config.model.adapter")


def starting_point(
    job: Job, folder: RunDir, source: RunDir, checkpointer: Checkpointer, say
) -> tuple[int, Consumed, dict, dict | None]:
    """Restore or make the train state.

    Returns:
      (steps done, `Consumed`, state, final figures of a run that is complete or None).
    """
    identity = job.cfg.task.identity(job.data)
    found = checkpointer.restore(
        job.saved(job.abstract_state()),
        warn=say,
        check=saved_with(job.cfg, identity),
    )
    final = None
    if found is not None:
        step, state, data, meta = found
        final = meta["final"]
        say(f"resuming {folder} after step {step}")
        consumed = Consumed.of(data, job.cfg.seq_len)
        if has_base(job.cfg):
            base = base_params(folder, job, say)
            state |= {"params": with_base(state["params"], base)}
    else:
        if folder.is_run():
            check_may_begin(folder, folder.config().checkpoint.every)
            say(f"{folder} has no checkpoint yet: it begins again at step 0")
        checkpointer.write_record()  # from now on the record lists the saved steps
        step, consumed, state = 0, Consumed(), job.init_state()
        if job.cfg.init_from:
            old = load_run(source, job.cfg.mesh, warn=say)
            if has_base(job.cfg) and jax.process_index() == 0:
                Base.of(source, old.step).save(folder)
            # State that depends on this run's own schedule or target starts afresh.
            fresh, info = state["state"], job.spec.info
            carried = jax.tree_util.tree_map_with_path(
                lambda path, was, new: was if keeps_value(info, path) else new,
                old.state,
                fresh,
            )
            begun = continued(job, old.cfg, old.params)
            params = with_base(begun, state["params"])
            state |= {"params": params, "state": carried}
            say(f"starting from the parameters of {source} at step {old.step}")
    return step, consumed, state, final


def keeps_value(info, path) -> bool:
    """Whether a router state keeps its meaning in another run, as biases do."""
    rule = info[path_name(path)].rule
    return rule is None or rule.keeps_value
