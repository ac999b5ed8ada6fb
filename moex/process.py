"""The process of a command: what libraries print, how it fails, the memory it took.

A user's mistake gives one line on stderr and exit code 2; a run that cannot go on gives
one line and exit code 1. Ctrl-C is in `interrupts.py`.
"""

import io
import logging
import sys
import warnings

from moex import progress
from moex.cluster import distributed
from moex.cluster.connections import say
from moex.config.base import ConfigWarning
from moex.terminal import Terminal


def fail(error, code: int) -> None:
    """End with one line on stderr, and an exit code."""
    progress.hide()
    distributed.fail(str(error), code)  # several processes print it only once
    say(str(error))
    raise SystemExit(code)


def quiet() -> None:
    """Stop libraries from printing, so that people see the run's own lines alone.

    Those lines can be printed in any encoding, and have no control characters.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    for name in ("jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout.isatty():
        sys.stdout = Terminal(sys.stdout, progress.clear)  # type: ignore[assignment]
    show = warnings.showwarning

    def showwarning(message, category, *where, **options):
        text = str(message)
        if issubclass(category, ConfigWarning):
            say(text, "warning")
        elif "persistent compilation cache" in text:  # a full disk, a damaged file
            say(f"{text.splitlines()[0][:200]}; see `moex cache`", "warning")
        else:
            show(message, category, *where, **options)

    warnings.showwarning = showwarning
    report = sys.unraisablehook

    def unraisable(args):
        # After a failed save, TensorStore calls an event loop that Orbax has closed.
        if str(args.exc_value) != "Event loop is closed":
            report(args)

    sys.unraisablehook = unraisable


def use_cpu() -> None:
    """Use the CPU: initialising an accelerator is slow and would claim it."""
    import jax

    if jax.config.jax_platforms is None:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def memory_bytes() -> int:
    """The peak memory of the first device, or of this process if no device tells it."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return host_bytes()


def host_bytes() -> int:
    """The peak memory of this process."""
    import resource  # needs POSIX

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
