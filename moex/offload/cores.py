"""Two sets of cores, on a machine whose only device is the CPU: one for each "device".

The threads of a CPU device may use the cores that the process may use when JAX makes
them. So the process keeps to one half of its cores before JAX starts, and the other
half gets a device of its own, with its own threads. Only Linux binds threads to cores.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
from jax._src import xla_bridge  # nothing public tells whether JAX has started
from jaxlib import xla_client

from moex.data.files import one_line
from moex.progress import tell

TASKS = pathlib.Path("/proc/self/task")
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Cores(NamedTuple):
    """Numbers of cores, as the operating system counts them."""

    device: frozenset[int]  # of JAX's own device
    host: frozenset[int]  # of the host, as a device for experts


def halves(cores: Iterable[int]) -> Cores | None:
    """Divide cores; hardware threads of one stay together. None: there is only one."""
    ordered = sorted(cores, key=lambda core: (_first_sibling(core), core))
    if len(ordered) < 2:
        return None
    middle = (len(ordered) + 1) // 2
    return Cores(frozenset(ordered[:middle]), frozenset(ordered[middle:]))


def _first_sibling(core: int) -> int:
    """The first thread of a core's hardware; the core itself if nothing tells it."""
    try:
        text = pathlib.Path(SIBLINGS.format(core)).read_text(encoding="utf-8")
        return int(text.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return core


def divide() -> Cores | None:
    """Keep this process to one half of its cores, if the CPU is its only device.

    Returns:
      The halves; with an accelerator all cores for both. None: both share all of them,
      and where there is no accelerator a line says why.
    """
    if xla_bridge.backends_are_initialized():
        return _shared("JAX has started already")
    if not hasattr(os, "sched_setaffinity"):
        return _shared("this system does not bind threads to cores")
    every = frozenset(os.sched_getaffinity(0))
    if (cores := halves(every)) is None:
        return _shared("there is only one")
    try:
        bind(cores.device)
    except OSError as e:
        with contextlib.suppress(OSError):  # some threads may be bound already
            bind(every)
        return _shared(f"threads cannot be bound to them ({one_line(e)})")
    if jax.default_backend() == "cpu":
        return cores
    bind(every)
    return Cores(every, every)


def _shared(reason: str) -> Cores | None:
    if jax.default_backend() == "cpu":
        told = f"host and device take turns on the same cores: {reason}."
        tell(f"--offload-host: {told}")
    return None


def bind(cores: Iterable[int]) -> None:
    """Let all threads of this process, and those that they start, use these cores.

    Raises:
      OSError: if the system refuses it.
    """
    for task in TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(task.name), cores)


def worker(cores: Iterable[int] | None) -> ThreadPoolExecutor:
    """A thread of the host, on these cores; None: on all of the process."""

    def keep():
        if cores is not None:
            os.sched_setaffinity(0, cores)

    return ThreadPoolExecutor(1, "host-experts", initializer=keep)


def host_device(thread: ThreadPoolExecutor, cores: Iterable[int] | None):
    """A CPU device that computes on the cores of a thread.

    Args:
      thread: from `worker`.
      cores: its cores; None: it computes where JAX's own CPU device does.
    """
    if cores is None:
        return jax.devices("cpu")[0]
    return thread.submit(xla_client.make_cpu_client).result().devices()[0]
