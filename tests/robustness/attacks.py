"""An attack on moex, and what became of it: done, or refused in one line.

An attack is a command of `moex`, called in this process as from a shell. Whatever it
meets, it may not end in a traceback, hang, or write where it was not told to.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import resource
import signal
import sys
import tempfile
import traceback
import warnings

import pytest

from moex import cli
from moex.cluster.connections import say
from moex.config.base import ConfigError
from moex.runs.checkpoint import CheckpointError

ERROR = "moex: error: "
LONGEST = 2000  # characters of an error line; a person must be able to read it
MOST_LINES = 8  # of warnings and errors
MOST_BYTES = 8 << 30  # of address space beside what is there; libraries reserve much
SECONDS = 60  # an attack may not take longer


class TooSlow(BaseException):
    """An attack took longer than it may; nothing in moex catches this."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
      code: exit code; None if an exception escaped.
      out, err: what it wrote, libraries in C included.
      escaped: the traceback of the exception that escaped, or "".
      result: what the function returned.
    """

    code: int | None
    out: str
    err: str
    escaped: str
    result: object = None

    @property
    def errors(self) -> list[str]:
        """The error lines, without what they begin with."""
        lines = self.err.splitlines()
        return [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]

    @property
    def warned(self) -> str:
        """All warnings."""
        lines = (self.out + self.err).splitlines()
        return "\n".join(line for line in lines if "warning: " in line)

    def __str__(self):
        return f"code {self.code}\n{self.out[-2000:]}{self.err[-3000:]}{self.escaped}"


def moex(*args, seconds: float = SECONDS) -> Outcome:
    """`moex ARGS` in this process."""
    return attempt(lambda: cli.main([str(a) for a in args]), seconds=seconds)


def attempt(function, *, seconds: float = SECONDS) -> Outcome:
    """Call a function and say what became of it; it may take so many seconds.

    Errors that `moex` shows as one line are shown so.
    """
    code, escaped, result = 0, "", None
    with _captured() as written, _unchanged_hooks(), _at_most(seconds, MOST_BYTES):
        try:
            result = function()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except ConfigError as e:
            code = 2
            say(str(e))
        except (CheckpointError, OSError) as e:
            code = 1
            say(str(e))
        except (Exception, TooSlow):
            code, escaped = None, traceback.format_exc()
    return Outcome(code, *written, escaped, result)


def check_refused(outcome: Outcome, *names: str, codes=(2,)) -> str:
    """The error line of an attack that was refused: one line, and nothing else.

    Args:
      outcome: of the attack.
      *names: the line must have one of them, if any are given.
      codes: exit codes that are right.
    """
    check_no_traceback(outcome)
    assert outcome.code in codes, outcome
    assert len(outcome.errors) == 1, outcome
    (line,) = outcome.errors
    assert 10 < len(line) < LONGEST, line
    assert not names or any(name in line for name in names), line
    return line


def check_no_traceback(outcome: Outcome) -> None:
    """Check that nothing escaped, and that no library wrote pages of its own."""
    assert not outcome.escaped, outcome
    assert "Traceback" not in outcome.out + outcome.err, outcome
    assert outcome.err.count("\n") <= MOST_LINES, outcome


def refused(outcome: Outcome) -> bool:
    """Whether the command ended with an error line."""
    return outcome.code not in (0, None)


def snapshot(folder) -> dict[str, str]:
    """A hash of every file under a folder, by its path; links by where they lead.

    Of files of more than a gigabyte, which are holes here, the size.
    """
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file() and path.stat().st_size > 1 << 30:
            found[name] = f"{path.stat().st_size} bytes"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def some(cases: dict, count: int) -> list:
    """Parameters of all cases by name; all but `count`, spread evenly, are slow."""
    step = max(1, len(cases) // max(count, 1))
    quick = set(list(cases)[step // 2 :: step][:count])
    return [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, case in cases.items()
    ]


@contextlib.contextmanager
def _captured():
    """Collect `[out, err]` of this process, what libraries write included."""
    written: list[str] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files, kept = (out, err), [os.dup(1), os.dup(2)]
        streams = [os.fdopen(os.dup(f.fileno()), "w", encoding="utf-8") for f in files]
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        try:
            with (
                contextlib.redirect_stdout(streams[0]),
                contextlib.redirect_stderr(streams[1]),
            ):
                yield written
        finally:
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)
            for stream, file in zip(streams, files, strict=True):
                stream.close()
                file.seek(0)
                written.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def _unchanged_hooks():
    """Put back what `moex` sets for its process."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(sys, "path", list(sys.path))
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)  # as Python does
        yield


@contextlib.contextmanager
def _at_most(seconds: float, size: int):
    """Let this process take so many seconds, and so many bytes beside what it has."""

    def stop(signum, frame):
        raise TooSlow(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    there = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + size, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def at(*path, value):
    """A change of one field of JSON data; the value `...` removes it."""

    def change(data):
        holder = data
        for name in path[:-1]:
            holder = holder[name]
        if value is ...:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        return data

    return change
