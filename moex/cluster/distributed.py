"""Jobs of several hosts: find out whether this process is in one, and join it.

`join` is called before JAX looks for devices. The flags say where the others are, or
else the environment (Open MPI, Slurm, TPU pods of GKE, indexed jobs of Kubernetes);
`--distributed` asks JAX, which can also ask the TPU's metadata server. The other
functions do nothing in a job of one process.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from moex import hints, progress
from moex.cluster import addresses, connections, rendezvous
from moex.config.base import ConfigError, own_files, require, to_dict

LINE: connections.Line | None = None
SHORTEST_TOKEN = 16  # characters that a secret must have


class Place(NamedTuple):
    """The place of this process in its job."""

    by: str  # where this was read, such as "Slurm"
    count: Any  # int, number of processes; None where only JAX can find out
    index: Any  # int, index of this process, or None
    coordinator: Any = None  # HOST:PORT of process 0, or None
    devices: Any = None  # list of local devices to use; None: all


# Variables with the number of processes and the index of this one. Open MPI is first:
# under `mpirun` in a Slurm job, Slurm's variables describe the step of mpirun itself.
SCHEDULERS = (
    ("environment", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    # These describe the step and not the job: a shell in an allocation is one process.
    ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def detect(environ: Mapping[str, str]) -> Place | None:
    """The place of this process by its environment; None if it is alone.

    Raises:
      ConfigError: if a variable is not a number, or only one of a pair is set.
    """

    def number(name: str) -> int:
        try:
            return int(environ[name])
        except (KeyError, ValueError):
            raise ConfigError(
                f"{name} = {environ.get(name)!r} in the environment: must be a whole "
                "number; set it, or use --no-distributed for a process of its own."
            ) from None

    coordinator = environ.get("JAX_COORDINATOR_ADDRESS")
    for by, size, rank in SCHEDULERS:
        if size in environ and number(size) > 1:
            return Place(by, number(size), number(rank), coordinator)
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    hosts = len(names.split(",")) if names else 0
    slices = number("MEGASCALE_NUM_SLICES") if "MEGASCALE_NUM_SLICES" in environ else 1
    if hosts * slices > 1:
        index = number("TPU_WORKER_ID")
        if slices > 1:
            index += hosts * number("MEGASCALE_SLICE_ID")
        return Place("TPU pod", hosts * slices, index, coordinator)
    # Indexed jobs set JOB_COMPLETION_INDEX; other pods have no index. A pod with TPUs
    # has `names`, and was handled above.
    job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    if job and not names:
        return Place("Kubernetes", None, number("JOB_COMPLETION_INDEX"), coordinator)
    return None


def _complete(place: Place, timeout: int) -> Place:
    """Ask JAX for the parts of a place that the environment does not name.

    Raises:
      ConfigError: if it does not know either.
    """
    found: tuple = (place.coordinator, place.count, place.index, None)
    if place.by == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            f"this pod is number {place.index} of an indexed job of Kubernetes "
            "(JOB_COMPLETION_INDEX), and the package that asks for the others is not "
            f"installed: {hints.command('pip', 'install', 'moex[k8s]')}, or give "
            "--no-distributed for a process of its own."
        )
    if place.by != "environment":
        # `jax.distributed.initialize()` calls this too, but does not return what it
        # found; we need the address to meet there before JAX does.
        from jax._src.clusters import ClusterEnv

        try:
            found = ClusterEnv.auto_detect_unset_distributed_params(
                place.coordinator, place.count, place.index, None, None, timeout
            )
        except Exception as e:  # cluster clients raise errors of many kinds
            raise ConfigError(
                f"joining by {place.by} failed: {' '.join(str(e).split())} "
                f"({type(e).__name__}); give --coordinator, --num-processes and "
                "--process-id, or --no-distributed for a process of its own."
            ) from None
    coordinator, count, index, devices = found
    if None in (coordinator, count, index):
        raise ConfigError(
            f"several processes (by {place.by}): the coordinator's address, the number "
            "of processes or the index of this one was not found; give --coordinator="
            "HOST:PORT --num-processes=N --process-id=I (or JAX_COORDINATOR_ADDRESS)."
        )
    devices = None if devices is None else list(devices)
    return Place(place.by, count, index, coordinator, devices)


def _place(flags, environ: Mapping[str, str]) -> Place | None:
    """The place of this process by the flags, or else by the environment."""
    explicit = (flags.num_processes, flags.process_id, flags.coordinator)
    if explicit != (None, None, None):
        if None in explicit:
            raise ConfigError(
                "--coordinator, --num-processes and --process-id go together; give "
                "all three, or --distributed alone to detect the cluster."
            )
        if flags.distributed is not None:
            raise ConfigError(
                "--distributed and --no-distributed are about detection; leave them "
                "out where --coordinator is given."
            )
        return Place("flags", *explicit)
    if flags.distributed is False:
        return None
    place = detect(environ)
    if place is None and flags.distributed:
        place = Place("--distributed", None, None)
    return None if place is None else _complete(place, flags.join_timeout)


def _check(place: Place) -> None:
    index, count = place.index, place.count
    if not 0 <= index < count:
        raise ConfigError(
            f"--process-id = {index}: must be in [0, --num-processes = {count})."
        )
    host, _, port = place.coordinator.rpartition(":")
    good = host and port.isdigit() and 0 < int(port) < 65536
    require(good, "--coordinator", place.coordinator, "HOST:PORT, such as node1:8476")


def _token(place: Place, environ: Mapping[str, str]) -> str:
    """The secret that the processes of a job share; "" if there is none.

    Other users can see the number of a Slurm step, but it distinguishes jobs.

    Raises:
      ConfigError: for a secret that can be guessed.
    """
    token = environ.get("MOEX_JOB_TOKEN")
    if token is not None and len(token.strip()) < SHORTEST_TOKEN:
        raise ConfigError(
            f"MOEX_JOB_TOKEN in the environment has {len(token.strip())} characters: "
            f"must have at least {SHORTEST_TOKEN}, such as those of `openssl rand -hex "
            "16`, the same on all hosts; or unset it."
        )
    if token is not None:
        return token.strip()
    if place.by == "Slurm":
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return ".".join(environ.get(name, "") for name in names)
    return ""


def _bind_address(coordinator: str) -> str | None:
    """The address where JAX's service should listen; None: leave it to JAX.

    The service takes one address: the one where the processes met.
    """
    host, port = addresses.split(coordinator)
    ours = addresses.bind_addresses(host)
    if os.environ.get(rendezvous.BIND) or not ours:
        return None
    if len(ours) > 1 and not addresses.is_loopback(host):
        return None
    address = ours[0]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def join(flags, facts: dict) -> None:
    """Join the other processes of the job, if there are any.

    Args:
      flags: those of `moex train`: coordinator, num_processes, process_id,
        distributed, and in seconds join_timeout and heartbeat_timeout.
      facts: JSON data that must be the same on all processes.

    Raises:
      ConfigError: for flags that are wrong or incomplete, a coordinator that cannot be
        reached, and processes that do not come or have other facts.
    """
    global LINE
    place = _place(flags, os.environ)
    if place is None or place.count == 1:
        _check_alone()
        return
    _check(place)
    LINE = rendezvous.meet(
        place.coordinator,
        place.index,
        place.count,
        facts,
        flags.join_timeout,
        _token(place, os.environ),
    )
    sys.excepthook = _unexpected
    if place.index:
        progress.hide()  # process 0 speaks for all
    import jax

    # The training loop handles SIGTERM itself; before it starts, a process may just
    # end. JAX's service would catch the signal, and we never ask that service.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            place.devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=_bind_address(place.coordinator),
            initialization_timeout=flags.join_timeout,
            heartbeat_timeout_seconds=flags.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"joining the processes of the job failed: {e}") from None
    devices = jax.device_count()  # all processes exchange their devices here
    if place.index == 0:
        print(
            f"joined {place.count} processes (by {place.by}; process 0 at "
            f"{place.coordinator}), {devices} devices",
            flush=True,
        )


def _check_alone() -> None:
    """Check that this process is not one of a TPU pod without having joined.

    Raises:
      ConfigError: if it is; JAX then sees the devices of the whole pod.
    """
    import jax

    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this host is one of {jax.process_count()} of a pod; run the same command "
            "with --distributed on each."
        )


def print_once(flags) -> Callable[[str], None]:
    """Make `print` for process 0 or a process alone, and silence for the others.

    Args:
      flags: the command line; only `process_id` is read.
    """
    place = detect(os.environ)
    if flags.process_id or (place.index if place else 0):
        return lambda text: None
    return functools.partial(print, flush=True)


def told(cfg, args) -> dict:
    """The facts that must be the same on all processes of a job.

    Args:
      cfg: run config.
      args: the command line of `moex train`.
    """
    import jax

    return {
        "config": to_dict(cfg),
        "code of moex (a hash)": code_hash(own_files(cfg)),
        "version of JAX": jax.__version__,
        "--workdir": str(args.workdir),
        "--dry-run": args.dry_run,
        "--profile": args.profile,
    }


def code_hash(own: Iterable[pathlib.Path] = ()) -> str:
    """A hash of the source text of moex, its kernels and `own` files of the user.

    The processes of a job compare it, as all must run the same code.
    """
    root, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for package in ("moex", "kernels_pallas"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    for path in own:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def agree(facts: dict) -> None:
    """Wait for all processes to call this; check that their facts are the same.

    Raises:
      ConfigError: if they are not.
    """
    if LINE is not None:
        LINE.agree(facts)


def leave() -> None:
    """Tell the other processes that this one has finished without an error."""
    if LINE is not None:
        LINE.leave()


def fail(text: str, code: int) -> None:
    """End all processes and print this error once; return if this one is alone."""
    if LINE is not None:
        LINE.fail(text, code)


def leave_now(text: str, code: int) -> NoReturn:
    """End all processes with this line, without the libraries' orderly end.

    Threads of JAX, Grain and Orbax may still be at work, and could block or crash it.
    """
    fail(text, code)
    connections.say(text)
    connections.end_now(code)


def _unexpected(kind, error, trace) -> None:
    """Print the traceback of an unexpected exception, and end the job with one line."""
    # A collective breaks in many ways when a process is lost. If that is the cause, the
    # listening thread ends this process during the sleep, without a traceback.
    time.sleep(1.0)
    traceback.print_exception(kind, error, trace)
    fail(f"{kind.__name__}: {str(error)[:300]}", 1)
