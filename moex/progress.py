"""Progress of long work: what runs now, how far it is and when it will be done.

Nothing is shown in Python use; the command line calls `show`, which `MOEX_PROGRESS=0`
in the environment turns off. From then on a phase that lasts longer than `PATIENCE_S`
is shown on stderr: in a terminal as one line that is drawn again, elsewhere as a plain
line every `EVERY_S` seconds, and later less often. Of several open phases the innermost
is shown.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moex.numbers import scaled
from moex.terminal import clock, printable

PATIENCE_S = 2.0
REDRAW_S = 0.25
EVERY_S = 10.0
ERASE = "\r\x1b[K"


class Phase:
    """Work that goes on, and how much of it is done.

    Args:
      doing: what is done, such as "encoding web".
      total: how much there is to do; None: it is not known.
      unit: such as "batches"; "B" for bytes; "": nothing is counted.
      initial: how much was done before the phase began; the rate does not count it.
      plain: whether lines are printed where there is no terminal.
    """

    def __init__(self, doing: str, total=None, unit="", *, initial=0, plain=True):
        self.doing, self.total, self.unit = doing, total, unit
        self.done = self.initial = initial
        self.note = ""  # shown at the end of the line
        self.began = time.monotonic()
        # The first amount is no part of the rate: it may have waited for a compiler.
        self.first: tuple[float, float] | None = None  # when it was done, and how much
        self.due = self.began + PATIENCE_S if plain else math.inf  # of a plain line

    def add(self, amount=1) -> None:
        """Count work that was done."""
        self.done += amount
        self.first = self.first or (time.monotonic(), self.done)

    def rate(self) -> float:
        """Units per second; if only one amount was counted, of the whole phase."""
        since, before = self.first or (self.began, self.initial)
        if before == self.done:
            since, before = self.began, self.initial
        return (self.done - before) / max(time.monotonic() - since, 1e-9)

    def seconds_left(self, done: float) -> float:
        """The time until all is done, by the rate of this phase."""
        return (self.total - done) / max(self.rate(), 1e-9)

    def text(self, columns: int | None = None) -> str:
        """One line about the phase; `columns` of a terminal leave room for a bar."""
        seconds = time.monotonic() - self.began
        doing = printable(self.doing)
        if not self.unit or self.done == self.initial:
            return f"{doing} ... {clock(seconds)}"[:columns]
        known = self.total and self.done <= self.total
        done = self._amount(self.done, known)
        told = f"{done} of {self._amount(self.total)}" if known else done
        begun = self.first is None or self.done > self.first[1]  # there is a rate
        if begun:
            told += f", {self._amount(self.rate())}/s"
        if known and begun:
            told += f", {clock(self.seconds_left(self.done))} left"
        if self.note:
            told += f", {self.note}"
        if columns is None or not known:
            return f"{doing}: {told}"[:columns]
        from tqdm import tqdm  # late: it takes as long as all of `moex --help`

        return tqdm.format_meter(
            self.done,
            self.total,
            seconds,
            ncols=columns,
            prefix=doing,
            bar_format="{l_bar}{bar}| {told}",
            told=told,
        )

    def _amount(self, value: float, bare: bool = False) -> str:
        """Write an amount in the unit; a `bare` one is followed by another."""
        if self.unit == "B":
            return scaled(value, unit="B")
        digits = ",.0f" if value >= 10 or value == int(value) else ".2g"
        number = f"{value:{digits}}"
        return number if bare else f"{number} {self.unit}"


class Display:
    """Shows the innermost open phase on a stream, from a thread of its own."""

    def __init__(self, stream):
        self.stream, self.redraws = stream, stream.isatty()
        self._phases: list[Phase] = []
        self._any = threading.Event()  # there are open phases
        self._lock = threading.RLock()
        self._drawn = self._paused = False
        threading.Thread(target=self._watch, daemon=True, name="moex-progress").start()

    def enter(self, phase: Phase) -> None:
        """Show a phase from now on."""
        self._phases.append(phase)
        self._any.set()

    def leave(self, phase: Phase) -> None:
        """Show a phase no longer."""
        self._phases.remove(phase)
        if not self._phases:
            self._any.clear()
        self.clear()

    def clear(self, pause: bool = False) -> None:
        """Make room for another line; with `pause` nothing is drawn until `resume`."""
        locked = self._lock.acquire(timeout=1)  # the other thread may wait to write
        self._paused = pause
        if self._drawn:
            self._write(ERASE)
            self._drawn = False
        if locked:
            self._lock.release()

    def refresh(self) -> None:
        """Write the line that is due, if one is."""
        with self._lock:
            phase, now = self._phases[-1] if self._phases else None, time.monotonic()
            if phase is None or self._paused or now - phase.began < PATIENCE_S:
                return
            if self.redraws:
                self._write(f"\r{phase.text(self._columns() - 1)}\x1b[K")
                self._drawn = True
            elif now >= phase.due:
                phase.due = now + max(EVERY_S, (now - phase.began) / 5)
                self._write(f"{phase.text()}\n")

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            self.stream.write(text)
            self.stream.flush()

    def _watch(self) -> None:
        while True:
            self._any.wait()
            time.sleep(REDRAW_S)
            self.refresh()


DISPLAY: Display | None = None


def show(stream=None) -> None:
    """Show phases from now on, on stderr by default; the command line calls this."""
    global DISPLAY
    if os.environ.get("MOEX_PROGRESS") != "0":
        DISPLAY = Display(stream or sys.stderr)


def hide() -> None:
    """Show no phase from now on: the process ends, or another one shows them."""
    global DISPLAY
    clear()
    DISPLAY = None


def clear(pause: bool = False) -> None:
    """Make room on the terminal for another line; see `Display.clear`."""
    if DISPLAY is not None:
        DISPLAY.clear(pause)


def tell(text: str) -> None:
    """Print text on stderr, where it does not mix with a phase that is shown."""
    clear()
    print(printable(text), file=sys.stderr, flush=True)


def erase() -> str:
    """The text that makes room for another line; a handler of signals writes it."""
    return ERASE if DISPLAY is not None and DISPLAY.redraws else ""


@contextlib.contextmanager
def phase(doing: str, total=None, unit="", **options) -> Iterator[Phase]:
    """Show the block as a `Phase`, which it yields."""
    made, display = Phase(doing, total, unit, **options), DISPLAY
    if display is not None:
        display.enter(made)
    try:
        yield made
    finally:
        if display is not None:
            display.leave(made)


def counted(
    items: Iterable,
    doing: str,
    total=None,
    unit="",
    size: Callable[[Any], float] = lambda item: 1,
) -> Iterator:
    """Yield the items of a phase; each counts `size(item)` once it is worked on."""
    with phase(doing, total, unit) as at:
        for item in items:
            yield item
            at.add(size(item))
