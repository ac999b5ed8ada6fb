"""Processes that a verb starts, one run in each; signals go on to them."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Sequence


class Children:
    """Processes in sessions of their own: only we receive Ctrl-C, and ask them to save.

    Attributes:
      asked: the first signal that was received; None: there was none.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._running: list[subprocess.Popen] = []

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Pass SIGTERM and Ctrl-C on while the block runs: the first one as SIGTERM."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        watched = signal.set_wakeup_fd(-1)  # a second Ctrl-C does not end this process
        try:
            yield
        finally:
            signal.set_wakeup_fd(watched)
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        """Start a process; the options are those of `subprocess.Popen`."""
        child = subprocess.Popen(command, start_new_session=True, **options)
        self._running = [c for c in self._running if c.poll() is None] + [child]
        if self.asked is not None:  # the signal came while the process was started
            child.terminate()
        return child

    def _pass_on(self, number, frame):
        """Ask children to save at the first signal; pass later ones on unchanged."""
        wanted = signal.SIGTERM if self.asked is None else number
        self.asked = self.asked or number
        for child in self._running:
            if child.poll() is None:
                child.send_signal(wanted)


def shell_code(code: int) -> int:
    """The exit code as shells give it: 128 + signal if a signal ended the process."""
    return code if code >= 0 else 128 - code
