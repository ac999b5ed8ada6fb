"""Stopping a training on a signal, and the message that says where it stands."""

import contextlib
import os
import signal

from moex import interrupts, progress
from moex.cluster import distributed
from moex.runs.directory import RunDir

SAVING = "interrupt: saving, then leaving (again: leave at once)"


@contextlib.contextmanager
def said_where_it_stands(run: RunDir):
    """Let Ctrl-C say from which step the same command goes on."""
    interrupts.truth = lambda: stands(run)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {stands(run)}") from None


def stands(run: RunDir) -> str:
    """Say in one line from which step the same command goes on."""
    steps = run.saved_steps()
    if not steps:
        return "no checkpoint was saved yet: the same command begins at step 0"
    return f"the same command goes on from the checkpoint of step {steps[-1]}"


@contextlib.contextmanager
def stop_on_signals(loop):
    """Let SIGTERM or Ctrl-C ask a `loop.Run` to save and leave.

    A second Ctrl-C leaves at once. The old handlers are restored at the end. JAX has a
    notice of its own for several processes, but one of them may already be past the
    step that it chose, and the others would wait for it there.
    """

    def ask(number, frame):
        if number == signal.SIGINT:
            interrupts.heard()
            if loop.stop_asked:
                distributed.leave_now(f"left at once; {stands(loop.dir)}", 130)
            loop.interrupted = True
            # `print` is not safe here: the signal may have interrupted a `print`.
            os.write(2, f"{progress.erase()}{SAVING}\n".encode())
        loop.stop_asked = True

    before = {}
    with contextlib.suppress(ValueError):  # only the main thread can have handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell's `&` makes the process ignore Ctrl-C: leave that so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
