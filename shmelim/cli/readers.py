"""``shmelim readers`` and ``top``: which processes read the name, and how much."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import YES
from shmelim.cli.options import Number, Settings, command
from shmelim.eliminations.reader import EliminationReader
from shmelim.system.clock import utc_text
from shmelim.watch.readers import COUNTED, Readers

if TYPE_CHECKING:
    from rich.table import Table

_RATES: Final = ("checks", "records", "snapshots")
_COLUMNS: Final = ("pid", "user", "since", *(f"{name}/s" for name in _RATES), *COUNTED, "title")
_SORTS: Final = (*COUNTED, "since")
_QUIT: Final = b"q"
_FIRST: Final = 1.0  # seconds, at most, until a screen shows something


def _begin(settings: Settings, seconds: float) -> Readers:
    """Take the first of two looks, so many seconds before the next; NotServingError without such a name."""
    EliminationReader(settings.name).close()
    found = Readers(settings.name)
    if seconds:
        found.look()
        time.sleep(seconds)
    return found


def _cells(reader: dict[str, Any]) -> tuple[object, ...]:
    rates = [rate and round(rate, 1) for rate in (reader[f"{name}_per_s"] for name in _RATES)]
    counts = (reader[name] for name in COUNTED)
    return reader["pid"], reader["user"], utc_text(reader["since_ms"]), *rates, *counts, reader["title"]


@command
@click.option(
    "--interval",
    type=Number(min=0, max=3600),
    default=1.0,
    metavar="SECONDS",
    help="How long rates are taken over; 0: none are.",
)
def readers(settings: Settings, *, interval: float) -> int:
    """List the processes that read the name: pid, user, since when, reads a second and in all, command line.

    Each process counts for itself, in shared memory; nobody is asked, and it works while the server is dead. A pid
    is that of the process's own container. What processes read that ended since is in the total.

    With --json: name, readers [{pid, uid, user, title, since_ms, and of checks, hits, batches, records,
    snapshots, retries: the count, and as …_per_s the rate, null with --interval 0}], total {checks, …}.

    For example:
      shmelim readers
      shmelim readers --json --interval 5
    """
    found = _begin(settings, interval).look()
    settings.table(found, _COLUMNS, map(_cells, found["readers"]))
    return YES


@command
@click.option(
    "--interval", type=Number(min=0.1, max=3600), default=1.0, metavar="SECONDS", help="Between two looks."
)
@click.option(
    "--sort",
    type=click.Choice(_SORTS),
    default="checks",
    help="The highest rate of this first; since: who reads longest.",
)
def top(settings: Settings, *, interval: float, sort: str) -> int:
    """Show who reads the name as it goes, who reads most first; q or Ctrl-C ends it.

    Into a pipe, on a terminal that cannot be drawn on (TERM=dumb), and with --json, it prints once what
    `shmelim readers` does, in this order.

    For example:
      shmelim top
      shmelim top --sort snapshots
    """
    is_drawn = not settings.as_json and output.can_draw() and output.can_ask()
    watched = _begin(settings, min(interval, _FIRST) if is_drawn else interval)

    def look() -> dict[str, Any]:
        found = watched.look()
        if sort != "since":
            found["readers"].sort(key=lambda reader: -reader[f"{sort}_per_s"])
        return found

    if not is_drawn:
        found = look()
        settings.table(found, _COLUMNS, map(_cells, found["readers"]))
        return YES
    from rich.live import Live

    with _keys() as pressed, Live(auto_refresh=False, screen=True) as live:
        while True:
            live.update(_screen(settings.name, look()), refresh=True)
            if _QUIT in pressed(interval).lower():
                return YES


def _screen(name: str, found: dict[str, Any]) -> Table:
    """Return a table of who reads; numbers keep their width, and the command line is cut where the screen ends."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    total = found["total"]
    title = f"{name}: {len(found['readers'])} readers; {total['checks']:,} checks in all, {total['hits']:,} hits"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", expand=True)
    rates = (*_RATES, "retries")
    for heading in ("pid", "user", *(f"{each}/s" for each in rates)):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "user" else "right")
    table.add_column("title", no_wrap=True, ratio=1, overflow="ellipsis")  # what the others leave
    for reader in found["readers"]:
        numbers = (f"{reader[f'{each}_per_s']:,.0f}" for each in rates)
        cells = (str(reader["pid"]), reader["user"], *numbers, reader["title"])
        table.add_row(*(Text(output.value(cell)) for cell in cells))
    return table


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bytes]]:
    """Have the terminal give each key at once; yield a function that waits so many seconds for some.

    It alone ends by a signal: raised at any line, an exception may leave a library's screen as it is.
    """
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    ended: list[int] = []
    before = termios.tcgetattr(descriptor)
    woken, waking = os.pipe()
    os.set_blocking(waking, False)

    def pressed(seconds: float) -> bytes:
        ready, _, _ = select.select([descriptor, woken], [], [], seconds)
        if ended:
            raise KeyboardInterrupt if ended[0] == signal.SIGINT else SystemExit(128 + ended[0])
        if descriptor not in ready:
            return b""
        with contextlib.suppress(OSError):
            if keys := os.read(descriptor, 64):
                return keys
        return _QUIT  # the terminal is gone

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: ended.append(number))
    signal.set_wakeup_fd(waking)
    tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
