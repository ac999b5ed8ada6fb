"""Control characters of others are shown on a terminal, not obeyed."""

import io
import sys
import warnings

import pytest

from moex import cli, process, progress
from moex.cluster import connections, distributed
from moex.config.base import ConfigError, ConfigWarning
from moex.terminal import CONTROL, Terminal, printable, wrapped
from moex.train.log import RunLog

SHOWN = {
    "\x1b[2J\x1b]0;owned\x07": r"\x1b[2J\x1b]0;owned\x07",
    "hidden\rshown": r"hidden\rshown",
    "\x00\x7f\x9b1m\x85": r"\x00\x7f\x9b1m\x85",
    "user\u202etxt.exe\u2066": r"user\u202etxt.exe\u2066",
    "two\u2028lines": r"two\u2028lines",
    "a file \udcff": r"a file \udcff",
    "plain\ttext\nof two lines, 語 ± 🙂 \\x1b": None,
}


@pytest.mark.parametrize("text", SHOWN)
def test_control_characters_are_shown(text):
    shown = printable(text)
    assert shown == (SHOWN[text] or text)
    assert not CONTROL.search(shown)
    assert shown.encode()  # every terminal of UTF-8 can show it


class Tty(io.StringIO):
    def isatty(self):
        return True


ESCAPE, ESCAPED = "\x1b[31mred\x9c", r"\x1b[31mred\x9c"


@pytest.fixture
def quiet(monkeypatch):
    """What the command line changes is undone after the test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    return monkeypatch


def test_the_command_line_writes_so_to_a_terminal_and_verbatim_to_a_file(quiet):
    for stream, expected in ((Tty(), ESCAPED), (io.StringIO(), ESCAPE)):
        quiet.setattr(sys, "stdout", stream)
        process.quiet()
        print(ESCAPE, flush=True)
        print("é", end="")
        assert stream.getvalue() == f"{expected}\né"


def test_a_terminal_is_still_a_stream():
    stream, unfinished = Tty(), []
    terminal = Terminal(stream, unfinished.append)
    assert terminal.isatty() and terminal.write("a\x1b") == 2
    terminal.write("b\n")
    assert stream.getvalue() == "a\\x1bb\n"
    assert unfinished == [True, False]


def test_errors_and_warnings_are_one_line_of_text(quiet, capsys):
    connections.say(f"a file\n{ESCAPE}: broken")
    process.quiet()
    # As Python does for a warning that is to be shown.
    warnings.showwarning(ConfigWarning(ESCAPE), ConfigWarning, "file", 1)
    progress.tell(ESCAPE)
    assert capsys.readouterr().err.splitlines() == [
        f"moex: error: a file {ESCAPED}: broken",
        f"moex: warning: {ESCAPED}",
        ESCAPED,
    ]


def test_an_error_that_names_a_file_shows_its_name(quiet, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", f"no{ESCAPE}"])
    line = capsys.readouterr().err
    assert ESCAPED in line and not CONTROL.search(line)


def test_lines_of_a_run_are_text_in_a_file_too(capsys):
    log = RunLog.__new__(RunLog)
    log.active = True
    log.line(f"sample: {ESCAPE}")
    assert capsys.readouterr().out == f"sample: {ESCAPED}\n"


def test_an_unexpected_error_of_another_process_shows_its_text(capsys):
    with pytest.raises(ConfigError):
        distributed._check(distributed.Place("flags", 2, 2, ESCAPE))
    connections.say(f"process 1 of 2: {ESCAPE}")
    assert not CONTROL.search(capsys.readouterr().err)


def test_fields_that_do_not_fit_go_on_in_the_next_line():
    fields = ["step 5/10", "loss 3.1", "grad 0.5", "eta 0:10"]
    assert wrapped(fields, 80) == "step 5/10 | loss 3.1 | grad 0.5 | eta 0:10"
    assert wrapped(fields, 31) == "step 5/10 | loss 3.1 | grad 0.5\n    | eta 0:10"
    assert wrapped(fields, 1).splitlines()[1:] == ["    | " + f for f in fields[1:]]
