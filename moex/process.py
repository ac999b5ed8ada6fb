"""How the process of a command behaves: what libraries print, and how it ends.

A user's mistake is one line on stderr and exit code 2; a run that cannot go on is one
line and exit code 1; Ctrl-C is exit code 130.
"""

import _thread
import io
import logging
import signal
import sys
import threading
import warnings

from moex.cluster import distributed
from moex.cluster.connections import say
from moex.config.base import ConfigWarning
from moex.terminal import Terminal

LONGEST = 2000  # characters of an error
INTERRUPTS: list[int] = []  # signals of Ctrl-C that came


def note_interrupts() -> None:
    """Let no Ctrl-C be lost, wherever in a library it lands.

    Python only prints a `KeyboardInterrupt` of a callback, such as JAX's of the garbage
    collector; it is then raised again.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # a shell has Ctrl-C ignored for what runs in the background

    def interrupt(signum, frame):
        INTERRUPTS.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    report = sys.unraisablehook

    def unraisable(args):
        if args.exc_type is KeyboardInterrupt:
            # A moment later: now it would be lost in the same callback.
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            report(args)

    sys.unraisablehook = unraisable


def leave(text: str, alone: bool) -> None:
    """End after Ctrl-C, with exit code 130.

    If this process is ours alone it ends at once: threads that read data or write files
    crash when the interpreter is taken apart under them.
    """
    (distributed.leave_now if alone else fail)(text, 130)


def fail(error, code: int) -> None:
    """End with one line on stderr, cut if it is long, and an exit code."""
    text = str(error)
    if len(text) > LONGEST:  # it quotes what somebody gave
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
    distributed.fail(text, code)  # in a job of several processes said once
    say(text)
    raise SystemExit(code)


def quiet() -> None:
    """Let libraries raise errors and print nothing: a person reads the run's own lines.

    Those lines never fail, in a terminal of any encoding, and control no terminal.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout.isatty():
        sys.stdout = Terminal(sys.stdout)  # type: ignore[assignment]
    show = warnings.showwarning

    def showwarning(message, category, *where, **options):
        if issubclass(category, ConfigWarning):
            say(str(message), "warning")
        else:
            show(message, category, *where, **options)

    warnings.showwarning = showwarning
    report = sys.unraisablehook

    def unraisable(args):
        # After a failed save Tensorstore calls back into a loop that Orbax closed.
        if str(args.exc_value) != "Event loop is closed":
            report(args)

    sys.unraisablehook = unraisable


def use_cpu() -> None:
    """Use the CPU: initialising an accelerator is slow and would claim it."""
    import jax

    if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
