"""Several processes of one job on this machine, on its CPU: start, watch, restart.

  python -m launch.local --processes 2 --devices-per-process 4 --restarts 3 -- \\
      --config=configs/quickstart.py --workdir=runs/two

What follows `--` is the command line of `moex train`. When a process dies the others
are given a moment to end, what is left is killed, and all are started again: the same
command goes on from the last checkpoint. A mistake in the command (exit code 2) is not
retried. SIGTERM and SIGINT are passed on; SIGTERM saves. It shows what process 0
prints, and the errors of the others. Only for tests and for trying things out: the
processes share the cores of one machine.
"""

import argparse
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

MISTAKE = 2  # the exit code of `moex` for a mistake of the user
# Printed by libraries in C++: connections, and the stack of a process that JAX ends.
NOISE = re.compile(r"\[Gloo\] Rank|[IWEF]\d{4} |\*\*\* |\s+@ +0x|RPC: /xla|$")


def parse(argv):
    """The launcher's own arguments, and those of `moex train`."""
    own, train = argv, []
    if "--" in argv:
        own, train = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=_positive, default=2, metavar="N")
    parser.add_argument("--devices-per-process", type=_positive, default=1, metavar="N")
    parser.add_argument("--restarts", type=int, default=0, metavar="N")
    parser.add_argument(
        "--grace",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="how long the others may take to end before they are killed (15)",
    )
    parser.add_argument(
        "--module",
        default="moex.cli",
        help="what is run with `train` and the arguments; tests put theirs around it",
    )
    args = parser.parse_args(own)
    if not train:
        parser.error("give the arguments of `moex train` after --")
    return args, train


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def say(text: str) -> None:
    """One line of the launcher itself."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def how(code: int) -> str:
    """An exit code of `subprocess` in words."""
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


class Job:
    """The processes of one attempt."""

    def __init__(self, args, train: list[str]):
        self.shown: set[str] = set()
        self.lock = threading.Lock()
        self.readers: list[threading.Thread] = []
        self.processes: list[subprocess.Popen] = []
        address = f"localhost:{free_port()}"
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(args.devices_per_process),
            "MOEX_JOB_TOKEN": secrets.token_hex(16),
        }
        for index in range(args.processes):
            place = (
                f"--coordinator={address}",
                f"--num-processes={args.processes}",
                f"--process-id={index}",
            )
            process = subprocess.Popen(
                [sys.executable, "-m", args.module, "train", *train, *place],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env=env,
                start_new_session=True,  # Ctrl-C comes to us, and we pass it on
            )
            self.processes.append(process)
            self._read(process.stdout, sys.stdout if index == 0 else None, False)
            self._read(process.stderr, sys.stderr, index != 0)

    def _read(self, stream, out, once: bool) -> None:
        """Show the lines of a stream; with `once` only those not shown before."""

        def work():
            for line in stream:
                if out is None or NOISE.match(line):
                    continue
                with self.lock:
                    if not (once and line in self.shown):
                        out.write(line)
                        out.flush()
                    if out is sys.stderr:
                        self.shown.add(line)

        self.readers.append(threading.Thread(target=work, daemon=True))
        self.readers[-1].start()

    def send(self, number: int) -> None:
        """A signal to all that still run."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def wait(self, grace: float) -> int:
        """Until all have ended; 0, or the exit code of the first that failed."""
        first = None
        while first is None and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
            first = self._failed()
        first = first if first is not None else self._failed()
        if first is not None:
            self._end_others(first, grace)
        for reader in self.readers:
            reader.join(5)
        return 0 if first is None else self.processes[first].returncode

    def _failed(self) -> int | None:
        """The index of a process that failed: one that a signal ended, if any was."""
        codes = {i: p.poll() for i, p in enumerate(self.processes)}
        failed = [i for i, code in codes.items() if code]
        return min(failed, key=lambda i: codes[i]) if failed else None

    def _end_others(self, first: int, grace: float) -> None:
        began, count = time.monotonic(), len(self.processes)
        say(f"process {first} of {count} {how(self.processes[first].returncode)}")
        while any(p.poll() is None for p in self.processes):
            if time.monotonic() - began > grace:
                left = [i for i, p in enumerate(self.processes) if p.poll() is None]
                say(f"killing process {', '.join(map(str, left))}: still there")
                self.send(signal.SIGKILL)
                for process in self.processes:
                    process.wait()
            time.sleep(0.05)
        others = [i for i in range(count) if i != first]
        if others:
            codes = ", ".join(
                f"process {i} {how(self.processes[i].returncode)}" for i in others
            )
            say(f"the others after {time.monotonic() - began:.1f} s: {codes}")


def run(args, train: list[str]) -> int:
    """All attempts; the exit code of the last."""
    asked = []
    current: list[Job] = []

    def pass_on(number, frame):
        asked.append(number)
        for job in current:
            job.send(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for attempt in range(args.restarts + 1):
        if attempt:
            say(f"restart {attempt} of {args.restarts}")
        current[:] = [Job(args, train)]
        for number in asked[:1]:  # it came while the processes were started
            current[0].send(number)
        code = current[0].wait(args.grace)
        if code in (0, MISTAKE) or asked:
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(run(*parse(sys.argv[1:])))
