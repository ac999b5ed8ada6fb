"""Claiming a run directory: one job has it, and all its processes can write there."""

import contextlib
import errno
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from moex.cluster import distributed
from moex.config.base import ConfigError
from moex.runs.directory import Place, RunDir
from moex.runs.lock import RunLock, held

SEEN_S = 60.0  # a network file system may show a new file late


@contextlib.contextmanager
def claimed(run: RunDir, say=print) -> Iterator[RunLock | None]:
    """Hold the run directory for this job alone; make it if there is none.

    Yields:
      The lock; None in processes other than 0, for which process 0 holds it.

    Raises:
      ConfigError: if the folder cannot be written, or another job writes it.
    """
    flag = f"--workdir={run}"
    with contextlib.ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            first = jax.process_index() == 0
            lock = stack.enter_context(held(run, flag, say)) if first else None
            distributed.agree({"step of the start": "the run directory is locked"})
            _check_writable(run.path)
        except OSError as e:
            raise ConfigError(
                f"{flag}: cannot be written ({e.strerror}); "
                "choose a folder that you may write to."
            ) from None
        yield lock


def new_folder(folder: Place, flag: str) -> pathlib.Path:
    """The path of a folder that will be made, without symbolic links.

    Args:
      flag: names it in errors, such as "--out=runs/a".

    Raises:
      ConfigError: if it is a file, is not empty or is the current folder.
    """
    target = pathlib.Path(folder).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{flag}: exists already; must be new or an empty folder.")
    if target == pathlib.Path.cwd():  # the new folder replaces it
        raise ConfigError(f"{flag}: is the folder you are in; name another.")
    return target


@contextlib.contextmanager
def new_run(target: Place, flag: str, say=print) -> Iterator[RunDir]:
    """Yield a hidden folder next to `target`; rename it to that if the block succeeds.

    An error leaves nothing behind; a second process for one target is refused at once.

    Args:
      target: the new run directory; does not exist, or is empty.
      flag: names it in errors, such as "--workdir=runs/a".

    Raises:
      ConfigError: if another process makes it, or has made it meanwhile.
    """
    path = RunDir.of(target).path
    made = RunDir(path.parent / f".{path.name}.new")
    made.path.mkdir(parents=True, exist_ok=True)
    try:
        with held(made, flag, say):
            for left in made.path.iterdir():  # a killed process may have left files
                if left.is_dir():
                    shutil.rmtree(left)
                elif left != made.lock:
                    left.unlink()
            try:
                yield made
                made.lock.unlink()
                made.path.replace(path)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise ConfigError(f"{flag}: came into being meanwhile; give another.") from None


def _check_writable(workdir: pathlib.Path) -> None:
    probe = workdir / f".write-test-{jax.process_index()}"
    probe.write_bytes(b"x")
    if jax.process_count() > 1:
        check_shared(workdir)
    probe.unlink()


def check_shared(workdir: pathlib.Path) -> None:
    """Check that the processes of a job write to one folder, not to disks of their own.

    Raises:
      ConfigError: if this one does not see the file of process 0.
    """
    multihost_utils.sync_global_devices("moex: probes are written")
    first, deadline = workdir / ".write-test-0", time.monotonic() + SEEN_S
    while not first.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir={workdir}: must be one folder that all hosts share; "
                f"process {jax.process_index()} does not see what process 0 wrote."
            )
        time.sleep(0.5)
    multihost_utils.sync_global_devices("moex: probes are seen")
