"""How data is printed: tables for people, tab-separated lines for pipes, one JSON document for programs.

Strangers choose what is printed (hotkeys, reasons), so none of it reaches a terminal as a control character.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.system.clock import utc_text
from shmelim.system.text import printable

if TYPE_CHECKING:
    from rich.table import Table

_FOLDED: Final = 24  # to which the last column of a table may be folded
_BETWEEN: Final = 2  # between two columns
_LINES_AT_ONCE: Final = 500
_KIB: Final = 1024


def on_terminal() -> bool:
    """Tell whether stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def can_draw() -> bool:
    """Whether stdout is a terminal on which the cursor can be moved."""
    return on_terminal() and os.environ.get("TERM", "dumb") not in {"", "dumb", "unknown"}


def can_ask() -> bool:
    """Tell whether stdin is a terminal, at which somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def agreed(question: str, *about: str) -> bool:
    """Show lines and ask a question about them; UsageError where nobody can be asked."""
    if not can_ask():
        raise click.UsageError("without a terminal nobody can be asked: give --yes")
    for line in about:
        click.echo(printable(line), err=True)
    return click.confirm(printable(question), err=True)


def records(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows: a table on a terminal, else one line each, tab-separated and complete, without a heading.

    Where the table would not fit, a terminal gets the lines too: nothing is ever shortened. Only the last column
    may be folded.
    """
    lines = ("\t".join(map(value, row)) for row in rows)
    if on_terminal() and columns:
        shown = [[value(cell) for cell in row] for row in rows]
        if _fits(columns, shown):
            _print(columns, shown)
            return
        lines = ("\t".join(row) for row in shown)
    # Each echo is a system call of its own.
    while chunk := list(islice(lines, _LINES_AT_ONCE)):
        click.echo("\n".join(chunk))


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print what is known of one thing: names and values in two columns, or tab-separated."""
    if on_terminal():
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        shown = [[value(cell) for cell in pair] for pair in pairs]
        if _fits(("", ""), shown):
            _show(table, shown)
            return
        pairs = [(name, thing) for name, thing in shown]
    records((), pairs)


def _fits(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> bool:
    """Tell whether a terminal is wide enough for all columns as they are, the last of which may be folded."""
    from rich.cells import cell_len
    from rich.console import Console

    widths = [cell_len(column) for column in columns]
    for row in rows:
        widths = list(map(max, widths, map(cell_len, row)))
    widths[-1] = min(widths[-1], max(_FOLDED, cell_len(columns[-1])))
    return sum(widths) + _BETWEEN * (len(widths) - 1) <= Console().width


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    # Only here: it takes as long to import as most commands take to run.
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    _show(table, rows)


def _show(table: Table, rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def value(thing: object) -> str:
    """Return any value as it is shown: text as it is, "-" for None, the rest as JSON."""
    match thing:
        case None:
            return "-"
        case str():
            return printable(thing)
        case bool():
            return "yes" if thing else "no"
    return printable(json.dumps(thing, ensure_ascii=False, default=str))


def span(seconds: float) -> str:
    """Return a length of time as people say it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """Return a number of bytes as people say it."""
    if count < _KIB:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB"):
        count /= _KIB
        if count < _KIB:
            return f"{count:,.1f} {unit}"
    return f"{count / _KIB:,.1f} GiB"


def attributes(thing: object, *names: str) -> dict[str, Any]:
    """Return some attributes by name, for JSON."""
    return {name: getattr(thing, name) for name in names}


def changed_fields(fields: Mapping[str, tuple[object, object]]) -> str:
    """Return the fields in which two records differ, as field: old → new."""
    return ", ".join(f"{field}: {' → '.join(map(value, pair))}" for field, pair in fields.items())


def problem(found: Mapping[str, Any]) -> str:
    """Return a named problem, as a health check lists it, in one line."""
    remedy = f" ({found['remedy']})" if found["remedy"] else ""
    since = "" if found["since_ms"] is None else f" since {utc_text(found['since_ms'])}"
    return f"{found['name']}, {found['severity']}{since}: {found['text']}{remedy}"
