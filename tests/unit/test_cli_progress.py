"""The progress bar: late, on a terminal only, and gone when it is over."""

import io
import sys
import threading

import pytest

from shmelim.cli import fleet, progress
from shmelim.cli.progress import DelayedProgress

PATIENCE = 30.0


class Terminal(io.StringIO):
    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted
        self.seen = threading.Event()

    def write(self, text):
        written = super().write(text)
        if self.wanted in self.getvalue():
            self.seen.set()
        return written

    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """Put a terminal in stderr's place; to be called in the test, since pytest's capture has its turn before."""

    def put():
        terminal = Terminal("committing")
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        return terminal

    return put


def test_it_appears_while_the_caller_is_busy_and_tells_nothing_new(on_terminal):
    terminal = on_terminal()
    with DelayedProgress(delay=0.0) as bar:
        bar.update("sending", 1, 10)
        bar.update("sending", 10, 10)
        bar.update("committing [1/2]", 0, None)
        assert terminal.seen.wait(PATIENCE)
    assert "[1/2]" in terminal.getvalue()


def test_lines_are_written_above_it_and_whole(on_terminal):
    terminal = on_terminal()
    with DelayedProgress(delay=0.0, file=terminal) as bar:
        bar.update("committing", 0, None)
        assert terminal.seen.wait(PATIENCE)
        bar.write("warning: [bold]" + "x" * 300 + "\n")
    bar.write("late\n")
    said = terminal.getvalue()
    assert "\x1b[2Kwarning: [bold]" + "x" * 300 + "\n" in said  # the bar's line is cleared first
    assert said.endswith("late\n")


def test_it_does_not_appear_before_its_time(on_terminal):
    terminal = on_terminal()
    with DelayedProgress(delay=PATIENCE) as bar:
        bar.update("committing", 0, None)
    assert terminal.getvalue() == ""


def test_it_does_not_come_after_its_end(on_terminal):
    terminal = on_terminal()
    with DelayedProgress(delay=PATIENCE) as bar:
        bar.stop()
        bar._show()
        bar.update("committing", 0, None)
    assert terminal.getvalue() == ""


def test_it_is_silent_where_nobody_looks(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with DelayedProgress(delay=0.0) as bar:
        bar.update("sending", 0, 10)
        bar._show()
    assert stream.getvalue() == ""


def test_it_lives_without_a_stderr(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", None)
    with DelayedProgress(delay=0.0) as bar:
        bar.update("sending", 0, 10)


def test_of_a_snapshot_that_loads_each_second_is_told(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(fleet.time, "monotonic", lambda: now[0])
    loading = fleet.telling_loading(DelayedProgress(), lambda event, **about: said.append((event, about)))
    for at, rows in ((100.4, 100), (101.0, 200), (101.9, 300), (102.1, 400)):
        now[0] = at
        loading(rows, 400)
    assert said == [("loading", {"rows": 200, "of": 400}), ("loading", {"rows": 400, "of": 400})]
