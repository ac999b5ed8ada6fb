"""The flags of a process in a job of several."""

import argparse

from moex.config.arguments import integer, positive

# Seconds of the flags that have a default.
TIMEOUTS = {"join-timeout": 300, "heartbeat-timeout": 100}


def process_flags(args) -> list[str]:
    """Write `--project` and the `add_processes` arguments for a child process."""
    names = ("coordinator", "num-processes", "process-id", "join-timeout")
    values = [
        (name, vars(args)[name.replace("-", "_")])
        for name in (*names, "heartbeat-timeout", "project")
    ]
    flags = [f"--{name}={v}" for name, v in values if v != TIMEOUTS.get(name)]
    if args.distributed is not None:
        flags.append("--distributed" if args.distributed else "--no-distributed")
    return flags


def add_processes(parser) -> None:
    """Add the arguments of a process in a job of several."""
    many = parser.add_argument_group(
        "several processes (one per host, or one per GPU)",
        "Open MPI, Slurm's srun and TPU pods on GKE are found in the environment.",
    )
    many.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="ask the TPU metadata server too; --no-distributed joins nobody",
    )
    many.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, to join explicitly"
    )
    many.add_argument("--num-processes", type=positive, metavar="N")
    many.add_argument("--process-id", type=integer, metavar="I", help="0 to N-1")
    many.add_argument(
        "--join-timeout",
        type=positive,
        default=TIMEOUTS["join-timeout"],
        metavar="SECONDS",
        help="how long to wait for the other processes (300)",
    )
    many.add_argument(
        "--heartbeat-timeout",
        type=positive,
        default=TIMEOUTS["heartbeat-timeout"],
        metavar="SECONDS",
        help="a host that is silent for this long ends the job (100)",
    )
