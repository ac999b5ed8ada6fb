"""The run directory before a run: that it can be written, and by all processes."""

import pathlib
import time

import jax
from jax.experimental import multihost_utils

from moex.config import ConfigError

SEEN_S = 60.0  # a network file system may show a new file late


def check_workdir(workdir: pathlib.Path) -> None:
    """Make the run directory and check that it can be written.

    Raises:
      ConfigError: if it cannot.
    """
    probe = workdir / f".write-test-{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        if jax.process_count() > 1:
            check_shared(workdir)
        probe.unlink()
    except OSError as e:
        raise ConfigError(
            f"--workdir={workdir}: cannot be written ({e.strerror}); "
            "choose a folder that you may write to."
        ) from None


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
