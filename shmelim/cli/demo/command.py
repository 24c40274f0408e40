"""The ``demo`` command: a place of its own, the scenario in it, the report, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

from shmelim.cli import output
from shmelim.cli.demo import report
from shmelim.cli.demo.records import real_departed_hotkeys
from shmelim.cli.demo.scenario import Scenario
from shmelim.cli.failure import NO
from shmelim.cli.options import Command, Settings, settings_options
from shmelim.shm import SharedNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_FEWEST, _MOST = 2, 4
_ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


@click.command("demo", cls=Command, short_help="Show and measure all of it, on real hotkeys.")
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    default=10.0,
    show_default=True,
    metavar="S",
    help="About how long it takes; starting processes comes on top of a short one.",
)
@click.option(
    "--readers",
    type=click.IntRange(1, 64),
    metavar="N",
    help=f"How many reader processes [default: {_FEWEST} to {_MOST}, by the number of processors].",
)
@settings_options
@click.pass_context
def demo(context: click.Context, *, seconds: float, readers: int | None) -> None:
    """Show the whole job on 367 real hotkeys, and measure it.

    Touches no state of yours: it serves a name of its own, whatever --name says, from a temporary directory.

    Starts a server, and reader processes that read without pause and check every answer. Adds, removes and syncs
    under their eyes, kills the server without warning in the middle of that, starts the next one, and looks for
    every change that was acknowledged. Exit code 1: something that must be 0 is not.

    With --json: ok, must_be_zero {torn_records, mixed_reads, wrong_answers, read_errors,
    read_errors_around_the_kill, acknowledged_changes_lost, changes_not_visible_on_return},
    reads {total, per_second, check_median_ns, check_p99_ns, retries, …}, readers [{pid, …}],
    changes {adds_per_second, sync_median_ms, …}, takeover {kill_to_first_change_ms,
    start_to_first_change_ms}, how {…}, not_measured [key].

    For example:
      shmelim demo
      shmelim demo --seconds 60 --readers 8 --json
    """
    settings: Settings = context.obj
    count = readers or min(_MOST, max(_FEWEST, os.cpu_count() or _FEWEST))
    with _ending_signals(), _place() as (name, home), _telling() as tell, contextlib.ExitStack() as stack:
        departed = stack.enter_context(resources.as_file(real_departed_hotkeys()))
        scenario = Scenario(name, home, departed, seconds, count, tell)
        try:
            findings = scenario.run()
        finally:
            with _undisturbed():
                scenario.close()
    content = report.document(findings)
    if settings.as_json:
        output.document(content)
    else:
        report.show(content)
    if not content["ok"]:
        context.exit(NO)


@contextlib.contextmanager
def _place() -> Iterator[tuple[str, Path]]:
    """Give a name and a directory that nobody else uses, and take away what was put there."""
    name = f"demo-{secrets.token_hex(4)}"
    home = Path(tempfile.mkdtemp(prefix="shmelim-demo-"))
    try:
        yield name, home
    finally:
        with _undisturbed():
            SharedNamespace(name).remove()
            shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], Any]]:
    """Show what happens on stderr, if that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    with Console(stderr=True).status("") as line:
        yield lambda what: line.update(f"{what} …")


@contextlib.contextmanager
def _ending_signals() -> Iterator[None]:
    """Let the signals that end a process end this one in order."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal but SIGKILL break off a cleaning up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_ENDING_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
