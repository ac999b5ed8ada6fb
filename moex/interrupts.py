"""Ctrl-C on the command line: how it ends a verb, and what it says.

The first Ctrl-C raises `KeyboardInterrupt` in the main thread, so that partial files
are removed; training asks itself to save instead (`train/stop.py`). The second one ends
the process at once, even while a library keeps the main thread, such as the compiler.
"""

import _thread
import os
import pathlib
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from moex import progress
from moex.cluster import connections, distributed

PATIENCE_S = 1.0  # how long the main thread may take before people hear of it
RAISED: list[int] = []  # signals of Ctrl-C that raised a KeyboardInterrupt
_received: list[int] = []  # signals of Ctrl-C in all
_heard = threading.Event()  # a handler of Python, in the main thread, has run


def nothing() -> str:
    """Say that nothing was written."""
    return "nothing was written"


truth: Callable[[], str] = nothing  # says what was written; verbs and training set it


def listen() -> None:
    """Handle Ctrl-C from now on, unless the process is to ignore it."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        return  # a shell makes background processes ignore Ctrl-C
    signal.signal(signal.SIGINT, _interrupt)
    report = sys.unraisablehook

    def unraisable(args):
        if args.exc_type is KeyboardInterrupt:
            # Python only prints what a callback raises, such as the one of JAX in the
            # garbage collector. Raise it a moment later: now it would be lost again.
            RAISED.clear()
            _received.clear()
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            report(args)

    sys.unraisablehook = unraisable
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(
        target=_watch, args=(reader,), daemon=True, name="moex-interrupts"
    ).start()


def ignore() -> None:
    """Leave Ctrl-C to the system from now on: it ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heard() -> None:
    """Note that the main thread has received Ctrl-C: handlers of signals call this."""
    _heard.set()


def leave(text: str, alone: bool) -> None:
    """End after Ctrl-C, with exit code 130.

    If `alone`, the process ends at once: threads that read data or write files could
    crash while the interpreter shuts down.
    """
    progress.hide()
    if alone:
        distributed.leave_now(text, 130)
    distributed.fail(text, 130)
    connections.say(text)
    raise SystemExit(130)


def outcome(output: pathlib.Path | None, other: str) -> Callable[[], str]:
    """Make the function that says whether a file or folder was written from now on.

    Args:
      output: the path; None: there is none.
      other: what to say if there is none.
    """
    output = output and output.expanduser()
    before = _stamp(output)

    def told() -> str:
        if output is None:
            return other
        if _stamp(output) != before:
            return f"{output} was written"
        name, near = output.name, output.parent
        left = [p for p in near.iterdir() if p.suffix in (".new", ".partial", ".tmp")]
        rest = [str(p) for p in left if p.name.startswith((f".{name}.", f"{name}."))]
        text = f"{output} was not written"
        return f"{text}; {' and '.join(rest)} can be removed" if rest else text

    return told


def _stamp(path: pathlib.Path | None):
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _interrupt(number, frame) -> None:
    heard()
    RAISED.append(number)
    if len(RAISED) > 1:
        distributed.leave_now(f"left at once; {truth()}", 130)
    raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Act on Ctrl-C where the main thread does not, as it is inside a library."""
    while True:
        (number,) = os.read(reader, 1)
        if number != signal.SIGINT:
            continue
        _received.append(number)
        if len(_received) > 1:
            time.sleep(PATIENCE_S / 2)  # the main thread says more, if it can
            distributed.leave_now(f"left at once; {truth()}", 130)
        again, _, _ = select.select([reader], [], [], PATIENCE_S)
        if not again and not _heard.is_set():
            progress.tell(
                "interrupt: what runs now has to end first (again: leave at once)"
            )
