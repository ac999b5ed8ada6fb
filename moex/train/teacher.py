"""The trained model that a training learns from besides its data (`Distillation`)."""

import jax

from moex.config.base import ConfigError
from moex.model.spec import check_mesh
from moex.runs.base import Teacher
from moex.runs.directory import RunDir
from moex.runs.open import load_run, saved_spec
from moex.runs.program import Program

FIELD = "config.task.teacher"


def check_teacher(cfg, folder: RunDir | None) -> None:
    """Check that the teacher of a run config is there, before anything is computed.

    Args:
      folder: the directory of the run; if the run goes on, the teacher must be the same
        as before. None: there is no directory.

    Raises:
      ConfigError: naming the teacher.
    """
    place = cfg.task.teacher_run()
    if not place:
        return
    if not _run(place).saved_steps():
        raise ConfigError(f"{FIELD} = {place!r}: the run has no checkpoint yet.")
    if folder is not None and _goes_on(folder):
        Teacher.read(folder)


def _run(place: str) -> RunDir:
    run = RunDir(place)
    if not run.is_run():
        raise ConfigError(f"{FIELD} = {place!r}: is no run directory.")
    return run


def _goes_on(folder: RunDir) -> bool:
    """Whether a run has begun with a teacher.

    A run that ended before its config was written begins anew, maybe with another one.
    """
    return folder.is_run() and folder.teacher.exists()


def find_teacher(cfg, mesh) -> Program | None:
    """The program of the teacher of a run config on its mesh; None: it has none.

    Raises:
      ConfigError: if it is no run, or one of another task or vocabulary.
    """
    place = cfg.task.teacher_run()
    if not place:
        return None
    folder = _run(place)
    theirs, spec = folder.config(), saved_spec(folder)
    if not isinstance(theirs.model, cfg.task.MODEL):
        kind, wanted = type(theirs.model).__name__, cfg.task.MODEL.__name__
        raise ConfigError(f"{FIELD} = {place!r}: its model is a {kind}, not {wanted}.")
    ours = cfg.model.num_outputs
    if ours is not None and theirs.model.num_outputs != ours:
        raise ConfigError(
            f"{FIELD} = {place!r}: its vocabulary has {theirs.model.num_outputs} "
            f"tokens, that of config.model {ours}."
        )
    check_mesh(spec, mesh)
    return Program(cfg=theirs, mesh=mesh, spec=spec)


def load_teacher(job, folder: RunDir, say) -> dict | None:
    """Read the arrays of the teacher of a job: {"params", "state"}; None: it has none.

    The run that begins keeps which checkpoint it learns from, and goes on with that.

    Args:
      job: `Job`.
      folder: the directory of the run.
      say: called with each line of news.

    Raises:
      ConfigError: if the teacher is gone, has changed, or has another tokenizer.
    """
    if job.teacher is None:
        return None
    if _goes_on(folder):
        source = Teacher.read(folder)
        place, step = source.folder, source.step
    else:
        place, step = RunDir(job.cfg.task.teacher_run()), None
    job.cfg.task.check_same(job.data, place, FIELD, resume=False)
    loaded = load_run(place, job.cfg.mesh, warn=say, step=step)
    if step is None and jax.process_index() == 0:
        Teacher.of(place, loaded.step).save(folder)
    say(f"learning from {place} at step {loaded.step}")
    return {"params": loaded.params, "state": loaded.state}
