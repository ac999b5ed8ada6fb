"""Progress of long work: one line on a terminal, a few plain ones in a pipe."""

import io
import time

import pytest

from moex import progress
from moex.progress import Display, Phase, counted, phase


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def display(monkeypatch):
    """`display(stream)` shows phases at once; the test calls `refresh` itself."""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(progress, "REDRAW_S", 1e6)
    monkeypatch.setattr(progress, "DISPLAY", None)
    monkeypatch.delenv("MOEX_PROGRESS", raising=False)

    def show(stream):
        progress.show(stream)
        return progress.DISPLAY

    return show


def begun(seconds, *args, done=0.0, **options):
    """A phase that began this many seconds ago."""
    made = Phase(*args, **options)
    made.began -= seconds
    made.done += done
    return made


def test_a_phase_says_how_far_it_is_its_rate_and_the_time_that_is_left():
    scoring = begun(10.0, "scoring", 40, "batches", done=10)
    assert scoring.text() == "scoring: 10 of 40 batches, 1 batches/s, 0:30 left"
    encoding = begun(100.0, "encoding web", 3e9, "B", done=1.2e9)
    assert encoding.text() == "encoding web: 1.20 GB of 3.00 GB, 12.0 MB/s, 2:30 left"
    assert begun(65.0, "compiling").text() == "compiling ... 1:05"
    more = begun(10.0, "encoding", 5, "B", done=10)  # a compressed file gives more
    assert more.text() == "encoding: 10 B, 1 B/s"
    assert begun(1.0, "a\x1b[2J").text() == "a\\x1b[2J ... 0:01"


def test_the_first_amount_which_waits_for_a_compiler_is_no_part_of_the_rate():
    scoring = begun(30.0, "scoring", 40, "batches")
    scoring.add()
    assert scoring.rate() == pytest.approx(1 / 30, rel=0.01)
    assert scoring.text() == "scoring: 1 of 40 batches"
    scoring.first = (scoring.first[0] - 2.0, scoring.first[1])
    scoring.add(10)
    assert scoring.text() == "scoring: 11 of 40 batches, 5 batches/s, 0:06 left"


def test_the_rate_does_not_count_what_was_done_before():
    resumed = begun(10.0, "training", 100, "steps", initial=50, done=10)
    assert resumed.text().endswith("60 of 100 steps, 1 steps/s, 0:40 left")
    assert resumed.seconds_left(59) == pytest.approx(41.0, abs=0.1)


def test_a_terminal_has_one_line_with_a_bar_that_is_erased_at_the_end(display):
    stream = Tty()
    shown = display(stream)
    with phase("scoring", 4, "batches") as at:
        shown.refresh()
        at.add(2)
        shown.refresh()
    assert "\n" not in stream.getvalue()
    first, second, last = stream.getvalue().split("\r")[1:]
    assert first == "scoring ... 0:00\x1b[K"
    assert second.startswith("scoring:  50%|") and "2 of 4 batches" in second
    assert len(second) <= 80 + len("\x1b[K")
    assert last == "\x1b[K"


def test_a_pipe_gets_plain_lines_now_and_then(display):
    stream = io.StringIO()
    shown = display(stream)
    for _ in counted(range(3), "scoring", 3, "batches"):
        shown.refresh()  # the next line is due after EVERY_S
    assert stream.getvalue() == "scoring ... 0:00\n"
    with phase("training", 3, "steps", plain=False):  # it has lines of its own
        shown.refresh()
    assert stream.getvalue() == "scoring ... 0:00\n"


def test_the_innermost_phase_is_shown(display):
    stream = io.StringIO()
    shown = display(stream)
    with phase("outer"):
        with phase("inner"):
            shown.refresh()
        shown.refresh()
    assert stream.getvalue() == "inner ... 0:00\nouter ... 0:00\n"


def test_short_phases_are_silent_and_long_ones_are_shown_by_themselves(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.2)
    monkeypatch.setattr(progress, "REDRAW_S", 0.02)
    stream = io.StringIO()
    monkeypatch.setattr(progress, "DISPLAY", Display(stream))
    with phase("short"):
        time.sleep(0.05)
    with phase("long"):
        deadline = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    assert stream.getvalue() == "long ... 0:00\n"


def test_other_lines_do_not_mix_with_the_drawn_one(display, capsys):
    stream = Tty()
    shown = display(stream)
    with phase("scoring"):
        shown.refresh()
        progress.tell("a warning")
        assert stream.getvalue().endswith(progress.ERASE)
        progress.clear(pause=True)  # a line is being written
        before = stream.getvalue()
        shown.refresh()
        assert stream.getvalue() == before
        progress.clear()
        shown.refresh()
        assert stream.getvalue() != before
        progress.hide()
    assert stream.getvalue().endswith(progress.ERASE)
    assert capsys.readouterr().err == "a warning\n"


def test_nothing_is_shown_in_python_use_or_where_it_is_turned_off(capsys, monkeypatch):
    monkeypatch.setenv("MOEX_PROGRESS", "0")
    progress.show()
    assert progress.DISPLAY is None
    with phase("scoring"):
        pass
    progress.clear()
    assert capsys.readouterr() == ("", "")
