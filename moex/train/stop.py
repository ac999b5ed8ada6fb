"""How training is asked to stop, and what a person is told of where it stands."""

import contextlib
import os
import signal

from moex.cluster import distributed
from moex.runs.directory import RunDir


@contextlib.contextmanager
def said_where_it_stands(run: RunDir):
    """Have Ctrl-C before the first step say where the run is, which is as it was."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {stands(run)}") from None


def stands(run: RunDir) -> str:
    """One line for people: the step from which the same command goes on."""
    steps = run.saved_steps()
    if not steps:
        return "no checkpoint was saved yet: the same command begins at step 0"
    return f"the same command goes on from the checkpoint of step {steps[-1]}"


@contextlib.contextmanager
def stop_on_signals(loop):
    """SIGTERM or Ctrl-C asks a `loop.Run` to save and leave; again: leave at once.

    The old handlers come back after. JAX's own notice to several processes may find one
    of them past the step that it chose, and the others wait for it there.
    """

    def ask(number, frame):
        if number == signal.SIGINT:
            if loop.stop_asked:
                distributed.leave_now(f"left at once; {stands(loop.dir)}", 130)
            loop.interrupted = True
            # Not `print`, which may be what this came in the middle of.
            os.write(2, b"interrupt: saving, then leaving (again: leave at once)\n")
        loop.stop_asked = True

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread: nobody to ask
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell's `&` has Ctrl-C ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
