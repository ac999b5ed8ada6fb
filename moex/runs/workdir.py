"""The run directory before a run: it can be written, by all processes of one job."""

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
from moex.runs.lock import FILE as LOCK
from moex.runs.lock import RunLock, held

SEEN_S = 60.0  # a network file system may show a new file late


@contextlib.contextmanager
def claimed(workdir: pathlib.Path, say=print) -> Iterator[RunLock | None]:
    """The run directory for this job alone, made if there is none.

    Args:
      workdir: run directory.
      say: called with a line where the lock of a dead process is taken over.

    Yields:
      The lock; None in processes other than 0, for which process 0 holds it.

    Raises:
      ConfigError: if the folder cannot be written, or another job writes it.
    """
    flag = f"--workdir={workdir}"
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            first = jax.process_index() == 0
            lock = stack.enter_context(held(workdir, flag, say)) if first else None
            distributed.agree({"step of the start": "the run directory is locked"})
            _check_writable(workdir)
        except OSError as e:
            raise ConfigError(
                f"{flag}: cannot be written ({e.strerror}); "
                "choose a folder that you may write to."
            ) from None
        yield lock


@contextlib.contextmanager
def new_run(target: pathlib.Path, flag: str, say=print) -> Iterator[pathlib.Path]:
    """A hidden folder beside `target` that becomes it at the end of a good block.

    An error leaves nothing behind; a second process for one target is refused at once.

    Args:
      target: the new run directory; does not exist, or is empty.
      flag: names it in errors, such as "--workdir=runs/a".
      say: called with a line where the folder of a killed process is taken over.

    Raises:
      ConfigError: if another process makes it, or it came into being meanwhile.
    """
    made = target.parent / f".{target.name}.new"
    made.mkdir(parents=True, exist_ok=True)
    try:
        with held(made, flag, say):
            for path in made.iterdir():  # of a killed process
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            try:
                yield made
                (made / LOCK).unlink()
                made.replace(target)
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
